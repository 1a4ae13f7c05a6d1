"""Options of DiSSECT, whose codebooks the methods of code prediction have too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from examples.pretrain.methods.byol import BYOLOptions

REFINED = ("operator", "residual", "serf_mlp", "refinement", "target_weights", "centred", "commitment_weight")
"""Names of the options of the refined target and of the objective; the others are of the teacher and the codebooks."""


@dataclass(frozen=True)
class DiSSECTOptions:
    """Codebooks, fusion and objective. The defaults are the paper's, except `operator`, `projection`, `refinement`."""

    byol: BYOLOptions = field(default_factory=BYOLOptions)
    """DiSSECT's own student and teacher. Codes have width `byol.dim`, and the SERF MLP `byol.hidden_dim`."""
    codebook_size: int = 2048
    """K, the codes of each scale."""
    shared_codebook: bool = False
    """Use one codebook for all scales."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance between tokens and codes."""
    ema: Literal["count_weighted", "batch_mean"] = "count_weighted"
    """Update rule of the codes; "batch_mean" is the paper's Eq. 1."""
    codebook_decay: float = 0.99
    """gamma of the update rule."""
    projection: Literal["orthogonal", "learned", "linear"] = "orthogonal"
    """A fixed map with layer norm, a learned map with layer norm, or a learned map alone (whose output shrinks)."""
    quantize: Literal["teacher", "student"] = "teacher"
    """Whose maps are quantised."""
    operator: Literal["spatial", "channel", "batch", "pooled", "concat"] = "spatial"
    """Reading of Eq. 6; see `vqssl.SERFFusion`."""
    residual: bool | None = None
    """Add z_c to the operator's output; None: wherever the widths agree."""
    centred: bool = False
    """Subtract from the fusion's inputs what all views share: the means of z_c and of each quantised map."""
    serf_mlp: bool = True
    """Apply an MLP after the operator."""
    refinement: Literal["predict", "align", "detached"] = "predict"
    """What trains the fusion; see `vqssl.DiSSECTObjective`."""
    target_weights: tuple[float, float] = (0.5, 0.5)
    """Weights of the targets z_c and z_s."""
    commitment_weight: float = 1.0
    """lambda of the commitment loss."""
    tuned = ("target_weights",)


def check_codebooks_alone(options: DiSSECTOptions, *, of_teacher: bool = False) -> None:
    """Raise ValueError if an option is set that code prediction has no use for.

    Args:
        options: those of the codebooks are used; there is no refined target.
        of_teacher: True where the maps are always the teacher's.

    >>> check_codebooks_alone(DiSSECTOptions(operator="channel"))
    Traceback (most recent call last):
    ValueError: code prediction has no fusion, refined target or commitment loss, got dissect.operator = channel: ...
    """
    without = DiSSECTOptions()
    for name in REFINED:
        if getattr(options, name) != getattr(without, name):
            raise ValueError(
                "code prediction has no fusion, refined target or commitment loss, got "
                f"dissect.{name} = {getattr(options, name)}: leave it out"
            )
    if of_teacher and options.quantize != "teacher":
        raise ValueError(f"the maps are the teacher's, got dissect.quantize = {options.quantize}: leave it out")
