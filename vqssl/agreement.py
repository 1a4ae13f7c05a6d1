"""Agreement of ranks: at its first call over several ranks, a module compares its options and state with the others'.

The ranks meet in the key-value store of the process group, which every backend has. So a rank that does not come can
be named, and a comparison cannot pair with another rank's all-reduce.
"""

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl.checks import policy_name
from vqssl.distributed import GroupHolder, rank_and_world_size

__all__ = ["Agreement", "checksum", "difference", "option_text"]

PATIENCE = timedelta(seconds=30)
"""How long a rank waits before it warns."""
MISSING = (
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
        self._number = 0

    def reach(
        self,
        owner: str,
        facts: Callable[[], Mapping[str, str]],
        group: ProcessGroup | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """Compare ``facts()`` with those of the other ranks' modules, which call this in the same order; once a group.

        Args:
            owner: what the facts are about, for errors.
            facts: returns names and values; called once.
            group: the ranks; None is the default group.
            wait: False returns at once while ranks are missing; a later call finds the result.

        Raises:
            ValueError: the facts differ. All ranks that wait raise it.
            RuntimeError: a rank did not come before the time-out of ``init_process_group``.

        Warns:
            UserWarning: a rank has not come after half a minute.
        """
        rank, world_size = rank_and_world_size(group)
        if world_size == 1:
            return
        group = dist.group.WORLD if group is None else group
        assert group is not None
        # The fake backend is a single process that pretends to be one of many.
        if self._reached_in.group is group or dist.get_backend(group) == "fake":
            return
        store = group.get_group_store()
        if self._entered_in.group is not group:
            self._number = store.add(f"vqssl/{rank}", 1)
            self._entered_in = GroupHolder(group)
            _enter(store, self._number, rank, world_size, {"module": owner, **facts()})
        verdict = f"vqssl/{self._number}/verdict"
        if wait:
            _wait_for_verdict(store, self._number, world_size, owner)
        elif not store.check([verdict]):
            return
        differ, readers = json.loads(store.get(verdict))
        if differ:
            self._entered_in = GroupHolder()  # the next call compares anew
            _wait_for_readers(store, self._number, readers if wait else 0)
            raise ValueError(
                f"{owner} must have the same options and state on all ranks of its process_group, got {differ}: build "
                "it alike on every rank, and load one checkpoint on all ranks or on none"
            )
        self._reached_in = GroupHolder(group)


def _enter(store: dist.Store, number: int, rank: int, world_size: int, facts: Mapping[str, str]) -> None:
    """Lay down this rank's facts. The last rank to come compares them, so that each is read once."""
    store.set(f"vqssl/{number}/{rank}", json.dumps(facts))
    if store.add(f"vqssl/{number}/entered", 1) == world_size:
        found = [json.loads(store.get(f"vqssl/{number}/{other}")) for other in range(world_size)]
        waiting = sum(each.get("frozen") != "True" for each in found)
        store.set(f"vqssl/{number}/verdict", json.dumps([difference(found), waiting]))


def _wait_for_verdict(store: dist.Store, number: int, world_size: int, owner: str) -> None:
    verdict = [f"vqssl/{number}/verdict"]
    if _came(lambda: store.check(verdict), min(PATIENCE, store.timeout)):
        return
    # Python's own time-outs are floats of seconds; those of torch.distributed are timedeltas.
    rest = store.timeout - PATIENCE
    absent = _absent(store, number, world_size)
    if rest > timedelta() and absent:
        warnings.warn(
            f"{absent} of {world_size} not called this {owner} in training mode, and this rank has waited for "
            f"{PATIENCE.seconds} s: {MISSING}",
            stacklevel=2,
        )
    if rest > timedelta() and _came(lambda: store.check(verdict), rest):
        return
    absent = _absent(store, number, world_size) or "not all ranks have"
    raise RuntimeError(
        f"{owner} has to be called in training mode on every rank of its process_group: {absent} of {world_size} not "
        f"called it within {store.timeout.total_seconds():g} s: {MISSING}"
    )


def _wait_for_readers(store: dist.Store, number: int, readers: int) -> None:
    """Wait until all ranks have read why they are going to stop: the store ends with the process that holds it."""
    key = f"vqssl/{number}/readers"
    store.add(key, 1)
    _came(lambda: store.add(key, 0) >= readers, timedelta(seconds=10))


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


def _absent(store: dist.Store, number: int, world_size: int) -> str:
    absent = [rank for rank in range(world_size) if not store.check([f"vqssl/{number}/{rank}"])]
    return f"{_ranks(absent)} {'has' if len(absent) == 1 else 'have'}" if absent else ""


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
    >>> checksum([torch.zeros(3)]) == checksum([torch.zeros(3)]), checksum([torch.zeros(3)]) == checksum([-torch.zeros(3)])
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
