"""Codebook health: what codebooks are doing, from a module or a checkpoint, and what to do about it.

``python -m vqssl.health CHECKPOINT`` shows it in a terminal; the table wants rich and the picture matplotlib, both in
the extra ``health``. Importing this package imports neither.

>>> import vqssl, vqssl.health
>>> report = vqssl.health.examine(vqssl.MultiScaleQuantizer([16, 32], codebook_size=8, dim=4))
>>> list(report), report["codebooks.0"].findings[0].says
(['codebooks.0', 'codebooks.1'], 'not trained yet: the codes are random')
"""

from vqssl.health.callbacks import lightning_callback, log_health
from vqssl.health.examination import examine
from vqssl.health.finding import Finding
from vqssl.health.measures import (
    code_spread,
    distinct_places,
    drift,
    dying_codes,
    effective_dimension,
    even_use,
    nearest_distances,
    spectrum,
    turnover,
)
from vqssl.health.picture import draw
from vqssl.health.report import CodebookHealth
from vqssl.health.sources import find_codebooks, read_checkpoint
from vqssl.health.table import show

__all__ = [
    "examine",
    "CodebookHealth",
    "Finding",
    "find_codebooks",
    "read_checkpoint",
    "show",
    "draw",
    "log_health",
    "lightning_callback",
    "dying_codes",
    "even_use",
    "code_spread",
    "spectrum",
    "effective_dimension",
    "nearest_distances",
    "distinct_places",
    "drift",
    "turnover",
]
