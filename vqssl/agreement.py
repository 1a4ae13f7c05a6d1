"""Agreement of ranks: at its first call over several ranks, a module compares its options and state with the others'.

The ranks meet in the key-value store of the process group, which every backend has. So a rank that does not come can
be named, and a comparison cannot pair with another rank's all-reduce.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl.checks import policy_name
from vqssl.distributed import GroupHolder, rank_and_world_size

if TYPE_CHECKING:  # builds of torch without distributed have none
    from torch.distributed.distributed_c10d import Store

__all__ = ["PATIENCE", "Agreement", "checksum", "difference", "option_text"]

PATIENCE = [timedelta(seconds=2), timedelta(seconds=30)]
"""After these times a waiting rank looks for ranks on which the module is frozen; after the last it warns, too."""
CURE = (
    "call it on every rank, with any number of tokens, or call .eval() before a call on some ranks alone; look for a "
    "rank that is in eval mode or frozen, or that stopped"
)


class Agreement:
    """The comparison of one module between the ranks of its process group, made once.

    A copy counts as compared where the original does; an unpickled module compares again.

    >>> Agreement().reach("EMACodebook", dict)  # one process has nobody to compare with
    """

    def __init__(self) -> None:
        self._reached_in = GroupHolder()
        self._entered_in = GroupHolder()
        self._noted_in = GroupHolder()
        self._number = 0

    def reach(
        self,
        owner: str,
        facts: Callable[[], Mapping[str, str]],
        group: ProcessGroup | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        """Compare ``facts()`` with those of the other ranks' modules, which call this in the same order; once a group.

        Args:
            owner: what the facts are about, for errors.
            facts: returns names and values; called once.
            group: the ranks; None is the default group.
            frozen: True leaves a note for ranks that wait for this one, and returns at once.

        Raises:
            ValueError: the facts differ; all ranks raise it. Or the module is frozen on some ranks alone; the others
                raise it.
            RuntimeError: a rank did not come before the time-out of ``init_process_group``.

        Warns:
            UserWarning: a rank has not come after half a minute.
        """
        rank, world_size = rank_and_world_size(group)
        if world_size == 1:
            return
        group = dist.group.WORLD if group is None else group
        assert group is not None
        # The fake backend is one process that pretends to be many.
        if (self._noted_in if frozen else self._reached_in).group is group or dist.get_backend(group) == "fake":
            return
        board = _Board(group.get_group_store(), rank, world_size, owner)
        if frozen:
            board.note_frozen(facts())
            self._noted_in = GroupHolder(group)
            return
        if self._entered_in.group is not group:
            self._number = board.enter(facts())
            self._entered_in = GroupHolder(group)
        differ = board.verdict(self._number)
        if differ:
            self._entered_in = GroupHolder()  # the next call compares anew
            raise ValueError(
                f"{owner} must have the same options and state on all ranks of its process_group, got {differ}: build "
                "it alike on every rank, and load one checkpoint on all ranks or on none"
            )
        self._reached_in = GroupHolder(group)


@dataclasses.dataclass(frozen=True)
class _Board:
    """The notice board of a process group. The n-th comparison of each rank belongs to the same module."""

    store: Store
    rank: int
    world_size: int
    owner: str

    def enter(self, facts: Mapping[str, str]) -> int:
        """Lay down this rank's facts and return the number of the comparison.

        The last rank to come compares, so that each rank's facts are read once.
        """
        number = self.store.add(f"vqssl/rank{self.rank}/entered", 1)
        self.store.set(f"vqssl/meeting{number}/{self.rank}", json.dumps({"module": self.owner, **facts}))
        if self.store.add(f"vqssl/meeting{number}/entered", 1) == self.world_size:
            found = [json.loads(self.store.get(f"vqssl/meeting{number}/{rank}")) for rank in range(self.world_size)]
            self.store.set(f"vqssl/meeting{number}/verdict", json.dumps(difference(found)))
        return number

    def note_frozen(self, facts: Mapping[str, str]) -> None:
        """Note that this rank has called a module with these facts, frozen."""
        self.store.add(f"vqssl/rank{self.rank}/frozen/{_digest(facts)}", 1)

    def verdict(self, number: int) -> str:
        """Return in what the ranks differ, once all are there."""
        key = f"vqssl/meeting{number}/verdict"
        self._wait_for(key, number)
        differ: str = json.loads(self.store.get(key))
        if differ:
            # All are going to stop, and the store ends with the process that holds it.
            read = f"vqssl/meeting{number}/read"
            self.store.add(read, 1)
            _came(lambda: self.store.add(read, 0) >= self.world_size, timedelta(seconds=10))
        return differ

    def _wait_for(self, key: str, number: int) -> None:
        limit: timedelta = self.store.timeout  # type: ignore[attr-defined]
        rest = max(limit - sum(PATIENCE, timedelta()), timedelta())
        for patience in (*PATIENCE, rest):
            if _came(lambda: self.store.check([key]), min(patience, limit)):
                return
            absent = self._absent(number)
            self._refuse_if_frozen(number, absent)
            if patience is PATIENCE[-1] and absent:
                waited = f"this rank has waited for {patience.total_seconds():g} s"
                missing = f"{self._missing(absent)} in training mode"
                warnings.warn(f"{self.owner}: {missing}, and {waited}: {CURE}", stacklevel=2)
        raise RuntimeError(
            f"{self.owner} has to be called in training mode on every rank of its process_group: "
            f"{self._missing(self._absent(number))} within {limit.total_seconds():g} s: {CURE}"
        )

    def _absent(self, number: int) -> list[int]:
        return [rank for rank in range(self.world_size) if not self.store.check([f"vqssl/meeting{number}/{rank}"])]

    def _missing(self, absent: list[int]) -> str:
        return f"{_ranks(absent)} of {self.world_size} {'has' if len(absent) == 1 else 'have'} not called it"

    def _refuse_if_frozen(self, number: int, absent: list[int]) -> None:
        """Raise if an absent rank has called a module with the same facts frozen, and this rank has not."""
        facts = json.loads(self.store.get(f"vqssl/meeting{number}/{self.rank}"))
        del facts["module"]
        notes = [self.store.add(f"vqssl/rank{rank}/frozen/{_digest(facts)}", 0) for rank in (self.rank, *absent)]
        frozen = [rank for rank, count in zip(absent, notes[1:], strict=True) if count > notes[0]]
        if frozen:
            raise ValueError(
                f"{self.owner} must be frozen on all ranks of its process_group or on none, got it frozen on "
                f"{_ranks(frozen)} and not on rank {self.rank}: call freeze() alike on every rank"
            )


def _came(condition: Callable[[], bool], limit: timedelta) -> bool:
    """Ask until the condition holds or the time is over: a wait within the store would lock it for other threads."""
    end = time.monotonic() + limit.total_seconds()
    pause = 0.001
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 0.25)
    return True


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def difference(found: Iterable[Mapping[str, str]], most: int = 3) -> str:
    """Return in words which facts differ between ranks, and their values; nothing if none does.

    Args:
        found: the facts of each rank, in the order of ranks.
        most: how many to list.

    >>> difference([{"seed": "0", "dim": "4"}, {"seed": "1", "dim": "4"}, {"seed": "0", "dim": "4"}])
    'seed 0 (ranks 0, 2) and 1 (rank 1)'
    """
    found = list(found)
    differ = []
    for name in dict.fromkeys(name for facts in found for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(found):
            ranks.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            differ.append(name + " " + " and ".join(f"{value} ({_ranks(held)})" for value, held in ranks.items()))
    more = f"; and {len(differ) - most} more" if len(differ) > most else ""
    return "; ".join(differ[:most]) + more


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def option_text(value: Any) -> str:
    """Return the text by which an option is compared between processes: without addresses in memory.

    >>> option_text(0.99), option_text(option_text)
    ('0.99', 'option_text')
    """
    if isinstance(value, str | int | float | bool | None) or dataclasses.is_dataclass(value):
        text = str(value)
        if " at 0x" not in text:
            return text
    return policy_name(value)


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return a short text that differs where a bit of the tensors does.

    >>> import torch
    >>> checksum([torch.zeros(3)]) == checksum([torch.zeros(3)])
    True
    >>> checksum([torch.zeros(3)]) == checksum([-torch.zeros(3)])
    False
    """
    digest = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
