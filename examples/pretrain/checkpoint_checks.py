"""What a checkpoint must hold to be continued: checked before anything of the run is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from examples.pretrain.data.fingerprint import is_fingerprint
from examples.pretrain.divergence import not_finite

KINDS: dict[str, type] = {
    "config": str,
    "data": str,
    "devices": list,
    "epoch": int,
    "seconds": float,
    "rows": list,
    "model": dict,
    "optimizer": dict,
    "scheduler": dict,
}
"""Entries of a checkpoint and their types."""


def check_facts(path: Path, state: dict[str, Any]) -> None:
    """Raise ValueError unless every entry is there and of its type, and the log belongs to the epoch."""
    for name, kind in KINDS.items():
        value = state.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise refusal(path, name, f"be of type {kind.__name__}", repr(value)[:40])
    try:
        is_dict = isinstance(json.loads(state["config"]), dict)
    except ValueError:
        is_dict = False
    if not is_dict:
        raise refusal(path, "config", "hold settings as JSON", repr(state["config"])[:40])
    if not is_fingerprint(state["data"]):
        raise refusal(path, "data", "hold the fingerprint of images", repr(state["data"])[:40])
    if not state["epoch"] >= 0:
        raise refusal(path, "epoch", "be at least 0", state["epoch"])
    if not 0 <= state["seconds"] < math.inf:
        raise refusal(path, "seconds", "be finite and at least 0", state["seconds"])
    epochs = [row.get("epoch") if isinstance(row, dict) else row for row in state["rows"]]
    if epochs != list(range(1, state["epoch"] + 1)):
        raise refusal(path, "rows", f"hold the figures of epochs 1 to {state['epoch']}", f"those of {epochs[:12]}")
    others = [(name, value) for row in state["rows"] for name, value in row.items() if type(value) not in (int, float)]
    if others:
        raise refusal(path, "rows", "hold numbers", f"{others[0][0]} = {others[0][1]!r:.40}")
    if not all(isinstance(device, str) for device in state["devices"]):
        raise refusal(path, "devices", "hold names", repr(state["devices"])[:40])


def check_values(
    path: Path,
    state: dict[str, Any],
    method: nn.Module,
    optimizer: Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
) -> None:
    """Raise ValueError unless model, optimizer and scheduler fit the run and hold finite numbers.

    Args:
        path: of the checkpoint, for the message.
        state: the checkpoint.
        method: of the run as it was built; nothing is changed in it.
        optimizer: of the run as it was built.
        epochs: of the whole run.
        steps_per_epoch: optimizer steps in an epoch.
    """
    if state["epoch"] > epochs:
        raise refusal(path, "epoch", f"be at most {epochs}, the last of the run", state["epoch"])
    model, ours = dict(tensors("model", state["model"])), dict(tensors("model", method.state_dict()))
    for name in (
        name for name in model if name in ours
    ):  # other names are for load_state_dict: older versions have some
        _check_like(path, name, model[name], ours[name])
    _check_optimizer(path, state["optimizer"], optimizer)
    done = state["epoch"] * steps_per_epoch - _skipped(path, state, state["epoch"] * steps_per_epoch)
    if state["scheduler"].get("last_epoch") != done:
        found = state["scheduler"].get("last_epoch")
        raise refusal(path, "scheduler.last_epoch", f"be {done}, the steps of {state['epoch']} epochs", found)
    everything = {name: state.get(name, {}) for name in ("model", "optimizer", "scheduler", "scaler")}
    bad = [name for name, value in numbers("", everything) if not math.isfinite(value)]
    for name in bad + not_finite(tensors("", everything)):
        raise refusal(path, name, "hold finite numbers", "NaN or infinity")


def _skipped(path: Path, state: dict[str, Any], steps: int) -> int:
    """Return the number of steps that a run in fp16 skipped; raise ValueError unless it and the scale are possible."""
    if json.loads(state["config"]).get("optimization", {}).get("precision") != "fp16":
        return 0
    scaler = state.get("scaler")
    if not isinstance(scaler, dict):
        raise refusal(path, "scaler", "hold the scale of the loss in fp16", repr(scaler)[:40])
    skipped, scale = scaler.get("skipped"), scaler.get("scale")
    if type(skipped) is not int or not 0 <= skipped <= steps:
        raise refusal(path, "scaler.skipped", f"be from 0 to {steps}, the steps so far", repr(skipped)[:40])
    if type(scale) is not float or not scale > 0:
        raise refusal(path, "scaler.scale", "be a number above 0", repr(scale)[:40])
    return skipped


def _check_optimizer(path: Path, state: dict[str, Any], optimizer: Optimizer) -> None:
    """Raise ValueError unless the state is of the same parameters, with moments of their shape and dtype."""
    groups = optimizer.state_dict()["param_groups"]
    found = [group.get("params") for group in state.get("param_groups", ())]
    if found != [group["params"] for group in groups]:
        ours = [len(group["params"]) for group in groups]
        raise refusal(path, "optimizer.param_groups", f"be groups of {ours} parameters", f"{found!r:.60}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state.get("state", {}).items():
        if number not in range(len(parameters)):
            raise refusal(path, "optimizer.state", f"be of parameters 0 to {len(parameters) - 1}", number)
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.ndim:  # a count of steps has no shape
                _check_like(path, f"optimizer.state.{number}.{name}", moment, parameters[number])


def _check_like(path: Path, name: str, found: Tensor, ours: Tensor) -> None:
    if (found.shape, found.dtype) != (ours.shape, ours.dtype):
        raise refusal(path, name, f"be {tuple(ours.shape)} {ours.dtype}", f"{tuple(found.shape)} {found.dtype}")


def refusal(path: Path, entry: str, rule: str, found: Any) -> ValueError:
    """Return the error that names the entry and says how to go on."""
    return ValueError(
        f"{path}: the entry {entry} must {rule}, got {found}: put an earlier copy of the file in its place, or remove "
        "it to train from the start"
    )


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of everything in nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(f"{name}.{key}" if name else str(key), part)
    else:
        yield name, value


def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield dotted name and value of every tensor in nested dicts and lists."""
    return ((key, leaf) for key, leaf in leaves(name, value) if isinstance(leaf, Tensor))


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield dotted name and value of every number in nested dicts and lists."""
    return ((key, leaf) for key, leaf in leaves(name, value) if isinstance(leaf, int | float))
