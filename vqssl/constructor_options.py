"""Constructor options of modules as they are now: with them, and a state, the same module can be built again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from vqssl.centring import TargetCentring
from vqssl.channels_first import ChannelsFirst
from vqssl.code_heads import CODE_HEADS
from vqssl.code_targets import CODE_TARGETS
from vqssl.codebook import EMACodebook
from vqssl.functional.ema_rules import EMA_RULES
from vqssl.functional.estimators import ESTIMATORS
from vqssl.functional.serf_operators import OPERATORS
from vqssl.fusion import SERFFusion
from vqssl.multiscale import MultiScaleQuantizer
from vqssl.place_centring import PlaceCentring
from vqssl.prediction import CodePrediction
from vqssl.product import ProductQuantizer
from vqssl.projection import LearnedProjection, OrthogonalProjection
from vqssl.random_projection import INPUT_NORMS, RandomProjectionQuantizer
from vqssl.residual import ResidualQuantizer

__all__ = ["constructor_options", "has_constructor_options"]


def has_constructor_options(module: nn.Module) -> bool:
    """Return True if :func:`constructor_options` knows the class of a module; a subclass is another class.

    >>> has_constructor_options(EMACodebook(codebook_size=8, dim=4)), has_constructor_options(nn.Linear(2, 2))
    (True, False)
    """
    return type(module) in _READERS


def constructor_options(module: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that build a module like this one, with the options that it has now.

    A policy that has a name is that name, others are the functions or objects themselves. Device, dtype and process
    group are left out: they belong to a run.

    Args:
        module: of a class that :func:`has_constructor_options` knows.

    Raises:
        TypeError: it is of another class.
        ValueError: codebooks or projections of one quantiser were changed so that no constructor gives them.

    >>> codebook = EMACodebook(codebook_size=8, dim=4, decay=0.9)
    >>> options = constructor_options(codebook)
    >>> options["decay"], options["ema"], options["revival"]
    (0.9, 'count_weighted', BatchRevival(threshold=0.1))
    """
    if not has_constructor_options(module):
        names = ", ".join(kind.__name__ for kind in _READERS)
        raise TypeError(f"module must be one of {names}, and no subclass, got {type(module).__name__}")
    return _READERS[type(module)](module)


def _name_in(table: Mapping[Any, Any], choice: Any) -> Any:
    """Return the name of a policy that the table has, or the policy."""
    return next((name for name, policy in table.items() if policy is choice), choice)


def _of_codebook(codebook: EMACodebook) -> dict[str, Any]:
    return {
        "codebook_size": codebook.codebook_size,
        "dim": codebook.dim,
        **_passed_on(codebook),
        "metric": codebook.metric,
        "estimator": _name_in(ESTIMATORS, codebook.estimator),
        "seed": codebook.seed,
    }


def _passed_on(codebook: EMACodebook) -> dict[str, Any]:
    """Return the options that quantisers of codebooks pass on as they are."""
    return {
        "decay": codebook.decay,
        "eps": codebook.eps,
        "commitment_weight": codebook.commitment_weight,
        "ema": _name_in(EMA_RULES, codebook.ema),
        "initialization": codebook.initialization,
        "revival": codebook.revival,
        "precision": codebook.precision,
    }


def _shared(codebooks: Sequence[EMACodebook]) -> dict[str, Any]:
    """Return the options that all codebooks of a quantiser have."""
    first, *others = [_of_codebook(codebook) for codebook in codebooks]
    for number, other in enumerate(others, 1):
        _check_equal("codebook", number, first, other, except_for=("codebook_size", "seed"))
        _check_equal("codebook", number, {"seed": first["seed"] + number}, {"seed": other["seed"]})
    return {name: value for name, value in first.items() if name not in ("codebook_size", "dim")}


def _check_equal(
    what: str, number: int, expected: Mapping[str, Any], found: Mapping[str, Any], except_for: Sequence[str] = ()
) -> None:
    for name, value in expected.items():
        if name not in except_for and found[name] != value:
            raise ValueError(
                f"all parts of a quantiser must have the options of one constructor, got {name} {found[name]} in "
                f"{what} {number} where it gives {value}: save the codebooks one by one"
            )


def _of_multiscale(quantizer: MultiScaleQuantizer) -> dict[str, Any]:
    codebooks = [quantizer.codebook(scale) for scale in range(1 if quantizer.shared else quantizer.num_scales)]
    options = _shared(codebooks)
    return {
        "in_channels": list(quantizer.in_channels),
        "codebook_size": _size_of(codebooks, quantizer.shared),
        "dim": quantizer.dim,
        "shared": quantizer.shared,
        "channels_last": quantizer.channels_last,
        "projection": _projection(quantizer.projections, options["seed"]),
        **options,
    }


def _size_of(codebooks: Sequence[EMACodebook], shared: bool) -> int | list[int]:
    sizes = [codebook.codebook_size for codebook in codebooks]
    return sizes[0] if shared else sizes


def _projection(projections: nn.ModuleList, seed: int) -> Any:
    """Return the name of the projection; that of one scale which no name gives is returned as it is."""
    names = {OrthogonalProjection: "orthogonal", LearnedProjection: "learned", nn.Identity: "identity"}
    first = names.get(type(projections[0]))
    for scale, projection in enumerate(projections):
        name = names.get(type(projection))
        if name is None:
            return projection
        _check_equal("projection", scale, {"projection": first}, {"projection": name})
        if isinstance(projection, OrthogonalProjection):
            _check_equal("projection", scale, {"seed": seed + scale}, {"seed": projection.seed})
    return first


def _of_residual(quantizer: ResidualQuantizer) -> dict[str, Any]:
    codebooks = [quantizer.codebook(level) for level in range(quantizer.num_levels)]
    options = _shared(codebooks)
    _check_equal("quantiser", 0, {"seed": quantizer.seed}, options)
    return {
        "codebook_size": _size_of(codebooks, False),
        "dim": quantizer.dim,
        "num_levels": quantizer.num_levels,
        "level_dropout": quantizer.level_dropout,
        "min_levels": quantizer.min_levels,
        **options,
        "estimator": _name_in(ESTIMATORS, quantizer.estimator),
    }


def _of_product(quantizer: ProductQuantizer) -> dict[str, Any]:
    codebooks = [quantizer.codebook(group) for group in range(1 if quantizer.shared else quantizer.num_groups)]
    return {
        "codebook_size": _size_of(codebooks, quantizer.shared),
        "dim": quantizer.dim,
        "num_groups": quantizer.num_groups,
        "shared": quantizer.shared,
        **_shared(codebooks),
    }


def _of_random_projection(quantizer: RandomProjectionQuantizer) -> dict[str, Any]:
    return {
        "in_dim": quantizer.in_dim,
        "codebook_size": quantizer.codebook_size,
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "norm_input": _name_in(INPUT_NORMS, quantizer.norm_input),
        "seed": quantizer.seed,
    }


def _of_channels_first(module: ChannelsFirst[Any]) -> dict[str, Any]:
    return {"quantizer": module.quantizer}


def _of_fusion(fusion: SERFFusion) -> dict[str, Any]:
    return {
        "dim": fusion.dim,
        "num_scales": fusion.num_scales,
        "operator": _name_in(OPERATORS, fusion.operator),
        "residual": fusion.residual,
        "hidden_dim": fusion.hidden_dim,
        "channels_last": fusion.channels_last,
    }


def _of_prediction(prediction: CodePrediction) -> dict[str, Any]:
    centring = prediction.centring
    options: dict[str, Any] = {
        "in_dim": list(prediction.in_dims) if prediction.takes_maps else prediction.in_dims[0],
        "quantizer": list(prediction.codebook_sizes),
        "target": _name_in(CODE_TARGETS, prediction.target),
        "head": _name_in(CODE_HEADS, prediction.build_head),
        "hidden_dim": prediction.hidden_dim,
        "dim": prediction.dim,
        "channels_last": prediction.channels_last,
    }
    return options if centring is None else {**options, "centring": centring.how, "centre_momentum": centring.momentum}


def _of_centring(centring: TargetCentring) -> dict[str, Any]:
    return {"widths": list(centring.widths), "how": centring.how, "momentum": centring.momentum}


def _of_place_centring(centring: PlaceCentring) -> dict[str, Any]:
    return {
        "in_channels": centring.in_channels,
        "num_cells": centring.num_cells,
        "momentum": centring.momentum,
    }


_READERS: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    EMACodebook: _of_codebook,
    MultiScaleQuantizer: _of_multiscale,
    ResidualQuantizer: _of_residual,
    ProductQuantizer: _of_product,
    RandomProjectionQuantizer: _of_random_projection,
    ChannelsFirst: _of_channels_first,
    SERFFusion: _of_fusion,
    CodePrediction: _of_prediction,
    TargetCentring: _of_centring,
    PlaceCentring: _of_place_centring,
}
