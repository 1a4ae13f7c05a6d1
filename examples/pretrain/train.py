"""The pretraining loop of every method: a checkpoint each epoch, resume to the bit, and ranks under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from examples.pretrain import agreement, checkpoint, ranks
from examples.pretrain.augment import Augmentation, Normalize, to_float, two_views, views_of
from examples.pretrain.checkpoint_checks import check_facts, check_values
from examples.pretrain.data import ImageSet
from examples.pretrain.data.fingerprint import changes
from examples.pretrain.divergence import Diverged, check_losses, check_state, finite
from examples.pretrain.encoder import Encoder, EncoderOptions
from examples.pretrain.kept import kept
from examples.pretrain.loader import load_batches
from examples.pretrain.lock import hold
from examples.pretrain.log import Log, Row, line_of
from examples.pretrain.methods import METHODS, Step
from examples.pretrain.optimization import Optimization, check_optimization, make_optimizer, make_schedule
from examples.pretrain.optimizer_step import OptimizerStep
from examples.pretrain.precision import check_device_can, laid_out
from examples.pretrain.pretrained import write_part
from examples.pretrain.records import device_model
from vqssl import MultiScaleQuantizer

Monitor = Callable[["Run"], Row]


@dataclass(frozen=True)
class Pretraining:
    """All settings that decide what a run computes."""

    method: str
    """Name in `METHODS`."""
    options: Any
    """The method's own."""
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimization: Optimization = field(default_factory=Optimization)
    seed: int = 0
    device: str = "cpu"


class Run:
    """A pretraining run in a folder: `checkpoint.pt`, the log, and the exported weights at the end.

    Under torchrun every rank builds one for the same folder. The ranks share out each batch; rank 0 writes.

    Args:
        data: the training images; labels are not used.
        config: the settings.
        folder: created when there is something to write.

    Raises:
        ValueError: the batch is larger than the data, or no multiple of the number of ranks; an option of the optimizer
            is out of its range.
    """

    def __init__(self, data: ImageSet, config: Pretraining, folder: Path) -> None:
        self.data = data
        self.config = config
        self.folder = folder
        optimization = config.optimization
        check_optimization(optimization)
        self.steps_per_epoch = len(data) // optimization.batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"batch_size must not exceed the number of training images, got {optimization.batch_size} for "
                f"{len(data)} images: give a smaller --optimization.batch-size"
            )
        shares = ranks.world_size() * optimization.accumulate
        if optimization.batch_size % shares:
            parts = "" if optimization.accumulate == 1 else f" x {optimization.accumulate} parts"
            raise ValueError(
                f"batch_size must be a multiple of the number of ranks{parts and ' and parts'}, got "
                f"{optimization.batch_size} for {ranks.world_size()}{parts}: it is the batch of all ranks together"
            )
        total_steps = self.steps_per_epoch * optimization.epochs
        torch.manual_seed(config.seed)
        encoder = Encoder(data.channels, config.encoder)
        method: Any = METHODS[config.method](encoder, config.options, total_steps=total_steps, seed=config.seed)
        if ranks.world_size() > 1 and config.device.startswith("cuda"):  # SyncBatchNorm does not support the CPU
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        self.method = method.to(config.device)  # an nn.Module with the members of `Method`
        if optimization.channels_last:
            self.method.to(memory_format=torch.channels_last)
        self.normalize = Normalize(data.images).to(config.device)
        self.augment = views_of(data.images.shape[1], config.augmentation)
        self.views = getattr(self.method, "views", two_views)
        self.optimizer = make_optimizer(self.method, optimization)
        self.scheduler = make_schedule(self.optimizer, optimization, self.steps_per_epoch)
        self.optimizer_step = OptimizerStep(self.method, self.optimizer, self.scheduler, optimization, config.device)
        self.epoch = 0
        self.seconds = 0.0
        self.resumed_from: str | None = None
        """Digest of the checkpoint that the run continued from."""
        self.rows: list[Row] = []
        self.devices: list[str] = []
        """Models of the devices that the run has trained on, in order."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the training images, as the checkpoint holds it."""
        return self.data.fingerprint

    def facts(self) -> dict[str, Any]:
        """Return what has to be equal on all ranks before they train, by name."""
        return {
            "config": json.loads(json.dumps(asdict(self.config))),
            "images": self.fingerprint,
            "folder": str(self.folder.absolute()),
            "epoch reached": self.epoch,
            "checkpoint": self.resumed_from,
        }

    def train(self, *, until: int | None = None, quiet: bool = False, monitor: Monitor | None = None) -> None:
        """Train from the epoch reached so far.

        Args:
            until: the last epoch; None trains to the end.
            quiet: whether to print nothing.
            monitor: called after each epoch; its figures are added to the log and never trained on.

        Raises:
            Diverged: the loss, or what an epoch left behind, is not finite. The checkpoint of the epoch before is kept.
            ValueError: the ranks do not agree on what they train, or the device cannot compute as the options say.
            FileNotFoundError: the folder or its log was removed while training.
            Unwritten: a file cannot be written; a note says which checkpoint is whole.
        """
        agreement.check_equal(self.facts())
        agreement.on_all(lambda: check_device_can(self.config.optimization, self.config.device))
        images = to_float(self.data.images)
        last = self.config.optimization.epochs if until is None else until
        prepare = getattr(self.method, "prepare", None)
        if prepare is not None and self.epoch < last:
            prepare(images)
        self.method.train()
        forward: nn.Module = self.method
        if ranks.world_size() > 1:
            # Buffers need no broadcast: what is not averaged below follows the same statistics on every rank.
            forward = DistributedDataParallel(self.method, find_unused_parameters=True, **ranks.buffers_stay())
        first = ranks.rank() == 0
        quiet = quiet or not first
        model = device_model(self.config.device)
        if self.epoch < last and self.devices[-1:] != [model]:
            self.devices.append(model)
        with kept(self.folder), contextlib.ExitStack() as stack:
            log = agreement.on_all(lambda: stack.enter_context(Log(self.folder, self.rows)) if first else None)
            while self.epoch < last:
                start = time.perf_counter()
                row = self._epoch(images, forward, quiet)
                self.epoch += 1
                self.seconds += time.perf_counter() - start
                row["seconds"] = self.seconds
                row |= ranks.decided_by_first(lambda: {} if monitor is None else monitor(self))
                self.method.train()
                self.rows.append(row)
                agreement.on_all(lambda: None if log is None else self._keep(log))
                if not quiet:
                    tqdm.write(line_of(self.config.method, row, self.config.optimization.epochs))
        self.method.eval()
        with kept(self.folder):
            agreement.on_all(lambda: self._finish() if first else None)

    def check_files(self, *names: str) -> None:
        """Raise FileNotFoundError if a file of the run is gone: to go on would leave half a run that looks whole."""
        for name in names:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(
                    f"{self.folder / name} is gone: it was removed while the run went on. Start again"
                )

    def _finish(self) -> None:
        self.check_files("metrics.csv")
        self.export()

    def _keep(self, log: Log) -> None:
        """Write the checkpoint, then the last row of the log."""
        self.check_files("metrics.csv")
        self.save()
        log.write(self.rows[-1])

    def export(self) -> None:
        """Write the method's exports as safetensors: weights for other programs, with nothing to execute.

        With codebooks comes the encoder whose maps they quantise, where that is not the one that is kept.
        """
        parts = self.method.exports()
        target = getattr(self.method, "target_encoder", None)
        if "codebooks" in parts and target is not None and target is not self.method.encoder:
            parts = {**parts, "target_encoder": target}
        for name, part in parts.items():
            write_part(self.folder / f"{name}.safetensors", part, self.normalize, self.notes)

    @property
    def notes(self) -> dict[str, Any]:
        """How the weights came about, for files that hold them."""
        return {
            "method": self.config.method,
            "epoch": self.epoch,
            "trained on": self.devices,
            "settings": asdict(self.config),
        }

    def _epoch(self, images: Tensor, forward: nn.Module, quiet: bool) -> Row:
        # Every epoch has its own seed: what a resumed run draws does not depend on the epochs before.
        seed = self.config.seed * 100_003 + self.epoch + 1
        torch.manual_seed(seed)
        batches = list(self._batches(len(images)))
        loaded = load_batches(images, batches, pin=self.config.device.startswith("cuda"))
        if ranks.rank() > 0:  # the same order of images on every rank, but other crops
            torch.manual_seed(seed + 1_000_003 * ranks.rank())
        title = f"{self.config.method} {self.epoch + 1}/{self.config.optimization.epochs}"
        bar = tqdm(
            loaded, desc=title, total=len(batches), leave=False, disable=True if quiet else None, mininterval=0.5
        )
        names: list[str] = []
        seen: list[Tensor] = []
        for number, batch in enumerate(bar, 1):
            step = self._step(forward, batch.to(self.config.device, non_blocking=True))
            if step is None:
                continue
            names = ["loss", *step.parts]
            seen.append(torch.stack([step.loss, *step.parts.values()]).detach())
            if number % 10 == 0:  # reading a figure synchronises with the device
                bar.set_postfix(loss=f"{torch.stack(seen[-10:])[:, 0].mean().item():.3f}", refresh=False)
        if not seen:
            raise Diverged(f"training diverged: {title}: the gradients of every step overflowed in fp16. Use bf16")
        losses = torch.stack(seen)
        ranks.average_([losses])
        ranks.average_statistics_(self.method)
        self._check_finite(losses, names)
        means = dict(zip(names, losses.mean(0).tolist(), strict=True))
        skipped = {} if self.optimizer_step.scaler is None else {"skipped_steps": self.optimizer_step.skipped}
        lr = self.scheduler.get_last_lr()[0]
        return {"epoch": self.epoch + 1, **means, "lr": lr, **skipped, **self.method.figures()}

    def _check_finite(self, losses: Tensor, names: list[str]) -> None:
        """Raise Diverged on all ranks unless the epoch that ends here left finite numbers everywhere."""
        of = f"{self.config.method}, epoch {self.epoch + 1}"
        kept = f"The checkpoint of epoch {self.epoch} is kept. " if self.epoch else ""
        options = self.config.optimization
        advice = (
            f"{kept}Train again in another --out with a smaller --optimization.lr than {options.lr:g}, or with more "
            f"--optimization.warmup-epochs than {options.warmup_epochs}"
        )
        check_losses(losses, names, of=of, advice=advice)
        parts = {"method": self.method, "optimizer": self.optimizer}
        agreement.on_all(lambda: check_state(parts, of=of, advice=advice))

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Yield this rank's share of the indices of every batch."""
        size = self.config.optimization.batch_size
        order = torch.randperm(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size][ranks.rank() :: ranks.world_size()]

    def _step(self, forward: nn.Module, images: Tensor) -> Step | None:
        parts = images.chunk(self.config.optimization.accumulate)
        return self.optimizer_step.take(forward, [partial(self._views, part) for part in parts])

    @torch.no_grad()
    def _views(self, images: Tensor) -> list[Tensor]:
        views = [self.normalize(view) for view in self.views(images, self.augment)]
        return laid_out(views, self.config.optimization)

    def save(self) -> None:
        """Write the checkpoint; the file is whole whenever the process is killed."""
        hold(self.folder)
        state = {
            "config": json.dumps(asdict(self.config), sort_keys=True),
            "data": self.fingerprint,
            "devices": self.devices,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "rows": self.rows,
            "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.optimizer_step.scaler is not None:
            state["scaler"] = self.optimizer_step.state_dict()
        checkpoint.save(self.folder / "checkpoint.pt", state)

    def resume(self, *, images_only: bool = False) -> bool:
        """Continue from the folder's checkpoint; return False if there is none.

        Args:
            images_only: whether labels, groups, masks and names may be others than those of the run, if only the
                images are the same: to evaluate, not to train on.

        Raises:
            ValueError: it cannot be read, holds impossible values, or belongs to another configuration or other images.
        """
        path = self.folder / "checkpoint.pt"
        if not os.path.lexists(path):  # a link to a file that is gone is no reason to start again
            return False
        state = checkpoint.load(path, self.config.device)
        check_facts(path, state)
        ours = json.loads(json.dumps(asdict(self.config)))
        changed = [
            f"{name} was {a}, is {b}" for name, a, b in checkpoint.differences(json.loads(state["config"]), ours)
        ]
        changed += changes(state["data"], self.fingerprint, self.data.images, images_only=images_only)
        if changed:
            raise ValueError(
                f"{path} belongs to another configuration: {'; '.join(changed)}. Give the options it was made with, or "
                "another --out"
            )
        check_values(
            path,
            state,
            self.method,
            self.optimizer,
            epochs=self.config.optimization.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.method.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.optimizer_step.load_state_dict(state.get("scaler", {}))
        self.epoch, self.seconds, self.rows = state["epoch"], state["seconds"], state["rows"]
        self.devices = state["devices"]
        self.resumed_from = checkpoint.digest(path)
        self.method.eval()
        return True

    @torch.no_grad()
    def encode(self, images: Tensor, encoder: nn.Module | None = None) -> Tensor:
        """Return the pooled features `(N, dim)` of images `(N, C, S, S)` in [0, 1], on the CPU.

        Args:
            images: in [0, 1]; they are normalised with the statistics of the training images.
            encoder: None is the method's.
        """
        encoder = (self.method.encoder if encoder is None else encoder).eval()
        features = torch.cat([encoder(batch)[0].cpu() for batch in self._normalized(images)])
        return finite(features, of=f"features of the encoder of {self.folder}")

    @torch.no_grad()
    def maps(self, images: Tensor, encoder: nn.Module) -> list[Tensor]:
        """Return the encoder's maps `(N, C, H, W)`, one a scale, as :meth:`encode` returns the features."""
        parts = [[scale.cpu() for scale in encoder.eval()(batch)[1]] for batch in self._normalized(images)]
        joined = [torch.cat(scales) for scales in zip(*parts, strict=True)]
        return [finite(scale, of=f"feature maps of the encoder of {self.folder}") for scale in joined]

    @torch.no_grad()
    def codes(self, images: Tensor) -> dict[str, np.ndarray] | None:
        """Return the code indices `(N, H, W)` of images in [0, 1], by scale; None for a method without codes."""
        codes = getattr(self.method, "codes", None)
        if codes is None:
            return None
        self.method.eval()
        parts = [codes(batch) for batch in self._normalized(images)]
        return {scale: torch.cat([part[scale] for part in parts]).cpu().numpy() for scale in parts[0]}

    def code_vectors(self) -> dict[str, np.ndarray] | None:
        """Return the codes `(K, D)` by scale; None for a method without a multi-scale quantiser."""
        quantizer = getattr(self.method, "quantizer", None)
        if not isinstance(quantizer, MultiScaleQuantizer):
            return None
        scales = enumerate(self.method.encoder.scales)
        return {name: quantizer.codebook(scale).embed.cpu().float().numpy() for scale, name in scales}

    def _normalized(self, images: Tensor) -> Iterator[Tensor]:
        for batch in images.split(256):
            yield self.normalize(batch.to(self.config.device))
