"""Tokens and codes that make a search hard, tensors of unusual strides, and a slow ``code_sums``."""

import torch
from torch import Tensor

KINDS = ("random", "clustered", "duplicated", "far mean", "tiny", "huge", "on the codes", "equal rows", "grid")
LAYOUTS = ("transposed", "strided", "repeated columns", "repeated rows", "offset", "overlapping")


def material(kind: str, n: int, k: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens ``(n, d)`` and codes ``(k, d)`` of one of the KINDS."""
    generator = torch.Generator().manual_seed(seed)
    x, codes = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, k))
    if kind == "clustered":  # all scores are close to each other
        centre = torch.randn(1, d, generator=generator, dtype=torch.float64)
        x, codes = 1e-3 * x + centre, 1e-3 * codes + centre
    elif kind == "duplicated":
        codes = codes[torch.randint(max(1, k // 3), (k,), generator=generator)]
    elif kind == "far mean":
        x, codes = x + 300, codes + 300
    elif kind == "tiny":
        x, codes = x * 1e-6, codes * 1e-6
    elif kind == "huge":
        x, codes = x * 3e3, codes * 3e3
    elif kind == "on the codes" and n:
        x = codes[torch.arange(n) % k].clone()
    elif kind == "equal rows":
        x, codes = x[:1].expand(n, d), codes[:1].expand(k, d)
    elif kind == "grid":  # midway between codes: exact ties
        x, codes = (x * 2).round(), (codes * 2).round()
    return x.to(dtype), codes.to(dtype)


def of_layout(layout: str, rows: int, width: int, seed: int = 0) -> Tensor:
    """Return random numbers ``(rows, width)`` whose strides are one of the LAYOUTS."""
    numbers = torch.randn(6 * rows * width + 5, generator=torch.Generator().manual_seed(seed))
    return {
        "transposed": numbers[: rows * width].view(width, rows).T,
        "strided": numbers[: 6 * rows * width].view(2 * rows, 3 * width)[::2, ::3],
        "repeated columns": numbers[:rows, None].expand(rows, width),
        "repeated rows": numbers[None, :width].expand(rows, width),
        "offset": numbers[5 : 5 + rows * width].view(rows, width),
        "overlapping": numbers.as_strided((rows, width), (3, 2)),
    }[layout]


def code_sums_by_loop(x: Tensor, indices: Tensor, size: int) -> tuple[list[int], Tensor]:
    """Return counts and float64 sums per code, adding one token after the other."""
    counts, sums = [0] * size, torch.zeros(size, x.shape[1], dtype=torch.float64)
    for row, k in zip(x.double(), indices.tolist(), strict=True):
        if k >= 0:
            counts[k] += 1
            sums[k] += row
    return counts, sums
