"""What the trainer needs of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from examples.pretrain.encoder import Encoder


class Step(NamedTuple):
    """The result of one forward pass in training."""

    loss: Tensor
    """Scalar; the trainer calls ``backward`` on it."""
    parts: dict[str, Tensor]
    """Scalars for the log by column name, the same names at every step; the log holds their means over an epoch."""


class Method(Protocol):
    """A pretraining method: an ``nn.Module`` with these members. It need not inherit from this class.

    It is built as ``METHODS[name](encoder, options, total_steps=T, seed=seed)``: a new encoder, the method's own
    options, the number of steps of the whole run, and the seed of whatever the method draws besides its weights.

    Members that a method may have, and that nothing supplies otherwise:

    - ``codes(images) -> dict[str, Tensor]``: the code indices ``(B, H, W)`` of normalised images, by scale.
    - ``target_encoder``: the encoder whose maps are quantised, where it is not ``encoder``; a teacher's, usually.
    - ``views(images, augment) -> list[Tensor]``: the views of a batch in [0, 1]; otherwise two calls of ``augment``.
    - ``prepare(images)``: called with all training images ``(N, C, S, S)`` in [0, 1], on the CPU, before the first step
      and again where a run continues. What it finds must follow from the images and the seed.
    - ``title``, of the options: what tables call the method, where it is not the name of the class.
    - ``tuned``, of the options: names of the loss weights that `compare` tunes besides the learning rate. Of a tuple of
      weights, the first is tuned.
    """

    Options: Any
    """A frozen dataclass; its fields are the flags ``--NAME.FIELD`` of the command line."""

    def __init__(self, encoder: Encoder, options: Any, *, total_steps: int, seed: int) -> None:
        """Build the method around an encoder."""

    @property
    def encoder(self) -> Encoder:
        """The encoder that is kept, probed and exported."""

    def __call__(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V views ``(B, C, S, S)`` of the same images, or of what ``views`` returns; normalised."""

    def after_step(self) -> None:
        """Do what follows an optimizer step, such as the update of a teacher."""

    def figures(self) -> dict[str, float]:
        """Return what the log shows of an epoch besides the parts of the loss."""

    def exports(self) -> dict[str, nn.Module]:
        """Return the modules whose weights are written as ``NAME.safetensors`` when training ends."""
