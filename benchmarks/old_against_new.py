"""Time and memory of a training step, an older commit against the working tree, in one interleaved run.

    python -m benchmarks.old_against_new --old COMMIT [--threads 1] [--rounds 40] [--quick]

Each version runs in a process of its own, from a checkout of its own. Rounds alternate between the two in random order,
so that both see the same load of the machine; CPU time is what counts (of all threads), which other programs do
not add to. Parity of the outputs is verified before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.provenance import ROOT, command_line, provenance

# tokens, codes, width, metric, dtype, whether a mask is given
CASES = (
    (12544, 512, 128, "euclidean", "float32", False),
    (12544, 2048, 128, "euclidean", "float32", False),
    (12544, 2048, 128, "cosine", "float32", False),
    (12544, 2048, 128, "euclidean", "bfloat16", False),
    (12544, 2048, 128, "euclidean", "float32", True),
    (50176, 512, 128, "euclidean", "float32", False),
    (3136, 2048, 64, "euclidean", "float32", False),
)

# Runs in both versions: it uses what both have.
WORKER = """
import json, sys, time
import torch, vqssl
def peak():
    state["x"].grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    running = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        most = max(most, running)
    return most / 2**20
state = {}
def build(tokens, codes, width, metric, dtype, masked):
    torch.manual_seed(0)
    try:
        codebook = vqssl.EMACodebook(codebook_size=codes, dim=width, metric=metric)
    except TypeError:
        codebook = vqssl.EMACodebook(codes, width, metric=metric)
    x = (torch.randn(tokens, 16) @ torch.randn(16, width)).to(getattr(torch, dtype)).requires_grad_()
    mask = torch.rand(tokens) < 0.7 if masked else None
    gradient = torch.randn(tokens, width).to(x.dtype)
    state.update(codebook=codebook, x=x, mask=mask, gradient=gradient)
    for _ in range(3):
        step()
    out = codebook.quantize(x, mask)
    return [codebook.embed.double().sum().item(), out.indices.sum().item(), out.commitment_loss.item()]
def step():
    state["x"].grad = None
    out = state["codebook"](state["x"], state["mask"])
    torch.autograd.backward([out.quantized, out.commitment_loss], [state["gradient"], torch.tensor(1.0)])
torch.set_num_threads(int(sys.argv[1]))
for line in sys.stdin:
    what, *arguments = json.loads(line)
    if what == "build":
        answer = build(*arguments)
    elif what == "time":
        start = time.process_time()
        step()
        answer = 1e3 * (time.process_time() - start)
    else:
        answer = peak()
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """A process that runs one version of the library."""

    def __init__(self, tree: Path, threads: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "OMP_WAIT_POLICY": "PASSIVE",
            # The C library keeps freed memory: page faults of fresh memory vary by a tenth of a step between runs.
            "MALLOC_MMAP_THRESHOLD_": str(2**32),
            "MALLOC_TRIM_THRESHOLD_": str(2**33),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=tree,
            text=True,
        )

    def ask(self, *message: Any) -> Any:
        """Send one request and return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compare(old: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return for each case both versions' medians and the median ratio of pairs of neighbouring steps."""
    rows = []
    order = random.Random(0)
    for case in CASES:
        workers = {"old": Worker(old, threads), "new": Worker(ROOT, threads)}
        answers = {name: worker.ask("build", *case) for name, worker in workers.items()}
        if not np.allclose(answers["old"], answers["new"], rtol=1e-6):
            raise SystemExit(f"error: the versions disagree on {case}: {answers}")
        times: dict[str, list[float]] = {"old": [], "new": []}
        for _ in tqdm(range(rounds), desc=" x ".join(map(str, case)), leave=False):
            names = list(workers)
            order.shuffle(names)
            for name in names:
                times[name].append(workers[name].ask("time"))
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
        for worker in workers.values():
            worker.process.kill()
        ratio = np.array(times["new"]) / np.array(times["old"])
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        rows.append(
            {
                "tokens": case[0],
                "codes": case[1],
                "width": case[2],
                "metric": case[3],
                "dtype": case[4],
                "masked": case[5],
                "old_ms": round(float(np.median(times["old"])), 3),
                "new_ms": round(float(np.median(times["new"])), 3),
                "ratio": [round(float(value), 4) for value in (low, middle, high)],
                "ratio_of_fastest": round(min(times["new"]) / min(times["old"]), 4),
                "old_mib": round(memory["old"], 1),
                "new_mib": round(memory["new"], 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Check the old commit out, compare, and write the record to runs/benchmarks/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="a commit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), options.old], cwd=ROOT, check=True)
        try:
            rows = compare(tree, options.threads, options.rounds)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    record = {
        "kind": "old_against_new",
        **provenance(command_line("benchmarks.old_against_new")),
        "cores": options.threads,
        "old": options.old,
        "rows": rows,
    }
    path = ROOT / "runs" / "benchmarks" / f"old_against_new-{options.threads}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
