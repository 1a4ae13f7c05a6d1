"""Time the exact search for the nearest code, relative to the matrix product of tokens and codes.

`python -m benchmarks.search [--device cuda] [--quick]`
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from vqssl.functional import nearest_codeword

CPU_SHAPES = [(12544, 2048, 128), (50176, 2048, 128), (12544, 512, 64), (4096, 8192, 256)]
CUDA_SHAPES = [(100352, 2048, 128), (25088, 2048, 128), (6272, 2048, 128), (401408, 8192, 256)]
DRY_SHAPES = [(96, 70, 12), (64, 8, 4)]


def material(kind: str, n: int, k: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """Return tokens ``(n, d)`` and codes ``(k, d)``: random, clustered, or with a large common mean."""
    generator = torch.Generator().manual_seed(n + k + d)
    x, codes = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    if kind == "clustered":  # tokens around the codes, as k-means leaves them
        x = codes[torch.randint(k, (n,), generator=generator)] + 0.3 * x
    elif kind == "large common mean":
        x, codes = x + 30.0, codes + 30.0
    return x.to(device), codes.to(device)


def exact(x: Tensor, codes: Tensor, *, by_differences: bool = False) -> Tensor:
    """Return the index of each token's nearest code in float64.

    With `by_differences` equal codes are at equal distances. It takes several times as long.
    """
    how = f"{'donot_' if by_differences else ''}use_mm_for_euclid_dist"
    wide = codes.double()
    return torch.cat([torch.cdist(part.double(), wide, compute_mode=how).argmin(-1) for part in x.split(2048)])


def runners(x: Tensor, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the searches to time, and the matrix product ``mm`` that all are compared with."""
    scores = x.new_empty(len(x), len(codes))
    halves = -0.5 * codes.square().sum(-1)
    found: dict[str, Callable[[], Tensor]] = {
        "mm": lambda: torch.mm(x, codes.T, out=scores),
        "vqssl": lambda: nearest_codeword(x, codes),
        "addmm + argmax": lambda: torch.addmm(halves, x, codes.T).argmax(-1),
        "cdist + argmin": lambda: torch.cdist(x, codes).argmin(-1),
    }
    if x.is_cuda:
        found |= cuda_runners(x, codes)
    else:
        found |= cpu_runners(x, codes)
    return found


def cpu_runners(x: Tensor, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the searches of other CPU libraries that are installed."""
    found: dict[str, Callable[[], Tensor]] = {}
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(codes.shape[1])
        index.add(codes.numpy())
        found["faiss"] = lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    # About thirty times slower than the product, so only timed where that is one second, not ten.
    if importlib.util.find_spec("pykeops") and len(x) * codes.numel() <= 2**32:
        from pykeops.torch import LazyTensor

        tokens, columns = LazyTensor(x[:, None, :]), LazyTensor(codes[None, :, :])
        found["pykeops"] = lambda: ((tokens - columns) ** 2).sum(-1).argmin(1).view(-1)
    return found


def cuda_runners(x: Tensor, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return inexact searches and those of other GPU libraries that are installed."""
    found: dict[str, Callable[[], Tensor]] = {}
    for precision in ("tf32", "fp16", "bf16"):
        found[f"vqssl {precision}"] = lambda name=precision: nearest_codeword(x, codes, precision=name)  # type: ignore[misc]
    half, half_codes = x.half(), codes.half()
    half_scores = half.new_empty(len(x), len(codes))
    found["mm fp16"] = lambda: torch.mm(half, half_codes.T, out=half_scores)
    if importlib.util.find_spec("flash_kmeans"):
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        squares = x.square().sum(-1)[None]
        found["flash-kmeans tf32"] = lambda: euclid_assign_triton(x[None], codes[None], squares)[0]
        found["flash-kmeans fp16"] = lambda: euclid_assign_triton(half[None], half_codes[None], squares)[0]
    return found


def one_shape(shape: tuple[int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """Compare every search with float64, then time them all."""
    x, codes = material("random", *shape, device=device)
    race = runners(x, codes)
    expected = exact(x, codes)
    differing = {name: int((run().long() != expected).sum()) for name, run in race.items() if not name.startswith("mm")}
    if differing["vqssl"]:
        raise SystemExit(f"vqssl differs from float64 in {differing['vqssl']} rows of {shape}: nothing is timed")
    times = harness.race(race, rounds, device)
    harness.ratios(times, "mm")
    return {"shape": shape, "threads": torch.get_num_threads(), "times": times, "rows differing": differing}


def exactness(device: str, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Return for each material the percentage of rows whose code differs from float64's."""
    table = []
    for kind in ("random", "clustered", "large common mean"):
        x, codes = material(kind, *shape, device=device)
        expected = exact(x, codes)

        halves = -0.5 * codes.square().sum(-1)
        answers = {
            "fp32": torch.addmm(halves, x, codes.T).argmax(-1),
            "tf32": torch.addmm(halves, to_tf32(x), to_tf32(codes).T).argmax(-1),
            "bf16": torch.addmm(halves, x.bfloat16().float(), codes.bfloat16().float().T).argmax(-1),
            "vqssl": nearest_codeword(x, codes),
        }
        off = {name: 100 * float((found != expected).double().mean()) for name, found in answers.items()}
        table.append({"material": kind, "percent differing": off})
        if off["vqssl"]:
            raise SystemExit(f"vqssl differs from float64 on {kind} material")
    return table


def to_tf32(x: Tensor) -> Tensor:
    """Round to 10 bits of mantissa, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def sweep(base: tuple[int, int, int], rounds: int, device: str, quick: bool) -> list[dict[str, Any]]:
    """Time the search while one of N, K and D varies."""
    n, k, d = base
    factors = (0.25, 1) if quick else (0.0625, 0.125, 0.25, 0.5, 1, 2, 4)
    shapes: set[tuple[str, tuple[int, int, int]]] = {("N", (int(n * f), k, d)) for f in factors}
    shapes |= {("K", (n, max(int(k * f), 1), d)) for f in factors}
    shapes |= {("D", (n, k, max(int(d * f), 1))) for f in factors if f <= 4}
    found = []
    for axis, shape in tqdm(sorted(shapes), desc="sweep"):
        x, codes = material("random", shape[0], shape[1], shape[2], device)
        race = runners(x, codes)
        race = {name: race[name] for name in ("mm", "vqssl", "cdist + argmin")}
        found.append({"axis": axis, "shape": shape, "times": harness.race(race, rounds, device)})
    return found


def bandwidth(device: str, size: int) -> float:
    """Return the GB/s of a copy of ``size`` numbers, bytes read and bytes written together."""
    a = torch.ones(size, device=device)
    b = torch.empty_like(a)
    time = harness.race({"copy": lambda: b.copy_(a)}, 9, device)["copy"]["median"]
    return round(2 * a.numel() * 4 / time / 1e6, 1)


def main() -> None:
    """Run the benchmark."""
    options = harness.options_of(__doc__, quick="a minute, written to a file of its own").parse_args()
    shapes = CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        shapes = [shapes[0], shapes[2]]
    if options.dry:
        shapes = DRY_SHAPES
    rounds = 1 if options.dry else 5 if options.quick else 15
    cores = torch.get_num_threads()
    counts = [1] if options.device == "cuda" else sorted({1, cores})
    cases = []
    for threads in counts:
        torch.set_num_threads(threads)
        for shape in tqdm(shapes, desc=f"shapes, {threads} threads"):
            cases.append(one_shape(shape, rounds, options.device))
            harness.write("search", options, {"cases": cases}, part=True)
    torch.set_num_threads(cores)
    base = (96, 64, 8) if options.dry else (12544, 2048, 128)
    exactly = base if options.dry else (2048, 512, 64) if options.quick else (12544, 2048, 128)
    record = {
        "cases": cases,
        "exactness": exactness(options.device, exactly),
        "sweep": sweep(base, 1 if options.dry else 3 if options.quick else 7, options.device, options.quick),
        "bandwidth GB/s": bandwidth(options.device, 2**10 if options.dry else 2**26),
    }
    harness.write("search", options, record)


if __name__ == "__main__":
    main()
