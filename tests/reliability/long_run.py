"""Train a codebook for 20,000 steps on changing features, and watch memory, dead codes and counts.

`python -m tests.reliability.long_run [--steps 20000] [--trial]`. A third of the clusters is constant, a third drifts
slowly all the time, and a third jumps to other places halfway.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import vqssl
from tests.reliability.record import write

CODES, DIM, TOKENS, CLUSTERS = 256, 16, 1024, 96
PARTS = ("still", "drifting", "jumping")


def batch(step: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return tokens ``(TOKENS, DIM)`` and the number of the part that each belongs to."""
    homes = 3 * torch.randn(CLUSTERS, DIM, generator=torch.Generator().manual_seed(1))
    ways = torch.randn(CLUSTERS, DIM, generator=torch.Generator().manual_seed(2))
    part = torch.arange(CLUSTERS) % 3
    homes = homes + (part == 1)[:, None] * ways * (20.0 * step / steps)
    homes = homes + (part == 2)[:, None] * ways * (20.0 * (step >= steps // 2))
    generator = torch.Generator().manual_seed(1000 + step)
    choice = torch.randint(CLUSTERS, (TOKENS,), generator=generator)
    return homes[choice] + 0.3 * torch.randn(TOKENS, DIM, generator=generator), part[choice]


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def tensors() -> int:
    """Return the number of live tensors."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def run(steps: int, revival: vqssl.revival.Revival | None = vqssl.BatchRevival(), looks: int = 100) -> dict:  # noqa: B008
    """Train a codebook, and return figures of the whole run and rows of `looks` of its steps."""
    codebook = vqssl.EMACodebook(codebook_size=CODES, dim=DIM, decay=0.99, revival=revival)
    total, worst_total = float(CODES), 0.0
    rows, junk = [], 0
    every = max(steps // looks, 1)
    for step in tqdm(range(steps), disable=not sys.stderr.isatty()):
        x, part = batch(step, steps)
        out = codebook(x)
        total = 0.99 * total + 0.01 * TOKENS
        if step % every and step != steps - 1:
            continue
        worst_total = max(worst_total, abs(codebook.cluster_size.sum().item() / total - 1))
        junk += sum(
            int((~torch.isfinite(t)).sum()) for t in (codebook.embed, codebook.embed_avg, codebook.cluster_size)
        )
        usage = codebook.usage()
        error = (x - out.quantized).square().sum(-1)
        rows.append(
            {
                "step": step,
                "perplexity": round(usage.perplexity.item(), 1),
                "dead": int(usage.dead),
                **{name: round(error[part == number].mean().item(), 3) for number, name in enumerate(PARTS)},
                "MiB": round(resident() / 2**20, 1),
                "tensors": tensors(),
            }
        )
    settled = [row for row in rows if row["step"] >= steps // 10]
    return {
        "steps": steps,
        "codes": CODES,
        "memory growth MiB after the first tenth": round(settled[-1]["MiB"] - settled[0]["MiB"], 1),
        "live tensors after the first tenth and at the end": [settled[0]["tensors"], settled[-1]["tensors"]],
        "numbers that are not finite": junk,
        "sum(cluster_size) off by at most": float(f"{worst_total:.1e}"),
        "least perplexity after the first tenth": min(row["perplexity"] for row in settled),
        "perplexity at the end": rows[-1]["perplexity"],
        "dead codes at the end": rows[-1]["dead"],
        "rows": rows,
    }


def main() -> None:
    """Run with and without revival, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--trial", action="store_true", help="write no record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = run(options.steps)
    record["without revival"] = run(options.steps, None)
    write("long_run", "python -m tests.reliability.long_run", record, trial=options.trial)


if __name__ == "__main__":
    main()
