"""Codebooks of Mimi: transformers' ``MimiModel``, and Kyutai's moshi."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqssl.checks import check_floating
from vqssl.codebook import EMACodebook
from vqssl.initialization import KMeansInit
from vqssl.interop.codebook_formats import HeadState, build_codebook
from vqssl.interop.residual import residual_quantizer_of
from vqssl.interop.state_dicts import check_state, listed
from vqssl.residual import ResidualQuantizer

__all__ = ["codebook_from_mimi", "residual_quantizer_from_mimi"]

SUMS = ("embed_sum", "embedding_sum")
FLAGS = ("initialized", "_initialized")
"""The name in transformers, and that in moshi."""
SMALLEST_COUNT = 1e-5
"""Epsilon of theirs: a smaller count divides as this one."""


def codebook_from_mimi(state: Mapping[str, Any], prefix: str | None = None, **options: Any) -> EMACodebook:
    """Return an :class:`~vqssl.EMACodebook` with the counts and sums of one codebook of Mimi, and its codes.

    Mimi saves no codes: they are sums over counts, computed here as there, to the bit. Options that you leave out:
    ``decay=0.99``, ``eps=1e-5``, no revival, ``commitment_weight=1.0``. Training goes on by our rule, which smooths
    counts where theirs clamps them; the two differ for counts near 0.

    Args:
        state: of transformers' ``MimiModel``, of moshi's, or of a quantiser in one.
        prefix: in front of the names, such as
            ``"quantizer.semantic_residual_vector_quantizer.layers.0.codebook."``; None if there is only one.
        **options: what :class:`~vqssl.EMACodebook` takes by name, but for ``metric``, which is euclidean.

    Returns:
        The codebook ``(K, D)`` in training mode.

    Raises:
        TypeError: ``state`` is not a state dict, or a tensor is not floating.
        ValueError: no codebook, several and no ``prefix``, shapes that do not belong together, or values that are not
            finite.

    >>> import torch
    >>> state = {"initialized": torch.tensor([1.0]), "cluster_usage": torch.full((8,), 4.0)}
    >>> state["embed_sum"] = torch.randn(8, 2)
    >>> codebook_from_mimi(state).embed.equal(state["embed_sum"] / 4)
    True
    """
    check_state("state", state)
    found = _prefixes(state)
    if not found:
        raise ValueError(
            f"state must hold a codebook of Mimi, names that end in 'cluster_usage' and 'embed_sum', got "
            f"{listed(state)}: codebook_from_encodec where they are 'cluster_size' and 'embed', "
            "codebook_from_embedding for a plain table of codes, or codebook.set_codes_(codes)"
        )
    if prefix not in found and (prefix is not None or len(found) > 1):
        received = "none" if prefix is None else repr(prefix)
        raise ValueError(f"prefix must name one of the codebooks in this state, {listed(found)}, got {received}")
    return build_codebook(_read(state, found[0] if prefix is None else prefix), "euclidean", _with_defaults(options))


def residual_quantizer_from_mimi(
    state: Mapping[str, Any], prefix: str = "", *, seed: int = 0, level_dropout: float = 0.0, **options: Any
) -> ResidualQuantizer:
    """Return a :class:`~vqssl.ResidualQuantizer` with all levels of one residual quantiser of Mimi.

    Mimi has two, and adds their outputs: a semantic one of one level, and an acoustic one. ``input_proj`` and
    ``output_proj`` of each stay in your model. The codes are those of :func:`codebook_from_mimi`.

    Args:
        state: of transformers' ``MimiModel``, of moshi's, or of a quantiser in one.
        prefix: in front of the names of all levels: ``"quantizer.semantic_residual_vector_quantizer."`` or
            ``"quantizer.acoustic_residual_vector_quantizer."``; in moshi ``"quantizer.rvq_first."`` or
            ``"quantizer.rvq_rest."``.
        seed: level l draws from ``seed + l``.
        level_dropout: as for :class:`~vqssl.ResidualQuantizer`.
        **options: what :class:`~vqssl.EMACodebook` takes by name, but for ``metric``.

    Returns:
        The quantiser in training mode, levels in the order of their numbers.

    Raises:
        TypeError: ``state`` is not a state dict, or a tensor is not floating.
        ValueError: there is no level under ``prefix``, they belong to more than one quantiser, or what
            :func:`codebook_from_mimi` refuses.

    >>> import torch
    >>> layer = {"initialized": torch.tensor([1.0]), "cluster_usage": torch.ones(8), "embed_sum": torch.randn(8, 2)}
    >>> state = {f"layers.{n}.codebook.{name}": value for n in range(3) for name, value in layer.items()}
    >>> residual_quantizer_from_mimi(state).num_levels
    3
    """
    check_state("state", state)
    return residual_quantizer_of(codebook_from_mimi, _prefixes(state), state, prefix, seed, level_dropout, options)


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "decay": 0.99,
        "eps": 1e-5,
        "commitment_weight": 1.0,
        "revival": None,
        "initialization": KMeansInit(iterations=50, few_tokens="sample"),
    }
    return {**defaults, **options}


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    ends = [name.removesuffix("cluster_usage") for name in state if f".{name}".endswith(".cluster_usage")]
    return [prefix for prefix in ends if any(prefix + name in state for name in SUMS)]


def _read(state: Mapping[str, Any], prefix: str) -> HeadState:
    sums = next(state[prefix + name] for name in SUMS if prefix + name in state)
    counts = state[prefix + "cluster_usage"]
    flag = next((state[prefix + name] for name in FLAGS if prefix + name in state), True)
    for name, tensor in (("sums", sums), ("cluster_usage", counts)):
        check_floating(prefix + name, tensor)
    if sums.ndim != 2 or counts.shape != sums.shape[:1]:
        raise ValueError(
            f"{prefix}cluster_usage must be (K,) and the sums (K, D), got {tuple(counts.shape)} and "
            f"{tuple(sums.shape)}: write codebook.set_codes_(codes) for codes in another form"
        )
    _check_values(prefix, sums, counts)
    sums, counts = sums.detach(), counts.detach()
    codes = sums / counts.clamp(min=SMALLEST_COUNT)[:, None]
    return HeadState(codes, counts, sums, bool(torch.as_tensor(flag).bool().all()))


def _check_values(prefix: str, sums: Tensor, counts: Tensor) -> None:
    if not (sums.isfinite().all() and counts.isfinite().all() and (counts >= 0).all()):
        raise ValueError(
            f"counts and sums under {prefix!r} must be finite, and counts not negative: this state is damaged, load "
            "another"
        )
