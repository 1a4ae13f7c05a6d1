"""Teachers of lightly's BYOL-like methods: the branch of a checkpoint that followed by momentum."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vqssl.interop.state_dicts import check_state, listed
from vqssl.teacher import MomentumTeacher

__all__ = ["load_lightly_teacher_", "momentum_state_from_lightly"]

# How lightly's examples and benchmarks mark the branch that follows ...
FOLLOWERS = ("teacher_{}", "{}_momentum", "momentum_{}")
# ... or, where it has the plain name, the branch that leads.
LEADERS = ("student_{}", "query_{}", "anchor_{}")


def momentum_state_from_lightly(
    checkpoint: Mapping[str, Any], parts: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The momentum branch of a lightly checkpoint, under the names of a student that has it as submodules.

    lightly's modules name the branch in one of three ways, and each is found: ``backbone_momentum`` (its examples of
    BYOL, MoCo, DenseCL, MMCR, SMoG), ``teacher_backbone`` (DINO, DINOv2, iBOT, the benchmark of BYOL, lightly-train),
    or plain ``backbone`` beside the ``student_backbone``, ``query_backbone`` or ``anchor_backbone`` that it follows
    (the benchmarks of DINO, TiCo and MoCo, MSN). ``momentum_backbone`` of its first releases, and of solo-learn, is a
    fourth. Each part becomes the submodule whose name is left when the mark is taken off: ``backbone``,
    ``projection_head``, ``head``.

    Args:
        checkpoint: a Lightning checkpoint with its weights under ``"state_dict"``, or such a state dict.
        parts: where names or methods are your own: submodule of the student to prefix in the checkpoint, such as
            ``{"encoder": "teacher_backbone"}``. ``""`` stands for the whole student: ``{"": "backbone_momentum"}``.
            Nothing is looked for then.

    Returns:
        The tensors, not copied, under names such as ``"backbone.0.weight"``.

    Raises:
        TypeError: ``checkpoint`` or ``parts`` is no mapping with strings for keys.
        ValueError: no branch, or branches marked in two ways, and no ``parts``; a prefix under which nothing is.

    >>> import torch
    >>> checkpoint = {"backbone.weight": torch.zeros(2), "backbone_momentum.weight": torch.ones(2)}
    >>> momentum_state_from_lightly({"state_dict": checkpoint, "global_step": 7})
    {'backbone.weight': tensor([1., 1.])}
    """
    state = _weights(checkpoint)
    if parts is not None:
        _check_parts(parts)
    found = _momentum_parts(state) if parts is None else parts
    branch = {}
    for part, prefix in found.items():
        start = prefix.removesuffix(".") + "."
        inside = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        if not inside:
            tops = dict.fromkeys(name.partition(".")[0] for name in state)
            raise ValueError(
                f"parts must name what is in the checkpoint, got {prefix!r} for {part!r}: it has {listed(tops, 12)}"
            )
        branch.update({f"{part}.{name}" if part else name: value for name, value in inside.items()})
    return branch


def load_lightly_teacher_(
    teacher: MomentumTeacher,
    checkpoint: Mapping[str, Any],
    *,
    step: int | None = None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Give a :class:`~vqssl.MomentumTeacher` the weights, buffers and step of lightly's momentum branch.

    Nothing may be missing, and nothing that belongs to the branch left over. To go on as there, build the teacher with
    ``buffers="own"``, since lightly's ``update_momentum`` moves parameters alone, and with ``total_steps=n - 1`` where
    theirs calls ``cosine_schedule(step, n, momentum, final_momentum)``, which reaches its end one step early; and call
    ``teacher.update_(student)`` where they call it, in most examples at the start of a training step, before the
    forward pass.

    Args:
        teacher: of a student with the submodules that :func:`momentum_state_from_lightly` describes.
        checkpoint: a Lightning checkpoint, or a state dict.
        step: how many updates there were; None takes the checkpoint's ``global_step``. Where the momentum went by
            epochs, as in some of the examples, give the epoch, and keep giving it to ``update_``.
        parts: as of :func:`momentum_state_from_lightly`.

    Raises:
        TypeError: ``teacher`` is no MomentumTeacher, ``checkpoint`` no mapping, ``step`` no integer.
        ValueError: no ``step`` and none in the checkpoint, a negative one, tensors missing, left over or of another
            shape, or what :func:`momentum_state_from_lightly` refuses. The teacher is then as it was.

    >>> import torch, vqssl
    >>> student = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 1, bias=False)})
    >>> teacher = vqssl.MomentumTeacher(student, momentum=0.99, buffers="own")
    >>> checkpoint = {"backbone.weight": torch.zeros(1, 2), "backbone_momentum.weight": torch.ones(1, 2)}
    >>> load_lightly_teacher_(teacher, {"state_dict": checkpoint, "global_step": 7})
    >>> teacher.module["backbone"].weight.tolist(), teacher.step
    ([[1.0, 1.0]], 7)
    """
    if not isinstance(teacher, MomentumTeacher):
        raise TypeError(
            f"teacher must be a vqssl.MomentumTeacher, got {type(teacher).__name__}: write MomentumTeacher(student)"
        )
    branch = momentum_state_from_lightly(checkpoint, parts)
    updates = _step(checkpoint, step)
    _check_fits(teacher.module, branch)
    teacher.module.load_state_dict({**teacher.module.state_dict(), **branch})  # what is no tensor stays
    teacher.step = updates


def _weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    check_state("checkpoint", checkpoint)
    inner = checkpoint.get("state_dict")
    if inner is None or isinstance(inner, Tensor):
        return checkpoint
    check_state("checkpoint['state_dict']", inner)
    return inner


def _check_parts(parts: Any) -> None:
    texts = isinstance(parts, Mapping) and all(isinstance(text, str) for pair in parts.items() for text in pair)
    if not texts:
        raise TypeError(
            "parts must map submodules of the student to prefixes in the checkpoint, got "
            f"{parts!r}: write parts={{'encoder': 'teacher_backbone'}}, or {{'': 'teacher_backbone'}} for the whole"
        )


def _momentum_parts(state: Mapping[str, Any]) -> dict[str, str]:
    """Submodule of the student to name in the checkpoint, by the way in which the branch is marked."""
    tops = list(dict.fromkeys(name.partition(".")[0] for name in state if "." in name))
    ways: dict[str, dict[str, str]] = {}
    for mark in FOLLOWERS:
        before, after = mark.split("{}")
        for top in tops:
            if top.startswith(before) and top.endswith(after) and len(top) > len(before + after):
                ways.setdefault(mark, {})[top.removeprefix(before).removesuffix(after)] = top
    for mark in LEADERS:
        for top in tops:
            if mark.format(top) in tops:
                ways.setdefault(mark, {})[top] = top
    if len(ways) != 1:
        several = " and ".join(listed(way.values()) for way in ways.values())
        raise ValueError(
            "checkpoint must mark the branch that follows by momentum in one of lightly's ways, such as "
            f"'backbone_momentum' or 'teacher_backbone', got {several or listed(tops, 12)}: write "
            "parts={'backbone': 'its name in the checkpoint'}"
        )
    return next(iter(ways.values()))


def _step(checkpoint: Mapping[str, Any], step: int | None) -> int:
    if step is None:
        step = checkpoint.get("global_step") if "state_dict" in checkpoint else None
        if step is None:
            raise ValueError(
                "step must be given, since the checkpoint holds no 'global_step': write step=0 to start the schedule "
                "anew, or the number of updates so far"
            )
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step must be an int, got {step!r}: count optimizer steps")
    step = operator.index(step)
    if not 0 <= step < 2**63 - 1:
        raise ValueError(f"step must not be negative, and fit 64 bits, got {step}: count from 0")
    return step


def _check_fits(module: nn.Module, branch: Mapping[str, Any]) -> None:
    """The branch is exactly the module's state: names and shapes."""
    ours = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing = [name for name in ours if not isinstance(branch.get(name), Tensor)]
    extra = [name for name in branch if name not in ours]
    cure = (
        "build the student with the submodules of their module, or write "
        "parts={'submodule of the student': 'its name in the checkpoint'}, with those that are wanted alone"
    )
    if missing or extra:
        raise ValueError(
            f"the student and the momentum branch must have the same tensors, but the branch lacks {listed(missing)} "
            f"and the student has no {listed(extra)}: {cure}"
        )
    differ = [name for name in ours if ours[name].shape != branch[name].shape and ours[name].ndim]
    if differ:
        name = differ[0]
        raise ValueError(
            f"the student and the momentum branch must have the same shapes, but {name!r} is "
            f"{tuple(ours[name].shape)} and {tuple(branch[name].shape)}, and so on for {len(differ)} in all: {cure}"
        )
