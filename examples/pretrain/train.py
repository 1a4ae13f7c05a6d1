"""The pretraining loop: warm-up and cosine, a checkpoint every epoch, resume to the bit, and ranks under torchrun."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pytorch_optimizer import LARS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

import vqssl
from examples.pretrain import ranks
from examples.pretrain.augment import Augmentation, Normalize, to_float, views_of
from examples.pretrain.data import ImageSet
from examples.pretrain.model import Model, SelfSupervised, Step


@dataclass(frozen=True)
class Optimization:
    """How long and with what. The defaults are the paper's; it does not give the weight decay (BYOL's here)."""

    optimizer: Literal["lars", "adamw"] = "lars"
    lr: float = 0.3
    """Peak learning rate for a batch of 256; scaled by batch / 256 for LARS."""
    momentum: float = 0.99
    """Of LARS."""
    weight_decay: float = 1.5e-6
    """Not applied to biases and norms."""
    batch_size: int = 256
    epochs: int = 300
    warmup_epochs: int = 10


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides what a run computes."""

    method: str = "dissect"
    model: Model = field(default_factory=Model)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimization: Optimization = field(default_factory=Optimization)
    seed: int = 0
    device: str = "cpu"


class Run:
    """A pretraining run in a folder: `checkpoint.pt`, `metrics.csv`, and TensorBoard events where it is installed.

    Under torchrun every rank makes one of the same folder: batches are shared out among them, and the first writes.
    """

    def __init__(self, data: ImageSet, config: Pretraining, folder: Path) -> None:
        self.data = data
        self.config = config
        self.folder = folder
        optimization = config.optimization
        self.steps_per_epoch = len(data) // optimization.batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"batch_size must not exceed the number of training images, got {optimization.batch_size} for "
                f"{len(data)} images: give a smaller --optimization.batch-size"
            )
        if optimization.batch_size % ranks.world_size():
            raise ValueError(
                f"batch_size must be a multiple of the number of ranks, got {optimization.batch_size} for "
                f"{ranks.world_size()}: it is the batch of all ranks together"
            )
        total_steps = self.steps_per_epoch * optimization.epochs
        torch.manual_seed(config.seed)
        self.model = SelfSupervised(config.method, data.channels, config.model, total_steps, config.seed)
        if ranks.world_size() > 1 and config.device.startswith("cuda"):  # there is none for the CPU
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(config.device)
        self.normalize = Normalize(data.images).to(config.device)
        self.augment = views_of(data.images.shape[1], config.augmentation)
        self.optimizer = make_optimizer(self.model, optimization)
        self.scheduler = make_schedule(self.optimizer, optimization, self.steps_per_epoch)
        self.epoch = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []

    def train(
        self,
        *,
        until: int | None = None,
        quiet: bool = False,
        monitor: Callable[[Run], dict[str, float]] | None = None,
    ) -> None:
        """Train from the epoch reached so far; `until` an epoch, or to the end.

        `monitor` looks at the run after each epoch and adds figures to its row; nothing it returns is trained on.
        """
        images = to_float(self.data.images)
        last = self.config.optimization.epochs if until is None else until
        self.model.train()
        forward: nn.Module = self.model
        if ranks.world_size() > 1:
            # Codes and teacher need no broadcast: they follow the same statistics on every rank.
            forward = DistributedDataParallel(self.model, forward_sync_buffers=False, find_unused_parameters=True)
        quiet = quiet or ranks.rank() > 0
        with Log(self.folder, self.rows) if ranks.rank() == 0 else NoLog() as log:
            while self.epoch < last:
                start = time.perf_counter()
                row = self._epoch(images, forward, quiet)
                self.epoch += 1
                self.seconds += time.perf_counter() - start
                row["seconds"] = self.seconds
                if monitor is not None and ranks.rank() == 0:
                    row |= monitor(self)
                    self.model.train()
                self.rows.append(row)
                if ranks.rank() == 0:
                    self.save()
                ranks.all_together()
                log.write(row)
                if not quiet:
                    tqdm.write(line_of(self.config.method, row, last))
        self.model.eval()
        if ranks.rank() == 0:
            self.export()

    def export(self) -> None:
        """Write `encoder.safetensors` and `codebooks.safetensors`: weights for others, without anything to execute."""
        parts: dict[str, nn.Module | None] = {"encoder": self.model.student.encoder, "codebooks": self.model.quantizer}
        for name, part in parts.items():
            if part is not None:
                tensors = {key: value.detach().cpu().contiguous() for key, value in part.state_dict().items()}
                about = {"format": "pt", "method": self.config.method, "epoch": str(self.epoch)}
                write_whole(self.folder / f"{name}.safetensors", safetensors.torch.save(tensors, about))

    def _epoch(self, images: Tensor, forward: nn.Module, quiet: bool) -> dict[str, float]:
        # Every epoch has its own generators: what a resumed run draws does not depend on what came before.
        seed = self.config.seed * 100_003 + self.epoch + 1
        torch.manual_seed(seed)
        sums = torch.zeros(len(MEASURES), device=self.config.device)
        title = f"{self.config.method} {self.epoch + 1}/{self.config.optimization.epochs}"
        batches = list(self._batches(len(images)))
        if ranks.rank() > 0:  # the same order of images everywhere, but not the same crops
            torch.manual_seed(seed + 1_000_003 * ranks.rank())
        bar = tqdm(batches, desc=title, leave=False, disable=True if quiet else None, mininterval=0.5)
        for number, index in enumerate(bar, 1):
            batch = images[index].to(self.config.device, non_blocking=True)
            sums += measures(self._step(forward, batch))
            if number % 10 == 0:  # reading a figure waits for the device
                bar.set_postfix(loss=f"{sums[0].item() / number:.3f}", refresh=False)
        ranks.average_([sums])
        ranks.average_statistics_(self.model)
        row = {"epoch": self.epoch + 1, **dict(zip(MEASURES, (sums / len(batches)).tolist(), strict=True))}
        row["lr"] = self.scheduler.get_last_lr()[0]
        row["teacher_momentum"] = self.model.teacher.momentum_at(self.model.teacher.step)
        if self.model.quantizer is not None:
            for scale, name in enumerate(self.config.model.scales):
                usage = self.model.quantizer.codebook(scale).usage()
                row[f"perplexity_{name}"] = usage.perplexity.item()
                row[f"dead_{name}"] = usage.dead.item()
        return row

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Of this rank: its share of every batch."""
        size = self.config.optimization.batch_size
        order = torch.randperm(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size][ranks.rank() :: ranks.world_size()]

    def _step(self, forward: nn.Module, images: Tensor) -> Step:
        with torch.no_grad():
            views = [self.normalize(self.augment(images)) for _ in range(2)]
        step: Step = forward(views)
        self.optimizer.zero_grad(set_to_none=True)
        step.loss.total.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.model.teacher.update_(self.model.student)
        return step

    def save(self) -> None:
        """Write the checkpoint so that a kill at any moment leaves a whole one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": json.dumps(asdict(self.config), sort_keys=True),
            "data": fingerprint(self.data),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "rows": self.rows,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getbuffer())

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; False where there is none.

        Raises:
            ValueError: it cannot be read, or belongs to another configuration or other images.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.config.device, weights_only=True)
            theirs, data = json.loads(state["config"]), state["data"]
        except Exception as error:
            raise ValueError(
                f"{path}: not a readable checkpoint of this example ({error}): remove it, or give another --out"
            ) from error
        ours = json.loads(json.dumps(asdict(self.config)))
        changed = [f"{name} was {a}, is {b}" for name, a, b in differences(theirs, ours)]
        if data != fingerprint(self.data):
            changed.append("the training images are others")
        if changed:
            raise ValueError(
                f"{path} belongs to another configuration: {'; '.join(changed)}. Give the options it was made with, or "
                "another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.seconds, self.rows = state["epoch"], state["seconds"], state["rows"]
        self.model.eval()
        return True

    @torch.no_grad()
    def encode(self, images: Tensor, encoder: nn.Module | None = None) -> tuple[Tensor, list[Tensor]]:
        """Pooled features and maps of `(N, C, S, S)` images in [0, 1]; by the student's encoder if not told."""
        encoder = self.model.student.encoder if encoder is None else encoder
        encoder.eval()
        parts = [encoder(self.normalize(batch.to(self.config.device))) for batch in images.split(256)]
        features = torch.cat([features for features, _ in parts]).cpu()
        return features, [torch.cat(maps).cpu() for maps in zip(*(maps for _, maps in parts), strict=True)]


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """The file holds all of `content` or what it held before, whenever the process or the machine dies."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":  # the new name has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_optimizer(model: SelfSupervised, config: Optimization) -> Optimizer:
    named = model.trained_parameters()
    decayed = [parameter for _, parameter in named if parameter.ndim > 1]
    others = [parameter for _, parameter in named if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr)
    lr = config.lr * config.batch_size / 256
    return LARS(groups, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)


def make_schedule(optimizer: Optimizer, config: Optimization, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up from lr / warm-up steps to lr, then half a cosine to 0."""
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total - 1)
    cosine = CosineAnnealingLR(optimizer, max(total - warmup, 1))
    if warmup < 1:
        return cosine
    ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [ramp, cosine], milestones=[warmup])


MEASURES = ("loss", "alignment_global", "alignment_refined", "refinement", "commitment", "target_spread")


def measures(step: Step) -> Tensor:
    """The figures of a step by the names above, `(6,)`, still on the device."""
    return torch.stack([*step.loss, vqssl.functional.target_spread(step.targets)]).detach()


def line_of(method: str, row: dict[str, float], epochs: int) -> str:
    """One epoch in one line."""
    parts = [
        f"{method} {row['epoch']:.0f}/{epochs}",
        f"loss {row['loss']:.3f}",
        f"L(p,z_c) {row['alignment_global']:.3f}",
    ]
    if method == "dissect":
        parts.append(f"L(p,z_s) {row['alignment_refined']:.3f}")
    parts.append(f"spread {row['target_spread']:.2f}")
    perplexities = [f"{value:.0f}" for name, value in row.items() if name.startswith("perplexity_")]
    if perplexities:
        parts.append(f"perplexity {' / '.join(perplexities)}")
        parts.append(f"dead {sum(value for name, value in row.items() if name.startswith('dead_')):.0f}")
    if "knn_auc" in row:
        parts.append(f"kNN {100 * row['knn_auc']:.1f}")
    parts.append(f"{row['seconds']:.0f} s")
    return "  ".join(parts)


class Log:
    """`metrics.csv`, begun with the rows so far (those of a resumed run), and TensorBoard where it is installed."""

    def __init__(self, folder: Path, rows: list[dict[str, float]]) -> None:
        self.folder = folder
        self.rows = list(rows)
        self.board: Any = None

    def __enter__(self) -> Log:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / "metrics.csv").open("w", newline="")
        self.writer: csv.DictWriter[str] | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            self.board = SummaryWriter(str(self.folder), purge_step=len(self.rows) + 1)
        for row in self.rows:
            self._to_csv(row)
        return self

    def write(self, row: dict[str, float]) -> None:
        self._to_csv(row)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, int(row["epoch"]))

    def _to_csv(self, row: dict[str, float]) -> None:
        if self.writer is None:
            # A run may have been begun without a monitor.
            self.writer = csv.DictWriter(self.file, list(self.rows[-1] if self.rows else row), extrasaction="ignore")
            self.writer.writeheader()
        self.writer.writerow({name: f"{value:.6g}" for name, value in row.items()})
        self.file.flush()

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


class NoLog(Log):
    """Of the ranks that write nothing."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> NoLog:
        return self

    def write(self, row: dict[str, float]) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def fingerprint(data: ImageSet) -> str:
    """What the images are, cheaply: shape, dtype and a checksum."""
    checksum = int(data.images[:: max(1, len(data) // 64)].sum(dtype="uint64"))
    return f"{data.images.shape} {data.images.dtype} {checksum}"


def differences(theirs: Any, ours: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted({*theirs, *ours}):
            found += differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if theirs == ours else [(name, theirs, ours)]
