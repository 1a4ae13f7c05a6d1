"""Measure a resized codebook against a fresh one of the same size: `python -m benchmarks.resizing`.

A codebook of 128 codes is trained for 500 steps, then resized. It trains for 200 steps more, beside a fresh codebook of
the new size that sees the same batches. Error and usage are those of tokens that no codebook was trained on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import vqssl
from benchmarks import harness
from benchmarks.fitting import error_of, mixture
from vqssl.experimental import resized
from vqssl.functional import code_counts, codebook_usage

SIZE = 128
NEW_SIZES = (64, 256, 512)
BATCH = 512
HELD_OUT = 8192
LOOKS = (1, 20, 200)
"""Steps after resizing at which error and usage are measured."""


Source = Callable[[int, int, int], Tensor]
"""``(step, draw, count) -> tokens``: those of a step, by the number of a draw."""


def clusters(seed: int) -> Source:
    """Return a source of tokens in 400 clusters of unequal size."""
    centres = mixture(400, 0.0, seed, 400)

    def tokens(step: int, draw: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 10**6 + draw)
        choice = (len(centres) * torch.rand(count, generator=generator) ** 2).long()
        return centres[choice] + 0.3 * torch.randn(count, 16, generator=generator)

    return tokens


def turning(seed: int) -> Source:
    """Return the same tokens, which turn by a right angle in 1000 steps, as features of a training network may."""
    still = clusters(seed)

    def tokens(step: int, draw: int, count: int) -> Tensor:
        x, angle = still(step, draw, count), torch.tensor(step * torch.pi / 2000)
        first, second = x[:, 0::2], x[:, 1::2]
        return torch.cat([angle.cos() * first - angle.sin() * second, angle.sin() * first + angle.cos() * second], 1)

    return tokens


MATERIAL: dict[str, Callable[[int], Source]] = {"400 clusters": clusters, "the same, turning": turning}


def look(codebook: vqssl.EMACodebook, x: Tensor) -> dict[str, float]:
    """Return error and usage on tokens that the codebook has not seen."""
    codebook = codebook.eval()
    counts = code_counts(codebook.quantize(x).indices, codebook.codebook_size)
    codebook.train()
    usage = codebook_usage(counts)
    return {
        "error": error_of(codebook.embed, x),
        "perplexity / K": usage.perplexity.item() / codebook.codebook_size,
        "dead / K": usage.dead.item() / codebook.codebook_size,
    }


def one_seed(source: Source, seed: int, before: int, looks: tuple[int, ...]) -> dict[str, Any]:
    """Return what each codebook measures at each look, by new size."""
    trained = vqssl.EMACodebook(codebook_size=SIZE, dim=16, seed=seed)
    for step in range(before):
        trained(source(step, step, BATCH))
    found: dict[str, Any] = {}
    for size in NEW_SIZES:
        runs = {
            "resized": resized(trained, size),
            "fresh": vqssl.EMACodebook(codebook_size=size, dim=16, seed=seed + 1000),
        }
        found[str(size)] = {name: {} for name in runs}
        for step in range(before, before + looks[-1]):
            x = source(step, step, BATCH)
            for codebook in runs.values():
                codebook(x)
            if step + 1 - before in looks:
                unseen = source(step, 500_000 + step, HELD_OUT)
                for name, codebook in runs.items():
                    found[str(size)][name][str(step + 1 - before)] = look(codebook, unseen)
    return found


def summary(seeds: list[dict[str, Any]], last: int) -> list[dict[str, Any]]:
    """Return a row for each size: means over seeds of the last look, and errors relative to a fresh codebook."""
    rows = []
    for size in seeds[0]:
        row: dict[str, Any] = {"codes": int(size)}
        for name in seeds[0][size]:
            looks = [found[size][name][str(last)] for found in seeds]
            row[name] = {each: round(statistics.mean(look[each] for look in looks), 5) for each in looks[0]}
        ratios = [f[size]["resized"][str(last)]["error"] / f[size]["fresh"][str(last)]["error"] for f in seeds]
        row["error, resized / fresh"] = {"mean": statistics.mean(ratios), "least": min(ratios), "most": max(ratios)}
        rows.append(row)
    return rows


def main() -> None:
    """Run the benchmark."""
    options = harness.options_of(__doc__).parse_args()
    few = options.dry or options.quick
    before, looks, seeds = (5, (1, 2), 2) if options.dry else (500, LOOKS, 2 if few else 5)
    figures: dict[str, Any] = {"size": SIZE, "steps before": before, "looks": looks, "seeds": seeds, "materials": {}}
    for name, make in MATERIAL.items():
        found = [one_seed(make(seed), seed, before, looks) for seed in tqdm(range(seeds), desc=name)]
        rows = summary(found, looks[-1])
        figures["materials"][name] = {"rows": rows, "seeds": found}
        for row in rows:
            print(name, row)
    harness.write("resizing", options, figures)


if __name__ == "__main__":
    main()
