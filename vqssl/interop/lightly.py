"""Teachers from lightly checkpoints: the momentum branch of BYOL-like methods."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vqssl.interop.state_dicts import check_state, listed
from vqssl.teacher import MomentumTeacher

__all__ = ["load_lightly_teacher_", "momentum_state_from_lightly"]

# Names that lightly's examples and benchmarks give the modules of the momentum branch ("{}" is the plain name) ...
TEACHER_NAMES = ("teacher_{}", "{}_momentum", "momentum_{}")
# ... or those of the student, if the momentum branch has the plain names.
STUDENT_NAMES = ("student_{}", "query_{}", "anchor_{}")


def momentum_state_from_lightly(
    checkpoint: Mapping[str, Any], parts: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Return the momentum branch of a lightly checkpoint under the student's names.

    The branch is found by the names of its modules:

    - ``backbone_momentum``: lightly's examples of BYOL, MoCo, DenseCL, MMCR and SMoG;
    - ``teacher_backbone``: DINO, DINOv2, iBOT, the benchmark of BYOL, lightly-train;
    - ``backbone`` beside ``student_backbone``, ``query_backbone`` or ``anchor_backbone``: the benchmarks of DINO, TiCo
      and MoCo; MSN;
    - ``momentum_backbone``: lightly's first releases, solo-learn.

    Each module becomes the student's submodule of the plain name: ``backbone``, ``projection_head``, ``head``.

    Args:
        checkpoint: a Lightning checkpoint with its weights under ``"state_dict"``, or such a state dict.
        parts: submodule of the student to prefix in the checkpoint, for names of your own, such as
            ``{"encoder": "teacher_backbone"}``. ``""`` stands for the whole student: ``{"": "backbone_momentum"}``.
            The branch is then not searched for.

    Returns:
        The tensors, not copied, under names such as ``"backbone.0.weight"``.

    Raises:
        TypeError: ``checkpoint`` or ``parts`` is not a mapping with string keys.
        ValueError: without ``parts``, no branch is found, or branches of two kinds of names; with ``parts``, the
            checkpoint has nothing under a prefix.

    >>> import torch
    >>> checkpoint = {"backbone.weight": torch.zeros(2), "backbone_momentum.weight": torch.ones(2)}
    >>> momentum_state_from_lightly({"state_dict": checkpoint, "global_step": 7})
    {'backbone.weight': tensor([1., 1.])}
    """
    state = _weights(checkpoint)
    if parts is not None:
        _check_parts(parts)
    branch = {}
    for part, prefix in (_momentum_parts(state) if parts is None else parts).items():
        start = prefix.removesuffix(".") + "."
        inside = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        if not inside:
            modules = dict.fromkeys(name.partition(".")[0] for name in state)
            raise ValueError(
                f"parts must name modules of the checkpoint, got {prefix!r} for {part!r}: it has {listed(modules, 12)}"
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

    The branch must hold exactly the student's tensors. To continue a lightly run as lightly would:

    - build the teacher with ``buffers="own"``, since lightly's ``update_momentum`` moves parameters only;
    - use ``total_steps=n - 1`` for their ``cosine_schedule(step, n, momentum, final_momentum)``, which reaches its end
      one step early;
    - call ``teacher.update_(student)`` where they update: in most examples at the start of a training step, before the
      forward pass.

    Args:
        teacher: the teacher of a student with the submodules that :func:`momentum_state_from_lightly` describes.
        checkpoint: a Lightning checkpoint, or a state dict.
        step: the number of updates so far; None takes the checkpoint's ``global_step``. If the momentum was scheduled
            by epochs, as in some examples, give the epoch, here and to ``update_``.
        parts: as in :func:`momentum_state_from_lightly`.

    Raises:
        TypeError: ``teacher`` is not a MomentumTeacher, ``checkpoint`` not a mapping, or ``step`` not an integer.
        ValueError: ``step`` is negative, or neither given nor in the checkpoint; tensors are missing, left over or of
            another shape; or :func:`momentum_state_from_lightly` raises. The teacher is then unchanged.

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
    teacher.module.load_state_dict({**teacher.module.state_dict(), **branch})  # extra state stays
    teacher.step = updates


def _weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict of a Lightning checkpoint, or the checkpoint if it is one."""
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
            f"{parts!r}: write parts={{'encoder': 'teacher_backbone'}}, or {{'': 'teacher_backbone'}} for all of it"
        )


def _momentum_parts(state: Mapping[str, Any]) -> dict[str, str]:
    """Return submodule of the student to module of the momentum branch, as found by lightly's names."""
    modules = list(dict.fromkeys(name.partition(".")[0] for name in state if "." in name))
    found: dict[str, dict[str, str]] = {}  # such as {"teacher_{}": {"backbone": "teacher_backbone"}}
    for pattern in TEACHER_NAMES:
        before, after = pattern.split("{}")
        for module in modules:
            if module.startswith(before) and module.endswith(after) and len(module) > len(before + after):
                found.setdefault(pattern, {})[module.removeprefix(before).removesuffix(after)] = module
    for pattern in STUDENT_NAMES:
        for module in modules:
            if pattern.format(module) in modules:
                found.setdefault(pattern, {})[module] = module
    if len(found) != 1:
        several = " and ".join(listed(parts.values()) for parts in found.values())
        raise ValueError(
            "checkpoint must name the momentum branch in one of lightly's ways, such as 'backbone_momentum' or "
            f"'teacher_backbone', got {several or listed(modules, 12)}: write "
            "parts={'backbone': 'its name in the checkpoint'}"
        )
    return next(iter(found.values()))


def _step(checkpoint: Mapping[str, Any], step: int | None) -> int:
    if step is None:
        step = checkpoint.get("global_step") if "state_dict" in checkpoint else None
        if step is None:
            raise ValueError(
                "step must be given, since the checkpoint holds no 'global_step': write step=0 to restart the "
                "schedule, or the number of updates so far"
            )
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step must be an int, got {step!r}: count optimizer steps")
    step = operator.index(step)
    if not 0 <= step < 2**63 - 1:
        raise ValueError(f"step must be at least 0 and fit 64 bits, got {step}: count from 0")
    return step


def _check_fits(module: nn.Module, branch: Mapping[str, Any]) -> None:
    """Raise if the branch differs from the module's state in a name or a shape."""
    ours = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing = [name for name in ours if not isinstance(branch.get(name), Tensor)]
    extra = [name for name in branch if name not in ours]
    cure = (
        "build the student with the submodules of lightly's module, or name the wanted ones alone: "
        "parts={'submodule of the student': 'its name in the checkpoint'}"
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
            f"the student and the momentum branch must have the same shapes, but {name!r} is {tuple(ours[name].shape)} "
            f"and {tuple(branch[name].shape)}, the first of {len(differ)} that differ: {cure}"
        )
