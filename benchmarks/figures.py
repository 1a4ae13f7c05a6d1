"""Pictures of the benchmarks' records, which RESULTS.md shows."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.records import Record


def draw_search(result: Record, path: Path) -> None:
    """Draw the time of the search against N, K and D."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), sharey=True)
    rate = max(2 * entry["shape"][0] * entry["shape"][1] * entry["shape"][2] / entry["times"]["mm"]["median"] / 1e3
               for entry in result["sweep"])  # fmt: skip
    styles = {"cdist + argmin": ("tab:red", "o"), "mm": ("0.45", "s"), "vqssl": ("tab:blue", "D")}
    labels = {"mm": "the matrix product alone", "vqssl": "vqssl, exact", "cdist + argmin": "torch.cdist + argmin"}
    base = next(entry["shape"] for entry in result["sweep"] if entry["shape"] == [12544, 2048, 128])
    for place, (axis, panel) in enumerate(zip("NKD", axes, strict=True)):
        entries = sorted((e for e in result["sweep"] if e["axis"] == axis), key=lambda e: e["shape"][place])
        along = [entry["shape"][place] for entry in entries]
        for name, (colour, marker) in styles.items():
            panel.plot(
                along, [e["times"][name]["median"] for e in entries], color=colour, marker=marker, label=labels[name]
            )
        roof = [max(2 * n * k * d / rate / 1e3, 4 * (n + k) * d / result["bandwidth GB/s"] / 1e6)
                for n, k, d in (e["shape"] for e in entries)]  # fmt: skip
        panel.plot(along, roof, "k:", label="roofline: fastest product seen, memory")
        panel.set(xscale="log", yscale="log", xlabel={"N": "tokens N", "K": "codes K", "D": "width D"}[axis])
        fixed = ", ".join(f"{name} = {size:,}" for name, size in zip("NKD", base, strict=True) if name != axis)
        panel.set_title(fixed, fontsize=10)
        panel.set_xticks(along, [f"{value:,}" for value in along], fontsize=7, rotation=45)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(fontsize=8)
    figure.suptitle("Finding the nearest of K codes for N tokens: time grows with N x K x D, as the product's does")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_codebook_usage(result: Record, path: Path) -> None:
    """Draw perplexity, error and moves of codebooks over the training steps."""
    entries = result["observers"]
    middle = next(name for name in entries if "k-means" in name).split(",")[0]
    sizes = [name for name in entries if "," not in name]
    panels: list[tuple[str, str, dict[str, str]]] = [
        (
            "perplexity / K, by size (dashed: no revival)",
            "perplexity",
            {name: name for size in sizes for name in (size, f"{size}, no revival")},
        ),
        (
            f"perplexity / K at {middle}, by first codes (dashed: no revival)",
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
            f"squared distance of token and code / variance, {middle}",
            "error",
            {
                middle: "vqssl",
                f"{middle}, Eq. 1": "vqssl, Eq. 1",
                f"{middle}, vector-quantize-pytorch": "vector-quantize-pytorch",
                f"{middle}, vector-quantize-pytorch, threshold 2": "the same, threshold 2",
            },
        ),
        (
            f"squared move of a used code a step / variance, {middle}",
            "move",
            {middle: "teacher's features", f"{middle}, student features": "student's features"},
        ),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.2), constrained_layout=True)
    for ax, (title, measure, lines) in zip(axes, panels, strict=True):
        colours: dict[str, str] = {}
        for name, label in lines.items():
            entry = entries[name]
            values = [value / entry["codes"] if measure == "perplexity" else value for value in entry[measure]]
            base = label.removesuffix(", no revival")
            colour = colours.setdefault(base, f"C{len(colours)}")
            dashed = label != base
            ax.plot(entry["step"], values, "--" if dashed else "-", color=colour, label=None if dashed else label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        if measure == "move":
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, None)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
