"""Several runs in a limited time: an epoch of each in turn, so that a stop leaves them equally far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from examples.pretrain import ranks
from examples.pretrain.train import Monitor, Run


def train_in_turns(
    runs: Sequence[Run],
    seconds: float,
    *,
    monitor: Monitor | None = None,
    quiet: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Train one epoch of each run in turn, that of the fewest epochs first; return True once all runs are finished.

    An epoch is not begun if it would end too late. It is expected to take as long as the longest one that its run has
    had in this call, or any run if its own has had none. So only the first epoch of a call can end too late.

    Args:
        runs: a checkpoint follows each epoch, so that a later call continues.
        seconds: from now on.
        monitor: see :meth:`Run.train`.
        quiet: whether to print nothing.
        clock: in seconds.
    """
    end = clock() + seconds
    longest: dict[int, float] = {}
    while left := [number for number, run in enumerate(runs) if run.epoch < run.config.optimization.epochs]:
        number = min(left, key=lambda each: runs[each].epoch)
        start = clock()
        expected = longest.get(number, max(longest.values(), default=0.0))
        fits = start < end and start + expected <= end
        if not ranks.decided_by_first(partial(bool, fits)):  # clocks of ranks differ
            return False
        runs[number].train(until=runs[number].epoch + 1, monitor=monitor, quiet=quiet)
        longest[number] = max(longest.get(number, 0.0), clock() - start)
    return True
