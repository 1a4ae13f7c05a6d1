"""CoBooM (MICCAI 2024): BYOL with a second target, made by attention between codes and features of the teacher's map.

As in azad6629/coboom at d6a4d2f: codes of the teacher's last map ask (queries), the map itself answers (keys, values),
and the pooled answer passes an MLP to the target `fuse`, which is *not* detached: it is trained to be predictable. Four
cosine terms have a quarter each. Here places stay places: the release reshapes `(B, C, H, W)` as if channels came last.
Its later version adds a reconstruction, which is left out; the encoder starts untrained, where the release's is
ImageNet's. The commitment loss has no gradient, there as here, because the teacher has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.attention import attention_of_width
from examples.pretrain.methods.byol import BYOL, BYOLOptions
from examples.pretrain.methods.codebooks import usage_figures
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.losses import over_pairs
from examples.pretrain.methods.released_lengths import released_lengths
from examples.pretrain.methods.student import plain_mlp


@dataclass(frozen=True)
class CoBooMOptions:
    """Codebook and fusion. The defaults are the release's."""

    byol: BYOLOptions = field(default_factory=lambda: BYOLOptions(dim=256, hidden_dim=4096))
    """Student and teacher; `fuse` has the width `byol.dim`."""
    codebook_size: int = 1024
    """K."""
    codebook_decay: float = 0.99
    """Of the running averages of the codes."""
    heads: int = 8
    """Of the attention; the encoder's width must be a multiple."""
    hidden_dim: int = 1024
    """Hidden width of the MLP to `fuse`."""
    commitment_weight: float = 0.25
    """Of the commitment loss."""
    released_ema: bool = False
    """Divide the codes as the release does: by sums of indices, where counts belong. They are almost 0 then."""
    title = "CoBooM"


class CoBooM(nn.Module):
    """BYOL, a codebook on the teacher's last map, and attention that turns codes and map into a second target."""

    Options = CoBooMOptions
    index_sum: Tensor

    def __init__(self, encoder: Encoder, options: CoBooMOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.byol = BYOL(encoder, options.byol, total_steps=total_steps)
        self.codebook = vqssl.EMACodebook(
            codebook_size=options.codebook_size,
            dim=encoder.dim,
            decay=options.codebook_decay,
            metric="cosine",
            revival=None,
            commitment_weight=options.commitment_weight,
            seed=seed,
        )
        self.attention = attention_of_width(encoder.dim, options.heads, "--coboom.heads")
        self.fuse = plain_mlp(encoder.dim, options.hidden_dim, options.byol.dim)
        self.register_buffer("index_sum", torch.zeros(()))

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.byol.encoder

    @property
    def target_encoder(self) -> nn.Module:
        """The teacher's encoder, whose last map is quantised."""
        return self.byol.target_encoder

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V views `(B, C, S, S)` of the same images."""
        images, count = torch.cat(list(views)), len(views)
        prediction = self.byol.student(images).prediction.chunk(count)
        with torch.no_grad():
            cells = rearrange(self.last_map(images), "b c h w -> b (h w) c")
            target = self.byol.teacher.module.get_submodule("projector")(cells.mean(1))
        codes, indices, commitment = self.codebook(cells)
        if self.options.released_ema:
            codes = codes * released_lengths(self.codebook, self.index_sum, indices)[indices][..., None]
        fused = self.fuse(self.attention(codes, cells, cells, need_weights=False)[0].mean(1))
        alignment = over_pairs(vqssl.functional.cosine_regression_loss, prediction, target.chunk(count))
        fusion = over_pairs(vqssl.functional.cosine_regression_loss, prediction, fused.chunk(count))
        parts = {"alignment_global": alignment, "alignment_fused": fusion, "commitment": commitment}
        parts["target_spread"] = vqssl.functional.target_spread(target)
        return Step((alignment + fusion) / 2 + commitment, parts)

    def last_map(self, images: Tensor) -> Tensor:
        """Return the teacher's map of layer4, `(B, C, H, W)`."""
        encoder: Encoder = self.byol.teacher.module.get_submodule("encoder")  # type: ignore[assignment]
        return encoder.pyramid(images)[-1]

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return the code indices `(B, H, W)` of normalised images `(B, C, S, S)`, of layer4."""
        return {"layer4": self.codebook(self.last_map(images).movedim(1, -1)).indices}

    def after_step(self) -> None:
        """Update the teacher."""
        self.byol.after_step()

    def figures(self) -> dict[str, float]:
        """Return BYOL's figures, and perplexity and number of dead codes."""
        return self.byol.figures() | usage_figures({"layer4": self.codebook})

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder and the codebook."""
        return {"encoder": self.encoder, "codebooks": self.codebook}
