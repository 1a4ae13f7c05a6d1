"""Segmentation: a U-Net decoder (MONAI's) on the encoder's stages, scored by Dice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import torch
from monai.losses.dice import DiceLoss
from monai.metrics.meandice import DiceMetric
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.decoder import Decoder
from examples.pretrain.divergence import check_losses, check_state
from examples.pretrain.encoder import Encoder
from examples.pretrain.protocols.finetune import batches
from examples.pretrain.protocols.labels import Draws, label_draws, label_subset
from examples.pretrain.protocols.subject import (
    Protocol,
    Scores,
    Settings,
    Subject,
    areas,
    count_planes,
    lacking_masks,
    plane_names,
    planes,
)
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.pictures import show
from examples.pretrain.reports.text import caption

BATCH = 128
"""Test images that a network sees at a time."""


class Segmenter(nn.Module):
    """An encoder, and a decoder with skip connections: images `(B, C, S, S)` -> logits of masks `(B, P, S, S)`."""

    def __init__(self, encoder: Encoder, masks: int, *, frozen: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.frozen = frozen
        self.decoder = Decoder(encoder, masks)

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()  # its BatchNorm too
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the masks at the size of the images."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.encoder.pyramid(images)
        return self.decoder(maps, images.shape[2:])


def measure(subject: Subject, settings: Settings, *, frozen: bool) -> Scores:
    """Return Dice (%) by share of the masks, and by plane if there are several."""
    assert subject.masked is not None
    train, test = subject.masked
    names = plane_names(train, test)
    found: Scores = {}
    for share, seed, index in mask_subsets(subject, settings):
        net = trained(subject, train.subset(index), len(names), settings, seed, frozen=frozen)
        for name, value in zip(names, dice(subject, net, test, len(names)), strict=True):
            column = f"{100 * share:g}%" if len(names) == 1 else f"{name}, {100 * share:g}%"
            found.setdefault(column, []).append(100 * value)
    return found


def presence(data: ImageSet, count: int) -> np.ndarray:
    """Return `(N, P)` of 0 and 1: images with a mask in each of `count` planes. Subsets are drawn by it."""
    assert data.masks is not None
    return (areas(data.masks, count) > 0).astype(np.uint8)


def mask_subsets(subject: Subject, settings: Settings) -> Draws:
    """Yield the subsets of the training masks."""
    assert subject.masked is not None
    there = presence(subject.masked[0], count_planes(*subject.masked))
    return label_draws(there, settings.mask_shares, settings.subsets, settings.seed)


def trained(subject: Subject, train: ImageSet, masks: int, settings: Settings, seed: int, *, frozen: bool) -> Segmenter:
    """Return a trained segmenter; the subject's encoder is not changed.

    Images and masks are flipped, rotated and scaled together.

    Raises:
        Diverged: the loss or the weights are not finite.
    """
    assert train.masks is not None
    torch.manual_seed(seed)
    run = subject.run
    device = run.config.device
    net = Segmenter(copy.deepcopy(subject.encoder), masks, frozen=frozen).to(device).train()
    augment = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(degrees=10.0, translate=(0.05, 0.05), scale=(0.9, 1.1), p=1.0, padding_mode="border"),
        data_keys=["input", "mask"],
    )
    # A nodule covers about 0.5% of the pixels: with equal weights a decoder learns to predict none.
    area = torch.from_numpy(areas(train.masks, masks).sum(0))[:, None, None].to(device)
    share = (area.float() / train.masks.size).clamp_min(1 / train.masks.size)
    overlap, pixels = DiceLoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss(pos_weight=((1 - share) / share).sqrt())
    optimizer = torch.optim.AdamW(
        (net.decoder if frozen else net).parameters(),
        lr=settings.mask_lr,
        weight_decay=1e-4,
    )
    schedule = CosineAnnealingLR(optimizer, settings.steps)
    losses = []
    for batch in batches(len(train), settings):
        index = batch.numpy()
        with torch.no_grad():
            # Read for each batch: images may be more than memory holds.
            target = torch.from_numpy(planes(train.masks[index], masks)).float().to(device)
            view, target = augment(to_float(train.images[index]).to(device), target)
            target = (target > 0.5).float()
        logits = net(run.normalize(view))
        optimizer.zero_grad(set_to_none=True)
        loss = overlap(logits, target) + pixels(logits, target)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        schedule.step()
    # A NaN is not above 0: the masks that it predicts would be empty, and the score 0.
    said = {"of": f"segmentation by {subject.name}", "advice": f"Give a smaller --mask-lr than {settings.mask_lr:g}"}
    check_losses(torch.stack(losses)[:, None], ["loss"], **said)
    check_state({"network": net}, **said)
    return net.eval()


@torch.no_grad()
def predicted(subject: Subject, net: Segmenter, images: np.ndarray) -> Tensor:
    """Return the predicted masks, `(N, P, S, S)` of 0 and 1."""
    batch = to_float(images).to(subject.run.config.device)
    return (net(subject.run.normalize(batch)) > 0).float().cpu()


def dice(subject: Subject, net: Segmenter, test: ImageSet, masks: int) -> list[float]:
    """Return the mean Dice of each plane over the test images that have a mask in it."""
    assert test.masks is not None
    metric = DiceMetric(include_background=True, reduction="mean_batch", ignore_empty=True)
    for start in range(0, len(test), BATCH):  # it keeps a figure for each image, and no image
        part = slice(start, start + BATCH)
        truth = torch.from_numpy(planes(test.masks[part], masks)).float()
        metric(predicted(subject, net, test.images[part]), truth)
    found = metric.aggregate()
    assert isinstance(found, Tensor)
    return found.tolist()


def draw(subjects: Sequence[Subject], settings: Settings, folder: Path, *, frozen: bool) -> None:
    """Draw outlines of masks and predictions on test images; decoders are trained with the second share of masks."""
    first = subjects[0].masked
    assert first is not None
    train, test = first
    assert train.masks is not None
    assert test.masks is not None
    names = plane_names(train, test)
    share = sorted(settings.mask_shares)[min(1, len(settings.mask_shares) - 1)]
    some = train.subset(label_subset(presence(train, len(names)), share, settings.seed * 1000))
    shown = test.subset(np.flatnonzero(test.masks.any((1, 2)))[:6])
    assert shown.masks is not None
    figure = new_figure(figsize=(1.3 * len(shown) + 0.5, 1.35 * len(subjects) + 0.5), layout="constrained")
    grid = figure.subplots(len(subjects), len(shown), squeeze=False)
    colors = ["#4cc9f0", "#f9c74f", "#90be6d"]
    for row, subject in zip(grid, subjects, strict=True):
        net = trained(subject, some, len(names), settings, settings.seed * 1000, frozen=frozen)
        guess, truth = predicted(subject, net, shown.images).numpy(), planes(shown.masks, len(names))
        for axes, image, made, real in zip(row, shown.images, guess, truth, strict=True):
            show(axes, image)
            for plane, color in zip(range(len(names)), colors, strict=False):
                if real[plane].any():
                    axes.contour(real[plane], levels=[0.5], colors="white", linewidths=1.2)
                if made[plane].any():
                    axes.contour(made[plane], levels=[0.5], colors=color, linewidths=1.2)
        row[0].set_ylabel(caption(subject.name))
    shown_in = zip(map(caption, names), ("blue", "yellow", "green"), strict=False)
    keys = ", ".join(f"{name} {color}" for name, color in shown_in)
    kind = "frozen" if frozen else "fine-tuned"
    figure.suptitle(f"{kind} encoder, {100 * share:g}% of the masks: truth white, {keys}")
    save_figure(figure, folder / f"segment-{'frozen' if frozen else 'tuned'}.png", dpi=110)


TITLE = "U-Net decoder on the {} encoder: Dice (%) by share of the masks"
FROZEN, TUNED = (
    Protocol(
        TITLE.format(kind), partial(measure, frozen=frozen), lacking_masks, partial(draw, frozen=frozen), mask_subsets
    )
    for kind, frozen in (("frozen", True), ("fine-tuned", False))
)
