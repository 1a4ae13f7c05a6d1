"""Compare the error of fit_codebook with faiss's and scikit-learn's k-means: `python -m benchmarks.fitting`.

Each library starts by its own rule and runs until nothing moves, or for 100 passes. The error is the mean squared
distance of a token from its nearest code, in float64. Nothing is timed here: see `benchmarks.quantisers`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import vqssl
from benchmarks import harness

PASSES = 100


def gaussian(seed: int, tokens: int) -> Tensor:
    """Return tokens without clusters."""
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))


def mixture(clusters: int, spread: float, seed: int, tokens: int) -> Tensor:
    """Return tokens in clusters of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, 16, generator=generator)
    choice = (clusters * torch.rand(tokens, generator=generator) ** 2).long()
    return centres[choice] + spread * torch.randn(tokens, 16, generator=generator)


def digits(seed: int, tokens: int) -> Tensor:
    """Return patches of 4 by 4 pixels of scikit-learn's handwritten digits, drawn at random."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)
    patches = images.unfold(1, 4, 1).unfold(2, 4, 1).reshape(-1, 16)
    # A little noise: a quarter of the patches are blank, and equal.
    generator = torch.Generator().manual_seed(seed)
    chosen = patches[torch.randperm(len(patches), generator=generator)[:tokens]]
    return chosen + 0.1 * torch.randn(chosen.shape, generator=generator)


MATERIAL: dict[str, Callable[[int, int], Tensor]] = {
    "Gaussian": gaussian,
    "64 tight clusters": lambda seed, tokens: mixture(64, 0.1, seed, tokens),
    "400 clusters": lambda seed, tokens: mixture(400, 0.3, seed, tokens),
    "patches of digits": digits,
}


def error_of(codes: Tensor, x: Tensor) -> float:
    """Return the mean squared distance of a token from its nearest code."""
    nearest = [torch.cdist(part.double(), codes.double()).amin(1).square() for part in x.split(4096)]
    return torch.cat(nearest).mean().item()


def ours(x: Tensor, size: int, seed: int) -> Tensor:
    """Return the codes of fit_codebook."""
    codebook = vqssl.EMACodebook(codebook_size=size, dim=x.shape[1], seed=seed)
    vqssl.fit_codebook(codebook, x.split(4096), passes=PASSES, tolerance=0)
    return codebook.embed


def of_faiss(x: Tensor, size: int, seed: int) -> Tensor:
    """Return the centroids of faiss's Kmeans, trained on all tokens."""
    fit = faiss.Kmeans(x.shape[1], size, niter=PASSES, seed=seed + 1, max_points_per_centroid=len(x))
    fit.train(x.numpy())
    return torch.from_numpy(np.array(fit.centroids))


def of_sklearn(x: Tensor, size: int, seed: int) -> Tensor:
    """Return the centres of scikit-learn's KMeans from one start by k-means++."""
    fit = KMeans(size, init="k-means++", n_init=1, max_iter=PASSES, tol=0, random_state=seed).fit(x.numpy())
    return torch.from_numpy(fit.cluster_centers_)


FITS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "vqssl": ours,
    "faiss": of_faiss,
    "scikit-learn, k-means++": of_sklearn,
}


def compare(sizes: list[int], tokens: int, seeds: int) -> list[dict[str, Any]]:
    """Return the errors of all, one row a material and size."""
    rows = []
    for name, make in tqdm(MATERIAL.items(), desc="materials"):
        for size in sizes:
            errors: dict[str, list[float]] = {each: [] for each in FITS}
            for seed in range(seeds):
                x = make(seed, tokens)
                for each, fit in FITS.items():
                    errors[each].append(error_of(fit(x, size, seed), x))
            row: dict[str, Any] = {"material": name, "codes": size, "errors": errors}
            for each in list(FITS)[1:]:
                ratios = [a / b for a, b in zip(errors["vqssl"], errors[each], strict=True)]
                row[f"vqssl / {each}"] = {"mean": statistics.mean(ratios), "worst": max(ratios)}
            rows.append(row)
            if row["vqssl / faiss"]["mean"] > 1.01:
                raise SystemExit(f"{name}, {size} codes: the error is more than 1% above faiss's")
            shown = {
                each: f"{v['mean']:.4f}, {v['worst']:.4f}" for each, v in row.items() if each.startswith("vqssl /")
            }
            print(f"{name}, {size} codes: mean and worst ratio of errors {shown}")
    return rows


def main() -> None:
    """Run the benchmark."""
    options = harness.options_of(__doc__).parse_args()
    few = options.dry or options.quick
    sizes, tokens, seeds = ([8], 512, 2) if options.dry else ([64], 4096, 2) if few else ([32, 128], 8192, 5)
    figures = {"tokens": tokens, "seeds": seeds, "passes": PASSES, "rows": compare(sizes, tokens, seeds)}
    harness.write("fitting", options, figures)


if __name__ == "__main__":
    main()
