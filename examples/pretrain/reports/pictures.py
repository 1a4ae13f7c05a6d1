"""Pictures of a run: curves, code maps over images, and the patches that chose the most-used codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.pretrain.data import ImageSet
from examples.pretrain.log import Row
from examples.pretrain.reports.code_colors import code_colors
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.text import caption

INK = "#333333"


PANELS = {
    "loss and its parts": ("loss", "alignment_", "refinement"),
    "loss of code prediction": ("code_layer",),
    "spread of the target, 0 (collapsed) to 1": ("target_spread",),
    "perplexity of the codes": ("perplexity_",),
    "AUC of the kNN probe": ("knn_auc",),
}
"""Columns of the log in each panel of the curves, by their first letters."""


def curves(runs: dict[str, list[Row]], path: Path) -> None:
    """Draw the columns in `PANELS` by epoch; a panel without data is left out.

    Args:
        runs: the rows of each method's log.
        path: of the picture.
    """
    panels = {
        title: {method: [name for name in rows[-1] if name.startswith(prefixes)] for method, rows in runs.items()}
        for title, prefixes in PANELS.items()
    }
    panels = {title: columns for title, columns in panels.items() if any(columns.values())}
    # Two panels beside each other: in a wider picture, text is too small on a page.
    rows, columns_of_panels = -(-len(panels) // 2), min(len(panels), 2)
    figure = new_figure(figsize=(4.2 * columns_of_panels, 3.4 * rows), layout="constrained")
    styles = ("-", "--", ":", "-.")
    grid = figure.subplots(rows, columns_of_panels, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, columns) in zip(grid, panels.items(), strict=False):
        for color, (method, names) in enumerate(columns.items()):
            for number, name in enumerate(names):
                seen = [(row["epoch"], row[name]) for row in runs[method] if name in row]
                label = f"{method}: {name}" if len(names) > 1 else method
                axes.plot(*zip(*seen, strict=True), styles[number % 4], color=f"C{color}", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.locator_params(axis="x", integer=True)
        axes.legend()
    save_figure(figure, path, dpi=120)


def code_maps(
    data: ImageSet,
    indices: dict[str, np.ndarray],
    path: Path,
    count: int = 6,
    codes: dict[str, np.ndarray] | None = None,
) -> None:
    """Draw images above their code maps, one row a scale, with lesions outlined.

    Args:
        data: the images.
        indices: code indices `(N, H, W)` by scale.
        path: of the picture.
        count: number of images.
        codes: the codes `(K, D)` of each scale. Near codes then have near colours; without, colours are shuffled, and
            say only which codes are equal.
    """
    which = _varied(data, count)
    figure = new_figure(figsize=(1.3 * len(which) + 0.5, 1.35 * (1 + len(indices)) + 0.3), layout="constrained")
    grid = figure.subplots(1 + len(indices), len(which), squeeze=False)
    for axes, image in zip(grid[0], which, strict=True):
        show(axes, data.images[image])
        axes.set_title(caption(_label(data, image), 18), fontsize=9, color=INK)
    side = data.images.shape[1]
    for row, (scale, chosen) in zip(grid[1:], indices.items(), strict=True):
        palette = _shuffled(1 + int(chosen.max())) if codes is None else code_colors(codes[scale])
        for axes, image in zip(row, which, strict=True):
            axes.imshow(palette[chosen[image]], extent=(-0.5, side - 0.5, side - 0.5, -0.5))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(f"{scale}\n{chosen.shape[1]} x {chosen.shape[2]}", fontsize=9, color=INK)
    for axes, image in zip(grid.T, which, strict=True):
        if data.masks is not None and data.masks[image].any():
            for each in axes:
                outline = "#D55E00" if each is axes[0] else "black"
                each.contour(data.masks[image] > 0, levels=[0.5], colors=outline, linewidths=1)
    if codes is not None:
        figure.suptitle("near colours are near codes", color=INK)
    save_figure(figure, path, dpi=120)


def _shuffled(size: int) -> np.ndarray:
    """Return distinct colours `(size, 3)`, whose order says nothing: neighbouring code numbers are not related."""
    codes = np.random.default_rng(0).standard_normal((size, 3))
    return code_colors(codes)


def code_patches(data: ImageSet, indices: np.ndarray, path: Path, codes: int = 14, patches: int = 10) -> None:
    """Draw the places of different images that chose each of the most-used codes of one scale, one row a code.

    Args:
        data: the images.
        indices: code indices `(N, H, W)`.
        path: of the picture.
        codes: number of codes.
        patches: number of places for each code.
    """
    used, counts = np.unique(indices, return_counts=True)
    used = used[np.argsort(-counts, kind="stable")][:codes]
    size, places = data.images.shape[1], indices.shape[1]
    side = max(size // places * 3, 8)  # the cell and its neighbours
    padding = [(side, side), (side, side)] + [(0, 0)] * (data.images.ndim - 3)
    pitch = side + max(side // 12, 1)
    # One picture: a grid of axes takes seconds to lay out.
    mosaic = np.ones((pitch * len(used), pitch * patches, *data.images.shape[3:]), np.float32)
    rng = np.random.default_rng(0)
    for row, code in enumerate(used):
        where = rng.permutation(np.argwhere(indices == code))
        _, first = np.unique(where[:, 0], return_index=True)  # different images
        for column, (image, y, x) in enumerate(where[np.sort(first)][:patches]):
            top, left = (int((at + 0.5) * size / places - side / 2) + side for at in (y, x))
            patch = np.pad(data.images[image], padding, mode="edge")[top : top + side, left : left + side]
            at = np.s_[pitch * row : pitch * row + side, pitch * column : pitch * column + side]
            mosaic[at] = patch / np.iinfo(patch.dtype).max
    figure = new_figure(figsize=(0.62 * patches + 1, 0.62 * len(used) + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    shares = [f"{code}\n{(indices == code).mean():.1%}" for code in used]
    axes.set_yticks(pitch * np.arange(len(used)) + side / 2, shares, fontsize=9)
    axes.set(xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle("places that chose the same code (number, share of all places)", color=INK)
    save_figure(figure, path, dpi=120)


def show(axes, image: np.ndarray) -> None:
    """Show an image of any dtype and number of channels, without ticks."""
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
        return names[label] if 0 <= label < len(names) else str(label)
    return ", ".join(name for name, there in zip(names, label, strict=False) if there > 0) or "no finding"


def _varied(data: ImageSet, count: int) -> list[int]:
    """Return the first images of each label, in turns."""
    if data.labels is None:
        return list(range(min(count, len(data))))
    keys = [tuple(np.atleast_1d(label).tolist()) for label in data.labels]
    queues = [[i for i, key in enumerate(keys) if key == label] for label in sorted(set(keys))]
    turns = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
    return sorted(turns[:count], key=lambda i: keys[i])
