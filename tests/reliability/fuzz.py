"""Make 100,000 random calls; each must either work and leave a sound state, or raise our error and change nothing.

`python -m tests.reliability.fuzz [--inputs 100000] [--seed 0] [--trial]`. random_calls.py draws the calls, and
test_hostile.py gives them to hypothesis.
"""

import argparse
import collections
import random
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import vqssl
from tests.reliability.random_calls import CASES
from tests.reliability.record import write

PACKAGE = str(Path(vqssl.__file__).parent)


def state_of(module: nn.Module | None) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    if module is None:
        return {}
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def sound(module: nn.Module | None) -> bool:
    """Return True if no code, count or weight is NaN or infinite, and no count negative."""
    if module is None:
        return True
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point() and "running_" not in name and not torch.isfinite(value).all():
            return False
        if name.endswith("cluster_size") and (value < 0).any():
            return False
    return True


class Unsound(Exception):
    """A call that neither worked nor was refused properly."""


def attempt(rng: random.Random) -> tuple[str, str]:
    """Make one random call; return its name and whether it "worked" or was "refused"."""
    name, module, call = rng.choice(CASES)(rng)
    before = state_of(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (ValueError, TypeError) as error:
        changed = [key for key, value in state_of(module).items() if not same(value, before[key])]
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not where.startswith(PACKAGE) or len(str(error)) < 20:
            raise Unsound(f"{name}: the error is not vqssl's own: {error!r}\n{traceback.format_exc()}") from error
        if changed:
            raise Unsound(f"{name}: raised {error}, but changed {changed}") from error
        return name, "refused"
    except Exception as error:
        if name == "load_state_dict" and isinstance(error, RuntimeError) and "Error(s) in loading" in str(error):
            return name, "refused"  # torch's own error for missing and unexpected keys
        raise Unsound(
            f"{name}: neither worked nor raised ValueError or TypeError: {error!r}\n{traceback.format_exc()}"
        ) from error
    if name != "load_state_dict" and not sound(module):
        raise Unsound(f"{name}: worked, but the state is not finite")
    return name, "worked"


def same(a: Tensor, b: Tensor) -> bool:
    """Return True if the values are equal, NaN with NaN."""
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def main() -> None:
    """Make the random calls and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", action="store_true", help="write no record, and go on after a failure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: collections.Counter[str] = collections.Counter()
    for number_of_input in tqdm(range(options.inputs), disable=not sys.stderr.isatty()):
        seed = options.seed * 10**9 + number_of_input
        try:
            seen[attempt(random.Random(seed))] += 1
        except Unsound as error:
            if not options.trial:
                raise SystemExit(f"input {seed}: {error}") from error
            lines = str(error).splitlines()
            failures[lines[0][:200] + " | " + " ".join(lines[-4:-1])[:300]] += 1
    for line, count in failures.most_common():
        print(count, line)
    outcomes: collections.Counter[str] = collections.Counter()
    for (_, outcome), count in seen.items():
        outcomes[outcome] += count
    figures = {
        "inputs": options.inputs,
        **{name: outcomes[name] for name in ("worked", "refused")},
        "other errors, changed or unsound state": sum(failures.values()),
        "calls": {name: {o: seen[name, o] for o in ("worked", "refused")} for name in sorted({n for n, _ in seen})},
    }
    write("fuzz", "python -m tests.reliability.fuzz", figures, trial=options.trial)


if __name__ == "__main__":
    main()
