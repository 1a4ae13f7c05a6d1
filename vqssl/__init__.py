"""Discrete (vector-quantised) self-supervision for PyTorch: parts that can each be used alone."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.2.0"

from vqssl import functional
from vqssl.centring import TargetCentring
from vqssl.channels_first import ChannelsFirst
from vqssl.code_targets import AnchorTarget, BagTarget, PlaceTarget
from vqssl.codebook import EMACodebook
from vqssl.fitting import CodebookFit, fit_codebook
from vqssl.fusion import SERFFusion
from vqssl.initialization import KMeansInit, RandomInit, SampleInit
from vqssl.multiscale import MultiScaleQuantizer
from vqssl.objective import DiSSECTObjective
from vqssl.place_centring import PlaceCentring
from vqssl.prediction import CodePrediction
from vqssl.product import ProductQuantizer
from vqssl.projection import LearnedProjection, OrthogonalProjection
from vqssl.random_projection import RandomProjectionQuantizer
from vqssl.residual import ResidualQuantizer
from vqssl.revival import BatchRevival, NoRevival
from vqssl.saving import load, save
from vqssl.teacher import MomentumTeacher
from vqssl.tokenising import TokenFiles, tokens
from vqssl.types import (
    CodebookUsage,
    CodePredictionLoss,
    DiSSECTLoss,
    MultiCodeQuantized,
    MultiScaleQuantized,
    Quantized,
)
from vqssl.update import update_codebooks

if TYPE_CHECKING:
    from vqssl import experimental, health, interop

# In the order in which data meets them.
__all__ = [
    "EMACodebook",
    "MultiScaleQuantizer",
    "ResidualQuantizer",
    "ProductQuantizer",
    "RandomProjectionQuantizer",
    "ChannelsFirst",
    "SERFFusion",
    "MomentumTeacher",
    "CodePrediction",
    "TargetCentring",
    "PlaceCentring",
    "DiSSECTObjective",
    "update_codebooks",
    "fit_codebook",
    "save",
    "load",
    "tokens",
    "RandomInit",
    "SampleInit",
    "KMeansInit",
    "BatchRevival",
    "NoRevival",
    "AnchorTarget",
    "BagTarget",
    "PlaceTarget",
    "OrthogonalProjection",
    "LearnedProjection",
    "Quantized",
    "MultiScaleQuantized",
    "MultiCodeQuantized",
    "CodePredictionLoss",
    "DiSSECTLoss",
    "CodebookUsage",
    "CodebookFit",
    "TokenFiles",
    "functional",
    "health",
    "interop",
    "experimental",
    "__version__",
]


def __getattr__(name: str) -> ModuleType:
    # Loaded on first use: few programs need them, and `import vqssl` stays fast.
    if name in ("experimental", "health", "interop"):
        return importlib.import_module(f"vqssl.{name}")
    raise AttributeError(f"module 'vqssl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
