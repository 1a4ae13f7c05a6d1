"""Check the kernels on this GPU: exactness on every kind of material, CUDA graphs, torch.compile, training.

`python -m benchmarks.gpu_check [--small] [--dry]` prints a line of JSON for each check and exits with 1 if any failed.
`--small` is for compute-sanitizer. `--dry` tries the checks on a CPU, where they say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from examples.pretrain.ranks import buffers_stay
from tests.kernels.material import KINDS, material
from tests.reliability.material import Net, images
from vqssl import BatchRevival, EMACodebook, KMeansInit, kernels, update_codebooks
from vqssl.kernels import backends
from vqssl.kernels.nearest import search_triton

failures = 0
DEVICE = "cpu" if "--dry" in sys.argv else "cuda"


def report(check: str, wrong: int, **more: Any) -> None:
    """Print the result of a check, and count it as failed if anything is wrong."""
    global failures
    failures += wrong > 0
    print(json.dumps({"check": check, "wrong": wrong, **more}), flush=True)


def reference(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Return the indices in float64, in chunks that fit the memory."""
    size = max(1, 2**27 // codes.numel())
    return torch.cat([kernels.nearest_reference(part, codes, metric) for part in x.split(size)])


def wrong_rows(x: Tensor, codes: Tensor, metric: str, found: Tensor) -> int:
    """Count the rows whose answer is not float64's, except for ties in its last bit."""
    expected = reference(x, codes, metric)
    off = (found != expected).nonzero().flatten()
    if len(off) == 0:
        return 0
    tokens, c = x[off].double(), codes.double()
    if metric == "cosine":
        c = c / c.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    valid = (found[off] >= 0) & (expected[off] >= 0)
    a, b = c[found[off].clamp_min(0)], c[expected[off].clamp_min(0)]
    gap = ((tokens * (a - b)).sum(-1) if metric == "cosine" else
           (tokens - a).square().sum(-1) - (tokens - b).square().sum(-1)).abs()  # fmt: skip
    excused = valid & (gap <= 1e-14 * (tokens.square().sum(-1) + c.square().sum(-1).nan_to_num(0, 0, 0).max()))
    return int((~excused).sum())


def exactness(sizes: list[tuple[int, int, int]]) -> None:
    """Check every metric, kind of material and dtype at the given sizes."""
    for metric in kernels.METRICS:
        for kind in KINDS:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                wrong = 0
                for n, k, d in sizes:
                    x, codes = (t.to(DEVICE) for t in material(kind, n, k, d, dtype))
                    wrong += wrong_rows(x, codes, metric, kernels.nearest_codeword(x, codes, metric))
                report(f"{metric}, {kind}, {dtype}", wrong, sizes=len(sizes))


def large() -> None:
    """Check large sizes, and report which shares of the rows were close calls and still open."""
    for n, k, d in [
        (100352, 2048, 128),
        (25088, 2048, 128),
        (6272, 2048, 128),
        (100352, 8192, 256),
        (50000, 3000, 300),
    ]:
        x, codes = torch.randn(n, d, device=DEVICE), torch.randn(k, d, device=DEVICE)
        found, left_open = search_triton.search_triton(x, codes, "euclidean")
        close, still_open = (count / n for count in left_open.tolist())
        report(f"{n} x {k} x {d}", wrong_rows(x, codes, "euclidean", found), close=close, still_open=still_open)


def ties_and_far_codes() -> None:
    """Check equal codes, of which the first has to win, and codes far beyond the others."""
    x, codes = torch.randn(20000, 128, device=DEVICE), torch.randn(2048, 128, device=DEVICE)
    far = codes.clone()
    far[7], far[1001] = far[7] * 1e4, far[1001] * 1e20
    cases = {"codes twice": codes[:1024].repeat(2, 1), "codes drawn from 700": codes[torch.arange(2048) * 37 % 700]}
    for name, these in (cases | {"far codes": far}).items():
        tokens = torch.cat([x, far[[7, 7, 1001]] * torch.tensor([[1.0], [0.4], [0.7]], device=DEVICE)])
        found, left_open = search_triton.search_triton(tokens, these, "euclidean")
        later = int((first_of_equals(these)[found] != found).sum())
        report(name, wrong_rows(tokens, these, "euclidean", found) + later, left_open=left_open.tolist())


def first_of_equals(codes: Tensor) -> Tensor:
    """Return for each code the index of the first that equals it."""
    inverse = torch.unique(codes, dim=0, return_inverse=True)[1]
    places = torch.arange(len(codes), device=codes.device)
    return places.scatter_reduce(0, inverse, places, "amin", include_self=False)[inverse]


def graph() -> None:
    """Check a search that is replayed from a CUDA graph."""
    x, codes = torch.randn(5000, 128, device=DEVICE), torch.randn(512, 128, device=DEVICE)
    kernels.nearest_codeword(x, codes, "euclidean")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.nearest_codeword(x, codes, "euclidean")
    for _ in range(3):
        x.normal_()
        graph.replay()
        report("CUDA graph", wrong_rows(x, codes, "euclidean", found))


def compiled_codebook() -> None:
    """Check a compiled codebook."""
    x, codes = torch.randn(5000, 128, device=DEVICE), torch.randn(512, 128, device=DEVICE)
    codebook = EMACodebook(codebook_size=512, dim=128, device=DEVICE)
    codebook.set_codes_(codes)
    compiled = torch.compile(codebook.eval(), fullgraph=True)
    report("torch.compile", int((compiled(x).indices != codebook(x).indices).sum()))


def statistics() -> None:
    """Check counts and sums per code, and that they are reproducible under deterministic algorithms."""
    x, indices = torch.randn(20000, 96, device=DEVICE), torch.randint(-1, 700, (20000,), device=DEVICE)
    expected = torch.zeros(701, 96, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, torch.where(indices < 0, 700, indices), x.double())
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        strided = torch.stack([indices, indices.flip(0)], 1)[:, 0]  # as of one of several groups of codes
        counts, sums = kernels.code_sums(x, strided, 700)
        again = kernels.code_sums(x, indices, 700)[1]
        wrong = int(((sums - expected[:700]).abs() > 1e-4).sum())
        wrong += int((counts != torch.bincount(indices[indices >= 0], minlength=700)).sum())
        if deterministic:
            wrong += int((sums != again).sum())
        report(f"code_sums, deterministic {deterministic}", wrong)
    torch.use_deterministic_algorithms(False)


def training() -> None:
    """Compare training steps with the CPU, each from the same state."""
    ours, theirs = (EMACodebook(codebook_size=64, dim=32, decay=0.9, device=device) for device in ("cpu", DEVICE))
    for step in range(20):
        x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(step))
        theirs.load_state_dict(ours.state_dict())
        a, b = ours(x), theirs(x.to(DEVICE))
        gap = float((ours.embed - theirs.embed.cpu()).abs().max())
        report("training step", int((a.indices != b.indices.cpu()).sum()) + (gap > 1e-4), gap=gap)


def updates() -> None:
    """Compare updates with those of float64 on the CPU, with and without revival, each from the same state."""
    cases: list[tuple[int, int, int, kernels.MetricName, float | None]]
    cases = [(25088, 2048, 128, "euclidean", 0.5), (300, 2048, 64, "euclidean", 1.0), (4096, 8192, 60, "cosine", 0.5)]
    cases.append((900, 40, 130, "euclidean", None))
    for n, k, d, metric, threshold in cases:
        revival = None if threshold is None else BatchRevival(threshold)
        ours = EMACodebook(codebook_size=k, dim=d, decay=0.6, metric=metric, revival=revival, device=DEVICE)
        ours.set_codes_(torch.randn(k, d, device=DEVICE))
        for step in range(4):
            exact = copy.deepcopy(ours).cpu().double()
            x = ours.as_compared(torch.randn(n, d, device=DEVICE) * (1 + step))
            indices = ours.quantize(x).indices
            update_codebooks([ours], [x], [indices], compared=True)
            update_codebooks([exact], [x.cpu().double()], [indices.cpu()], compared=True)
            expected = exact.state_dict()
            gap = max(
                float((value.cpu().double() - expected[name].double()).abs().max()
                      / expected[name].double().abs().max().clamp_min(1))
                for name, value in ours.state_dict().items()
            )  # fmt: skip
            report(f"update, {n} x {k} x {d}, {metric}", int(gap > 1e-5), gap=gap, born=int(ours.births.sum()))


def far_offsets() -> None:
    """Check rows 2^30 entries apart, where offsets of 32 bits would wrap."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 8), (2**30, 1))
    far.copy_(torch.randn(3, 8))
    codes = torch.randn(16, 8, device=DEVICE)
    report(
        "offsets beyond 2^31", wrong_rows(far, codes, "euclidean", kernels.nearest_codeword(far, codes, "euclidean"))
    )


def whole_steps() -> None:
    """Train a small DiSSECT network twice under deterministic algorithms, and under DDP over NCCL with one rank."""

    def run(*, ddp: bool = False) -> list[Tensor]:
        net = Net(initialization=KMeansInit(5)).to(DEVICE)
        optimizer = torch.optim.SGD(net.trained(), lr=0.05, momentum=0.9)
        forward = (
            DistributedDataParallel(net, device_ids=[0] if DEVICE == "cuda" else None, **buffers_stay()) if ddp else net
        )
        for step in range(20):
            optimizer.zero_grad()
            forward(images(step, 8).to(DEVICE)).backward()
            optimizer.step()
            net.teacher.update_(net.student)
        return [tensor.detach() for tensor in [*net.parameters(), *net.buffers()]]

    torch.use_deterministic_algorithms(True)
    first, second = run(), run()
    report("deterministic twice", sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1
        )
        third = run(ddp=True)
        dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    off = sum(not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(first, third, strict=True))
    report("DDP over NCCL with one rank", off)


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU, dry"
    print(json.dumps({"device": name, "torch": torch.__version__}))
    if options.dry:
        exactness([(63, 65, 20)])
        statistics()
        compiled_codebook()
        training()
        whole_steps()
    elif options.small:
        exactness([(63, 65, 20)])
        statistics()
        training()
    else:
        exactness([(1, 1, 1), (63, 65, 60), (257, 1000, 129), (1000, 2049, 64)])
        statistics()
        graph()
        compiled_codebook()
        training()
        updates()
        whole_steps()
        far_offsets()
        ties_and_far_codes()
        large()
    kernels_of = (
        "vqssl.kernels.nearest.search_triton",
        "vqssl.kernels.code_sums_triton",
        "vqssl.kernels.codebook_update_triton",
    )
    unused = sorted(set(kernels_of) - backends.used_modules() | backends.unusable_modules())
    report("the Triton kernels were used", 0 if options.dry else len(unused), unused=unused)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
