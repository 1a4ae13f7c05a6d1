"""Codebooks of other libraries: codes, running counts and sums under a prefix, and a flag."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqssl.checks import check_floating, policy_name
from vqssl.codebook import EMACodebook
from vqssl.functional.metrics import MetricName
from vqssl.interop.state_dicts import check_state, listed

__all__ = ["CodebookFormat", "HeadState", "codebook_prefixes"]


def codebook_prefixes(state: Mapping[str, Any]) -> list[str]:
    """Return where a state dict holds EMA codebooks of vector-quantize-pytorch or encodec, in the order of the state.

    Args:
        state: of any module that contains such codebooks.

    Returns:
        The prefixes of ``embed`` and ``cluster_size``, dot included; each is a ``prefix`` for the functions of this
        package. A codebook that several layers share is listed once for each layer.

    Raises:
        TypeError: ``state`` is not a state dict.

    >>> import torch
    >>> layer = {"_codebook.embed": torch.zeros(1, 8, 4), "_codebook.cluster_size": torch.ones(1, 8)}
    >>> codebook_prefixes({f"layers.{n}.{name}": value for n in range(2) for name, value in layer.items()})
    ['layers.0._codebook.', 'layers.1._codebook.']
    """
    check_state("state", state)
    found = [name.removesuffix("embed") for name in state if name == "embed" or name.endswith(".embed")]
    return [prefix for prefix in found if prefix + "cluster_size" in state]


class HeadState(NamedTuple):
    """One codebook of another library, without a heads axis."""

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initialized: bool


class CodebookFormat(NamedTuple):
    """Key names and layout of another library's codebook."""

    library: str
    flag: str
    heads: bool
    cure: str
    """What to write instead of a state that is not of this library."""

    def locate(self, state: Mapping[str, Any], prefix: str | None) -> str:
        """Return ``prefix`` if it names a codebook, or the prefix of the only one."""
        found = codebook_prefixes(state)
        if prefix in found:
            return str(prefix)
        if not found:
            raise ValueError(
                f"state must hold a codebook of {self.library}, names that end in 'embed' and 'cluster_size', got "
                f"{listed(state)}: {self.cure}; for a plain table of codes (K, D), codebook_from_embedding or "
                "codebook.set_codes_(codes)"
            )
        if prefix is not None:
            under = [name for name in state if name.startswith(prefix)]
            if under:
                raise ValueError(
                    f"prefix={prefix!r} must lead to a codebook of {self.library}, 'embed' and 'cluster_size', got "
                    f"{listed(name.removeprefix(prefix) for name in under)} there; codebooks are at {listed(found)}: "
                    "give one of these; for a plain table of codes (K, D), write codebook_from_embedding or "
                    "codebook.set_codes_(codes)"
                )
        if prefix is not None or len(found) > 1:
            received = "none" if prefix is None else repr(prefix)
            raise ValueError(
                f"prefix must name one of the codebooks in this state, {listed(found)}, got {received}: write "
                f"prefix={found[0]!r}, or load all with [... for prefix in codebook_prefixes(state)]"
            )
        return found[0]

    def read(self, state: Mapping[str, Any], prefix: str | None, metric: MetricName) -> list[HeadState]:
        """Return every head of one codebook, checked: views of the tensors in ``state``."""
        prefix = self.locate(state, prefix)
        inside = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
        names = ["embed", "cluster_size", "embed_avg", self.flag]
        # Cosine codebooks of older releases average the codes themselves and have no embed_avg.
        missing = [name for name in names if name not in inside and not (name == "embed_avg" and metric == "cosine")]
        extra = [name for name in inside if name not in names]
        if missing or extra:
            raise ValueError(
                f"a codebook of {self.library} that follows the data by moving averages has {listed(names)}, got "
                f"{listed(inside)} under prefix {prefix!r}: {self.cure}"
            )
        for name, tensor in inside.items():
            if name != self.flag:
                check_floating(prefix + name, tensor)
        embed, cluster_size = inside["embed"].detach(), inside["cluster_size"].detach()
        embed_avg = inside["embed_avg"].detach() if "embed_avg" in inside else embed * cluster_size[..., None]
        most = 3 if self.heads else 2
        if not (2 <= embed.ndim <= most and cluster_size.shape == embed.shape[:-1] and embed_avg.shape == embed.shape):
            axes = "(K, D) or (heads, K, D)" if self.heads else "(K, D)"
            raise ValueError(
                f"{prefix}embed must be {axes}, embed_avg alike and cluster_size without the last axis, got "
                f"{tuple(embed.shape)}, {tuple(embed_avg.shape)} and {tuple(cluster_size.shape)}: {self.cure}"
            )
        _check_values(prefix, embed, cluster_size, embed_avg, metric)
        initialized = bool(torch.as_tensor(inside[self.flag]).all())
        if embed.ndim == 2:
            return [HeadState(embed, cluster_size, embed_avg, initialized)]
        return [HeadState(*head, initialized) for head in zip(embed, cluster_size, embed_avg, strict=True)]

    def write(
        self, codebooks: Sequence[EMACodebook], prefix: str | None, like: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        """Return the state of ``codebooks``, one a head, under this library's names."""
        for codebook in codebooks:
            if not isinstance(codebook, EMACodebook):
                raise TypeError(f"codebook must be a vqssl.EMACodebook, got {type(codebook).__name__}")
        _check_one_codebook(codebooks)
        if like is not None:
            check_state("like", like)
            prefix = self.locate(like, prefix)
        prefix = "_codebook." if prefix is None else prefix
        initialized = torch.stack([codebook.initialized for codebook in codebooks]).all()
        ours = {
            self.flag: initialized if self.heads else initialized.float().reshape(1),
            **{
                name: torch.stack([getattr(codebook, name).detach() for codebook in codebooks])
                for name in ("cluster_size", "embed_avg", "embed")
            },
        }
        if not self.heads:
            ours = {name: tensor if name == self.flag else tensor[0] for name, tensor in ours.items()}
        if like is None:
            return {prefix + name: tensor for name, tensor in ours.items()}
        fitted = {
            prefix + name: _fitted(prefix + name, tensor, like[prefix + name])
            for name, tensor in ours.items()
            if prefix + name in like
        }
        return {**like, **fitted}


def build_codebook(state: HeadState, metric: MetricName, options: dict[str, Any]) -> EMACodebook:
    """Return an :class:`~vqssl.EMACodebook` that holds ``state``, bit for bit."""
    dtype = torch.promote_types(state.embed.dtype, state.embed_avg.dtype)
    dtype = torch.promote_types(dtype, state.cluster_size.dtype)
    options = {"device": state.embed.device, "dtype": dtype, **options}
    codebook = EMACodebook(codebook_size=state.embed.shape[0], dim=state.embed.shape[1], metric=metric, **options)
    loaded = {name: getattr(state, name) for name in ("embed", "cluster_size", "embed_avg")}
    if not state.initialized:
        loaded = {**codebook.state_dict(), **loaded}
    codebook.load_state_dict(loaded)  # without flag and counters: a trained codebook of unknown age
    return codebook


def _check_values(prefix: str, embed: Tensor, cluster_size: Tensor, embed_avg: Tensor, metric: str) -> None:
    for name, tensor in (("embed", embed), ("cluster_size", cluster_size), ("embed_avg", embed_avg)):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{prefix}{name} must be finite, got NaN or infinite values: load an earlier checkpoint, or replace "
                "those rows"
            )
    if (cluster_size < 0).any():
        raise ValueError(f"{prefix}cluster_size must not be negative, got {cluster_size.min().item():g}: it is a count")
    lengths = embed.float().norm(dim=-1)
    # Averages make cosine codes of older releases shorter than 1; none is longer but for rounding.
    if metric == "cosine" and (lengths > 1.01).any():
        raise ValueError(
            f"codes of a cosine codebook have a length of 1 at most, got {lengths.max().item():g} under prefix "
            f"{prefix!r}: write metric='euclidean', or normalise the codes"
        )


def _check_one_codebook(codebooks: Sequence[EMACodebook]) -> None:
    """Raise unless the heads of one codebook have one shape, one metric and one flag."""
    if not codebooks:
        raise ValueError("codebook must be an EMACodebook, or one for each head, got an empty sequence")
    alike: dict[str, list[Hashable]] = {
        "one codebook_size and dim": [tuple(codebook.embed.shape) for codebook in codebooks],
        "one metric": [policy_name(codebook.metric) for codebook in codebooks],
        "one dtype": [codebook.embed.dtype for codebook in codebooks],
        "one device": [codebook.embed.device for codebook in codebooks],
        "one flag, all initialised or all uninitialised": [bool(codebook.initialized) for codebook in codebooks],
    }
    for what, values in alike.items():
        if len(set(values)) > 1:
            raise ValueError(
                f"the heads of one codebook must have {what}, got {values}: write them as separate codebooks, one call "
                "for each prefix"
            )


def _fitted(name: str, ours: Tensor, theirs: Any) -> Tensor:
    """Return ``ours`` in the shape and dtype of the tensor that it replaces."""
    theirs = torch.as_tensor(theirs)
    # Releases differ in a heads axis of one and in the shape of the flag.
    if theirs.shape not in (ours.shape, (1, *ours.shape), ours.shape[1:] if ours.shape[:1] == (1,) else ours.shape):
        raise ValueError(
            f"like[{name!r}] must have room for {tuple(ours.shape)}, got {tuple(theirs.shape)}: build their module "
            "with the codebook_size, dim and heads of what you write into it"
        )
    fitted = ours.reshape(theirs.shape).to(device=theirs.device, dtype=theirs.dtype)
    if not torch.isfinite(fitted).all():
        raise ValueError(
            f"{name} must be finite in the dtype of like, {theirs.dtype}, got values beyond it: write "
            "their_module.float() first"
        )
    return fitted
