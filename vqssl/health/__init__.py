"""Codebook health: examine the codebooks of a module or a checkpoint, and say what to do.

``python -m vqssl.health CHECKPOINT`` shows it in a terminal. The table needs rich and the picture matplotlib, both in
the extra ``health``; importing this package imports neither.

A codebook passes through one file after another: ``sources`` finds it, ``examine`` measures it with ``measures``, has
``verdict`` judge the measures and returns the report, which ``show`` prints and ``callbacks`` logs.

>>> import vqssl, vqssl.health
>>> report = vqssl.health.examine(vqssl.MultiScaleQuantizer([16, 32], codebook_size=8, dim=4))
>>> list(report), report["codebooks.0"].findings[0].says
(['codebooks.0', 'codebooks.1'], 'not trained yet: the codes are random')
"""

from vqssl.health.callbacks import lightning_callback, log_health, scalars
from vqssl.health.examine import CodebookHealth, examine
from vqssl.health.gallery import code_patches, draw_codes
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
from vqssl.health.show import draw, show
from vqssl.health.sources import find_codebooks, read_checkpoint
from vqssl.health.verdict import Finding

__all__ = [
    "examine",
    "CodebookHealth",
    "Finding",
    "find_codebooks",
    "read_checkpoint",
    "show",
    "draw",
    "draw_codes",
    "code_patches",
    "scalars",
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
