"""Health while training: scalars for TensorBoard-like writers, and a callback for Lightning under either name."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from vqssl.checks import check_positive_int
from vqssl.health.examination import examine
from vqssl.health.finding import LEVELS
from vqssl.health.report import CodebookHealth
from vqssl.health.sources import find_codebooks

__all__ = ["ScalarWriter", "lightning_callback", "log_health", "scalars"]

LOGGED = (
    "perplexity", "usage", "dead", "dying", "effective_dimension", "nearest_median", "near_duplicates", "spread",
    "tokens_per_step", "drift", "turnover",
)  # fmt: skip
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""One project under two names, whose classes know nothing of each other."""


class ScalarWriter(Protocol):
    """What :func:`log_health` asks of a writer; ``torch.utils.tensorboard.SummaryWriter`` has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


def scalars(reports: Mapping[str, CodebookHealth], tag: str = "codebook") -> dict[str, float]:
    """The numbers worth a curve, as ``tag/name/measure``; what could not be measured is left out.

    ``level`` is 0 for ok, 1 for look, 2 for act.

    >>> import vqssl
    >>> scalars(examine(vqssl.EMACodebook(8, 4)))["codebook/codebook/level"]
    1.0
    """
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
    """Examine the codebooks of a module and write their measures as scalars.

    Call it every few hundred steps, on one rank: it waits for the device.

    Args:
        writer: anything with ``add_scalar(tag, value, step)``, as a SummaryWriter.
        module: that holds the codebooks.
        step: of the curve.
        since: what the call before returned; gives drift and turnover.
        tag: what the names begin with.

    Returns:
        The reports, as of :func:`vqssl.health.examine`.

    Raises:
        TypeError: ``writer`` has no ``add_scalar``.
        ValueError: what :func:`vqssl.health.examine` refuses.

    >>> import vqssl
    >>> class Writer:
    ...     def add_scalar(self, tag, value, step):
    ...         if tag.endswith("perplexity"):
    ...             print(tag, value, step)
    >>> reports = log_health(Writer(), vqssl.EMACodebook(8, 4), 100)
    codebook/codebook/perplexity 8.0 100
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            f"writer must have add_scalar(tag, value, step), got {type(writer).__name__}: write "
            "torch.utils.tensorboard.SummaryWriter(folder)"
        )
    reports = examine(module, since=since)
    for name, value in scalars(reports, tag).items():
        writer.add_scalar(name, value, step)
    return reports


def lightning_callback(every_n_epochs: int = 1, *, tag: str = "codebook") -> Any:
    """A callback for a Lightning Trainer that logs the health of all codebooks after training epochs.

    It is of the ``Callback`` class of ``lightning``, of ``pytorch_lightning``, or of both: of whichever the program
    has imported, or else of the first that is installed. Rank 0 measures and logs, since codes are equal on all ranks;
    drift and turnover are those since the epoch logged before.

    Args:
        every_n_epochs: how often; counted from the first epoch.
        tag: what the names of the scalars begin with.

    Raises:
        TypeError: ``every_n_epochs`` is no int.
        ValueError: it is below 1.
        ImportError: neither package is installed.

    >>> lightning_callback(0)
    Traceback (most recent call last):
    ValueError: every_n_epochs must be at least 1, got 0
    """
    check_positive_int("every_n_epochs", every_n_epochs)
    bases = tuple(importlib.import_module(package).Callback for package in _packages())
    made = type("HealthCallback", (_Health, *dict.fromkeys(bases)), {"__module__": __name__})
    return made(every_n_epochs, tag)


def _packages() -> list[str]:
    used = [package for package in PACKAGES if package in sys.modules]
    if used:
        return used
    for package in PACKAGES:
        if importlib.util.find_spec(package.partition(".")[0]) is not None:
            return [package]
    raise ImportError(
        "lightning_callback needs Lightning: pip install lightning, or call log_health(writer, module, step)"
    )


class _Health:
    """What the callback does, whoever's class it is."""

    def __init__(self, every_n_epochs: int, tag: str) -> None:
        super().__init__()
        self.every_n_epochs = every_n_epochs
        self.tag = tag
        self.reports: dict[str, CodebookHealth] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        find_codebooks(pl_module)  # says that there is none now, not after an epoch
        self.reports = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch % self.every_n_epochs or not trainer.is_global_zero:
            return
        self.reports = examine(pl_module, since=self.reports)
        logged = scalars(self.reports, self.tag)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)

    def __reduce__(self) -> Any:  # the class is made at run time: pickle finds the function
        return _made, (self.every_n_epochs, self.tag)


def _made(every_n_epochs: int, tag: str) -> Any:
    return lightning_callback(every_n_epochs, tag=tag)
