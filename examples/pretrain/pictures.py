"""Pictures of a run: curves, code maps over images, and the patches that the most-used codes stand for."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.pretrain.data import ImageSet

matplotlib.use("agg")

INK, FAINT = "#333333", "#999999"


def curves(runs: dict[str, list[dict[str, float]]], codebook_size: int, path: Path) -> None:
    """Losses, target spread, perplexity and the kNN probe by epoch; `runs` holds the rows of each method's log."""
    probed = any("knn_auc" in row for rows in runs.values() for row in rows)
    figure = Figure(figsize=(15.5 if probed else 12, 3.6), layout="constrained")
    left, middle, right, *rest = figure.subplots(1, 4 if probed else 3)
    titles = {"alignment_global": "to z_c", "alignment_refined": "to z_s", "refinement": "z_s to z_c"}
    for method, rows in runs.items():
        epochs = [row["epoch"] for row in rows]
        style = "--" if method == "byol" else "-"
        for color, (name, title) in enumerate(titles.items()):
            values = [row[name] for row in rows]
            if any(values):
                left.plot(epochs, values, style, color=f"C{color}", label=f"{method}: {title}")
        middle.plot(epochs, [row["target_spread"] for row in rows], style, color="C4", label=method)
        for number, name in enumerate(sorted(name for name in rows[0] if name.startswith("perplexity_"))):
            scale = name.removeprefix("perplexity_")
            right.plot(epochs, [row[name] for row in rows], style, color=f"C{5 + number}", label=scale)
    left.set(title="cosine losses, 0 to 4", xlabel="epoch", ylim=(0, None))
    middle.set(title="spread of the target: 0 collapsed, 1 isotropic", xlabel="epoch", ylim=(0, 1.05))
    right.set(title=f"perplexity of the codes, 1 to {codebook_size}", xlabel="epoch", ylim=(0, None))
    right.axhline(codebook_size, color=FAINT, linewidth=0.8, linestyle=":")
    for axes in rest:
        for method, rows in runs.items():
            seen = [(row["epoch"], 100 * row["knn_auc"]) for row in rows if "knn_auc" in row]
            axes.plot(*zip(*seen, strict=True), "--" if method == "byol" else "-", color="C8", label=method)
        axes.set(title="AUC (%) of a kNN probe, held-out training images", xlabel="epoch")
    for axes in (left, middle, right, *rest):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def code_maps(data: ImageSet, indices: dict[str, np.ndarray], codebook_size: int, path: Path, count: int = 8) -> None:
    """Images above their code maps, one row a scale; equal colours within a row are equal codes."""
    which = _varied(data, count)
    figure = Figure(figsize=(1.5 * len(which) + 0.4, 1.55 * (1 + len(indices)) + 0.4), layout="constrained")
    grid = figure.subplots(1 + len(indices), len(which), squeeze=False)
    for axes, image in zip(grid[0], which, strict=True):
        _show(axes, data.images[image])
        axes.set_title(_label(data, image), fontsize=7, color=INK)
        if data.masks is not None and data.masks[image].any():
            axes.contour(data.masks[image] > 0, levels=[0.5], colors="#ff5533", linewidths=0.8)
    # Neighbouring code numbers mean nothing: shuffled hues keep them apart.
    hues = np.random.default_rng(0).permutation(codebook_size) / codebook_size
    palette = matplotlib.colormaps["hsv"](hues)
    for row, (scale, codes) in zip(grid[1:], indices.items(), strict=True):
        for axes, image in zip(row, which, strict=True):
            axes.imshow(palette[codes[image]], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{scale}\n{codes.shape[1]} x {codes.shape[2]}", fontsize=8, color=INK)
    figure.savefig(path, dpi=120)


def code_patches(data: ImageSet, indices: np.ndarray, path: Path, codes: int = 14, patches: int = 10) -> None:
    """What the most-used codes of one scale stand for: places of different images that chose each."""
    used, counts = np.unique(indices, return_counts=True)
    used = used[np.argsort(-counts, kind="stable")][:codes]
    size, places = data.images.shape[1], indices.shape[1]
    side = max(size // places * 3, 8)  # the place and its neighbours
    padding = [(side, side), (side, side)] + [(0, 0)] * (data.images.ndim - 3)
    figure = Figure(figsize=(0.62 * patches + 1, 0.62 * len(used) + 0.3), layout="constrained")
    grid = figure.subplots(len(used), patches, squeeze=False)
    rng = np.random.default_rng(0)
    for row, code in zip(grid, used, strict=True):
        where = rng.permutation(np.argwhere(indices == code))
        _, first = np.unique(where[:, 0], return_index=True)  # different images
        where = where[np.sort(first)][:patches]
        for axes in row:
            axes.axis("off")
        for axes, (image, y, x) in zip(row, where, strict=False):
            top, left = (int((at + 0.5) * size / places - side / 2) + side for at in (y, x))
            patch = np.pad(data.images[image], padding, mode="edge")[top : top + side, left : left + side]
            _show(axes, patch)
        share = (indices == code).mean()
        row[0].text(-0.15, 0.5, f"{code}\n{share:.1%}", transform=row[0].transAxes, fontsize=7, ha="right", va="center")
    figure.suptitle("places that chose the same code (number, share of all places)", fontsize=8, color=INK)
    figure.savefig(path, dpi=120)


def _show(axes, image: np.ndarray) -> None:
    full = np.iinfo(image.dtype).max
    axes.imshow(image / full, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label(data: ImageSet, image: int) -> str:
    if data.labels is None:
        return ""
    names = data.label_names
    label = data.labels[image]
    if data.labels.ndim == 1:
        return names[label] if names else str(label)
    return ", ".join(name for name, there in zip(names, label, strict=False) if there) or "no finding"


def _varied(data: ImageSet, count: int) -> list[int]:
    """The first images of each label, in turns."""
    if data.labels is None:
        return list(range(min(count, len(data))))
    keys = [tuple(np.atleast_1d(label)) for label in data.labels.tolist()]
    queues = [[i for i, key in enumerate(keys) if key == label] for label in sorted(set(keys))]
    turns = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
    return sorted(turns[:count], key=lambda i: keys[i])
