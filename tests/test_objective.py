"""DiSSECTObjective against loops over pairs of views; gradients; policies of refinement."""

import itertools
import math
import pickle
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl import DiSSECTLoss, DiSSECTObjective
from vqssl.functional import REFINEMENTS, cosine_regression_loss
from vqssl.functional.refinement import RefinementName
from vqssl.types import CodePredictionLoss, Quantized

MODES = tuple(REFINEMENTS)
seeds = st.integers(0, 2**31 - 1)


def setting(seed=0, views=2, batch=3, dim=4, dtype=torch.float64):
    """Return p, z_c, z_s: each a list of leaves, one a view."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(3, views, batch, dim, generator=generator, dtype=torch.float64).to(dtype)
    return [[t.clone().requires_grad_() for t in group] for group in draws]


def slow_regression(p, t):
    """Compute the mean squared distance of unit vectors in Python floats."""
    total = 0.0
    for a, b in zip(p.tolist(), t.tolist(), strict=True):
        lengths = math.hypot(*a), math.hypot(*b)
        total += sum((x / lengths[0] - y / lengths[1]) ** 2 for x, y in zip(a, b, strict=True))
    return total / len(p)


def slow_objective(p, z_c, z_s, commitment, codes, weights, commitment_weight, code_weight, mode):
    pairs = [(v, w) for v in range(len(p)) for w in range(len(z_c)) if v != w]
    to_global = sum(slow_regression(p[v], z_c[w]) for v, w in pairs) / len(pairs)
    to_refined = sum(slow_regression(p[v], z_s[w]) for v, w in pairs) / len(pairs)
    refinement = sum(slow_regression(z_s[v], z_c[v]) for v in range(len(z_c))) / len(z_c) if mode == "predict" else 0.0
    total = weights[0] * to_global + weights[1] * to_refined + refinement
    total += commitment_weight * commitment + code_weight * codes
    return [total, to_global, to_refined, refinement, commitment, codes]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [2, 3, 4])
@given(
    seed=seeds,
    batch=st.integers(1, 4),
    dim=st.integers(1, 5),
    weights=st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.5, 1.0])),
    commitment_weight=st.sampled_from([0.0, 1.0, 3.0]),
    code_weight=st.sampled_from([0.0, 0.5]),
    losses=st.tuples(st.sampled_from([None, 0.7]), st.sampled_from([None, 0.3])),
    only_predict=st.integers(0, 2),
)
def test_objective_equals_formula(
    mode, views, seed, batch, dim, weights, commitment_weight, code_weight, losses, only_predict
):
    p, z_c, z_s = setting(seed, views, batch, dim)
    targets = max(1, views - only_predict)
    z_c, z_s = z_c[:targets], z_s[:targets]
    objective = DiSSECTObjective(
        target_weights=weights, commitment_weight=commitment_weight, code_weight=code_weight, refinement=mode
    )
    found = objective(
        p, z_c, z_s, *(None if loss is None else torch.tensor(loss, dtype=torch.float64) for loss in losses)
    )
    assert type(found) is DiSSECTLoss
    assert all(part.shape == () for part in found)
    given = [loss or 0.0 for loss in losses]
    expected = slow_objective(p, z_c, z_s, *given, weights, commitment_weight, code_weight, mode)
    assert [part.item() for part in found] == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_defaults_are_those_of_the_paper():
    p, z_c, z_s = setting()
    found = DiSSECTObjective()(p, z_c, z_s, torch.tensor(0.7, dtype=torch.float64))
    expected = slow_objective(p, z_c, z_s, 0.7, 0.0, (0.5, 0.5), 1.0, 0.5, "predict")
    assert [part.item() for part in found] == pytest.approx(expected, rel=1e-12)


def test_gradient_of_the_code_loss_is_its_weight():
    p, z_c, _ = setting()
    codes = torch.tensor(0.3, requires_grad=True)
    DiSSECTObjective(code_weight=0.25)(p, z_c, code_loss=codes).total.backward()
    assert codes.grad.item() == 0.25


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [2, 3])
def test_without_refined_targets_it_is_byol(mode, views):
    """Target weights do not matter: BYOL's loss has weight 1."""
    p, z_c, _ = setting(views=views)
    found = DiSSECTObjective(target_weights=(0.3, 0.9), refinement=mode)(p, z_c)
    pairs = list(itertools.permutations(range(views), 2))
    # BYOL sums 2 - 2 cos over ordered pairs; here it is averaged.
    cosine = torch.nn.functional.cosine_similarity
    byol = sum((2 - 2 * cosine(p[v], z_c[w], dim=-1)).mean() for v, w in pairs) / len(pairs)
    torch.testing.assert_close(found.total, byol, rtol=1e-13, atol=0)
    assert found.total.equal(found.alignment_global)
    assert [part.item() for part in found[2:]] == [0, 0, 0, 0]


# ---- gradients ----


def gradients(part, tensors):
    return torch.autograd.grad(part, tensors, allow_unused=True) if part.requires_grad else [None] * len(tensors)


@pytest.mark.parametrize(
    ("mode", "alignment_reaches_head", "head_is_trained"),
    [("predict", False, True), ("align", True, True), ("detached", False, False)],
)
def test_gradient_reaches_the_inputs_it_should(mode, alignment_reaches_head, head_is_trained):
    p, z_c, z_s = setting(views=3)

    def loss():
        return DiSSECTObjective(refinement=mode)(p, z_c, z_s)

    def reached(part, tensors):
        found = {g is not None and bool(g.abs().sum() > 0) for g in gradients(getattr(loss(), part), tensors)}
        assert len(found) == 1  # all views alike
        return found.pop()

    assert reached("total", p)
    assert reached("alignment_global", p)
    assert reached("alignment_refined", p)
    assert not reached("refinement", p)
    for part in ("total", "alignment_global", "alignment_refined", "refinement"):
        assert not reached(part, z_c)
    assert reached("total", z_s) == head_is_trained
    assert not reached("alignment_global", z_s)
    assert reached("alignment_refined", z_s) == alignment_reaches_head
    assert reached("refinement", z_s) == (mode == "predict")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_of_the_formula(mode):
    p, z_c, z_s = setting(views=3)
    DiSSECTObjective(refinement=mode)(p, z_c, z_s).total.backward()
    q, targets, refined = setting(views=3)

    def cosine_loss(a, b):
        return (a / a.norm(dim=-1, keepdim=True) - b / b.norm(dim=-1, keepdim=True)).square().sum(-1).mean()

    pairs = list(itertools.permutations(range(3), 2))
    seen = refined if mode == "align" else [t.detach() for t in refined]
    expected = sum(
        0.5 * cosine_loss(q[v], targets[w].detach()) + 0.5 * cosine_loss(q[v], seen[w]) for v, w in pairs
    ) / len(pairs)
    if mode == "predict":
        expected = expected + sum(cosine_loss(refined[v], targets[v].detach()) for v in range(3)) / 3
    expected.backward()
    for found, wanted in zip(p + z_s, q + refined, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-11, atol=1e-13)


def test_weights_of_one_and_zero_leave_one_target():
    p, z_c, z_s = setting()
    first = DiSSECTObjective(target_weights=(1, 0), refinement="detached")(p, z_c, z_s)
    assert first.total.equal(first.alignment_global)
    assert first.total.equal(DiSSECTObjective()(p, z_c).total)
    second = DiSSECTObjective(target_weights=(0, 1), refinement="detached")(p, z_c, z_s)
    assert second.total.equal(second.alignment_refined)
    assert second.total.equal(DiSSECTObjective()(p, z_s).total)


def test_commitment_gradient_is_scaled_by_its_weight():
    p, z_c, z_s = setting()
    commitment = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = DiSSECTObjective(commitment_weight=3.0)(p, z_c, z_s, commitment)
    loss.total.backward()
    assert commitment.grad.item() == 3
    assert loss.commitment.item() == 0.7


def test_view_is_not_its_own_target():
    p, z_c, z_s = setting()
    objective = DiSSECTObjective(refinement="detached")
    # Perfect on the same view, opposite on the other.
    z_c = [p[0].detach(), -p[0].detach()]
    loss = objective([p[0], -p[0]], z_c, z_s)
    assert loss.alignment_global.item() == pytest.approx(4, rel=1e-13)


def test_order_of_views_does_not_matter():
    p, z_c, z_s = setting(views=4)
    order = [2, 0, 3, 1]
    permuted = ([group[v] for v in order] for group in (p, z_c, z_s))
    torch.testing.assert_close(tuple(DiSSECTObjective()(*permuted)), tuple(DiSSECTObjective()(p, z_c, z_s)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_summed_in_float32(dtype):
    p, z_c, z_s = setting(dtype=dtype)
    loss = DiSSECTObjective()(p, z_c, z_s)
    exact = DiSSECTObjective()(*([t.double() for t in group] for group in (p, z_c, z_s)))
    assert all(part.dtype == torch.float32 for part in loss)
    torch.testing.assert_close(tuple(part.double() for part in loss), tuple(exact), rtol=1e-5, atol=1e-6)
    loss.total.backward()
    assert all(t.grad.dtype == dtype and t.grad.isfinite().all() for t in p + z_s)


# ---- refinement as a function ----


def half_refinement(refined_targets, global_targets):
    """Let a part of the gradient into z_s, and predict z_c of the first view only."""
    targets = [0.5 * z + 0.5 * z.detach() for z in refined_targets]
    return targets, 2 * cosine_regression_loss(refined_targets[0], global_targets[0])


def test_every_refinement_has_its_name_as_a_type():
    assert get_args(RefinementName) == tuple(REFINEMENTS)


@pytest.mark.parametrize("mode", MODES)
def test_refinement_functions_equal_names(mode):
    p, z_c, z_s = setting(views=3)
    named, written = DiSSECTObjective(refinement=mode), DiSSECTObjective(refinement=REFINEMENTS[mode])
    for a, b in zip(named(p, z_c, z_s), written(p, z_c, z_s), strict=True):
        assert a.equal(b)


def test_custom_refinement_gives_targets_and_loss():
    p, z_c, z_s = setting()
    objective = DiSSECTObjective(refinement=half_refinement)
    loss = objective(p, z_c, z_s)
    detached = DiSSECTObjective(refinement="detached")(p, z_c, z_s)
    torch.testing.assert_close(loss.alignment_refined, detached.alignment_refined)
    assert loss.refinement.equal(2 * cosine_regression_loss(z_s[0], z_c[0]))
    torch.testing.assert_close(loss.total, detached.total + loss.refinement)
    (half,) = torch.autograd.grad(loss.alignment_refined, z_s[0])
    (whole,) = torch.autograd.grad(DiSSECTObjective(refinement="align")(p, z_c, z_s).alignment_refined, z_s[0])
    torch.testing.assert_close(half, 0.5 * whole)
    assert "refinement='half_refinement'" in repr(objective)
    assert pickle.loads(pickle.dumps(objective))(p, z_c, z_s).total.equal(loss.total)


def test_repr_has_all_options_and_there_is_no_state():
    objective = DiSSECTObjective(target_weights=(1, 0), commitment_weight=2, refinement="align")
    assert objective.state_dict() == {}
    assert repr(objective) == (
        "DiSSECTObjective(target_weights=(1.0, 0.0), commitment_weight=2, code_weight=0.5, refinement='align')"
    )


# ---- errors ----


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (ValueError, "refinement must be one of 'predict', 'align', 'detached'", {"refinement": "none"}),
        (TypeError, r"refinement must be a name \('predict', .*got None", {"refinement": None}),
        (ValueError, "two numbers", {"target_weights": (1.0,)}),
        (ValueError, "two numbers, for z_c and z_s, got 0.5", {"target_weights": 0.5}),
        (ValueError, "target_weights must be from 0", {"target_weights": (1.0, -0.5)}),
        (ValueError, "target_weights must be from 0", {"target_weights": (math.nan, 0.5)}),
        (TypeError, "target_weights must be a number", {"target_weights": ("1", 0.5)}),
        (ValueError, "commitment_weight must be from 0", {"commitment_weight": -1}),
        (ValueError, "code_weight must be from 0", {"code_weight": -1}),
    ],
)
def test_wrong_options_are_refused(error, says, arguments):
    with pytest.raises(error, match=says):
        DiSSECTObjective(**arguments)


def z(*shape):
    return torch.ones(shape or (3, 4))


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (ValueError, "at least 2 views, got 1", ([z()], [z()])),
        (ValueError, "at least 2 views, got 0", ([], [])),
        (ValueError, "global_targets must hold one.*order of the predictions", ([z(), z()], [z()] * 3)),
        (ValueError, "global_targets must hold one.*order of the predictions", ([z(), z()], [])),
        (ValueError, "refined_targets must hold one", ([z(), z()], [z(), z()], [z()])),
        (ValueError, "same output width", ([z(), z(3, 5)], [z(), z()])),
        (ValueError, "same output width", ([z(), z()], [z(), z()], [z(), z(2, 4)])),
        (ValueError, "at least one pair", ([z(0, 4)] * 2, [z(0, 4)] * 2)),
        (TypeError, "floating", ([z().long(), z()], [z(), z()])),
        (TypeError, "commitment_loss must be a torch.Tensor", ([z(), z()], [z(), z()], None, 0.5)),
        (ValueError, r"must be a scalar.*commitment_loss.mean\(\) for one a view", ([z()] * 2, [z()] * 2, None, z(2))),
        (
            TypeError,
            r"list of 2: write torch.stack\(commitment_loss\).mean\(\) for one a view, .*.sum\(\) for one a scale",
            ([z(), z()], [z(), z()], None, [z(), z()]),
        ),
        (TypeError, "Quantized: write its .commitment_loss", ([z(), z()], [z(), z()], None, Quantized(z(), z(), z()))),
        (TypeError, r"predictions\[0\] .*got a tuple of 2: .*student\(view\)\[0\]", ([(z(), [z()])] * 2, [z(), z()])),
        (TypeError, r"predictions\[1\] .*got a list of 1: .*student\(view\)\[0\]", ((z(), [z()]), [z(), z()])),
        (
            TypeError,
            "code_loss must be a scalar, got the whole CodePredictionLoss: write its .total",
            ([z(), z()], [z(), z()], None, None, CodePredictionLoss(z(), (z(),))),
        ),
        # One tensor has a length too: its samples would pass for views.
        (TypeError, r"predictions must be a sequence.*predictions.chunk\(2\) for two views joined", (z(), [z()] * 3)),
        (TypeError, "global_targets must be a sequence", ([z()] * 3, z())),
        (TypeError, "refined_targets must be a sequence", ([z()] * 3, [z()] * 3, z())),
    ],
)
def test_wrong_input_is_refused(error, says, arguments):
    with pytest.raises(error, match=says):
        DiSSECTObjective()(*arguments)


def test_backward_of_the_loss_tuple_names_total():
    p = z().requires_grad_()
    loss = DiSSECTObjective()([p, p], [z(), z()])
    with pytest.raises(AttributeError, match=r"write .total.backward\(\)"):
        loss.backward()
    assert not hasattr(loss, "backward")
    loss.total.backward()
    assert p.grad is not None
