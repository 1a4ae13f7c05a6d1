"""Log codebook health while training: scalars for any tracker, and a callback for Lightning."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from torch import nn

from vqssl.checks import check_positive_int
from vqssl.health.examine import CodebookHealth, check_reports, examine
from vqssl.health.sources import find_codebooks
from vqssl.health.verdict import LEVELS

__all__ = ["ScalarWriter", "lightning_callback", "log_health", "scalars"]

LOGGED = (
    "perplexity", "usage", "dead", "dying", "effective_dimension", "nearest_median", "near_duplicates", "spread",
    "tokens_per_step", "drift", "turnover",
)  # fmt: skip
LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
"""Two names of one project; the classes of one are not those of the other."""


class ScalarWriter(Protocol):
    """Writer for :func:`log_health`; ``torch.utils.tensorboard.SummaryWriter`` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Write one point of one curve."""


def scalars(reports: Mapping[str, CodebookHealth], tag: str = "codebook") -> dict[str, float]:
    """Return the measures that are worth a curve, under names ``tag/codebook/measure``.

    Any tracker that takes a dictionary can log them: ``wandb.log(scalars(examine(model)), step=step)``. Measures that
    are None are left out. ``level`` is 0 for ok, 1 for look and 2 for act.

    Args:
        reports: result of :func:`vqssl.health.examine`.
        tag: first part of the names.

    Returns:
        A float for each name.

    Raises:
        TypeError: ``reports`` are something else.

    >>> import vqssl
    >>> scalars(examine(vqssl.MultiScaleQuantizer([16], codebook_size=8, dim=4)))["codebook/codebooks.0/perplexity"]
    8.0
    """
    check_reports(reports)
    found: dict[str, float] = {}
    for name, report in reports.items():
        values = {measure: getattr(report, measure) for measure in LOGGED}
        values["level"] = LEVELS.index(report.level)
        found |= {f"{tag}/{name}/{measure}": float(value) for measure, value in values.items() if value is not None}
    return found


def log_health(
    writer: ScalarWriter,
    module: nn.Module,
    step: int,
    *,
    since: Mapping[str, CodebookHealth] | None = None,
    tag: str = "codebook",
) -> dict[str, CodebookHealth]:
    """Examine the codebooks of a module, and write their :func:`scalars` to a TensorBoard-like writer.

    Call it every few hundred steps and on one rank: it synchronises with the device.

    Args:
        writer: an object with ``add_scalar(tag, value, step)``, as a SummaryWriter.
        module: the module that holds the codebooks.
        step: position on the curves.
        since: result of the previous call; adds drift and turnover.
        tag: first part of the names.

    Returns:
        The reports, as :func:`vqssl.health.examine` returns them.

    Raises:
        TypeError: ``writer`` has no ``add_scalar``.
        ValueError: as :func:`vqssl.health.examine`.

    >>> import vqssl
    >>> class Writer:
    ...     def add_scalar(self, tag, value, step):
    ...         if tag.endswith("perplexity"):
    ...             print(tag, value, step)
    >>> reports = log_health(Writer(), vqssl.EMACodebook(codebook_size=8, dim=4), 100)
    codebook/codebook/perplexity 8.0 100
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            f"writer must have add_scalar(tag, value, step), got {type(writer).__name__}: write "
            "torch.utils.tensorboard.SummaryWriter(folder), or log scalars(examine(module)) yourself"
        )
    reports = examine(module, since=since)
    for name, value in scalars(reports, tag).items():
        writer.add_scalar(name, value, step)
    return reports


def lightning_callback(every_n_epochs: int = 1, *, tag: str = "codebook") -> Any:
    """Return a callback for a Lightning Trainer that logs the health of all codebooks after training epochs.

    It subclasses the ``Callback`` of whichever Lightning package is imported, ``lightning`` or ``pytorch_lightning``,
    or both; if none is imported, that of the first one installed. Rank 0 measures and logs, because codes are equal on
    all ranks. Drift and turnover are those since the epoch logged before.

    Args:
        every_n_epochs: interval, counted from the first epoch.
        tag: first part of the names of the scalars.

    Raises:
        TypeError: ``every_n_epochs`` is not an int.
        ValueError: it is below 1.
        ImportError: neither package is installed.

    >>> lightning_callback(0)
    Traceback (most recent call last):
    ValueError: every_n_epochs must be at least 1, got 0
    """
    check_positive_int("every_n_epochs", every_n_epochs)
    bases = tuple(importlib.import_module(package).Callback for package in _packages())
    callback = type("HealthCallback", (_HealthHooks, *dict.fromkeys(bases)), {"__module__": __name__})
    return callback(every_n_epochs, tag)


def _packages() -> list[str]:
    """Return the Lightning packages that are imported, or else the first one installed."""
    imported = [package for package in LIGHTNING if package in sys.modules]
    if imported:
        return imported
    for package in LIGHTNING:
        if importlib.util.find_spec(package.partition(".")[0]) is not None:
            return [package]
    raise ImportError(
        "lightning_callback needs Lightning: pip install lightning, or call log_health(writer, module, step)"
    )


class _HealthHooks:
    """Hooks of the callback, the same for either package."""

    def __init__(self, every_n_epochs: int, tag: str) -> None:
        super().__init__()
        self.every_n_epochs = every_n_epochs
        self.tag = tag
        self.reports: dict[str, CodebookHealth] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        find_codebooks(pl_module)  # raises now if there is none, not after an epoch
        self.reports = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch % self.every_n_epochs or not trainer.is_global_zero:
            return
        self.reports = examine(pl_module, since=self.reports)
        logged = scalars(self.reports, self.tag)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)

    def __reduce__(self) -> Any:  # the class is made at run time, so pickle needs the function that makes it
        return partial(lightning_callback, tag=self.tag), (self.every_n_epochs,)
