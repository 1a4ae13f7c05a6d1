"""Conversions of other libraries' codebooks and teachers to ours, and back.

All are functions of state dicts and need nothing but torch. You open the files: ``torch.load(path, weights_only=True)``
or safetensors' ``load_file``. The package is loaded on first use of ``vqssl.interop``.

>>> import torch, vqssl.interop
>>> theirs = {"initted": torch.tensor(True), "cluster_size": torch.ones(1, 8), "embed": torch.randn(1, 8, 4)}
>>> theirs["embed_avg"] = theirs["embed"].clone()
>>> vqssl.interop.codebook_from_vector_quantize_pytorch(theirs)
EMACodebook(codebook_size=8, dim=4, decay=0.8, ...)
"""

from vqssl.interop.codebook_formats import codebook_prefixes
from vqssl.interop.embedding import codebook_from_embedding
from vqssl.interop.encodec import codebook_from_encodec, codebook_to_encodec
from vqssl.interop.lightly import load_lightly_teacher_, momentum_state_from_lightly
from vqssl.interop.mimi import codebook_from_mimi, residual_quantizer_from_mimi
from vqssl.interop.residual import (
    residual_quantizer_from_encodec,
    residual_quantizer_from_vector_quantize_pytorch,
)
from vqssl.interop.resnet import resnet_state_dict
from vqssl.interop.vector_quantize_pytorch import (
    codebook_from_vector_quantize_pytorch,
    codebook_to_vector_quantize_pytorch,
)

__all__ = [
    "codebook_from_vector_quantize_pytorch",
    "codebook_to_vector_quantize_pytorch",
    "codebook_from_encodec",
    "codebook_to_encodec",
    "residual_quantizer_from_vector_quantize_pytorch",
    "residual_quantizer_from_encodec",
    "codebook_from_mimi",
    "residual_quantizer_from_mimi",
    "codebook_from_embedding",
    "codebook_prefixes",
    "load_lightly_teacher_",
    "momentum_state_from_lightly",
    "resnet_state_dict",
]
