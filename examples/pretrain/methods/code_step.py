"""The step of the methods that predict codes: BYOL's loss, that of the heads, and what the log shows of both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import vqssl
from examples.pretrain.methods.byol import Compared
from examples.pretrain.methods.interface import Step
from vqssl.types import CodePredictionLoss


def step_with_codes(
    objective: vqssl.DiSSECTObjective,
    seen: Compared,
    predicted: CodePredictionLoss,
    count: int,
    *,
    scales: Sequence[str],
    commitment: Tensor,
) -> Step:
    """Return the loss of `count` views, and its parts by name.

    Args:
        objective: its `code_weight` is the weight of the heads.
        seen: student and teacher on the views.
        predicted: the losses of the heads.
        count: the number of views.
        scales: names of the scales.
        commitment: the commitment loss, for the log alone.
    """
    loss = objective(seen.student.prediction.chunk(count), seen.target.chunk(count), code_loss=predicted.total)
    parts = {"alignment_global": loss.alignment_global, "commitment": commitment}
    parts |= {f"code_{name}": each for name, each in zip(scales, predicted.losses, strict=True)}
    return Step(loss.total, {**parts, "target_spread": vqssl.functional.target_spread(seen.target)})
