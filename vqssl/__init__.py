"""Discrete (vector-quantised) self-supervision for PyTorch: parts that can each be used alone."""

__version__ = "0.1.0"

from vqssl import functional
from vqssl.codebook import EMACodebook
from vqssl.fusion import SERFFusion
from vqssl.initialization import KMeansInit, RandomInit, SampleInit
from vqssl.multiscale import MultiScaleQuantizer
from vqssl.objective import DiSSECTObjective
from vqssl.projection import LearnedProjection, OrthogonalProjection
from vqssl.revival import BatchRevival, NoRevival
from vqssl.teacher import MomentumTeacher
from vqssl.types import CodebookUsage, DiSSECTLoss, MultiScaleQuantized, Quantized

# In the order in which data meets them.
__all__ = [
    "EMACodebook",
    "MultiScaleQuantizer",
    "SERFFusion",
    "MomentumTeacher",
    "DiSSECTObjective",
    "RandomInit",
    "SampleInit",
    "KMeansInit",
    "BatchRevival",
    "NoRevival",
    "OrthogonalProjection",
    "LearnedProjection",
    "Quantized",
    "MultiScaleQuantized",
    "DiSSECTLoss",
    "CodebookUsage",
    "functional",
    "__version__",
]
