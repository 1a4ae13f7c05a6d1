"""Heads of code prediction: from features ``(N, C)`` to one output a code, or to a vector."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vqssl.functional.vectors import unit

__all__ = [
    "CODE_HEADS",
    "CodeHead",
    "CodeHeadName",
    "GeneratedHead",
    "HeadSizes",
    "last_linear",
    "linear_head",
    "mlp_head",
    "restart_rows_",
]

CodeHeadName = Literal["mlp", "linear", "generated"]


class HeadSizes(NamedTuple):
    """Widths of a head.

    Attributes:
        in_dim: C, of the features.
        hidden_dim: of the hidden layer.
        out_dim: of the output: K where the head has one output a code.
        dim: D, of the codes.
        codebook_size: K.

    >>> linear_head(HeadSizes(in_dim=4, hidden_dim=8, out_dim=16, dim=2, codebook_size=16)).out_features
    16
    """

    in_dim: int
    hidden_dim: int
    out_dim: int
    dim: int
    codebook_size: int


CodeHead = Callable[[HeadSizes], nn.Module]
"""``(sizes) -> module`` that maps ``(N, in_dim)`` to ``(N, out_dim)``."""


def linear_head(sizes: HeadSizes) -> nn.Linear:
    """Return one linear layer."""
    return nn.Linear(sizes.in_dim, sizes.out_dim)


def mlp_head(sizes: HeadSizes) -> nn.Sequential:
    """Return BYOL's predictor: linear layer, batch norm, ReLU, linear layer."""
    return nn.Sequential(
        nn.Linear(sizes.in_dim, sizes.hidden_dim),
        nn.BatchNorm1d(sizes.hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(sizes.hidden_dim, sizes.out_dim),
    )


class GeneratedHead(nn.Module):
    r"""A classifier whose weights are computed from the codes: OBoW, arXiv 2012.11552.

    .. math:: x_j = \kappa \, \langle f, w_j \rangle, \qquad
        w_j = \frac{G(e_j / \lVert e_j \rVert)}{\lVert G(e_j / \lVert e_j \rVert) \rVert}

    G is a linear layer, batch norm, ReLU and a linear layer; kappa is learned. A code that moves or is revived takes
    its weights with it: see :meth:`vqssl.CodePrediction.follow_`.

    Args:
        sizes: widths; ``out_dim`` has to be the codebook's size.

    Shape:
        ``(N, in_dim) -> (N, codebook_size)``.

    Raises:
        ValueError: the target is not one output a code.

    >>> import torch
    >>> sizes = HeadSizes(in_dim=4, hidden_dim=8, out_dim=16, dim=2, codebook_size=16)
    >>> GeneratedHead(sizes)(torch.randn(3, 4)).shape
    torch.Size([3, 16])
    """

    codes: Tensor

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        if sizes.out_dim != sizes.codebook_size:
            raise ValueError(
                f"a generated head has one output a code, {sizes.codebook_size}, got a target of width "
                f"{sizes.out_dim}: write target='bag' or 'place', or head='mlp'"
            )
        self.generator = mlp_head(sizes._replace(in_dim=sizes.dim, out_dim=sizes.in_dim))
        self.scale = nn.Parameter(torch.ones(()))
        # Until the first `follow_`: any codes that differ.
        self.register_buffer("codes", torch.randn(sizes.codebook_size, sizes.dim))

    def forward(self, features: Tensor) -> Tensor:
        """Return one logit a code."""
        weights = unit(self.generator(unit(self.codes).to(features.dtype)))
        return self.scale * (features @ weights.mT)


def last_linear(head: nn.Module, codebook_size: int) -> nn.Linear | None:
    """Return the linear layer whose rows belong to the codes: the last of a head, if it has one output a code.

    >>> last_linear(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16)), 16)
    Linear(in_features=8, out_features=16, bias=True)
    """
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    return layers[-1] if layers and layers[-1].out_features == codebook_size else None


@torch.no_grad()
def restart_rows_(layer: nn.Linear, born: Tensor) -> None:
    """Set the rows of codes that were born again to zero weights and the mean bias: they knew other codes.

    Args:
        layer: of K outputs.
        born: ``(K,)`` bool. A GPU is not synchronised for it.

    >>> layer = nn.Linear(2, 3)
    >>> restart_rows_(layer, torch.tensor([True, False, False]))
    >>> layer.weight[0].tolist(), bool((layer.weight[1:] != 0).all())
    ([0.0, 0.0], True)
    """
    layer.weight.copy_(torch.where(born[:, None], 0.0, layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(torch.where(born, layer.bias.mean(), layer.bias))


CODE_HEADS: dict[CodeHeadName, CodeHead] = {"mlp": mlp_head, "linear": linear_head, "generated": GeneratedHead}
"""The heads by name."""
