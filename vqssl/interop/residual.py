"""Residual quantisers of encodec, Xcodec and vector-quantize-pytorch: all levels at once."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vqssl.codebook import EMACodebook
from vqssl.interop.codebook_formats import codebook_prefixes
from vqssl.interop.encodec import codebook_from_encodec
from vqssl.interop.state_dicts import check_state, listed
from vqssl.interop.vector_quantize_pytorch import codebook_from_vector_quantize_pytorch
from vqssl.residual import ResidualQuantizer

__all__ = [
    "residual_quantizer_from_encodec",
    "residual_quantizer_from_vector_quantize_pytorch",
    "residual_quantizer_of",
]


def residual_quantizer_from_encodec(
    state: Mapping[str, Any], prefix: str = "", *, seed: int = 0, level_dropout: float = 0.0, **options: Any
) -> ResidualQuantizer:
    """Return a :class:`~vqssl.ResidualQuantizer` with all levels of a residual quantiser of encodec, bit for bit.

    Codes, counts and sums are those of :func:`codebook_from_encodec`, whose notes and defaults hold for each level. The
    output is the sum of codes in their order, to the bit. Two things differ in training: our commitment loss is the sum
    over levels, theirs the mean; and ours has a gradient at every level, theirs (in 0.1.1) only at the first. For the
    way back call :func:`codebook_to_encodec` for each level, with its prefix and ``like=state``.

    Args:
        state: of an encodec model or of a quantiser in it; Meta's, audiocraft's or transformers'. Or of Xcodec in
            transformers, whose codebooks have the same names.
        prefix: in front of the names of all levels, such as ``"quantizer."``; needed where the state has others too.
        seed: level l draws from ``seed + l``.
        level_dropout: as for :class:`~vqssl.ResidualQuantizer`.
        **options: what :class:`~vqssl.EMACodebook` takes by name, but for ``metric``.

    Returns:
        The quantiser in training mode, levels in the order of their numbers.

    Raises:
        TypeError: ``state`` is not a state dict, or a tensor is not floating.
        ValueError: there is no level under ``prefix``, they belong to more than one quantiser, or what
            :func:`codebook_from_encodec` refuses.

    >>> import torch
    >>> layer = {"embed": torch.randn(8, 4), "cluster_size": torch.full((8,), 3.0), "inited": torch.tensor([1.0])}
    >>> layer["embed_avg"] = 3 * layer["embed"]
    >>> state = {f"quantizer.layers.{n}.codebook.{name}": value for n in range(2) for name, value in layer.items()}
    >>> residual_quantizer_from_encodec(state).lookup(torch.tensor([5, 5])).equal(2 * layer["embed"][5])
    True
    """
    check_state("state", state)
    prefixes = codebook_prefixes(state)
    return residual_quantizer_of(codebook_from_encodec, prefixes, state, prefix, seed, level_dropout, options)


def residual_quantizer_from_vector_quantize_pytorch(
    state: Mapping[str, Any], prefix: str = "", *, seed: int = 0, level_dropout: float = 0.0, **options: Any
) -> ResidualQuantizer:
    """Return a :class:`~vqssl.ResidualQuantizer` with all levels of a ``ResidualVQ``, bit for bit.

    Codes, counts and sums are those of :func:`codebook_from_vector_quantize_pytorch`, whose notes and defaults hold for
    each level. ``project_in`` and ``project_out`` of theirs stay in your model. The gradient differs: theirs adds up
    the gradients of all levels, L in all; ours is 1, straight through unless you give another ``estimator``.

    Args:
        state: a state dict that holds the levels.
        prefix: what leads to the levels of one quantiser in it.
        seed: level l, from 0, draws from ``seed + l``.
        level_dropout: see :class:`~vqssl.ResidualQuantizer`.
        **options: of :class:`~vqssl.EMACodebook`, for all levels. The metric is euclidean.

    Raises:
        TypeError: ``state`` is not a mapping.
        ValueError: there are no levels under the prefix, or those of several quantisers; the levels differ in width; or
            a level cannot be read.

    >>> import torch
    >>> layer = {"embed": torch.randn(1, 8, 4), "cluster_size": torch.ones(1, 8), "initted": torch.tensor(True)}
    >>> layer["embed_avg"] = layer["embed"]
    >>> state = {f"layers.{n}._codebook.{name}": value for n in range(3) for name, value in layer.items()}
    >>> residual_quantizer_from_vector_quantize_pytorch(state).num_levels
    3
    """
    options = {"estimator": "straight_through", **options}
    check_state("state", state)
    prefixes = codebook_prefixes(state)
    return residual_quantizer_of(
        codebook_from_vector_quantize_pytorch, prefixes, state, prefix, seed, level_dropout, options
    )


def residual_quantizer_of(
    reader: Callable[..., EMACodebook],
    found: Sequence[str],
    state: Mapping[str, Any],
    prefix: str,
    seed: int,
    level_dropout: float,
    options: Mapping[str, Any],
) -> ResidualQuantizer:
    """Return a residual quantiser of the levels under a prefix.

    Args:
        reader: returns the codebook at a prefix.
        found: the prefixes of all codebooks in the state.
        state: a state dict.
        prefix: in front of the names of all levels.
        seed: level l draws from ``seed + l``.
        level_dropout: of the quantiser.
        options: for the reader.

    Raises:
        ValueError: there is no level under ``prefix``, they belong to more than one quantiser, or they differ in width.
    """
    if options.get("metric", "euclidean") != "euclidean":
        raise ValueError(f"metric must be 'euclidean' for residual levels, got {options['metric']!r}: leave it out")
    prefixes = [each for each in found if each.startswith(prefix)]
    _check_one_quantizer(prefixes, prefix, found or list(state))
    prefixes.sort(key=_numbers)  # safetensors sorts names as text: 10 before 2
    levels = [reader(state, each, seed=seed + level, **options) for level, each in enumerate(prefixes)]
    first = levels[0]
    quantizer = ResidualQuantizer(
        codebook_size=[level.codebook_size for level in levels],
        dim=first.dim,
        num_levels=len(levels),
        level_dropout=level_dropout,
        seed=seed,
        device=first.embed.device,
        dtype=first.embed.dtype,
        decay=first.decay,
        eps=first.eps,
        commitment_weight=first.commitment_weight,
        ema=first.ema,
        initialization=first.initialization,
        revival=first.revival,
        estimator=first.estimator,
        precision=first.precision,
        process_group=first.process_group,
    )
    for own, read in zip(quantizer.codebooks, levels, strict=True):
        own.load_state_dict(read.state_dict())
    return quantizer


def _numbers(prefix: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prefix)]


def _check_one_quantizer(prefixes: Sequence[str], prefix: str, found: Sequence[str]) -> None:
    if not prefixes:
        raise ValueError(
            f"state must hold codebooks under prefix {prefix!r}, got {listed(found)}: give "
            "the prefix of one residual quantiser in it"
        )
    # The levels of one quantiser differ in the last number alone.
    parents = list(dict.fromkeys(re.sub(r"\d+(?!.*\d)", "N", each) for each in prefixes))
    if len(parents) > 1:
        raise ValueError(
            f"prefix must lead to the levels of one residual quantiser, got {prefix!r}, under which there are "
            f"{listed(parents)}: give one of these up to the number of its level"
        )
