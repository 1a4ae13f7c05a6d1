"""CodeTable: what a codebook holds, and how that stays consistent."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vqssl import kernels
from vqssl.checks import (
    can_read_without_sync,
    check_code_range,
    check_device,
    check_floating,
    check_indices,
    check_mask,
    check_positive_int,
    check_seed,
    check_state_fits,
    check_tokens,
)
from vqssl.functional.ema import CodebookState
from vqssl.functional.random import random_normal
from vqssl.functional.usage import codebook_usage
from vqssl.functional.vectors import unit
from vqssl.types import CodebookUsage

__all__ = ["UNKNOWN_AGE", "CodeTable"]

UNKNOWN_AGE = -(2**62)
"""From where draws are counted beside counts that did not start with them: below zero they do not say how old those
are, and still none comes twice."""


class CodeTable(nn.Module):
    """The codes of an :class:`~vqssl.EMACodebook` with their running counts and sums: buffers, look-up and setters.

    State (buffers): ``embed`` ``(K, D)``, ``cluster_size`` ``(K,)``, ``embed_avg`` ``(K, D)``, at least float32
    whatever the rest of the model is cast to; ``initialized`` (bool); ``rng`` (int64: seed and draws so far). A state
    of codes, counts and sums alone loads as that of a trained table; the seed stays, and the draws count on from
    ``UNKNOWN_AGE``.

    >>> table = CodeTable(8, 4, metric="euclidean", seed=0).half()
    >>> table.embed.dtype, table.embed.shape
    (torch.float32, torch.Size([8, 4]))
    """

    # 2: `initialized` and `rng` belong to the state.
    _version = 2

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initialized: Tensor
    rng: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        metric: str,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("codebook_size", codebook_size)
        check_positive_int("dim", dim)
        if metric not in kernels.METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, kernels.METRICS))}, got {metric!r}")
        check_seed(seed)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}: write torch.float32 or torch.float64")
        self.codebook_size = codebook_size
        self.dim = dim
        self.metric = metric
        self.seed = seed
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("embed", torch.empty(codebook_size, dim, device=device, dtype=dtype))
        self.register_buffer("cluster_size", torch.empty(codebook_size, device=device, dtype=dtype))
        self.register_buffer("embed_avg", torch.empty(codebook_size, dim, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.empty((), device=device, dtype=torch.bool))
        self.register_buffer("rng", torch.empty(2, device=device, dtype=torch.int64))
        # What `initialized` was last seen to be: asking the buffer at every step would wait for the device.
        self._known_initialized = False
        self.register_load_state_dict_pre_hook(check_state_fits)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_forget_what_was_known)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes at ``indices``, raw.

        Args:
            indices: integers of any shape; -1 (masked) gives zeros.

        Returns:
            ``(*indices.shape, D)`` in the dtype of the state.

        Raises:
            TypeError: ``indices`` is no integer tensor.
            ValueError: an index is K or more, or below -1, or they are on another device.

        >>> import torch, vqssl
        >>> vqssl.EMACodebook(8, 2).lookup(torch.tensor([3, -1])).shape
        torch.Size([2, 2])
        """
        check_indices("indices", indices, device=self.embed.device)
        check_code_range("indices", indices, self.codebook_size)
        return self._codes(indices.long())

    def usage(self, dead_below: float = 0.1) -> CodebookUsage:
        """How evenly the codes are used, from the running counts, which are sums over all ranks.

        Counts start out even and forget by ``decay`` a step: in the first few times 1 / (1 - decay) steps this says
        too much, K and none dead before any. For one batch write
        ``functional.codebook_usage(functional.code_counts(indices, K))``.

        Args:
            dead_below: a code is dead that gets less than this fraction of the fair share.

        Returns:
            :class:`~vqssl.types.CodebookUsage` of detached scalars.

        >>> import vqssl
        >>> vqssl.EMACodebook(8, 4).usage().dead.item()
        0
        """
        return codebook_usage(self.cluster_size, dead_below)

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """Replace the codes, and set counts and sums to match; the codebook counts as initialised then.

        Args:
            codes: ``(K, D)``, finite.

        Raises:
            TypeError: ``codes`` is no floating tensor.
            ValueError: the shape is not ``(K, D)``, or a value is NaN or infinite.

        >>> import torch, vqssl
        >>> codebook = vqssl.EMACodebook(3, 2)
        >>> codebook.set_codes_(torch.eye(3, 2))
        >>> codebook.quantize(torch.tensor([0.1, 0.8])).indices.item()
        1
        """
        check_floating("codes", codes)
        if codes.shape != self.embed.shape:
            raise ValueError(
                f"codes must be (codebook_size, dim) = {tuple(self.embed.shape)}, got shape {tuple(codes.shape)}"
            )
        if codes.is_meta != self.embed.is_meta:
            check_device("codes", codes, self.embed.device)
        codes = codes.to(self.embed)  # first: what is finite in float64 may not be here
        if not codes.is_meta and not torch.isfinite(codes).all():
            raise ValueError("codes must be finite, got NaN or infinite values: drop or replace those rows")
        codes = self._tokens(codes)
        self.embed.copy_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.fill_(1.0)
        # One draw, as of the first codes; later on the counter no longer says how old the counts are.
        again = self.rng[1] > 1
        self.rng[1] += torch.where(again, UNKNOWN_AGE, 1)
        self.initialized.fill_(True)
        self._known_initialized = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start over: standard normal codes from ``seed``, counts of 1, not initialised."""
        self.rng.copy_(self.rng.new_tensor([self.seed, 0]))
        codes = random_normal(self.rng, self.codebook_size * self.dim, self.embed.dtype)
        self.embed.copy_(self._tokens(codes.reshape(self.codebook_size, self.dim)))
        self.embed_avg.copy_(self.embed)
        self.cluster_size.fill_(1.0)
        self.initialized.fill_(False)
        self.rng[1] += 1
        self._known_initialized = False

    # ---- parts ----

    def _check(self, x: Tensor, mask: Tensor | None = None) -> None:
        check_tokens("x", x, self.dim)
        check_device("x", x, self.embed.device)
        check_mask(mask, x.shape[:-1], x.device)

    def _tokens(self, x: Tensor) -> Tensor:
        """Tokens as they are compared: of length 1 where the metric is cosine."""
        return unit(x) if self.metric == "cosine" else x

    def _codes(self, indices: Tensor) -> Tensor:
        known = (indices >= 0)[..., None]
        return torch.where(known, torch.nn.functional.embedding(indices.clamp_min(0), self.embed), 0.0)

    def _state(self) -> CodebookState:
        return CodebookState(self.embed, self.cluster_size, self.embed_avg)

    def _write(self, state: CodebookState, where: Tensor) -> None:
        """Take ``state`` over, and count one draw, if the scalar ``where`` says so: without waiting for the device."""
        embed, cluster_size, embed_avg = state
        if self.metric == "cosine":
            # Tokens that cancel out leave no direction: the code keeps the one it had.
            length = embed.norm(dim=-1, keepdim=True)
            embed = torch.where(length > 0, embed / torch.where(length > 0, length, 1.0), self.embed)
        if can_read_without_sync(where):
            if not where:
                return
            if not torch.isfinite(embed.sum() + embed_avg.sum()):
                embed, cluster_size, embed_avg = self._kept(_finite(embed, embed_avg), embed, cluster_size, embed_avg)
        else:
            embed, cluster_size, embed_avg = self._kept(
                _finite(embed, embed_avg) & where, embed, cluster_size, embed_avg
            )
        self.embed.copy_(embed)
        self.cluster_size.copy_(cluster_size)
        self.embed_avg.copy_(embed_avg)
        self.rng[1] += where.long()

    def _kept(self, sound: Tensor, embed: Tensor, cluster_size: Tensor, embed_avg: Tensor) -> CodebookState:
        """The new rows where ``sound`` ``(K,)``, the old ones elsewhere."""
        return CodebookState(
            torch.where(sound[:, None], embed, self.embed),
            torch.where(sound, cluster_size, self.cluster_size),
            torch.where(sound[:, None], embed_avg, self.embed_avg),
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        # Codes, counts and sums alone, as before version 2, or of a file that knows no versions: a trained table.
        if local_metadata.get("version", 1) < 2 and prefix + "embed" in state_dict:
            state_dict.setdefault(prefix + "initialized", torch.ones_like(self.initialized))
            state_dict.setdefault(prefix + "rng", torch.stack([self.rng[0].detach(), self.rng.new_tensor(UNKNOWN_AGE)]))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodeTable":
        # .half() and .bfloat16() move the rest of a model; statistics that add a hundredth a step need float32.
        def at_least_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(applied.device)
            return applied

        return super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]


def _finite(embed: Tensor, embed_avg: Tensor) -> Tensor:
    """``(K,)`` bool. Tokens near the end of float32 may take count times code beyond it; such a code waits."""
    return kernels.finite_rows(embed) & kernels.finite_rows(embed_avg)


def _forget_what_was_known(module: nn.Module, incompatible_keys: Any) -> None:
    # A loaded `initialized` may be either; the next training step looks.
    module._known_initialized = False  # type: ignore[assignment]
