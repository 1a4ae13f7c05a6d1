"""Learning rate and loss weights of each method, chosen once among equally many trials on a validation part.

A trial pretrains on a part of the training images and is scored by linear probes on the rest; test images have no part.
Trial 0 has the preset's values. The others multiply the learning rate, and the weights that a method names in `tuned`,
by factors from 1/4 to 4, which are the same for all methods.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc

from examples.pretrain.data import ImageSet, train_test_split
from examples.pretrain.divergence import Diverged
from examples.pretrain.finished_runs import digest
from examples.pretrain.protocols.linear import probe_encoder
from examples.pretrain.records import kept_record, provenance, read_record, rounded, write_record
from examples.pretrain.train import Pretraining, Run

RANGE = 4.0
"""Largest factor, and one over the smallest."""


@dataclass(frozen=True)
class Parts:
    """The training images, cut in two: patients of one are not in the other."""

    fit: ImageSet
    validation: ImageSet


def validation_parts(train: ImageSet) -> Parts:
    """Return the training images in two parts, a quarter for validation."""
    free = replace(train, split=None)  # a named split has no test images left
    fit, validation = (free.subset(index) for index in train_test_split(free, seed=1))
    return Parts(fit, validation)


def factors(trial: int) -> tuple[float, float]:
    """Return the factors of learning rate and loss weights of a trial, spread evenly on a logarithmic scale.

    >>> [factors(trial) for trial in range(3)]
    [(1.0, 1.0), (0.5, 1.59), (2.0, 0.34)]
    """
    if trial == 0:
        return 1.0, 1.0
    where = qmc.Halton(2, scramble=False).random(trial + 2)[-1]
    lr, weight = (float(f"{RANGE ** (2 * each - 1):.3g}") for each in where)
    return lr, weight


def varied(config: Pretraining, trial: int) -> Pretraining:
    """Return the settings of a trial."""
    lr, weight = factors(trial)
    changes: dict[str, Any] = {}
    for name in getattr(config.options, "tuned", ()):
        value = getattr(config.options, name)
        changes[name] = (weight * value[0], *value[1:]) if isinstance(value, tuple) else weight * value
    optimization = replace(config.optimization, lr=lr * config.optimization.lr)
    return replace(config, options=replace(config.options, **changes), optimization=optimization)


def tuned_values(config: Pretraining) -> dict[str, Any]:
    """Return the values that trials choose, by name."""
    weights = {name: getattr(config.options, name) for name in getattr(config.options, "tuned", ())}
    return {"lr": config.optimization.lr, **weights}


def try_out(
    parts: Parts, config: Pretraining, trial: int, folder: Path, *, shares: tuple[float, ...], command: str
) -> dict[str, Any]:
    """Return the record of a trial: the one that `folder` holds, or that of a new run there.

    Args:
        parts: the images.
        config: the preset's settings of the method; :func:`varied` makes those of the trial.
        trial: its number.
        folder: of the trial, which keeps the record and the checkpoint of an unfinished run.
        shares: of the labels, of the probes whose AUC is averaged.
        command: for the record.

    Raises:
        ValueError: the folder holds a trial of other settings or images.
    """
    own = varied(config, trial)
    basis = {
        "config": {name: value for name, value in asdict(own).items() if name != "device"},
        "shares": list(shares),
        "images": [digest(parts.fit), digest(parts.validation)],
    }
    path = folder / "trial.json"
    kept = kept_record(path, basis)
    if kept is not None:
        return kept
    run = Run(parts.fit, own, folder)
    run.resume()
    auc: float | None = None  # of a run that diverged
    try:
        run.train(quiet=True)
        found = probe_encoder(run, run.method.encoder, parts.fit, parts.validation, fractions=shares, subsets=2)
        auc = float(np.mean([np.mean(values) for values in found.values()]))
    except Diverged:
        pass
    record = {
        **provenance(command, own.device),
        "kind": "comparison-trial",
        "method": own.method,
        "trial": trial,
        "chosen_among": tuned_values(own),
        "auc": rounded(auc),
        **basis,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_record(path, record)
    return read_record(path)


def best(trials: list[dict[str, Any]]) -> int:
    """Return the number of the trial with the highest AUC; of equal ones the first.

    Raises:
        ValueError: all trials diverged.

    >>> best([{"trial": 0, "auc": 0.6}, {"trial": 1, "auc": None}, {"trial": 2, "auc": 0.7}])
    2
    """
    scores = [-math.inf if trial["auc"] is None else trial["auc"] for trial in trials]
    if max(scores) == -math.inf:
        raise ValueError(
            f"all {len(trials)} trials of {trials[0]['method']} diverged: give more --trials, or a preset with a lower "
            "learning rate"
        )
    return int(trials[int(np.argmax(scores))]["trial"])
