"""Time a whole training step of a quantiser: assign, look up, update the codes, commitment, backward.

`python -m benchmarks.train_step [--device cuda] [--quick]`. The unit is the matrix product of tokens and codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from vector_quantize_pytorch import VectorQuantize

from benchmarks import harness
from benchmarks.search import exact, material
from vqssl import EMACodebook


class Case(NamedTuple):
    """A shape ``(N, K, D)``, the threads (0: all), and where the codes come from."""

    shape: tuple[int, int, int]
    threads: int = 0
    codes: str = "random"
    """``"drawn"`` from the tokens with replacement, as a first batch with fewer tokens than codes leaves them: some are
    equal, and every token that was drawn lies on its code."""


CPU_CASES = [
    Case((12544, 2048, 128)),
    Case((12544, 512, 64)),
    Case((4096, 8192, 256)),
    Case((4096, 8192, 256), codes="drawn"),
    Case((50176, 2048, 128), threads=1),
]
DRY_CASES = [Case((96, 64, 8)), Case((32, 64, 8), codes="drawn")]
CUDA_CASES = [Case((100352, 2048, 128)), Case((25088, 2048, 128)), Case((4096, 8192, 256), codes="drawn")]


class Textbook(nn.Module):
    """Codebook as in tutorials: all distances, a one-hot matrix, and the usual moving averages."""

    embed: Tensor
    size: Tensor
    average: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("embed", codes.clone())
        self.register_buffer("size", torch.ones(len(codes), device=codes.device))
        self.register_buffer("average", codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantised tokens, indices and commitment loss, and update the codes."""
        indices = torch.cdist(x.detach(), self.embed).argmin(-1)
        one_hot = torch.nn.functional.one_hot(indices, len(self.embed)).to(x.dtype)
        quantized = self.embed[indices]
        with torch.no_grad():
            self.size.mul_(0.99).add_(one_hot.sum(0), alpha=0.01)
            self.average.mul_(0.99).add_(one_hot.T @ x.detach(), alpha=0.01)
            total = self.size.sum()
            smoothed = (self.size + 1e-5) / (total + len(self.size) * 1e-5) * total
            self.embed = self.average / smoothed[:, None]
        loss = 0.25 * torch.nn.functional.mse_loss(x, quantized.detach())
        return x + (quantized - x).detach(), indices, loss


def ours(codes: Tensor, **options: Any) -> EMACodebook:
    """Return our codebook with these codes."""
    size, dim = codes.shape
    codebook = EMACodebook(codebook_size=size, dim=dim, device=codes.device, **options)
    codebook.set_codes_(codes)
    return codebook


def peer(codes: Tensor, cosine: bool) -> VectorQuantize:
    """Return vector-quantize-pytorch's codebook with these codes and the same update."""
    size, dim = codes.shape
    module = VectorQuantize(
        dim, size, decay=0.99, use_cosine_sim=cosine, rotation_trick=False, threshold_ema_dead_code=0,
        commitment_weight=0.25,
    )  # fmt: skip
    module.to(codes.device)
    table: Any = module._codebook
    table.embed.copy_(torch.nn.functional.normalize(codes, dim=-1) if cosine else codes)
    table.embed_avg.copy_(table.embed)
    table.cluster_size.fill_(1.0)
    return module


def makers() -> dict[str, Callable[[Tensor], nn.Module]]:
    """Return functions that make each quantiser from its codes."""
    return {
        "vqssl": ours,
        "vqssl cosine": lambda codes: ours(codes, metric="cosine"),
        "vector-quantize-pytorch": lambda codes: peer(codes, False),
        "vector-quantize-pytorch cosine": lambda codes: peer(codes, True),
        "textbook": Textbook,
    }


def step(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Run forward and backward, with a given gradient of the quantised tokens."""
    quantized, _, loss = module(x)
    x.grad = None
    torch.autograd.backward([quantized, loss.sum()], [gradient, torch.ones_like(loss.sum())])


def check(x: Tensor, codes: Tensor, ties: bool) -> None:
    """Exit where our indices, or our codes after one step, differ from float64; print how far the codes are off."""
    indices = exact(x, codes, by_differences=ties)
    tokens, before = x.double(), codes.double()
    counts = torch.bincount(indices, minlength=len(codes)).double()
    sums = torch.zeros_like(before).index_add_(0, indices, tokens)
    size, average = 0.99 + 0.01 * counts, 0.99 * before + 0.01 * sums
    expected = average / ((size + 1e-5) / (size.sum() + len(codes) * 1e-5) * size.sum())[:, None]
    own = ours(codes, revival=None)
    if not torch.equal(own(x).indices, indices):
        raise SystemExit("vqssl: indices differ from float64")
    book, other = Textbook(codes), peer(codes, False)
    book(x)
    other(x[None])
    others: Any = other._codebook
    for name, embed in {"vqssl": own.embed, "textbook": book.embed, "peer": others.embed[0]}.items():
        gap = float((embed.double() - expected).abs().max())
        print(f"parity: codes of {name} after one step differ from float64 by {gap:.1e}")
        if name == "vqssl" and gap > 1e-5:
            raise SystemExit("vqssl: codes differ from the formula")


def one_case(case: Case, rounds: int, device: str) -> dict[str, Any]:
    """Compare with float64, then time all quantisers on one shape."""
    x, codes = material("random", *case.shape, device)
    if case.codes == "drawn":
        codes = x[torch.randint(len(x), (len(codes),), generator=torch.Generator().manual_seed(0)).to(x.device)]
    check(x, codes, ties=case.codes == "drawn")
    gradient = torch.randn_like(x)
    x.requires_grad_()
    scores = x.new_empty(len(x), len(codes))
    race: dict[str, Callable[[], Any]] = {"mm": lambda: torch.mm(x.detach(), codes.T, out=scores)}
    for name, make in makers().items():
        module = make(codes)
        tokens = x[None].detach().requires_grad_() if "pytorch" in name else x
        race[name] = lambda m=module, t=tokens: step(m, t, gradient.view_as(t))  # type: ignore[misc]
    times = harness.race(race, rounds, device)
    harness.ratios(times, "mm")
    return {"shape": case.shape, "threads": torch.get_num_threads(), "codes": case.codes, "times": times}


def main() -> None:
    """Run the benchmark."""
    options = harness.options_of(__doc__).parse_args()
    torch.manual_seed(0)
    cases = CUDA_CASES if options.device == "cuda" else CPU_CASES
    cases = DRY_CASES if options.dry else cases[:2] if options.quick else cases
    rounds = 1 if options.dry else 3 if options.quick else 9
    cores, found = torch.get_num_threads(), []
    for case in tqdm(cases, desc="shapes"):
        torch.set_num_threads(case.threads or cores)
        found.append(one_case(case, rounds, options.device))
        harness.write("train_step", options, {"cases": found}, part=True)
    torch.set_num_threads(cores)
    harness.write("train_step", options, {"cases": found})


if __name__ == "__main__":
    main()
