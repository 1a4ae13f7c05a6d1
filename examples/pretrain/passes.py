"""Forward passes of a method: how much encoder a step costs, which equal numbers of steps do not show."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.encoder import Encoder
from examples.pretrain.train import Pretraining, Run


def forward_passes(data: ImageSet, config: Pretraining, folder: Path) -> float:
    """Return how often a step passes each image through an encoder, of the student or of a teacher.

    A view of half the side counts as a quarter. The method is built anew and takes a step without an update: what no
    batch of these images can be used for is refused here. Nothing is written.

    Args:
        data: the training images.
        config: of the run.
        folder: of the run.

    Raises:
        ValueError: the method cannot be built, or not take a step.
    """
    run = Run(data, config, folder)
    images = to_float(data.images)
    prepare = getattr(run.method, "prepare", None)
    if prepare is not None:
        prepare(images)
    batch = images[: config.optimization.batch_size // config.optimization.accumulate].to(config.device)
    seen = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0]) * inputs[0].shape[-2] * inputs[0].shape[-1]

    for module in run.method.modules():
        if isinstance(module, Encoder):
            module.resnet.conv1.register_forward_pre_hook(count)
    torch.manual_seed(config.seed)
    with torch.no_grad():
        run.method([run.normalize(view) for view in run.views(batch, run.augment)])
    return seen / (len(batch) * batch.shape[-2] * batch.shape[-1])
