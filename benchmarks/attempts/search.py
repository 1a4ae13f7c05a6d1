"""The search: called within itself, and among codes that make it slow."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from benchmarks.attempts.attempt import Outcome, attempt
from vqssl.functional import nearest_codeword


def _case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, codes = torch.randn(1500, 8, generator=generator), torch.randn(300, 8, generator=generator)
    return x, codes, torch.cdist(x.double(), codes.double()).argmin(1)


@attempt("300 searches, each interrupted by a signal handler that searches too", right="no index is wrong")
def search_in_a_signal_handler() -> Outcome:
    (x, codes, expected), (y, others, answers) = _case(0), _case(1)
    inner: list[bool] = []

    def handler(*_: object) -> None:
        inner.append(torch.equal(nearest_codeword(y, others), answers))

    before = signal.signal(signal.SIGALRM, handler)
    outer = []
    try:
        for round in range(300):
            signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + 7 * round % 300))
            outer.append(torch.equal(nearest_codeword(x, codes), expected))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    wrong = outer.count(False) + inner.count(False)
    return Outcome(wrong == 0 and len(inner) > 30, f"{wrong} of {len(outer) + len(inner)} searches wrong")


@attempt("searches in eight threads at once", right="no index is wrong")
def searches_in_threads() -> Outcome:
    def search(seed: int) -> bool:
        x, codes, expected = _case(seed)
        return all(torch.equal(nearest_codeword(x, codes), expected) for _ in range(5))

    with ThreadPoolExecutor(8) as threads:
        wrong = list(threads.map(search, range(24))).count(False)
    return Outcome(wrong == 0, f"{wrong} of 24 threads wrong")


def _times_as_long(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Outcome:
    """Compare the time of a search with that among ordinary codes, in turn."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = torch.randn(16384, 64), torch.randn(256, 64)
    changed = change(*(tensor.clone() for tensor in plain))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(11):
        for odd, (x, codes) in ((False, plain), (True, changed)):
            start = time.process_time()
            nearest_codeword(x, codes)
            seconds[odd].append(time.process_time() - start)
    ratio = sorted(seconds[True])[5] / sorted(seconds[False])[5]
    return Outcome(ratio < 2, f"{ratio:.1f} times as long")


@attempt("one of 256 codes is a million times as far as the others", right="less than twice the time")
def far_code() -> Outcome:
    def change(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        codes[7] *= 1e6
        return x, codes

    return _times_as_long(change)


@attempt("a tenth of the codes are a thousand to a million times as far", right="less than twice the time")
def far_codes_of_many_scales() -> Outcome:
    def change(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        codes[:25] *= 10.0 ** torch.linspace(3, 6, 25)[:, None]
        return x, codes

    return _times_as_long(change)


@attempt("one of 16,384 tokens is a million times as far as the others", right="less than twice the time")
def far_token() -> Outcome:
    def change(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        x[7] *= 1e6
        return x, codes

    return _times_as_long(change)


@attempt("each code is there four times", right="less than twice the time")
def copies() -> Outcome:
    return _times_as_long(lambda x, codes: (x, codes[torch.arange(256) % 64]))


@attempt("codes are tokens, a third of them twice", right="less than twice the time")
def codes_drawn_from_tokens() -> Outcome:
    return _times_as_long(lambda x, codes: (x, x[torch.randint(400, (256,))]))
