"""What quantisers of several codebooks share: their sizes, codebooks by number, and first codes of all at once."""

from collections.abc import Sequence

from torch import Tensor, nn

from vqssl.codebook import EMACodebook
from vqssl.types import CodebookUsage

__all__ = ["codebook_at", "codebooks_in", "freeze_all", "set_first_codes_", "sizes_of", "usage_of_all"]


def sizes_of(codebook_size: int | Sequence[int], count: int, what: str, *, shared: bool = False) -> list[int]:
    """Return the size of each codebook to build.

    Args:
        codebook_size: one for all, or one for each.
        count: how many parts the quantiser has.
        what: the name of a part: ``"scale"``, ``"level"`` or ``"group"``.
        shared: True if all parts use one codebook.

    Raises:
        ValueError: another number of sizes than parts, or several for a shared codebook.

    >>> sizes_of(8, 3, "level"), sizes_of([8, 4], 2, "group"), sizes_of(8, 3, "scale", shared=True)
    ([8, 8, 8], [8, 4], [8])
    """
    if isinstance(codebook_size, int):
        return [codebook_size] * (1 if shared else count)
    if shared:
        raise ValueError(f"a shared codebook has one codebook_size, got {list(codebook_size)}: give one int")
    if len(codebook_size) != count:
        raise ValueError(
            f"codebook_size must be one int or one for each of the {count} {what}s, got {list(codebook_size)}"
        )
    return list(codebook_size)


def codebooks_in(modules: nn.ModuleList) -> list[EMACodebook]:
    """Return the codebooks of a module list.

    >>> codebooks_in(nn.ModuleList([EMACodebook(codebook_size=8, dim=4)]))
    [EMACodebook(codebook_size=8, dim=4, ...)]
    """
    found = []
    for module in modules:
        assert isinstance(module, EMACodebook)
        found.append(module)
    return found


def codebook_at(modules: nn.ModuleList, number: int, count: int, what: str) -> EMACodebook:
    """Return the codebook of a part; the only one where all parts share it.

    Args:
        modules: the codebooks.
        number: of the part, from 0.
        count: how many parts the quantiser has.
        what: the name of a part.

    Raises:
        ValueError: there is no such part.

    >>> codebook_at(nn.ModuleList([EMACodebook(codebook_size=8, dim=4)]), 2, 2, "group")
    Traceback (most recent call last):
    ValueError: group must be from 0 to 1, got 2: groups count from 0
    """
    if not 0 <= number < count:
        raise ValueError(f"{what} must be from 0 to {count - 1}, got {number}: {what}s count from 0")
    found = modules[number if len(modules) > 1 else 0]
    assert isinstance(found, EMACodebook)
    return found


def freeze_all(modules: nn.ModuleList, frozen: bool) -> None:
    """Freeze all codebooks, or resume their updates."""
    for codebook in codebooks_in(modules):
        codebook.freeze(frozen)


def usage_of_all(modules: nn.ModuleList, dead_below: float) -> tuple[CodebookUsage, ...]:
    """Return the usage of each codebook."""
    return tuple(codebook.usage(dead_below) for codebook in codebooks_in(modules))


def set_first_codes_(modules: nn.ModuleList, tokens: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """Draw the first codes of each codebook that has none, from tokens and mask of its part."""
    codebooks = codebooks_in(modules)
    # All are drawn before any is set: an initialisation that refuses one part leaves the others as they were.
    codes = [
        codebook.first_codes(z, mask) if codebook.needs_codes else None
        for codebook, z, mask in zip(codebooks, tokens, masks, strict=True)
    ]
    for codebook, first in zip(codebooks, codes, strict=True):
        if first is not None:
            codebook.set_codes_(first)
