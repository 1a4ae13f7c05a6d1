"""Time a training step of the quantisers of several codes beside their peers, and k-means beside scikit-learn's.

`python -m benchmarks.quantisers [--device cuda] [--quick]`. Peers are vector-quantize-pytorch's. Each pair holds equal
codes, and its results are compared first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import RandomProjectionQuantizer, ResidualVQ, VectorQuantize

import vqssl
from benchmarks import harness

THEIRS = {"decay": 0.99, "rotation_trick": False, "threshold_ema_dead_code": 0, "commitment_weight": 0.25}
"""Options by which vector-quantize-pytorch takes the same step as ours without a revival."""


def residual(x: Tensor) -> tuple[nn.Module, nn.Module]:
    """Return ours and theirs with 8 levels of 1024 codes, as in encodec."""
    dim = x.shape[-1]
    ours = vqssl.ResidualQuantizer(codebook_size=1024, dim=dim, num_levels=8, revival=None, device=x.device)
    ours.initialize_(x)
    theirs: Any = ResidualVQ(dim=dim, codebook_size=1024, num_quantizers=8, **THEIRS).to(x.device)
    for codebook, layer in zip(ours.codebooks, theirs.layers, strict=True):
        copy_codes(layer._codebook, [codebook])
    return ours, theirs


def product(x: Tensor) -> tuple[nn.Module, nn.Module]:
    """Return ours and theirs with 2 groups of 320 codes, as in wav2vec 2.0."""
    dim = x.shape[-1]
    ours = vqssl.ProductQuantizer(codebook_size=320, dim=dim, num_groups=2, revival=None, device=x.device)
    ours.initialize_(x)
    theirs: Any = VectorQuantize(
        dim=dim, codebook_dim=dim // 2, codebook_size=320, heads=2, separate_codebook_per_head=True, **THEIRS
    ).to(x.device)
    copy_codes(theirs._codebook, list(ours.codebooks))
    return ours, theirs


def random_projection(x: Tensor) -> tuple[nn.Module, nn.Module]:
    """Return ours and theirs with 8192 codes of width 16, as in BEST-RQ."""
    ours = vqssl.RandomProjectionQuantizer(in_dim=x.shape[-1], codebook_size=8192, dim=16, device=x.device)
    theirs: Any = RandomProjectionQuantizer(dim=x.shape[-1], codebook_size=8192, codebook_dim=16).to(x.device)
    theirs.rand_projs.copy_(ours.projection.mT)
    theirs.vq._codebook.embed.data.copy_(ours.codes)
    return ours, theirs


def copy_codes(theirs: Any, ours: list[Any]) -> None:
    """Give their codebook the state of ours, one a head."""
    for name in ("embed", "embed_avg", "cluster_size"):
        getattr(theirs, name).data.copy_(torch.stack([getattr(codebook, name) for codebook in ours]))


CASES: dict[str, tuple[Callable[[Tensor], tuple[nn.Module, nn.Module]], int]] = {
    "residual, 8 x 1024 codes of width 128": (residual, 128),
    "product, 2 x 320 codes of width 128": (product, 256),
    "random projection, 8192 codes of width 16": (random_projection, 320),
}
"""Quantisers, and the width of their tokens."""


def step(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Run forward, and backward where there is one."""
    out = module(x)
    if isinstance(out, Tensor):  # indices alone
        return
    x.grad = None
    loss = out[2].sum()
    torch.autograd.backward([out[0], loss], [gradient, torch.ones_like(loss)])


def check(name: str, ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Exit where the indices differ for more tokens than rounding explains: their search rounds, ours is exact."""
    indices: list[Any] = []
    for module in (ours, theirs):
        out = module.eval()(x)
        indices.append((out if isinstance(out, Tensor) else out[1]).reshape(x.shape[0] * x.shape[1], -1))
        module.train()
    differ = (indices[0] != indices[1]).any(-1).double().mean().item()
    print(f"parity: {name}: {differ:.2%} of the tokens differ")
    if differ > 0.002:
        raise SystemExit(f"{name}: indices differ")


def steps(rounds: int, tokens: int, device: str) -> dict[str, Any]:
    """Compare and time each pair, on eight sequences of tokens."""
    found = {}
    for name, (make, width) in CASES.items():
        shape = (8, tokens, width)
        centres = torch.randn(4096, shape[-1], device=device)
        choice = torch.randint(len(centres), shape[:-1], device=device)
        x = centres[choice] + 0.5 * torch.randn(*shape, device=device)
        ours, theirs = make(x)
        check(name, ours, theirs, x)
        x.requires_grad_()
        gradient = torch.randn(shape, device=device)
        race: dict[str, Callable[[], Any]] = {
            "vqssl": partial(step, ours, x, gradient),
            "vector-quantize-pytorch": partial(step, theirs, x, gradient),
        }
        times = harness.race(race, rounds, device)
        harness.ratios(times, "vqssl")
        print(name, {who: entry["median"] for who, entry in times.items()}, "ms")
        found[name] = {"shape": shape, "times": times}
    return found


def k_means(rounds: int, timed_passes: int, device: str) -> dict[str, Any]:
    """Compare the errors of starts of their own, and time some passes over 20,480 tokens from one start."""
    from sklearn.cluster import KMeans

    torch.manual_seed(0)  # the same tokens after any number of steps
    size, dim = 128, 64
    x = torch.randn(400, dim)[torch.randint(400, (20480,))] + 0.5 * torch.randn(20480, dim)
    batches = x.to(device).split(4096)

    def ours(passes: int, given: bool) -> vqssl.EMACodebook:
        codebook = vqssl.EMACodebook(codebook_size=size, dim=dim, device=device)
        if given:
            codebook.set_codes_(x[:size].to(device))
        vqssl.fit_codebook(codebook, batches, passes=passes, tolerance=0)
        return codebook

    def theirs(passes: int, init: Any) -> Tensor:
        fit = KMeans(size, init=init, n_init=1, max_iter=passes, tol=0, random_state=0).fit(x.numpy())
        return torch.from_numpy(fit.cluster_centers_)

    def error(codes: Tensor) -> float:
        return torch.cdist(x.double(), codes.cpu().double()).amin(1).square().mean().item()

    errors = {
        "vqssl": error(ours(100, False).embed),
        "scikit-learn, random start": error(theirs(100, "random")),
        "scikit-learn, k-means++": error(theirs(100, "k-means++")),
    }
    print("error after 100 passes from starts of their own:", {name: f"{value:.4f}" for name, value in errors.items()})
    if errors["vqssl"] > 1.01 * errors["scikit-learn, random start"]:
        raise SystemExit("k-means: the error is more than 1% above scikit-learn's from a random start, as ours is")
    start = x[:size].numpy()
    race: dict[str, Callable[[], Any]] = {
        "vqssl": lambda: ours(timed_passes, True).embed.cpu(),
        "scikit-learn": lambda: theirs(timed_passes, start),
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        fit = faiss.Kmeans(dim, size, niter=timed_passes, max_points_per_centroid=len(x))
        race["faiss"] = lambda: fit.train(x.numpy(), init_centroids=start)
    times = harness.race(race, rounds)  # by the host's clock: scikit-learn runs on the CPU
    harness.ratios(times, "vqssl")
    print(f"{timed_passes} passes", {who: entry["median"] for who, entry in times.items()}, "ms")
    return {"tokens": len(x), "codes": size, "dim": dim, "errors": errors, "times": times}


def main() -> None:
    """Run the benchmark."""
    options = harness.options_of(__doc__).parse_args()
    torch.manual_seed(0)
    rounds = 1 if options.dry else 3 if options.quick else 9
    tokens = 160 if options.dry else 512
    figures = {
        "steps": steps(rounds, tokens, options.device),
        "k_means": k_means(min(rounds, 3), 1 if options.dry else 20, options.device),
    }
    harness.write("quantisers", options, figures)


if __name__ == "__main__":
    main()
