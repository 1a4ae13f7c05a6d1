"""Weights of a run as safetensors: written when it ends, and loaded in your own code."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import vqssl
from examples.pretrain.augment import Normalize
from examples.pretrain.checkpoint import write_whole
from examples.pretrain.encoder import Encoder, EncoderOptions
from examples.pretrain.unwritten import writing

KEY = "examples.pretrain"
"""The only key of the metadata, because safetensors writes several in any order; its value is JSON."""


class Pretrained(nn.Module):
    """An encoder behind the normalisation of the images that it was trained on.

    Args:
        encoder: called with normalised images.
        mean: of each channel.
        std: of each channel.

    >>> encoder = Pretrained(Encoder(1, EncoderOptions(width=8, stem_stride=2)), [0.5], [0.2])
    >>> features, maps = encoder.eval()(torch.rand(2, 1, 32, 32))
    >>> features.shape, len(maps)
    (torch.Size([2, 64]), 3)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(B, dim)` of images `(B, C, S, S)` in [0, 1], and the maps of some stages."""
        features, maps = self.encoder((images - self.mean) / self.std)
        return features, maps


def write_part(path: Path, part: nn.Module, normalize: Normalize, notes: Mapping[str, Any]) -> None:
    """Write a part of a method: a file for :func:`load_encoder` or `vqssl.load`, and its state where neither fits.

    Args:
        path: ends in `.safetensors`.
        part: an encoder, a quantiser in eval mode from then on, or any other module.
        normalize: of the training images, which an encoder needs.
        notes: how the weights came about.

    Raises:
        Unwritten: the file cannot be written.
    """
    about: dict[str, Any] = {"notes": notes}
    if isinstance(part, Encoder):
        about |= {
            "channels": part.resnet.conv1.in_channels,
            "encoder": asdict(part.options),
            "mean": normalize.mean.tolist(),
            "std": normalize.std.tolist(),
        }
    elif isinstance(part, vqssl.MultiScaleQuantizer | vqssl.EMACodebook):
        try:
            with writing(path):
                vqssl.save(copy.deepcopy(part).eval(), path, notes=notes)
            return
        except ValueError:  # options that no file can hold, such as a projection of one's own
            pass
    tensors = {key: value.detach().cpu().contiguous() for key, value in part.state_dict().items()}
    write_whole(path, safetensors.torch.save(tensors, {KEY: json.dumps(about)}))


def load_encoder(path: str | Path) -> Pretrained:
    """Return the encoder of a run in eval mode, such as that of `runs/demo-1/byol/encoder.safetensors`.

    Nothing in the file is executed.

    Raises:
        ValueError: the file is not one that a run wrote.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: give the encoder.safetensors of a run")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        options = {**about["encoder"], "scales": tuple(about["encoder"]["scales"])}
        encoder = Encoder(about["channels"], EncoderOptions(**options))
        encoder.load_state_dict(state)
        return Pretrained(encoder, about["mean"], about["std"]).eval()
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} must be the encoder of a run, as the example writes it since 0.2, and is not ({error}): give its "
            "encoder.safetensors; vqssl.load reads codebooks.safetensors"
        ) from error
