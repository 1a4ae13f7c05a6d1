"""DiSSECTObjective: each view predicts the global and refined targets of the other views."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vqssl.checks import by_name, check_device, check_floating, check_range, policy_name
from vqssl.foreign_keywords import FOREIGN_OBJECTIVE_KEYWORDS, names_foreign_keywords
from vqssl.functional.cross_view import cross_view_loss
from vqssl.functional.refinement import REFINEMENTS, Refinement, RefinementName
from vqssl.types import CodePredictionLoss, DiSSECTLoss, MultiScaleQuantized, Quantized

__all__ = ["DiSSECTObjective"]


class DiSSECTObjective(nn.Module):
    r"""Cross-view objective of DiSSECT: alignment with two targets, refinement, commitment and predicted codes.

    .. math:: \mathcal{L} = \frac{1}{W (V - 1)} \sum_{v \neq w} \big[ w_c\, L(p^v, \mathrm{sg}[z_c^w])
        + w_s\, L(p^v, z_s^w) \big] + \lambda L_{VQ} + \mu L_{code}, \qquad
        L(p, t) = 2 - 2 \left\langle \tfrac{p}{\lVert p \rVert}, \tfrac{t}{\lVert t \rVert} \right\rangle

    Source: DiSSECT, arXiv 2509.18765, Eq. 7, with weights of one half each. With two views it is BYOL's symmetric loss
    plus a second target. Give predictions and targets in the same order of views: the objective crosses them itself.
    The first W of V views have targets; the others, such as small local crops, only predict. No gradient reaches z_c.
    ``refinement`` decides what trains the head that makes z_s:

    - ``"predict"`` (default): the head predicts z_c. The student sees z_s detached, and the mean over views of
      L(z_s, sg[z_c]) is added to the total. The head cannot make its target easier for the student.
    - ``"align"``: the literal reading. Gradients of L(p, z_s) pass into z_s. Student and head can then agree on a
      nearly constant target; the page on the method has the measurement.
    - ``"detached"``: no gradient reaches z_s. The head stays as it is, or is trained elsewhere.

    Args:
        target_weights: w_c and w_s. (1, 0) and (0, 1) leave one target only.
        commitment_weight: lambda.
        code_weight: mu, of the loss of a :class:`~vqssl.CodePrediction`, which the paper does not have.
        refinement: one of the names above, or a function of your own like those of
            ``vqssl.functional.REFINEMENTS``: ``(refined_targets, global_targets) -> (targets, loss)``.

    Shape:
        V predictions ``(B, D)``, V >= 2; W targets of each kind, 1 <= W <= V, or None for the refined ones; scalars or
        None. Output :class:`~vqssl.types.DiSSECTLoss` of scalars.

    Raises:
        TypeError: a weight is not a number, or ``refinement`` is neither a name nor callable.
        ValueError: there are not two target weights, a weight is negative, or the name of ``refinement`` is unknown.

    >>> import torch
    >>> p, z_c, z_s = (torch.randn(2, 4, 8) for _ in range(3))
    >>> loss = DiSSECTObjective()(p.unbind(), z_c.unbind(), z_s.unbind(), torch.tensor(0.1))
    >>> bool(loss.total > 0)
    True
    >>> byol = DiSSECTObjective()(p.unbind(), z_c.unbind())
    >>> bool(byol.total == byol.alignment_global)
    True
    """

    @names_foreign_keywords(
        FOREIGN_OBJECTIVE_KEYWORDS,
        sizes_by_name="DiSSECTObjective(target_weights=, commitment_weight=)",
        what="options",
    )
    def __init__(
        self,
        *,
        target_weights: tuple[float, float] = (0.5, 0.5),
        commitment_weight: float = 1.0,
        code_weight: float = 0.5,
        refinement: RefinementName | Refinement = "predict",
    ) -> None:
        super().__init__()
        if not isinstance(target_weights, tuple | list) or len(target_weights) != 2:
            raise ValueError(f"target_weights must be two numbers, for z_c and z_s, got {target_weights!r}")
        for weight in target_weights:
            check_range("each of target_weights", weight, 0, float("inf"))
        check_range("commitment_weight", commitment_weight, 0, float("inf"))
        self.target_weights = (float(target_weights[0]), float(target_weights[1]))
        check_range("code_weight", code_weight, 0, float("inf"))
        self.commitment_weight = commitment_weight
        self.code_weight = code_weight
        self.refinement: Refinement = by_name("refinement", refinement, REFINEMENTS)
        self.refinement_name = policy_name(refinement)

    def forward(
        self,
        predictions: Sequence[Tensor],
        global_targets: Sequence[Tensor],
        refined_targets: Sequence[Tensor] | None = None,
        commitment_loss: Tensor | None = None,
        code_loss: Tensor | None = None,
    ) -> DiSSECTLoss:
        """Compute the loss of a batch.

        Args:
            predictions: p, one ``(B, D)`` a view.
            global_targets: z_c, one ``(B, D)`` for each of the first W views.
            refined_targets: z_s, likewise. None gives BYOL's loss: the global target with weight 1.
            commitment_loss: L_VQ, a scalar, or None.
            code_loss: L_code, a scalar such as the ``total`` of :class:`~vqssl.types.CodePredictionLoss`, or None.

        Returns:
            :class:`~vqssl.types.DiSSECTLoss`; call ``backward`` on ``total``.

        Raises:
            TypeError: an entry is not a floating tensor, or a single tensor is given instead of a sequence.
            ValueError: there are fewer than two predictions, no targets or more than predictions, two shapes or devices
                differ, the batch is empty, or a loss is not a scalar.
        """
        _check_views(predictions, global_targets, refined_targets)
        _check_scalar("commitment_loss", commitment_loss, predictions[0].device)
        _check_scalar("code_loss", code_loss, predictions[0].device)

        z_c = [target.detach() for target in global_targets]
        alignment_global = cross_view_loss(predictions, z_c)
        zero = torch.zeros_like(alignment_global)
        if refined_targets is None:
            alignment_refined, refinement, total = zero, zero, alignment_global
        else:
            z_s, refinement = self.refinement(refined_targets, z_c)
            alignment_refined = cross_view_loss(predictions, z_s)
            w_c, w_s = self.target_weights
            total = w_c * alignment_global + w_s * alignment_refined + refinement
        commitment = zero
        if commitment_loss is not None:
            commitment = commitment_loss
            total = total + self.commitment_weight * commitment
        codes = zero
        if code_loss is not None:
            codes = code_loss
            total = total + self.code_weight * codes
        return DiSSECTLoss(total, alignment_global, alignment_refined, refinement, commitment, codes)

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return (
            f"target_weights={self.target_weights}, commitment_weight={self.commitment_weight:g}, "
            f"code_weight={self.code_weight:g}, refinement={self.refinement_name!r}"
        )

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(
            self,
            predictions: Sequence[Tensor],
            global_targets: Sequence[Tensor],
            refined_targets: Sequence[Tensor] | None = None,
            commitment_loss: Tensor | None = None,
            code_loss: Tensor | None = None,
        ) -> DiSSECTLoss:
            """Call :meth:`forward`."""


# ---- checks of the input ----


def _check_views(
    predictions: Sequence[Tensor], global_targets: Sequence[Tensor], refined_targets: Sequence[Tensor] | None
) -> None:
    """Raise if the inputs are not sequences of floating tensors on one device, predictions of all views among them."""
    given: dict[str, Any] = {"predictions": predictions, "global_targets": global_targets}
    if refined_targets is not None:
        given["refined_targets"] = refined_targets
    for name, tensors in given.items():
        if isinstance(tensors, Tensor):  # it has a length, so its samples would pass for views
            raise TypeError(
                f"{name} must be a sequence of one (B, D) tensor a view, got one tensor of shape "
                f"{tuple(tensors.shape)}: write {name}.chunk(2) for two views joined by torch.cat, {name}.unbind() if "
                "its first axis is the views"
            )
    views = len(predictions)
    if views < 2:
        raise ValueError(
            f"predictions must hold at least 2 views, got {views}: each view is predicted from the others, so give "
            "one (B, D) tensor a view"
        )
    targets = len(global_targets)
    if not 1 <= targets <= views:
        raise ValueError(
            f"global_targets must hold one tensor for each of the {views} predictions, or for the first of them, got "
            f"{targets}: give the targets in the order of the predictions, views that only predict last"
        )
    if refined_targets is not None and len(refined_targets) != targets:
        raise ValueError(
            f"refined_targets must hold one tensor for each of the {targets} global targets, got "
            f"{len(refined_targets)}: give both targets of the same views, in the same order"
        )
    several = "give one (B, D) tensor a view; of a student that returns (z, maps), write predictor(student(view)[0])"
    for name, tensors in given.items():
        for view, tensor in enumerate(tensors):
            check_floating(f"{name}[{view}]", tensor, several)
            check_device(f"{name}[{view}]", tensor, predictions[0].device, "predictions[0]")


def _check_scalar(name: str, loss: Tensor | None, device: torch.device) -> None:
    """Raise if a loss is neither None nor a floating scalar on ``device``."""
    if loss is None:
        return
    whole = {Quantized: ".commitment_loss", MultiScaleQuantized: ".commitment_loss", CodePredictionLoss: ".total"}
    if type(loss) in whole:
        raise TypeError(f"{name} must be a scalar, got the whole {type(loss).__name__}: write its {whole[type(loss)]}")
    reduce = "write {0}.mean() for one a view, {0}.sum() for one a scale"
    check_floating(name, loss, reduce.format(f"torch.stack({name})"))
    if loss.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got shape {tuple(loss.shape)}: {reduce.format(name)}")
    check_device(name, loss, device, "the predictions")
