"""Grad-CAM (captum's) of the frozen encoder through its linear probe: the share of the map that lies in the lesion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from examples.pretrain.augment import to_float
from examples.pretrain.encoder import STAGES
from examples.pretrain.protocols.labels import learnable
from examples.pretrain.protocols.linear import fit_finding
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject, plane_names, planes
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.pictures import show
from examples.pretrain.reports.text import caption, file_name

LAYERS = STAGES[1:]


class Probed(nn.Module):
    """Encoder and linear probe with all labels as one network: normalised images -> logits of the findings."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        train = subject.train
        assert train.labels is not None
        self.encoder = subject.encoder.eval()
        features = subject.run.encode(to_float(train.images), self.encoder).numpy()
        # coef (x - mean) / scale + intercept as one linear map; zero for a finding that cannot be learnt.
        weight = np.zeros((train.labels.shape[1], features.shape[1]))
        bias = np.zeros(len(weight))
        for finding in learnable(train.labels, train.labels):
            scaler, regression = fit_finding(features, train.labels[:, finding])
            weight[finding] = regression.coef_[0] / scaler.scale_
            bias[finding] = regression.intercept_[0] - weight[finding] @ scaler.mean_
        self.head = nn.Linear(*weight.shape[::-1])
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight))
            self.head.bias.copy_(torch.from_numpy(bias))
        self.to(subject.run.config.device)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, L)`."""
        return self.head(self.encoder(images)[0])


def maps(subject: Subject, net: Probed, images: np.ndarray, finding: int) -> dict[str, np.ndarray]:
    """Return the positive part of Grad-CAM at the size of the images, `(N, S, S)`, by layer."""
    device = subject.run.config.device
    found = {}
    for layer in LAYERS:
        cam = LayerGradCam(net, net.encoder.resnet.get_submodule(layer))
        parts = []
        for batch in to_float(images).split(128):
            inputs = subject.run.normalize(batch.to(device))
            coarse = cam.attribute(inputs, target=finding, relu_attributions=True).detach()
            fine = LayerAttribution.interpolate(coarse, images.shape[1:3], "bilinear")
            parts.append(fine[:, 0].cpu().numpy())
        found[layer] = np.concatenate(parts)
    return found


def measure(subject: Subject, settings: Settings) -> Scores:
    """Return the share (%) of the map in the lesion, by finding and layer, and the share of the image in it."""
    assert subject.masked is not None
    net = Probed(subject)
    scores: Scores = {}
    for finding, name, images, masks in lesions(subject):
        for layer, cam in maps(subject, net, images, finding).items():
            scores[f"{name}, {layer}"] = [100 * float(energy(cam, masks).mean())]
        scores[f"{name}, by chance"] = [100 * float(masks.mean())]
    return scores


def lesions(subject: Subject) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """Yield number, name, test images and masks of each finding that a probe can learn."""
    assert subject.masked is not None
    test = subject.masked[1]
    assert test.masks is not None
    assert subject.train.labels is not None
    names = plane_names(*subject.masked)
    split = planes(test.masks, len(names))
    for finding in learnable(subject.train.labels, subject.train.labels):
        there = split[:, finding].any((1, 2))
        if there.any():
            yield int(finding), names[finding], test.images[there], split[there, finding]


def energy(cam: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return `(N,)` shares of the maps that lie in the masks; 0 for an empty map."""
    total = cam.sum((1, 2))
    return np.where(total > 0, (cam * masks).sum((1, 2)) / np.maximum(total, 1e-12), 0.0)


def draw(subjects: Sequence[Subject], settings: Settings, folder: Path) -> None:
    """Draw the maps of layer3 over test images, one picture a finding."""
    drawn: set[Path] = set()
    for finding, name, images, masks in lesions(subjects[0]):
        figure = new_figure(figsize=(1.3 * 6 + 0.5, 1.35 * (1 + len(subjects)) + 0.5), layout="constrained")
        grid = figure.subplots(1 + len(subjects), 6, squeeze=False)
        images, masks = images[:6], masks[:6]
        for axes, image in zip(grid[0], images, strict=False):
            show(axes, image)
        for row, subject in zip(grid[1:], subjects, strict=True):
            cams = maps(subject, Probed(subject), images, finding)["layer3"]
            shares = energy(cams, masks)
            for axes, image, cam, share in zip(row, images, cams, shares, strict=False):
                show(axes, image)
                axes.imshow(cam, cmap="inferno", alpha=0.55)
                axes.set_title(f"{share:.0%} inside", fontsize=9)
            row[0].set_ylabel(caption(subject.name))
        for row in grid:
            for axes, mask in zip(row, masks, strict=False):
                axes.contour(mask, levels=[0.5], colors="#4cc9f0", linewidths=1)
            for axes in row:
                axes.set(xticks=[], yticks=[])
        figure.suptitle(f"Grad-CAM of layer3 for {caption(name)} through a linear probe, lesion outlined")
        path = folder / f"localise-{file_name(name)}.png"
        if path in drawn:  # two names may differ in what file names cannot hold
            path = folder / f"localise-{file_name(name)}-{finding}.png"
        drawn.add(path)
        save_figure(figure, path, dpi=110)


def lacking(subject: Subject) -> str | None:
    """Return what the images lack, or None."""
    labels = subject.train.labels
    if subject.masked is None or labels is None or labels.ndim != 2:
        return "a mask of each finding, as the phantoms have"
    # Compared by name: a file of other masks may have as many planes as there are findings.
    if tuple(plane_names(*subject.masked)) != subject.train.label_names:
        return "a mask of each finding, as the phantoms have"
    return None if any(True for _ in lesions(subject)) else "test images with a finding that a probe can learn"


PROTOCOL = Protocol(
    "Grad-CAM through the linear probe: share (%) of the map that lies in the lesion", measure, lacking, draw
)
