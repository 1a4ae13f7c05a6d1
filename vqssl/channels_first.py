"""ChannelsFirst: a quantiser of tokens, for maps with channels first."""

from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, cast, runtime_checkable

from torch import Tensor, nn

from vqssl.checks import check_floating, check_mask
from vqssl.types import CodebookUsage, MultiCodeQuantized, Quantized

__all__ = ["ChannelsFirst", "TokenQuantizer"]

Result = TypeVar("Result", Quantized, MultiCodeQuantized)
Returned = TypeVar("Returned", Quantized, MultiCodeQuantized, covariant=True)


@runtime_checkable
class TokenQuantizer(Protocol[Returned]):
    """A module that quantises tokens ``(*batch, D)``: :class:`vqssl.EMACodebook` and those built of it.

    >>> import vqssl
    >>> isinstance(vqssl.EMACodebook(codebook_size=8, dim=4), TokenQuantizer)
    True
    """

    dim: int

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Returned:
        """Quantise, and in training mode update."""
        ...

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> Returned:
        """Quantise and change nothing."""
        ...

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes at ``indices``, channels last."""
        ...


class ChannelsFirst(nn.Module, Generic[Result]):
    """A quantiser for maps ``(B, D, *spatial)``: each position is a token.

    Moves the channels to the last axis, calls the quantiser, and moves them back. Nothing else happens: no projection
    and no normalisation. For both, or for several maps, see :class:`vqssl.MultiScaleQuantizer`. :meth:`usage` and
    :meth:`freeze` are passed on. All other methods are those of ``.quantizer``.

    Args:
        quantizer: an :class:`vqssl.EMACodebook`, :class:`vqssl.ResidualQuantizer` or :class:`vqssl.ProductQuantizer`,
            or any module with their methods. It stays usable with tokens, as ``.quantizer``.

    Shape:
        Input ``(B, D, *spatial)``, a mask ``(B, *spatial)``; the result of the quantiser, with ``quantized``
        ``(B, D, *spatial)``. ``indices`` are ``(B, *spatial)``, or ``(B, *spatial, C)`` for C codes a token.

    Raises:
        TypeError: ``quantizer`` is not such a module.

    >>> import torch, vqssl
    >>> quantizer = ChannelsFirst(vqssl.EMACodebook(codebook_size=16, dim=4))
    >>> quantized, indices, loss = quantizer(torch.randn(2, 4, 8, 8))
    >>> quantized.shape, indices.shape, quantizer.lookup(indices).shape
    (torch.Size([2, 4, 8, 8]), torch.Size([2, 8, 8]), torch.Size([2, 4, 8, 8]))
    """

    quantizer: TokenQuantizer[Result]

    def __init__(self, quantizer: TokenQuantizer[Result]) -> None:
        super().__init__()
        if isinstance(quantizer, type) or not isinstance(quantizer, TokenQuantizer):
            found = type(quantizer).__name__ if isinstance(quantizer, nn.Module) else repr(quantizer)
            raise TypeError(
                f"quantizer must be a module that quantises tokens, got {found}: write "
                "ChannelsFirst(EMACodebook(codebook_size=, dim=))"
            )
        self.quantizer = quantizer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Result:
        """Quantise, and in training mode update, as the quantiser does.

        Args:
            x: a map ``(B, D, *spatial)``.
            mask: ``(B, *spatial)`` bool, True where a token counts.

        Returns:
            The quantiser's result, with ``quantized`` ``(B, D, *spatial)``.

        Raises:
            TypeError: ``x`` is not a floating tensor, or the mask is not boolean.
            ValueError: ``x`` is not ``(B, D, *spatial)`` or the mask not ``(B, *spatial)``, or what the quantiser
                refuses.
        """
        self._check(x, mask)
        return _channels_first(self.quantizer(x.movedim(1, -1), mask))

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> Result:
        """Quantise and change nothing: the pure half of forward, with its arguments and errors.

        >>> import torch, vqssl
        >>> ChannelsFirst(vqssl.EMACodebook(codebook_size=8, dim=4)).quantize(torch.randn(2, 4, 3)).indices.shape
        torch.Size([2, 3])
        """
        self._check(x, mask)
        return _channels_first(self.quantizer.quantize(x.movedim(1, -1), mask))

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes at ``indices`` as a map ``(B, D, *spatial)``.

        Args and errors are those of the quantiser's ``lookup``.

        >>> import torch, vqssl
        >>> ChannelsFirst(vqssl.EMACodebook(codebook_size=8, dim=4)).lookup(torch.zeros(2, 5, 5).long()).shape
        torch.Size([2, 4, 5, 5])
        """
        return self.quantizer.lookup(indices).movedim(-1, 1)

    def usage(self, dead_below: float = 0.1) -> CodebookUsage | tuple[CodebookUsage, ...]:
        """Return the quantiser's ``usage``: of an :class:`vqssl.EMACodebook` one, of other quantisers one a codebook.

        >>> import vqssl
        >>> ChannelsFirst(vqssl.EMACodebook(codebook_size=8, dim=4)).usage().dead.item()
        0
        """
        return cast(Any, self.quantizer).usage(dead_below)

    def freeze(self, frozen: bool = True) -> Self:
        """Freeze the quantiser, see :meth:`vqssl.EMACodebook.freeze`; ``freeze(False)`` resumes its updates.

        >>> import vqssl
        >>> ChannelsFirst(vqssl.EMACodebook(codebook_size=8, dim=4)).freeze().quantizer.frozen
        True
        """
        cast(Any, self.quantizer).freeze(frozen)
        return self

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        check_floating("x", x)
        dim = self.quantizer.dim
        if x.ndim < 2 or x.shape[1] != dim:
            last = x.ndim > 1 and x.shape[-1] == dim
            cure = "give tokens to .quantizer itself" if last else "project it to that width first"
            raise ValueError(f"x must be (B, D, *spatial) with D = {dim}, got shape {tuple(x.shape)}: {cure}")
        check_mask(mask, x.shape[:1] + x.shape[2:], x.device)

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> Result:
            """Call :meth:`forward`."""


def _channels_first(result: Result) -> Result:
    return result._replace(quantized=result.quantized.movedim(-1, 1))
