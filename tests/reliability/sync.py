"""Measure what synchronising a codebook costs, and how the codes fare when it happens less often.

`python -m tests.reliability.sync [--trial]` counts bytes and all-reduces of a step, times the all-reduces between
processes of this machine, and updates codebooks at every T-th step only.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

import vqssl
from tests.reliability import long_run
from tests.reliability.ranks import counted
from tests.reliability.record import write

CODES, DIM, SCALES = 2048, 128, 3
INTERVALS = (1, 4, 16, 32)
STEPS = 1500
SEEDS = 5


def measure_rank(rank: int, world: int, folder: str) -> None:
    """Count and time the all-reduces of one training step; rank 0 saves them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    quantizer = vqssl.MultiScaleQuantizer([DIM] * SCALES, codebook_size=CODES, dim=DIM, channels_last=True)
    # ResNet-18 at 224 px has maps of 28, 14 and 7 cells a side; 4 images a rank.
    maps = [torch.randn(4, side, side, DIM) for side in (28, 14, 7)]
    quantizer(maps)
    with counted() as sizes:
        quantizer(maps)
    waits = []
    for _ in range(20):
        flat = [torch.zeros(size // 4) for size in sizes]
        dist.barrier()
        start = time.perf_counter()
        for tensor in flat:
            dist.all_reduce(tensor)
        waits.append(time.perf_counter() - start)
    if rank == 0:
        torch.save({"bytes": sizes, "ms": 1e3 * statistics.median(waits)}, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def cost_of_step(world: int) -> dict:
    """Return bytes, number and milliseconds of a step's all-reduces between `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure_rank, (world, folder), world)  # type: ignore[attr-defined]
        found = torch.load(Path(folder) / "found.pt", weights_only=True)
    return {
        "ranks": world,
        "all-reduces a step": len(found["bytes"]),
        "bytes": found["bytes"],
        "ms": round(found["ms"], 2),
    }


def updated_every(interval: int, seed: int, *, all_tokens: bool) -> dict[str, float]:
    """Quantise drifting features at every step, update at every `interval`-th, and return the figures."""
    codebook = vqssl.EMACodebook(codebook_size=long_run.CODES, dim=long_run.DIM, decay=0.99**interval, seed=seed)
    seen, errors = [], []
    for step in range(STEPS):
        x, _ = long_run.batch(step, STEPS)
        codebook.initialize_(x)
        out = codebook.quantize(x)
        seen.append((x, out.indices))
        if (step + 1) % interval == 0:
            kept = seen if all_tokens else seen[-1:]
            codebook.update_(torch.cat([x for x, _ in kept]), torch.cat([k for _, k in kept]))
            seen = []
        errors.append((x - out.quantized).square().sum(-1).mean())
    usage = codebook.usage()
    seen_errors = torch.stack(errors)
    median = seen_errors[STEPS // 10 :].median()
    after_jump = seen_errors[STEPS // 2 :] < 2 * median
    return {
        "error": round(median.item(), 3),
        "steps to recover": int(after_jump.long().argmax()),
        "perplexity": round(usage.perplexity.item(), 1),
    }


def over_seeds(interval: int, *, all_tokens: bool) -> dict[str, list[float]]:
    """Return the least, the median and the largest value of each figure over seeds."""
    runs = [updated_every(interval, seed, all_tokens=all_tokens) for seed in range(SEEDS)]
    return {name: sorted(run[name] for run in runs)[:: SEEDS // 2] for name in runs[0]}


def main() -> None:
    """Measure all costs and write the record."""
    torch.set_num_threads(1)
    costs = [cost_of_step(world) for world in (2, 4)]
    rows = []
    for interval in tqdm(INTERVALS, disable=not sys.stderr.isatty()):
        row: dict = {"every": interval}
        for name, all_tokens in (("last step's tokens", False), ("all steps' tokens", True)):
            row[name] = over_seeds(interval, all_tokens=all_tokens)
        rows.append(row)
    figures = {
        "codebook": {"codes": CODES, "dim": DIM, "scales": SCALES},
        "travel": costs,
        "intervals": rows,
        "interval codebook": {
            "seeds": SEEDS,
            "codes": long_run.CODES,
            "dim": long_run.DIM,
            "tokens a step": long_run.TOKENS,
            "steps": STEPS,
        },
    }
    write("sync", "python -m tests.reliability.sync", figures, trial="--trial" in sys.argv)


if __name__ == "__main__":
    main()
