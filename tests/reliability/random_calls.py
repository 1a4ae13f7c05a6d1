"""Random public calls with arguments that are mostly right and sometimes wrong.

Wrong are shape, dtype, strides, device or kind of object; values may be NaN, infinite, denormal or huge.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vqssl
from vqssl import functional

DIM, SIZE, CHANNELS = 4, 6, (3, 5)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e-38, 3e38, -3e38, 65504.0, 1e300]
NOT_TENSORS = [None, "x", 3, 2.5, True, [1.0, 2.0], {"a": 1}, (), object(), np.zeros(3), torch.float32, nn.Identity]


def tensor(rng: random.Random, *shape: int, kind: str = "float", wrong: float = 0.1) -> Tensor:
    """Return a tensor of this shape; sometimes of another shape, dtype, layout or device, or not finite."""
    sizes = list(shape)
    if rng.random() < wrong:
        change = rng.randrange(4)
        if change == 0 and sizes:
            sizes[rng.randrange(len(sizes))] = rng.choice([0, 1, 2, 7])
        elif change == 1:
            sizes.insert(rng.randint(0, len(sizes)), rng.choice([0, 1, 3]))
        elif change == 2 and sizes:
            sizes.pop(rng.randrange(len(sizes)))
        else:
            rng.shuffle(sizes)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if kind == "mask":
        made = torch.rand(sizes, generator=generator) < rng.choice([0.0, 0.5, 1.0])
    elif kind == "index":
        made = torch.randint(-1, SIZE, sizes, generator=generator)
        if rng.random() < wrong:
            made = made + rng.choice([-5, 1, 2**40])
    else:
        made = rng.choice([1.0, 1e-40, 1e-20, 1e20, 1e38]) * torch.randn(sizes, generator=generator).double()
        if rng.random() < 0.3:
            broken = torch.rand(sizes, generator=generator) < rng.choice([0.05, 1.0])
            made[broken] = rng.choice(SPECIAL)
        made = made.to(rng.choice(FLOATS))
    if rng.random() < wrong / 2:
        made = made.to(rng.choice(FLOATS + OTHERS))
    layout = rng.randrange(6)
    if layout == 0 and made.ndim >= 2:
        made = made.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == 1 and made.ndim:
        made = made.repeat_interleave(2, -1)[..., ::2]
    elif layout == 2 and made.ndim and made.shape[0]:
        made = made[:1].expand(made.shape)
    elif layout == 3 and made.ndim:
        made = made.flip(0)
    if made.is_floating_point() and rng.random() < 0.2:
        made.requires_grad_()
    if rng.random() < wrong / 4:
        made = made.to("meta")
    return made


def maybe(rng: random.Random, value: object, wrong: float = 0.05) -> Any:
    """Return the value, or sometimes an object that is not a tensor."""
    return rng.choice(NOT_TENSORS) if rng.random() < wrong else value


def number(rng: random.Random, right: object) -> Any:
    """Return the right value, or sometimes a wrong number or no number."""
    return right if rng.random() < 0.8 else rng.choice([0, -1, 1.5, float("nan"), float("inf"), 2**70, "x", None, True])


def batch_of(rng: random.Random) -> list[int]:
    """Return batch dimensions, zeros included."""
    return [rng.choice([0, 1, 2, 3, 9]) for _ in range(rng.choice([0, 1, 1, 2, 3]))]


def codebook(rng: random.Random) -> vqssl.EMACodebook:
    """Return a codebook with random options."""
    made = vqssl.EMACodebook(
        codebook_size=SIZE,
        dim=DIM,
        decay=rng.choice([0.0, 0.5, 0.99, 1.0]),
        eps=rng.choice([0.0, 1e-5]),
        metric=rng.choice(["euclidean", "cosine"]),
        ema=rng.choice(["count_weighted", "batch_mean"]),
        initialization=rng.choice([None, vqssl.RandomInit(), vqssl.KMeansInit(2)]),
        revival=rng.choice([None, vqssl.BatchRevival(), vqssl.BatchRevival(1.0)]),
        estimator=rng.choice(["straight_through", "rotation"]),
        dtype=rng.choice([None, torch.float64]),
        seed=rng.randrange(5),
    )
    made.train(rng.random() < 0.8)
    made.freeze(rng.random() < 0.1)
    return made


Case = tuple[str, nn.Module | None, Callable[[], object]]
"""Name of the call, the module whose state must stay sound (or None), and the call."""


def codebook_case(rng: random.Random) -> Case:
    """Return a call of a codebook's methods."""
    module, batch = codebook(rng), batch_of(rng)
    x, mask = maybe(rng, tensor(rng, *batch, DIM)), None
    if rng.random() < 0.4:
        mask = maybe(rng, tensor(rng, *batch, kind="mask"))
    indices = maybe(rng, tensor(rng, *batch, kind="index"))
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: module(x, mask),
        "quantize": lambda: module.quantize(x, mask),
        "update_": lambda: module.update_(x, indices),
        "initialize_": lambda: module.initialize_(x, mask),
        "first_codes": lambda: module.first_codes(x, mask),
        "lookup": lambda: module.lookup(indices),
        "set_codes_": lambda: module.set_codes_(codes),
        "usage": lambda: module.usage(dead_below),
    }
    codes = maybe(rng, tensor(rng, SIZE, DIM))
    dead_below = number(rng, 0.1)
    name = rng.choice([*calls, "forward", "forward", "update_"])
    return f"EMACodebook.{name}", module, calls[name]


def quantizer_case(rng: random.Random) -> Case:
    """Return a forward pass of a multi-scale quantiser."""
    last = rng.random() < 0.3
    module = vqssl.MultiScaleQuantizer(
        CHANNELS, codebook_size=SIZE, dim=DIM, shared=rng.random() < 0.3, channels_last=last,
        projection=rng.choice([None, vqssl.LearnedProjection]), metric=rng.choice(["euclidean", "cosine"]),
    )  # fmt: skip
    module.train(rng.random() < 0.8)
    maps, masks = [], []
    for channels in CHANNELS:
        lead, space = rng.choice([0, 1, 2, 3]), [rng.choice([0, 1, 2, 4]) for _ in range(rng.choice([0, 1, 2, 3]))]
        shape = [lead, *space, channels] if last else [lead, channels, *space]
        one = tensor(rng, *shape, wrong=0.05)
        if rng.random() < 0.9:
            one = one.real.float()
        maps.append(maybe(rng, one, 0.02))
        masks.append(rng.choice([None, maybe(rng, tensor(rng, lead, *space, kind="mask", wrong=0.05), 0.02)]))
    features = maybe(
        rng, rng.choice([maps, tuple(maps), maps[:1], torch.zeros(2, 3, 4)]) if rng.random() < 0.1 else maps
    )
    given = rng.choice([None, masks])
    return "MultiScaleQuantizer.forward", module, lambda: module(features, given)


def fusion_case(rng: random.Random) -> Case:
    """Return a forward pass of the fusion."""
    module = vqssl.SERFFusion(
        DIM, 2, operator=rng.choice(["spatial", "channel", "batch", "pooled", "concat"]), hidden_dim=8
    ).train(rng.random() < 0.5)
    lead = rng.choice([0, 1, 2, 3])
    z_c = maybe(rng, tensor(rng, lead, DIM, wrong=0.05).real.float() if rng.random() < 0.9 else tensor(rng, lead, DIM))
    spaces = [[rng.choice([0, 1, 2, 4]) for _ in range(rng.choice([0, 1, 2, 3]))] for _ in range(2)]
    maps = [tensor(rng, lead, DIM, *space, wrong=0.05) for space in spaces]
    maps = [one.real.float() if rng.random() < 0.9 else one for one in maps]
    masks = rng.choice([None, [tensor(rng, lead, *space, kind="mask", wrong=0.05) for space in spaces]])
    given = maybe(rng, maps)
    return "SERFFusion.forward", module, lambda: module(z_c, given, masks)


def objective_case(rng: random.Random) -> Case:
    """Return a forward pass of the objective."""
    module = vqssl.DiSSECTObjective(refinement=rng.choice(["predict", "align", "detached"]))
    lead, views = rng.choice([0, 1, 2, 3]), rng.choice([1, 2, 2, 2, 3])
    p, z_c, z_s = ([maybe(rng, tensor(rng, lead, DIM, wrong=0.05), 0.02) for _ in range(views)] for _ in range(3))
    refined = maybe(rng, rng.choice([None, z_s]))
    commitment = maybe(rng, rng.choice([None, tensor(rng, wrong=0.05)]))
    given = maybe(rng, p)
    return "DiSSECTObjective.forward", module, lambda: module(given, z_c, refined, commitment)


def teacher_case(rng: random.Random) -> Case:
    """Return a call of a teacher's methods."""
    student = nn.Sequential(nn.Linear(3, DIM), nn.BatchNorm1d(DIM))
    module = vqssl.MomentumTeacher(
        student, momentum=0.9, total_steps=rng.choice([None, 5]), buffers=rng.choice(["ema", "copy", "own"])
    )
    other = rng.choice([student, student, nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), nn.Linear(3, DIM)])
    given, step = maybe(rng, other), rng.choice([None, 3, number(rng, 2)])
    name = rng.choice(["update_", "backbone_state_dict", "momentum_at"])
    part: Any = rng.choice(["", "0", "1", "2", "x.y", 3])
    calls: dict[str, Callable[[], object]] = {
        "update_": lambda: module.update_(given, step),
        "backbone_state_dict": lambda: module.backbone_state_dict(part),
        "momentum_at": lambda: module.momentum_at(3),
    }
    return f"MomentumTeacher.{name}", module, calls[name]


def function_case(rng: random.Random) -> Case:
    """Return a call of a public function."""
    batch = batch_of(rng)
    x, y = maybe(rng, tensor(rng, *batch, DIM)), maybe(rng, tensor(rng, *batch, DIM))
    codes = maybe(rng, tensor(rng, rng.choice([0, 1, SIZE]), DIM))
    mask = rng.choice([None, maybe(rng, tensor(rng, *batch, kind="mask"))])
    indices = maybe(rng, tensor(rng, *batch, kind="index"))
    metric: Any = rng.choice(["euclidean", "cosine", "cosine", "manhattan", None, 3])
    precision: Any = rng.choice(["exact", "exact", "tf32", "torch", "fp8", None])
    counts = maybe(rng, tensor(rng, SIZE))
    calls: dict[str, Callable[[], object]] = {
        "nearest_codeword": lambda: functional.nearest_codeword(x, codes, metric, precision=precision),
        "commitment_loss": lambda: functional.commitment_loss(x, y, mask),
        "cosine_regression_loss": lambda: functional.cosine_regression_loss(x, y),
        "straight_through": lambda: functional.straight_through(x, y),
        "rotation_trick": lambda: functional.rotation_trick(x, y),
        "code_counts": lambda: functional.code_counts(indices, size),
        "codebook_usage": lambda: functional.codebook_usage(counts, below),
        "target_spread": lambda: functional.target_spread(x),
        "cosine_momentum": lambda: functional.cosine_momentum(step, total, start),
    }
    size, below = number(rng, SIZE), number(rng, 0.1)
    step, total, start = number(rng, 3), number(rng, 10), number(rng, 0.9)
    name = rng.choice(list(calls))
    return f"functional.{name}", None, calls[name]


def construction_case(rng: random.Random) -> Case:
    """Return the construction of a public class."""

    def options(**right: object) -> dict[str, Any]:
        return {name: number(rng, value) if rng.random() < 0.3 else value for name, value in right.items()}

    made: dict[str, Callable[[], object]] = {
        "EMACodebook": lambda: vqssl.EMACodebook(
            **options(codebook_size=SIZE, dim=DIM, decay=0.9, eps=1e-5, metric="cosine", commitment_weight=0.25,
                      ema="batch_mean", initialization=None, revival=None, estimator="rotation", precision="exact",
                      seed=1)
        ),
        "MultiScaleQuantizer": lambda: vqssl.MultiScaleQuantizer(
            **options(in_channels=[3, 5], codebook_size=SIZE, dim=DIM, projection=None, seed=1, decay=0.5)
        ),
        "SERFFusion": lambda: vqssl.SERFFusion(**options(dim=DIM, num_scales=2, operator="batch", hidden_dim=8)),
        "MomentumTeacher": lambda: vqssl.MomentumTeacher(
            **options(student=nn.Linear(2, 2), momentum=0.9, final_momentum=1.0, total_steps=9, buffers="ema")
        ),
        "DiSSECTObjective": lambda: vqssl.DiSSECTObjective(
            **options(target_weights=(1, 0), commitment_weight=1.0, refinement="align")
        ),
        "KMeansInit": lambda: vqssl.KMeansInit(**options(iterations=3)),
        "BatchRevival": lambda: vqssl.BatchRevival(**options(threshold=0.1)),
        "OrthogonalProjection": lambda: vqssl.OrthogonalProjection(**options(in_channels=3, dim=DIM, seed=1)),
        "LearnedProjection": lambda: vqssl.LearnedProjection(**options(in_channels=3, dim=DIM)),
    }  # fmt: skip
    name = rng.choice(list(made))
    return f"{name}()", None, made[name]


def state_case(rng: random.Random) -> Case:
    """Return load_state_dict with a state of another size, with a key missing or too many, or with random values."""
    module = codebook(rng)
    state = codebook(rng).state_dict()
    change = rng.randrange(5)
    if change == 0:
        state = vqssl.EMACodebook(codebook_size=rng.choice([SIZE, 7]), dim=rng.choice([DIM, 5])).state_dict()
    elif change == 1:
        state.pop(rng.choice(list(state)))
    elif change == 2:
        state["more"] = torch.zeros(2)
    elif change == 3:
        state[rng.choice(list(state))] = tensor(rng, SIZE, DIM)
    return "load_state_dict", module, lambda: module.load_state_dict(state)


CASES = [codebook_case] * 5 + [
    quantizer_case, quantizer_case, fusion_case, objective_case, teacher_case, function_case, function_case,
    construction_case, state_case,
]  # fmt: skip
