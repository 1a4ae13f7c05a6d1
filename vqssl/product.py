"""ProductQuantizer: the channels of a token in groups, each with a code of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, Unpack

import torch
from torch import Tensor, nn

from vqssl import kernels
from vqssl.checks import (
    check_device,
    check_indices,
    check_mask,
    check_positive_int,
    check_seed,
    check_tokens,
)
from vqssl.codebook import EMACodebook, warn_of_random_codes
from vqssl.codebook_options import CodebookOptions
from vqssl.foreign_keywords import FOREIGN_KEYWORDS, names_foreign_keywords
from vqssl.foreign_methods import ForeignMethod
from vqssl.functional.masking import zero_where_masked
from vqssl.loading import check_before_loading
from vqssl.several_codebooks import (
    codebook_at,
    codebooks_in,
    freeze_all,
    set_first_codes_,
    sizes_of,
    usage_of_all,
)
from vqssl.types import CodebookUsage, MultiCodeQuantized, Quantized
from vqssl.update import update_codebooks

__all__ = ["ProductQuantizer"]

KEYWORDS = {
    **FOREIGN_KEYWORDS,
    **dict.fromkeys(("heads", "num_heads", "groups", "num_codebooks", "n_groups"), "num_groups="),
    "separate_codebook_per_head": "shared=True if it is False, nothing if it is True",
    "combine_groups": "shared=",
    "codebook_dim": "dim=num_groups * codebook_dim; the projection to it is a module of your own",
}


class ProductQuantizer(nn.Module):
    r"""Token channels in G groups of equal width, each group quantised by a codebook of its own or by a shared one.

    .. math:: z = [z^1, \dots, z^G], \qquad k^g = \arg\min_j \lVert z^g - e^g_j \rVert^2, \qquad
        q = [e^1_{k^1}, \dots, e^G_{k^G}], \qquad
        L = \frac{1}{G} \sum_g \beta \cdot \mathrm{mean}\,(z^g - \mathrm{sg}[e^g_{k^g}])^2

    (Jegou, Douze, Schmid 2011, product quantization; as groups in wav2vec 2.0, arXiv 2006.11477, and as multi-head
    codebooks elsewhere.) G codebooks of K codes tell :math:`K^G` tokens apart. With one width of all groups L is
    :math:`\beta\,\mathrm{mean}(z - \mathrm{sg}[q])^2`, the commitment loss of the whole token.

    In training mode a forward pass updates the codes, as :class:`~vqssl.EMACodebook` does; under ``torch.distributed``
    all codebooks share two all-reduces. Metric and estimator work on each group alone: ``metric="cosine"`` scales every
    group to length 1.

    Args:
        codebook_size: K, for all groups or one number a group.
        dim: D, the width of tokens; a multiple of ``num_groups``. The width of codes is D / G.
        num_groups: G.
        shared: True if all groups use one codebook, updated once a step with the parts of all.
        seed: group g, from 0, draws from ``seed + g``.
        device: of the codebooks.
        dtype: of the codebooks.
        **codebook_options: what :class:`~vqssl.EMACodebook` takes by name.

    Shape:
        Input ``(*batch, D)``, a mask ``(*batch,)``; output :class:`~vqssl.types.MultiCodeQuantized`: ``quantized``
        ``(*batch, D)`` in the input's dtype, ``indices`` ``(*batch, G)``, ``commitment_loss`` a scalar,
        ``commitment_losses`` G scalars, whose mean it is.

    Raises:
        TypeError: an argument of another type than above, sizes by position, or another library's keyword.
        ValueError: a size below 1, a width that G does not divide, another number of sizes than groups, several sizes
            for a shared codebook, or what :class:`~vqssl.EMACodebook` refuses.

    >>> import torch
    >>> quantizer = ProductQuantizer(codebook_size=320, dim=16, num_groups=2)
    >>> out = quantizer(torch.randn(2, 500, 16))
    >>> out.quantized.shape, out.indices.shape, quantizer.codebook(1).dim
    (torch.Size([2, 500, 16]), torch.Size([2, 500, 2]), 8)
    """

    # vector-quantize-pytorch; and ours without the underscore
    get_output_from_indices = ForeignMethod("lookup(indices)")
    initialize = ForeignMethod("initialize_(x)")
    update = ForeignMethod("update_(x, indices)")

    @names_foreign_keywords(
        KEYWORDS,
        sizes_by_name="ProductQuantizer(codebook_size=, dim=, num_groups=)",
        passed_on=CodebookOptions.__annotations__,
    )
    def __init__(
        self,
        *,
        codebook_size: int | Sequence[int],
        dim: int,
        num_groups: int,
        shared: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **codebook_options: Unpack[CodebookOptions],
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("num_groups", num_groups)
        if dim % num_groups:
            raise ValueError(
                f"dim must be a multiple of num_groups, got {dim} and {num_groups}: all groups have one width"
            )
        check_seed(seed)
        sizes = sizes_of(codebook_size, num_groups, "group", shared=shared)
        self.dim = dim
        self.num_groups = num_groups
        self.shared = shared
        self.codebooks = nn.ModuleList(
            EMACodebook(
                codebook_size=size,
                dim=dim // num_groups,
                seed=seed + group,
                device=device,
                dtype=dtype,
                **codebook_options,
            )
            for group, size in enumerate(sizes)
        )
        check_before_loading(self)

    # ---- forward ----

    def forward(self, x: Tensor, mask: Tensor | None = None) -> MultiCodeQuantized:
        """Quantise, and in training mode initialise codebooks before and update them after.

        Args:
            x: tokens ``(*batch, D)``.
            mask: ``(*batch,)`` bool, True where a token counts.

        Returns:
            See :meth:`quantize`.

        Raises:
            TypeError: ``x`` is not a floating tensor, or the mask is not boolean.
            ValueError: the width of ``x`` is not D, it is on another device, the mask is not ``(*batch,)``, or the
                initialisation refuses the batch. The state is then as it was.
        """
        self._check(x, mask)
        parts = self._parts(x, mask)
        if self.training:
            self._check_ranks()
            self._initialize(parts, mask)
        warn_of_random_codes(self, self._own_codebooks())
        results = self._quantize_parts(parts, mask)
        if self.training:
            self._update(parts, torch.stack([result.indices for result in results], -1))
        return _joined(results)

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> MultiCodeQuantized:
        """Return codes, indices and commitment losses: the pure half of forward, which changes nothing.

        A masked token gets indices -1 and zeros, and no part in the losses, whatever it holds. A token with NaN or an
        infinity in any channel that is not masked gets indices -1 in all groups; its output is NaN, as is the loss.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> ProductQuantizer(codebook_size=8, dim=4, num_groups=2).quantize(torch.randn(3, 4)).indices.shape
        torch.Size([3, 2])
        """
        self._check(x, mask)
        return _joined(self._quantize_parts(self._parts(x, mask), mask))

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes at ``indices``, the groups side by side.

        Args:
            indices: ``(*batch, G)`` integers; -1 (masked) gives zeros in that group.

        Returns:
            ``(*batch, D)`` in the dtype of the state.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            ValueError: the last axis is not of G groups, an index is K or more, or below -1, or they are on another
                device.

        >>> import torch
        >>> ProductQuantizer(codebook_size=8, dim=4, num_groups=2).lookup(torch.tensor([[3, 0], [-1, -1]])).shape
        torch.Size([2, 4])
        """
        check_indices("indices", indices)
        if indices.ndim < 1 or indices.shape[-1] != self.num_groups:
            raise ValueError(
                f"indices must be (*batch, groups) with {self.num_groups} groups in the last axis, got shape "
                f"{tuple(indices.shape)}: for one group write codebook(group).lookup(indices)"
            )
        return torch.cat([self.codebook(group).lookup(k) for group, k in enumerate(indices.unbind(-1))], -1)

    # ---- updates ----

    def update_(self, x: Tensor, indices: Tensor) -> None:
        """Move the codes towards the parts that chose them, then revive dead codes: the other half of forward.

        Args:
            x: tokens ``(*batch, D)``, as given to :meth:`quantize`.
            indices: ``(*batch, G)``, what :meth:`quantize` returned; -1 is left out.

        Raises:
            TypeError: ``x`` is not a floating or ``indices`` not an integer tensor.
            ValueError: the width of ``x`` is not D, the shapes do not fit, or (on CPU) an index is out of range.

        >>> import torch
        >>> quantizer, x = ProductQuantizer(codebook_size=8, dim=4, num_groups=2), torch.randn(32, 4)
        >>> quantizer.initialize_(x)
        >>> quantizer.update_(x, quantizer.quantize(x).indices)
        >>> [codebook.num_updates.item() for codebook in quantizer.codebooks]
        [1, 1]
        """
        self._check(x)
        check_indices("indices", indices, torch.Size([*x.shape[:-1], self.num_groups]), x.device)
        self._check_ranks()
        self._update(self._parts(x.detach(), None), torch.where(self._finite(x)[..., None], indices.long(), -1))

    def freeze(self, frozen: bool = True) -> Self:
        """Freeze all codebooks, see :meth:`vqssl.EMACodebook.freeze`; ``freeze(False)`` resumes their updates."""
        freeze_all(self.codebooks, frozen)
        return self

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Draw the first codes of each codebook that has none yet; those that have some, or are frozen, stay.

        Forward does so in training mode. Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> quantizer = ProductQuantizer(codebook_size=8, dim=4, num_groups=2)
        >>> quantizer.initialize_(torch.randn(32, 4))
        >>> [codebook.initialized.item() for codebook in quantizer.codebooks]
        [True, True]
        """
        self._check(x, mask)
        self._check_ranks()
        self._initialize(self._parts(x, mask), mask)

    # ---- parts ----

    def codebook(self, group: int) -> EMACodebook:
        """Return the codebook of a group, 0 to G - 1; one for all where shared.

        Raises:
            ValueError: there is no such group.

        >>> ProductQuantizer(codebook_size=8, dim=4, num_groups=2).codebook(1)
        EMACodebook(codebook_size=8, dim=2, ...)
        """
        return codebook_at(self.codebooks, group, self.num_groups, "group")

    def usage(self, dead_below: float = 0.1) -> tuple[CodebookUsage, ...]:
        """Return :meth:`vqssl.EMACodebook.usage` of each group; of the one codebook where shared.

        >>> [usage.dead.item() for usage in ProductQuantizer(codebook_size=8, dim=4, num_groups=2).usage()]
        [0, 0]
        """
        return usage_of_all(self.codebooks, dead_below)

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        return f"dim={self.dim}, num_groups={self.num_groups}{', shared' if self.shared else ''}"

    def _own_codebooks(self) -> list[EMACodebook]:
        return codebooks_in(self.codebooks)

    def _check(self, x: Tensor, mask: Tensor | None = None) -> None:
        check_tokens("x", x, self.dim)
        check_device("x", x, self.codebook(0).embed.device)
        check_mask(mask, x.shape[:-1], x.device)

    def _check_ranks(self) -> None:
        for group, codebook in enumerate(self._own_codebooks()):
            codebook.check_ranks(group=group, num_groups=self.num_groups, shared=self.shared)

    def _finite(self, x: Tensor) -> Tensor:
        return kernels.finite_rows(x.detach().reshape(-1, self.dim)).reshape(x.shape[:-1])

    def _parts(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens as ``(*batch, G, D / G)``: zeros where masked, NaN in all groups of a token that has one."""
        counts = self._finite(x)
        if mask is not None:
            x, counts = zero_where_masked(x, mask), counts | ~mask
        return torch.where(counts[..., None], x, torch.nan).unflatten(-1, (self.num_groups, -1))

    def _initialize(self, parts: Tensor, mask: Tensor | None) -> None:
        if not any(codebook.needs_codes for codebook in self._own_codebooks()):
            return
        if self.shared:
            self.codebook(0).initialize_(parts, None if mask is None else mask[..., None].expand(parts.shape[:-1]))
            return
        set_first_codes_(self.codebooks, parts.unbind(-2), [mask] * self.num_groups)

    def _quantize_parts(self, parts: Tensor, mask: Tensor | None) -> list[Quantized]:
        return [self.codebook(group).quantize(z, mask) for group, z in enumerate(parts.unbind(-2))]

    def _update(self, parts: Tensor, indices: Tensor) -> None:
        if self.shared:
            update_codebooks(self._own_codebooks(), [parts], [indices])
        else:
            update_codebooks(self._own_codebooks(), parts.unbind(-2), indices.unbind(-1))

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> MultiCodeQuantized:
            """Call :meth:`forward`."""


def _joined(results: Sequence[Quantized]) -> MultiCodeQuantized:
    losses = tuple(result.commitment_loss for result in results)
    return MultiCodeQuantized(
        quantized=torch.cat([result.quantized for result in results], -1),
        indices=torch.stack([result.indices for result in results], -1),
        commitment_loss=torch.stack(losses).mean(),
        commitment_losses=losses,
    )
