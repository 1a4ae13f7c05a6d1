"""RandomProjectionQuantizer: targets from a fixed random projection and fixed random codes."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from vqssl.checks import (
    by_name,
    check_code_range,
    check_device,
    check_floating_dtype,
    check_indices,
    check_mask,
    check_positive_int,
    check_seed,
    check_shape_of_result,
    check_tokens,
    policy_name,
)
from vqssl.foreign_keywords import FOREIGN_KEYWORDS, names_foreign_keywords
from vqssl.functional.autocast import without_autocast
from vqssl.functional.random import random_normal
from vqssl.functional.search import nearest_codeword
from vqssl.functional.vectors import unit
from vqssl.loading import check_before_loading, check_finite_state
from vqssl.state_dtype import keeping_float32, state_dtype

__all__ = ["INPUT_NORMS", "InputNorm", "InputNormName", "RandomProjectionQuantizer", "sequence_norm", "token_norm"]

InputNorm = Callable[[Tensor, Tensor | None], Tensor]
"""``(x, mask) -> x``: features ``(*batch, C)`` to features of zero mean and unit variance."""

InputNormName = Literal["token", "sequence", "none"]

KEYWORDS = {
    **FOREIGN_KEYWORDS,
    "codebook_dim": "dim=, the width of the codes",
    "input_dim": "in_dim=",
    "heads": "num_codebooks=",
    "norm": 'norm_input="token" if it is True, norm_input="none" if it is False',
}


def token_norm(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each token with zero mean and unit variance over its channels: a layer norm without weights.

    Args:
        x: ``(*batch, C)``.
        mask: not used.

    >>> import torch
    >>> token_norm(torch.tensor([[1.0, 3.0]])).round().tolist()
    [[-1.0, 1.0]]
    """
    return layer_norm(x, x.shape[-1:])


def sequence_norm(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each channel with zero mean and unit variance over the tokens of its sequence.

    Args:
        x: ``(B, *positions, C)``, or one sequence ``(N, C)``.
        mask: ``(B, *positions)`` bool, True where a token counts. Tokens that are not finite do not count either.

    Returns:
        The same shape; a channel that does not vary is 0.

    >>> import torch
    >>> sequence_norm(torch.tensor([[[1.0, 5.0], [3.0, 5.0]]])).round().tolist()
    [[[-1.0, 0.0], [1.0, 0.0]]]
    """
    counts = x.isfinite().all(-1, keepdim=True)
    if mask is not None:
        counts = counts & mask[..., None]
    over = tuple(range(1, x.ndim - 1)) if x.ndim > 2 else tuple(range(x.ndim - 1))
    number = counts.sum(over, keepdim=True).clamp_min(1)
    mean = torch.where(counts, x, 0.0).sum(over, keepdim=True) / number
    variance = torch.where(counts, x - mean, 0.0).square().sum(over, keepdim=True) / number
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def _no_norm(x: Tensor, mask: Tensor | None = None) -> Tensor:
    return x


INPUT_NORMS: dict[InputNormName, InputNorm] = {"token": token_norm, "sequence": sequence_norm, "none": _no_norm}
"""The normalisations of the input by name."""


class RandomProjectionQuantizer(nn.Module):
    r"""Codes of a random projection, as targets: nothing in it is ever trained.

    .. math:: k^c = \arg\min_j \left\lVert \frac{A^c \hat x}{\lVert A^c \hat x \rVert} - e^c_j \right\rVert,
        \qquad \lVert e^c_j \rVert = 1

    (BEST-RQ, arXiv 2202.01855, Eq. 1.) :math:`\hat x` is the input with zero mean and unit variance, without which the
    projection falls onto few codes. :math:`A^c` is drawn by Xavier's rule, the codes are normal and scaled to length 1.
    Both come from ``seed`` alone, so that all ranks and all devices hold the same; torch's generators play no part.
    Several codebooks, each with a projection of its own, give each token several targets (arXiv 2303.01037).

    Training mode, ``.eval()`` and gradients change nothing, and no forward pass changes the state. No gradient reaches
    the input: the result are integers. :func:`vqssl.functional.code_counts` of them says how evenly the codes are used.

    Args:
        in_dim: C, the width of the input: for speech usually some frames stacked.
        codebook_size: K; 8192 in the paper.
        dim: D, the width of the codes; 16 in the paper.
        num_codebooks: how many codes each token gets.
        norm_input: ``"token"``, which normalises each token over its channels; ``"sequence"``, which normalises each
            channel over the tokens of a sequence; ``"none"`` for input that is normalised already, such as by the
            statistics of the whole data set; or a function ``(x, mask) -> x``.
        seed: codebook c, from 0, draws from ``seed + c``.
        device: of projections and codes.
        dtype: of projections and codes: float64, or else float32, also where half precision is requested.

    Shape:
        Input ``(*batch, C)``, a mask ``(*batch,)``; output one tensor ``(*batch, num_codebooks)`` int64. For a single
        codebook ``quantizer(x)[..., 0]`` are the targets ``(*batch,)``. Unlike the other quantisers it returns no named
        tuple: there is no quantised output to train through, and no loss.

    State (buffers): ``projection`` ``(num_codebooks, D, C)`` and ``codes`` ``(num_codebooks, K, D)``.

    Raises:
        TypeError: an argument of another type than above, or another library's keyword.
        ValueError: a size below 1, or an unknown name.

    >>> import torch
    >>> quantizer = RandomProjectionQuantizer(in_dim=320, codebook_size=8192, dim=16, num_codebooks=2)
    >>> quantizer(torch.randn(4, 50, 320)).shape
    torch.Size([4, 50, 2])
    """

    projection: Tensor
    codes: Tensor

    @names_foreign_keywords(KEYWORDS, sizes_by_name="RandomProjectionQuantizer(in_dim=, codebook_size=, dim=)")
    def __init__(
        self,
        *,
        in_dim: int,
        codebook_size: int,
        dim: int,
        num_codebooks: int = 1,
        norm_input: InputNormName | InputNorm = "token",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("in_dim", in_dim)
        check_positive_int("codebook_size", codebook_size)
        check_positive_int("dim", dim)
        check_positive_int("num_codebooks", num_codebooks)
        check_seed(seed)
        check_floating_dtype(dtype)
        self.in_dim = in_dim
        self.codebook_size = codebook_size
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.norm_input = by_name("norm_input", norm_input, INPUT_NORMS)
        self.norm_input_name = policy_name(norm_input)
        self.seed = seed
        dtype = state_dtype(dtype)
        self.register_buffer("projection", torch.empty(num_codebooks, dim, in_dim, device=device, dtype=dtype))
        self.register_buffer("codes", torch.empty(num_codebooks, codebook_size, dim, device=device, dtype=dtype))
        check_before_loading(self)
        self.reset_parameters()

    @torch.no_grad()
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the codes of each token.

        Args:
            x: features ``(*batch, C)``.
            mask: ``(*batch,)`` bool, True where a token counts.

        Returns:
            ``(*batch, num_codebooks)`` int64; -1 where a token is masked or not finite.

        Raises:
            TypeError: ``x`` is not a floating tensor, or the mask is not boolean.
            ValueError: the width of ``x`` is not C, it is on another device, the mask is not ``(*batch,)``, or
                ``norm_input`` returns another shape.
        """
        check_tokens("x", x, self.in_dim)
        check_device("x", x, self.projection.device)
        check_mask(mask, x.shape[:-1], x.device)
        # Half precision, also that of autocast, would move tokens to other codes.
        with without_autocast(x):
            return self._indices(x, mask)

    def _indices(self, x: Tensor, mask: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, self.projection.dtype))
        normed = self.norm_input(wide, mask)
        check_shape_of_result("norm_input", normed, wide)
        projected = linear(normed, self.projection.flatten(0, 1).to(normed.dtype)).unflatten(-1, (-1, self.dim))
        pairs = zip(projected.unbind(-2), self.codes, strict=True)
        indices = torch.stack([nearest_codeword(z, codes, "cosine") for z, codes in pairs], -1)
        return indices if mask is None else torch.where(mask[..., None], indices, -1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes at ``indices``, of length 1.

        Args:
            indices: ``(*batch, num_codebooks)`` integers; -1 (masked) gives zeros.

        Returns:
            ``(*batch, num_codebooks, D)`` in the dtype of the state.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            ValueError: the last axis is not ``num_codebooks``, an index is K or more, or below -1, or they are on
                another device.

        >>> import torch
        >>> RandomProjectionQuantizer(in_dim=8, codebook_size=4, dim=2).lookup(torch.tensor([[3], [-1]])).shape
        torch.Size([2, 1, 2])
        """
        check_indices("indices", indices, device=self.codes.device)
        if indices.ndim < 1 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"indices must be (*batch, num_codebooks) with {self.num_codebooks} in the last axis, got shape "
                f"{tuple(indices.shape)}"
            )
        check_code_range("indices", indices, self.codebook_size)
        found = self.codes[torch.arange(self.num_codebooks, device=indices.device), indices.long().clamp_min(0)]
        return torch.where((indices >= 0)[..., None], found, 0.0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections and codes from ``seed``: the same every time."""
        # On the CPU and in float64, to be the same on every device. Counters: 0 for codes, as a codebook has them, and
        # -1 for a projection.
        scale = (2 / (self.in_dim + self.dim)) ** 0.5
        for number in range(self.num_codebooks):
            rngs = [torch.tensor([self.seed + number, counter], device="cpu") for counter in (-1, 0)]
            projection = random_normal(rngs[0], self.dim * self.in_dim, torch.float64)
            codes = random_normal(rngs[1], self.codebook_size * self.dim, torch.float64)
            self.projection[number].copy_(scale * projection.reshape(self.dim, self.in_dim))
            self.codes[number].copy_(unit(codes.reshape(self.codebook_size, self.dim)))

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "", *, assign: bool = False) -> None:
        """Raise if a state holds NaN or infinities, as :meth:`vqssl.EMACodebook.check_state` does."""
        check_finite_state(self, state_dict, prefix, assign)

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        return (
            f"in_dim={self.in_dim}, codebook_size={self.codebook_size}, dim={self.dim}, "
            f"num_codebooks={self.num_codebooks}, norm_input={self.norm_input_name!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .half() casts the rest of a model; here it would change the targets.
        super()._apply(keeping_float32(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            """Call :meth:`forward`."""
