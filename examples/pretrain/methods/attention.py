"""Attention over the cells of a map."""

from __future__ import annotations

from torch import nn


def attention_of_width(width: int, heads: int, option: str) -> nn.MultiheadAttention:
    """Return attention over rows `(B, N, width)`.

    Args:
        width: of the last stage of the encoder.
        heads: the number of heads.
        option: what a user calls that number.

    Raises:
        ValueError: the number of heads does not divide the width.
    """
    if width % heads:
        raise ValueError(
            f"{option} must divide the width of the last stage, {width}, got {heads}: give another number of heads, "
            "or another --encoder.width"
        )
    return nn.MultiheadAttention(width, heads, batch_first=True)
