"""Keyword options of a codebook, for quantisers that pass them on."""

from typing import NotRequired, TypedDict

from torch.distributed import ProcessGroup

from vqssl.functional.ema_rules import EMAName, EMARule
from vqssl.functional.estimators import Estimator, EstimatorName
from vqssl.functional.metrics import Metric, MetricName
from vqssl.functional.search import PrecisionName
from vqssl.initialization import Initialization
from vqssl.revival import Revival

__all__ = ["CodebookOptions"]


class CodebookOptions(TypedDict):
    """Keyword options of :class:`vqssl.EMACodebook`, for quantisers that pass them on."""

    decay: NotRequired[float]
    eps: NotRequired[float]
    metric: NotRequired[MetricName | Metric]
    commitment_weight: NotRequired[float]
    ema: NotRequired[EMAName | EMARule]
    initialization: NotRequired[Initialization | None]
    revival: NotRequired[Revival | None]
    estimator: NotRequired[EstimatorName | Estimator]
    precision: NotRequired[PrecisionName]
    process_group: NotRequired[ProcessGroup | None]
