"""DiSSECTObjective: each view predicts the other views' global and refined targets."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vqssl.checks import check_device, check_floating, check_range
from vqssl.functional.cosine_regression import cosine_regression_loss
from vqssl.types import DiSSECTLoss, MultiScaleQuantized, Quantized

__all__ = ["DiSSECTObjective"]

REFINEMENTS = ("predict", "align", "detached")


class DiSSECTObjective(nn.Module):
    r"""The cross-view objective, its parts by name.

    .. math:: \mathcal{L} = \frac{1}{V (V - 1)} \sum_{v \neq w} \big[ w_c\, L(p^v, \mathrm{sg}[z_c^w])
        + w_s\, L(p^v, z_s^w) \big] + \lambda L_{VQ}, \qquad
        L(p, t) = 2 - 2 \left\langle \tfrac{p}{\lVert p \rVert}, \tfrac{t}{\lVert t \rVert} \right\rangle

    (DiSSECT, arXiv 2509.18765, Eq. 7; weights of one half each.) With two views this is BYOL's symmetric loss, with a
    second target. It crosses the views itself: give predictions and targets in one order, and swap none. It detaches
    z_c. Who trains the head that makes z_s is ``refinement``:

    - ``"predict"`` (default): the head predicts z_c. The student sees z_s detached, and the sum over views of
      L(z_s, sg[z_c]) / V is added to the total. The head cannot make its target easy for the student.
    - ``"align"``: the literal reading. Gradients of L(p, z_s) pass into z_s. Student and head can then agree on a
      nearly constant target; the page on the method has the measurement.
    - ``"detached"``: no gradient reaches z_s: the head stays as it is, or is trained elsewhere.

    Args:
        target_weights: w_c and w_s. (1, 0) and (0, 1) leave one target only.
        commitment_weight: lambda.
        refinement: see above.

    Shape:
        Two sequences of V tensors ``(B, D)``, V >= 2, a third or None, and a scalar; output
        :class:`~vqssl.types.DiSSECTLoss` of scalars.

    Raises:
        TypeError: a weight is no number.
        ValueError: not two weights, a negative one, or an unknown ``refinement``.

    >>> import torch
    >>> p, z_c, z_s = (torch.randn(2, 4, 8) for _ in range(3))
    >>> loss = DiSSECTObjective()(p.unbind(), z_c.unbind(), z_s.unbind(), torch.tensor(0.1))
    >>> bool(loss.total > 0)
    True
    >>> byol = DiSSECTObjective()(p.unbind(), z_c.unbind())
    >>> bool(byol.total == byol.alignment_global)
    True
    """

    def __init__(
        self,
        *,
        target_weights: tuple[float, float] = (0.5, 0.5),
        commitment_weight: float = 1.0,
        refinement: str = "predict",
    ) -> None:
        super().__init__()
        if not isinstance(target_weights, tuple | list) or len(target_weights) != 2:
            raise ValueError(f"target_weights must be two numbers, for z_c and z_s, got {target_weights!r}")
        for weight in target_weights:
            check_range("each of target_weights", weight, 0, float("inf"))
        check_range("commitment_weight", commitment_weight, 0, float("inf"))
        if refinement not in REFINEMENTS:
            raise ValueError(f"refinement must be one of {', '.join(map(repr, REFINEMENTS))}, got {refinement!r}")
        self.target_weights = (float(target_weights[0]), float(target_weights[1]))
        self.commitment_weight = commitment_weight
        self.refinement = refinement

    def forward(
        self,
        predictions: Sequence[Tensor],
        global_targets: Sequence[Tensor],
        refined_targets: Sequence[Tensor] | None = None,
        commitment_loss: Tensor | None = None,
    ) -> DiSSECTLoss:
        """The loss of a batch.

        Args:
            predictions: p, one ``(B, D)`` a view.
            global_targets: z_c, one ``(B, D)`` a view.
            refined_targets: z_s, one ``(B, D)`` a view; None is BYOL: the global target with weight 1.
            commitment_loss: L_VQ, a scalar, or None.

        Returns:
            :class:`~vqssl.types.DiSSECTLoss`; call ``backward`` on ``total``.

        Raises:
            TypeError: an entry is no floating tensor, or one tensor came instead of a sequence.
            ValueError: fewer than two views, another number of targets than predictions, shapes that differ, or a
                commitment loss that is no scalar.
        """
        _check_views(predictions, global_targets, refined_targets)
        z_c = [target.detach() for target in global_targets]
        alignment_global = _cross_view(predictions, z_c)
        nothing = torch.zeros_like(alignment_global)
        alignment_refined, refinement, commitment = nothing, nothing, nothing
        total = alignment_global
        if refined_targets is not None:
            z_s = refined_targets if self.refinement == "align" else [target.detach() for target in refined_targets]
            alignment_refined = _cross_view(predictions, z_s)
            weight_global, weight_refined = self.target_weights
            total = weight_global * alignment_global + weight_refined * alignment_refined
            if self.refinement == "predict":
                refinement = _same_view(refined_targets, z_c)
                total = total + refinement
        if commitment_loss is not None:
            if isinstance(commitment_loss, Quantized | MultiScaleQuantized):
                raise TypeError(
                    f"commitment_loss must be a scalar, got the whole {type(commitment_loss).__name__}: write its "
                    ".commitment_loss"
                )
            check_floating("commitment_loss", commitment_loss, _one_scalar("torch.stack(commitment_loss)"))
            if commitment_loss.ndim != 0:
                raise ValueError(
                    f"commitment_loss must be a scalar, got shape {tuple(commitment_loss.shape)}: "
                    f"{_one_scalar('commitment_loss')}"
                )
            check_device("commitment_loss", commitment_loss, total.device, "the predictions")
            commitment = commitment_loss
            total = total + self.commitment_weight * commitment
        return DiSSECTLoss(total, alignment_global, alignment_refined, refinement, commitment)

    def extra_repr(self) -> str:
        return (
            f"target_weights={self.target_weights}, commitment_weight={self.commitment_weight:g}, "
            f"refinement={self.refinement!r}"
        )

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(
            self,
            predictions: Sequence[Tensor],
            global_targets: Sequence[Tensor],
            refined_targets: Sequence[Tensor] | None = None,
            commitment_loss: Tensor | None = None,
        ) -> DiSSECTLoss: ...


def _cross_view(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The mean of L over ordered pairs of different views."""
    pairs = list(itertools.permutations(range(len(predictions)), 2))
    return torch.stack([cosine_regression_loss(predictions[v], targets[w]) for v, w in pairs]).mean()


def _same_view(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    pairs = zip(predictions, targets, strict=True)
    return torch.stack([cosine_regression_loss(p, t) for p, t in pairs]).mean()


def _one_scalar(losses: str) -> str:
    """What to write where several commitment losses came."""
    return f"write {losses}.mean() for one a view, {losses}.sum() for one a scale"


def _check_views(
    predictions: Sequence[Tensor], global_targets: Sequence[Tensor], refined_targets: Sequence[Tensor] | None
) -> None:
    for name, tensors in (
        ("predictions", predictions),
        ("global_targets", global_targets),
        ("refined_targets", refined_targets),
    ):
        if isinstance(tensors, Tensor):
            raise TypeError(
                f"{name} must be a sequence of one (B, D) tensor a view, got one tensor of shape "
                f"{tuple(tensors.shape)}: write {name}.chunk(2) for two views joined by torch.cat, {name}.unbind() if "
                "its first axis is the views"
            )
    views = len(predictions)
    if views < 2:
        raise ValueError(
            f"predictions must hold at least 2 views, got {views}: a view is predicted from the others, so give one "
            "(B, D) tensor a view"
        )
    for name, targets in (("global_targets", global_targets), ("refined_targets", refined_targets)):
        if targets is not None and len(targets) != views:
            raise ValueError(
                f"{name} must hold one tensor for each of the {views} predictions, got {len(targets)}: give the target "
                "of each view, in the order of the predictions"
            )
    several = "give one (B, D) tensor a view; of a student that returns (z, maps), write predictor(student(view)[0])"
    for name, tensors in (
        ("predictions", predictions),
        ("global_targets", global_targets),
        ("refined_targets", refined_targets),
    ):
        for view, tensor in enumerate(tensors or ()):
            check_floating(f"{name}[{view}]", tensor, several)
            check_device(f"{name}[{view}]", tensor, predictions[0].device, "predictions[0]")
