"""Projections from an encoder's channels to the code width; MultiScaleQuantizer puts one before each codebook."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from vqssl.checks import check_dtype, check_floating_dtype, check_positive_int, check_seed
from vqssl.foreign_keywords import names_foreign_keywords
from vqssl.functional.random import random_normal
from vqssl.loading import check_before_loading, check_finite_state

__all__ = ["LearnedProjection", "OrthogonalProjection", "Projection", "ProjectionName", "projection_of"]

Projection = Callable[[int, int], nn.Module]
"""``(in_channels, dim) -> module`` that maps ``(*batch, in_channels)`` to ``(*batch, dim)``."""

ProjectionName = Literal["orthogonal", "learned", "identity"]


class OrthogonalProjection(nn.Module):
    r"""A fixed random orthogonal map, then a layer norm without weights. It has no parameters.

    .. math:: z = \mathrm{LN}(W h), \qquad W W^\top = I \text{ or } W^\top W = I

    A projection that only the commitment loss trains shrinks its output, which is the cheapest way to be close to a
    code. This one cannot. The layer norm gives every token a length of about sqrt(dim).

    Args:
        in_channels: C, width of the features.
        dim: D, width of the codes.
        seed: the only source of the map, so that all ranks draw the same one. Torch's generators play no part.
        device: device of the map, a buffer.
        dtype: dtype of the map.

    Shape:
        ``(*batch, C) -> (*batch, D)``, in the wider dtype of input and map.

    Raises:
        TypeError: a width or the seed is not an int.
        ValueError: a width is below 1.

    >>> import torch
    >>> OrthogonalProjection(8, 4)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 4])
    """

    weight: Tensor

    @names_foreign_keywords(
        {}, sizes_by_name="OrthogonalProjection(in_channels, dim, seed=)", positional=2, what="options"
    )
    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("dim", dim)
        check_seed(seed)
        check_floating_dtype(dtype)
        self.in_channels = in_channels
        self.dim = dim
        self.seed = seed
        self.register_buffer("weight", torch.empty(dim, in_channels, device=device, dtype=dtype))
        check_before_loading(self)
        self.reset_parameters()

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "", *, assign: bool = False) -> None:
        """Raise if a state holds NaN or infinities, as :meth:`vqssl.EMACodebook.check_state` does."""
        check_finite_state(self, state_dict, prefix, assign)

    def reset_parameters(self) -> None:
        """Draw the map from ``seed``: the same map every time."""
        # On the CPU and in float64, to be the same on every device. The counter is negative, because a codebook of the
        # same seed uses the counters from 0.
        rng = torch.tensor([self.seed, -1], device="cpu")
        tall = sorted((self.in_channels, self.dim), reverse=True)
        q, r = torch.linalg.qr(random_normal(rng, self.in_channels * self.dim, torch.float64).reshape(tall))
        q = q * r.diagonal().sign()  # makes q uniform over orthogonal maps (Mezzadri 2007, arXiv math-ph/0609050)
        self.weight.copy_(q if self.dim >= self.in_channels else q.T)

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens ``(*batch, C)`` to ``(*batch, D)``."""
        same = x.dtype == self.weight.dtype
        dtype = x.dtype if same else torch.promote_types(x.dtype, self.weight.dtype)
        return layer_norm(linear(x.to(dtype), self.weight.to(dtype)), (self.dim,))

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return f"{self.in_channels}, {self.dim}"


class LearnedProjection(nn.Sequential):
    r"""A trained linear map, then a layer norm without weights.

    .. math:: z = \mathrm{LN}(W h + b)

    Without the layer norm, the commitment loss alone would shrink the map to zero.

    Args:
        in_channels: C, width of the features.
        dim: D, width of the codes.
        device: device of the map.
        dtype: dtype of the map.

    Shape:
        ``(*batch, C) -> (*batch, D)``.

    Raises:
        TypeError: a width is not an int; in ``forward``, the features have another dtype than the map, outside
            autocast.
        ValueError: a width is below 1.

    >>> import torch
    >>> LearnedProjection(8, 4)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 4])
    """

    @names_foreign_keywords(
        {}, sizes_by_name="LearnedProjection(in_channels, dim, dtype=)", positional=2, what="options"
    )
    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("in_channels", in_channels)
        check_positive_int("dim", dim)
        check_floating_dtype(dtype)
        super().__init__(
            nn.Linear(in_channels, dim, device=device, dtype=dtype),
            nn.LayerNorm(dim, elementwise_affine=False, device=device, dtype=dtype),
        )
        check_before_loading(self)

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "", *, assign: bool = False) -> None:
        """Raise if a state holds NaN or infinities, as :meth:`vqssl.EMACodebook.check_state` does."""
        check_finite_state(self, state_dict, prefix, assign)

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens ``(*batch, C)`` to ``(*batch, D)``."""
        weight = self[0].weight
        assert isinstance(weight, Tensor)
        check_dtype("x", x, weight.dtype)
        projected: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return projected


def projection_of(
    projection: ProjectionName | Projection | None, in_channels: int, dim: int, *, seed: int = 0
) -> nn.Module:
    """Return the projection that a name or a function gives for these widths.

    Args:
        projection: ``"orthogonal"`` (also for None), ``"learned"``, ``"identity"``, or a function
            ``(in_channels, dim) -> module``.
        in_channels: C, width of the features.
        dim: D, width of the codes.
        seed: of an orthogonal map.

    Raises:
        TypeError: ``projection`` is a module or something else that cannot be called.
        ValueError: the name is unknown, or the identity is given two widths.

    >>> projection_of("identity", 4, 4)
    Identity()
    """
    if projection is None or projection == "orthogonal":
        return OrthogonalProjection(in_channels, dim, seed=seed)
    if projection == "learned":
        return LearnedProjection(in_channels, dim)
    if projection == "identity":
        if in_channels != dim:
            raise ValueError(
                f"projection='identity' needs maps of the width of the codes, dim = {dim}, got {in_channels} channels: "
                "leave projection out, or build with dim=in_channels"
            )
        return nn.Identity()
    if isinstance(projection, str):
        raise ValueError(
            f"projection must be one of 'orthogonal', 'learned', 'identity', or a function, got {projection!r}"
        )
    if isinstance(projection, nn.Module) or not callable(projection):
        raise TypeError(
            f"projection must be a function (in_channels, dim) -> module for tokens (*batch, in_channels), got "
            f"{projection!r}: write projection=LearnedProjection, or a lambda that returns your module"
        )
    return projection(in_channels, dim)
