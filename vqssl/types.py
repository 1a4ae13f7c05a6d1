"""Named tuples that the modules return: results can be unpacked or read by name."""

from typing import NamedTuple, NoReturn

from torch import Tensor
from torch.utils import _pytree

__all__ = [
    "CodePredictionLoss",
    "CodebookUsage",
    "DiSSECTLoss",
    "MultiCodeQuantized",
    "MultiScaleQuantized",
    "Quantized",
]


class Quantized(NamedTuple):
    """The result of quantising a batch of tokens.

    Attributes:
        quantized: ``(*batch, dim)`` in the input's dtype: the nearest code of each token; zeros where masked.
        indices: ``(*batch,)`` int64: the index of that code; -1 where the token is masked or not finite.
        commitment_loss: scalar float32, already weighted by beta.

    >>> import torch, vqssl
    >>> quantized, indices, loss = vqssl.EMACodebook(codebook_size=8, dim=4).quantize(torch.zeros(2, 3, 4))
    >>> quantized.shape, indices.shape, loss.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3]), torch.Size([]))
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor


class MultiScaleQuantized(NamedTuple):
    """The result of quantising a pyramid of feature maps, one entry a scale.

    Attributes:
        quantized: per scale ``(B, dim, *spatial)``, or ``(B, N, dim)`` for tokens.
        indices: per scale ``(B, *spatial)`` int64; -1 where masked or not finite.
        commitment_loss: scalar: the sum of ``commitment_losses``.
        commitment_losses: per scale: the scalar of Eq. 5.

    >>> import torch, vqssl
    >>> out = vqssl.MultiScaleQuantizer([8, 16], codebook_size=4, dim=8)(
    ...     [torch.randn(2, 8, 6, 6), torch.randn(2, 16, 3, 3)]
    ... )
    >>> [tuple(q.shape) for q in out.quantized], [tuple(i.shape) for i in out.indices]
    ([(2, 8, 6, 6), (2, 8, 3, 3)], [(2, 6, 6), (2, 3, 3)])
    """

    quantized: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]
    commitment_loss: Tensor
    commitment_losses: tuple[Tensor, ...]


class MultiCodeQuantized(NamedTuple):
    """The result of quantising each token by several codes: residual levels or groups of channels.

    Attributes:
        quantized: ``(*batch, dim)`` in the input's dtype: the vector that a token's codes give; zeros where masked.
        indices: ``(*batch, C)`` int64: the indices of a token's C codes; -1 where masked, dropped or not finite.
        commitment_loss: scalar, already weighted by beta: what to add to your loss.
        commitment_losses: C scalars: the loss of each codebook, weighted by beta.

    >>> import torch, vqssl
    >>> out = vqssl.ResidualQuantizer(codebook_size=8, dim=4, num_levels=3)(torch.randn(2, 50, 4))
    >>> out.quantized.shape, out.indices.shape, len(out.commitment_losses)
    (torch.Size([2, 50, 4]), torch.Size([2, 50, 3]), 3)
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    commitment_losses: tuple[Tensor, ...]


class DiSSECTLoss(NamedTuple):
    """The objective and its parts. Call ``backward`` on ``total``.

    Attributes:
        total: the weighted sum of the others.
        alignment_global: L(p, z_c), averaged over ordered pairs of views; unweighted.
        alignment_refined: L(p, z_s), averaged over ordered pairs of views; unweighted.
        refinement: L(z_s, sg[z_c]), which trains the fusion head; 0 where the objective does not use it.
        commitment: L_VQ as it was given; unweighted by lambda.
        code_prediction: L_code as it was given; unweighted by mu.

    >>> import torch, vqssl
    >>> z = [torch.randn(4, 8) for _ in range(2)]
    >>> vqssl.DiSSECTObjective()(z, z[::-1], z[::-1], torch.tensor(0.1))._fields
    ('total', 'alignment_global', 'alignment_refined', 'refinement', 'commitment', 'code_prediction')
    """

    total: Tensor
    alignment_global: Tensor
    alignment_refined: Tensor
    refinement: Tensor
    commitment: Tensor
    code_prediction: Tensor

    @property
    def backward(self) -> NoReturn:
        """Raise AttributeError: write ``loss.total.backward()``."""
        # A property, so that `hasattr` is False and the error says what to write.
        raise AttributeError("DiSSECTLoss holds the loss and its parts, and has no backward: write .total.backward()")


class CodePredictionLoss(NamedTuple):
    """The loss of predicted codes. Call ``backward`` on ``total``.

    Attributes:
        total: the mean of ``losses``.
        losses: one scalar a scale.

    >>> import torch, vqssl
    >>> loss = vqssl.CodePrediction(4, [8], target="bag")(torch.randn(2, 4), [torch.tensor([[0, 1], [7, 7]])])
    >>> len(loss.losses)
    1
    """

    total: Tensor
    losses: tuple[Tensor, ...]

    @property
    def backward(self) -> NoReturn:
        """Raise AttributeError: write ``loss.total.backward()``."""
        raise AttributeError("CodePredictionLoss holds the loss by scale, and has no backward: write .total.backward()")


class CodebookUsage(NamedTuple):
    """How evenly the codes are used. All fields are detached scalars.

    Counts start at 1, so usage looks perfect before the first update. The start is forgotten after a few times
    1 / (1 - decay) updates; ``codebook.num_updates`` counts them.

    Attributes:
        perplexity: exp of the entropy (nats) of the code frequencies: from 1 (one code) to K (all equal).
        fraction: share of codes that are alive, 0 to 1.
        dead: int64: number of dead codes.

    >>> import vqssl
    >>> vqssl.EMACodebook(codebook_size=8, dim=4).usage().perplexity.item()
    8.0
    """

    perplexity: Tensor
    fraction: Tensor
    dead: Tensor


# torch.export.save refuses named tuples that are not registered.
for _cls in (Quantized, MultiScaleQuantized, MultiCodeQuantized, DiSSECTLoss, CodePredictionLoss, CodebookUsage):
    _pytree._register_namedtuple(_cls, serialized_type_name=f"vqssl.types.{_cls.__name__}")
