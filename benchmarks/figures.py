"""Pictures of the benchmarks' records, which RESULTS.md shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.records import Record
from examples.pretrain.reports.figure import new_figure, plain_log, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^"
SEARCHES = {
    "cdist + argmin": ("torch.cdist + argmin", "C1", "o"),
    "mm": ("the matrix product alone", "0.45", "s"),
    "vqssl": ("vqssl, exact", "C0", "D"),
}
"""By the name in a record: label, color and marker."""


def draw_search(result: Record, path: Path) -> None:
    """Draw the time of the search against N, K and D."""
    figure = new_figure(figsize=(8, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True).ravel()
    rate = max(2 * entry["shape"][0] * entry["shape"][1] * entry["shape"][2] / entry["times"]["mm"]["median"] / 1e3
               for entry in result["sweep"])  # fmt: skip
    base = next(entry["shape"] for entry in result["sweep"] if entry["shape"] == [12544, 2048, 128])
    for place, (axis, panel) in enumerate(zip("NKD", grid, strict=False)):
        entries = sorted((e for e in result["sweep"] if e["axis"] == axis), key=lambda e: e["shape"][place])
        along = [entry["shape"][place] for entry in entries]
        for name, (label, color, marker) in SEARCHES.items():
            times = [entry["times"][name]["median"] for entry in entries]
            panel.plot(along, times, color=color, marker=marker, label=label)
        roof = [max(2 * n * k * d / rate / 1e3, 4 * (n + k) * d / result["bandwidth GB/s"] / 1e6)
                for n, k, d in (e["shape"] for e in entries)]  # fmt: skip
        panel.plot(along, roof, "k:", label="roofline: fastest product seen, memory")
        panel.set(xscale="log", yscale="log", xlabel={"N": "tokens N", "K": "codes K", "D": "width D"}[axis])
        panel.set_title(", ".join(f"{name} = {size:,}" for name, size in zip("NKD", base, strict=True) if name != axis))
        panel.set_xticks(along, [f"{value:,}" for value in along], rotation=45)
        panel.minorticks_off()
        panel.grid()
    for panel in grid[::2]:
        panel.set_ylabel("milliseconds")
        plain_log(panel.yaxis)
    grid[3].set_axis_off()
    grid[3].legend(*grid[0].get_legend_handles_labels(), loc="center")
    figure.suptitle("Finding the nearest of K codes for N tokens: time grows with N x K x D, as the product's does")
    save_figure(figure, path, dpi=110)


def draw_codebook_usage(result: Record, path: Path) -> None:
    """Draw perplexity, error and moves of codebooks over the training steps."""
    entries = result["observers"]
    middle = next(name for name in entries if "k-means" in name).split(",")[0]
    sizes = [name for name in entries if "," not in name]
    panels: list[tuple[str, str, dict[str, str]]] = [
        (
            "perplexity / K, by size\n(dashed: no revival)",
            "perplexity",
            {name: name for size in sizes for name in (size, f"{size}, no revival")},
        ),
        (
            f"perplexity / K, {middle}, by first codes\n(dashed: no revival)",
            "perplexity",
            {
                middle: "tokens",
                f"{middle}, no revival": "tokens, no revival",
                f"{middle}, k-means": "k-means",
                f"{middle}, k-means, no revival": "k-means, no revival",
                f"{middle}, random": "random",
                f"{middle}, random, no revival": "random, no revival",
            },
        ),
        (
            f"squared distance of token and code\n/ variance, {middle}",
            "error",
            {
                middle: "vqssl",
                f"{middle}, Eq. 1": "vqssl, Eq. 1",
                f"{middle}, vector-quantize-pytorch": "vector-quantize-pytorch",
                f"{middle}, vector-quantize-pytorch, threshold 2": "the same, threshold 2",
            },
        ),
        (
            f"squared move of a used code a step\n/ variance, {middle}",
            "move",
            {middle: "teacher's features", f"{middle}, student features": "student's features"},
        ),
    ]
    figure = new_figure(figsize=(8, 7.4), layout="constrained")
    for axes, (title, measure, lines) in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
        _draw_lines(axes, entries, measure, lines)
        axes.set_title(title)
    save_figure(figure, path, dpi=110)


def _draw_lines(axes: Axes, entries: dict[str, Record], measure: str, lines: dict[str, str]) -> None:
    """Draw a measure of some codebooks by step; one without revival is dashed, in the colour of the one with it."""
    bases: list[str] = []
    for name, label in lines.items():
        entry = entries[name]
        values = [value / entry["codes"] if measure == "perplexity" else value for value in entry[measure]]
        base = label.removesuffix(", no revival")
        if base not in bases:
            bases.append(base)
        number, dashed = bases.index(base), label != base
        axes.plot(
            entry["step"],
            values,
            "--" if dashed else "-",
            color=f"C{number}",
            label=None if dashed else label,
            marker=MARKERS[number],
            markersize=4,
            markevery=(2 * number, 8),
        )
    axes.set_xlabel("step")
    if measure == "move":
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    else:
        axes.set_ylim(0, None)
    axes.grid()
    axes.legend()
