"""What the operators share for :func:`torch.vmap`."""

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["unbatched"]


def unbatched(size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the arguments of each member of a vmap, so that the operator can run on one after the other.

    A single member already uses the whole machine, so that running them together would gain nothing.

    Args:
        size: how many members.
        in_dims: for each argument, its batch axis, or None if all members share it.
        arguments: the batched arguments.
    """
    for member in range(size):
        yield [
            value if dim is None else value.select(dim, member) for dim, value in zip(in_dims, arguments, strict=True)
        ]
