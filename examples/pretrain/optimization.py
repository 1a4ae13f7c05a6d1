"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pytorch_optimizer import LARS
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from examples.pretrain.ranges import check_range


@dataclass(frozen=True)
class Optimization:
    """Optimizer, schedule and length. The defaults are the paper's; it omits the weight decay (here BYOL's)."""

    optimizer: Literal["lars", "adamw"] = "lars"
    """lars is the paper's; adamw suits few steps and small batches."""
    lr: float = 0.3
    """Peak learning rate; LARS scales it by batch / 256."""
    momentum: float = 0.99
    """Of LARS."""
    weight_decay: float = 1.5e-6
    """Not applied to biases and norms."""
    batch_size: int = 256
    """Images a step, of all ranks and all parts together: with 4 ranks, each takes a quarter."""
    epochs: int = 300
    """Passes over the training images."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up; half a cosine follows."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Of forward passes in training. fp16 scales the loss; a step that overflows is skipped and changes nothing."""
    accumulate: int = 1
    """Parts of a batch that pass one after another, to save memory. Gradients are averaged, and codebooks see all parts
    at once. Each part is a batch of its own to BatchNorm, to targets that are centred, and to losses that compare
    images with each other."""
    channels_last: bool = False
    """Keep images and weights with channels last in memory, which some devices prefer. It rounds otherwise."""
    compile: bool = False
    """Compile the forward pass by torch.compile, which takes minutes when training starts. It rounds otherwise."""


def check_optimization(config: Optimization) -> None:
    """Raise ValueError unless every option is in its range."""
    check_range("--optimization.lr", config.lr, above=0)
    check_range("--optimization.momentum", config.momentum, least=0, below=1)
    check_range("--optimization.weight-decay", config.weight_decay, least=0)
    check_range("--optimization.batch-size", config.batch_size, least=2)
    check_range("--optimization.epochs", config.epochs, least=1)
    check_range("--optimization.warmup-epochs", config.warmup_epochs, least=0)
    check_range("--optimization.accumulate", config.accumulate, least=1)
    if config.batch_size % config.accumulate or config.batch_size < 2 * config.accumulate:
        raise ValueError(
            "--optimization.batch-size must be a multiple of --optimization.accumulate, of 2 images a part at least, "
            f"got {config.batch_size} for {config.accumulate} parts: give another number of parts"
        )


def make_optimizer(model: nn.Module, config: Optimization) -> Optimizer:
    """Return the optimizer of all trainable parameters; biases and norms have no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [each for each in trained if each.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in trained if each.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr)
    lr = config.lr * config.batch_size / 256
    return LARS(groups, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)


def make_schedule(optimizer: Optimizer, config: Optimization, steps_per_epoch: int) -> LRScheduler:
    """Return a linear warm-up from lr / (warm-up steps + 1) to lr, followed by half a cosine to 0."""
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total - 1)
    cosine = CosineAnnealingLR(optimizer, max(total - warmup, 1))
    if warmup < 1:
        return cosine
    ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [ramp, cosine], milestones=[warmup])
