"""Codebooks of many kinds while an encoder trains: usage, perplexity, dead codes, drift, error, time and memory.

`python -m benchmarks.codebook_usage [--data kermany_cxr_64.npz] [--device cuda] [--quick]`

All codebooks get the features of one BYOL run at one scale (the example's `small` preset, or on a GPU the encoder of
`paper` at 64 px). None of them returns a gradient, so all see the same tokens at the same step, ours and those of
vector-quantize-pytorch. The variance of the update (DiSSECT's Eqs. 2 and 3) is measured on teacher and student
features: the squared distance that used codes move in a step, relative to the variance of the tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from vector_quantize_pytorch import VectorQuantize

import vqssl
from benchmarks import harness
from examples.pretrain.augment import Normalize, to_float, views_of
from examples.pretrain.data import ImageSet, load_images, train_test_split
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.byol import BYOL
from examples.pretrain.optimization import make_optimizer, make_schedule
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS
from vqssl.functional import code_counts, codebook_usage

SCALE = "layer3"
WINDOW = 20
"""Number of steps whose tokens are counted together for usage."""
DEAD = 0.1
"""A code is dead if it got less than this fraction of its fair share of the tokens of a window."""


@dataclass
class Observer:
    """A codebook and its measurements."""

    module: nn.Module
    codes: Callable[[nn.Module], Tensor]
    source: str = "teacher"
    counts: Tensor | None = None
    tokens: int = 0
    times: list[float] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    moves: list[Tensor] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)

    def feed(self, x: Tensor) -> None:
        """Train the codebook on tokens `(N, D)`, and measure time, error and move."""
        before = self.codes(self.module).clone()
        start = time.perf_counter()
        quantized, indices, _ = self.module(x[None])
        if x.is_cuda:
            torch.cuda.synchronize()
        self.times.append(1e3 * (time.perf_counter() - start))
        after = self.codes(self.module)
        size = len(after)
        counts = code_counts(indices.flatten(), size)
        self.counts = counts if self.counts is None else self.counts + counts
        self.tokens += len(x)
        variance = x.var(0).sum()
        self.errors.append((x - quantized[0]).square().sum(-1).mean() / variance)
        used = counts > 0
        self.moves.append((after - before)[used].square().sum(-1).mean() / variance)

    def look(self, step: int) -> None:
        """Close the window: add a row of its figures."""
        assert self.counts is not None
        usage = codebook_usage(self.counts, DEAD)
        self.rows.append(
            {
                "step": step,
                "perplexity": round(usage.perplexity.item(), 1),
                "dead": int(usage.dead),
                "error": round(torch.stack(self.errors).mean().item(), 4),
                # The median over the window: a revived code moves far, once.
                "move": float(f"{torch.stack(self.moves).median().item():.3g}"),
            }
        )
        self.counts, self.tokens, self.errors, self.moves = None, 0, [], []


def ours(size: int, dim: int, device: str, source: str = "teacher", **options: Any) -> Observer:
    """Return an observer of our codebook."""
    module = vqssl.EMACodebook(codebook_size=size, dim=dim, device=device, **options)
    return Observer(module, lambda m: m.embed, source)  # type: ignore[arg-type, return-value]


def peer(size: int, dim: int, device: str, **options: Any) -> Observer:
    """Return an observer of the codebook of vector-quantize-pytorch."""
    module = VectorQuantize(
        dim, codebook_size=size, decay=0.99, rotation_trick=False, commitment_weight=0.25, **options
    ).to(device)
    return Observer(module, lambda m: m._codebook.embed[0])  # type: ignore[union-attr, index]


def observers(dim: int, device: str, sizes: list[int], middle: int) -> dict[str, Observer]:
    """Return all codebooks by name; `middle` is the size of those that vary in another way."""
    found = {}
    for size in sizes:
        found[f"K={size}"] = ours(size, dim, device)
        found[f"K={size}, no revival"] = ours(size, dim, device, revival=None)
    kmeans, random = vqssl.KMeansInit(10), vqssl.RandomInit()
    found[f"K={middle}, k-means"] = ours(middle, dim, device, initialization=kmeans)
    found[f"K={middle}, k-means, no revival"] = ours(middle, dim, device, initialization=kmeans, revival=None)
    found[f"K={middle}, random"] = ours(middle, dim, device, initialization=random)
    found[f"K={middle}, random, no revival"] = ours(middle, dim, device, initialization=random, revival=None)
    found[f"K={middle}, Eq. 1"] = ours(middle, dim, device, ema="batch_mean")
    found[f"K={middle}, student features"] = ours(middle, dim, device, source="student")
    found[f"K={middle}, vector-quantize-pytorch"] = peer(middle, dim, device, kmeans_init=True)
    found[f"K={middle}, vector-quantize-pytorch, threshold 2"] = peer(
        middle, dim, device, kmeans_init=True, threshold_ema_dead_code=2
    )
    return found


def watch(
    data: ImageSet, device: str, sizes: list[int], middle: int, epochs: int, batch: int
) -> tuple[dict[str, Any], int]:
    """Train BYOL and all codebooks; return the rows and costs of each, and the number of steps."""
    preset = PRESETS["small"][1]
    optimization = replace(preset.optimization, epochs=epochs, batch_size=batch, warmup_epochs=min(1, epochs - 1))
    per_epoch = len(data) // batch
    torch.manual_seed(0)
    width = preset.encoder.width if device == "cpu" else 64
    encoder = Encoder(data.channels, replace(preset.encoder, scales=(SCALE,), width=width))
    dim = preset.options["byol"].dim
    net = BYOL(encoder, preset.options["byol"], total_steps=per_epoch * epochs).to(device).train()
    optimizer = make_optimizer(net, optimization)
    schedule = make_schedule(optimizer, optimization, per_epoch)
    augment = views_of(data.images.shape[1], preset.augmentation)
    normalize = Normalize(data.images).to(device)
    images = to_float(data.images)
    project = vqssl.OrthogonalProjection(encoder.scale_channels[0], dim).to(device)
    watched = observers(dim, device, sizes, middle)
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, list[Tensor]]) -> None:
            maps[name] = output[1][0].detach()

        return hook

    net.student.embedder.register_forward_hook(keep("student"))
    net.teacher.module.register_forward_hook(keep("teacher"))
    step, window = 0, min(WINDOW, max(per_epoch * epochs // 5, 1))
    bar = tqdm(total=per_epoch * epochs, desc="steps", mininterval=1)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, per_epoch * batch, batch):
            views = images[order[start : start + batch]].to(device)
            with torch.no_grad():
                pair = [normalize(augment(views)) for _ in range(2)]
            optimizer.zero_grad(set_to_none=True)
            net(pair).loss.backward()
            optimizer.step()
            schedule.step()
            net.after_step()
            with torch.no_grad():
                tokens = {name: project(scale.movedim(1, -1)).flatten(0, -2) for name, scale in maps.items()}
                for observer in watched.values():
                    observer.feed(tokens[observer.source])
            step += 1
            bar.update()
            if step % window == 0:
                for observer in watched.values():
                    observer.look(step)
    bar.close()
    found = {
        name: {
            "codes": len(observer.codes(observer.module)),
            "ms a step": round(statistics.median(observer.times), 3),
            "MiB of state": round(sum(b.numel() * b.element_size() for b in observer.module.buffers()) / 2**20, 2),
            **{key: [row[key] for row in observer.rows] for key in observer.rows[0]},
        }
        for name, observer in watched.items()
    }
    return {"observers": found, "tokens a step": len(tokens["teacher"]), "dim": dim, "scale": SCALE}, step


def main() -> None:
    """Load or draw the images, run, and keep the result."""
    parser = harness.options_of(__doc__, quick="two epochs of few phantoms, and a file of its own")
    parser.add_argument("--data", type=Path, help="images (.npz); else generated phantoms")
    options = parser.parse_args()
    large = options.device == "cuda"
    sizes, middle = ([256, 1024, 4096, 16384], 4096) if large else ([256, 1024, 4096], 1024)
    pixels = 64 if large else 32
    if options.dry:
        sizes, middle = [16, 32], 32
    if options.data is not None:
        data = load_images(options.data, pixels)
        data = data.subset(train_test_split(data)[0])
    else:
        data = make_phantoms(32 if options.dry else 400 if options.quick else 4400, pixels, seed=0)
    epochs = 1 if options.dry else 2 if options.quick else 60 if large else 12
    record, steps = watch(data, options.device, sizes, middle, epochs, 256 if large else 16 if options.dry else 64)
    command = "python -m benchmarks.codebook_usage"
    if options.data is not None:
        command += f" --data {options.data.name}"
    about = {
        "command": command + " --device cuda" * large,
        "images": len(data),
        "data": options.data.name if options.data else "phantoms",
        "steps": steps,
    }
    harness.write("codebook_usage", options, {**about, **record})


if __name__ == "__main__":
    main()
