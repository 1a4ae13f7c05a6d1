"""The product of tokens and codes, by the fastest routine that this machine has for it."""

import torch
from torch import Tensor

__all__ = ["Factor"]


class Factor:
    """Codes ``(K, D)`` and constants ``(K,)``, ready to be multiplied with tokens.

    Every entry of the product is a sum of D products and a constant, added in any order, each product and sum rounded
    at most once.

    In float32 on a CPU oneDNN is called directly: on the AMD processors measured it takes less time than the library
    behind :func:`torch.mm` (``benchmarks/NOTES.md``). Its operator is not public; without it, torch's public product is
    used.

    Args:
        weight: the codes.
        constant: added to the scores of each code.
        rows: number of tokens of the usual product.
    """

    def __init__(self, weight: Tensor, constant: Tensor, rows: int) -> None:
        self.weight, self.constant = weight, constant
        self.packed = None
        if (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
        ):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def scores(self, tokens: Tensor) -> Tensor:
        """Return ``tokens @ weight.T + constant``: ``(R, D) -> (R, K)``."""
        if self.packed is None:
            return torch.addmm(self.constant, tokens, self.weight.T)
        return torch.ops.mkldnn._linear_pointwise(tokens, self.packed, self.constant, "none", [], "")
