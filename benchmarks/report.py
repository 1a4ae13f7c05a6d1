"""Tables and pictures from the kept results: `python -m benchmarks.report` writes RESULTS.md and results/*.png."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness import RESULTS

PAGE = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Written by `python -m benchmarks.report` from the files in `results/`; nothing here is typed by hand. The unit of a
ratio is the matrix product of tokens and codes alone, `torch.mm(x, codes.T, out=...)`, in the same run: the floor of
every method that scores all codes. Medians; in brackets the quartiles. The targets are the project's own.
"""


def load(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The committed results of one benchmark, by device."""
    return [(path.name.split(".")[0], json.loads(path.read_text())) for path in sorted(RESULTS.glob(f"c*.{name}.json"))]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def heading(title: str, result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"\n## {title}\n\n`{result['command']}` on {result['device']}, {result['date']}; {versions}.\n\n"


def cell(entry: dict[str, float]) -> str:
    return f"{entry['ratio']:.2f} [{entry['q25'] / entry['median'] * entry['ratio']:.2f}, " + (
        f"{entry['q75'] / entry['median'] * entry['ratio']:.2f}]"
    )


def by_case(cases: list[dict[str, Any]]) -> str:
    names = list(cases[0]["times"])
    rows = []
    for case in cases:
        shape = " x ".join(map(str, case["shape"]))
        times = case["times"]
        rows.append(
            [shape, case["threads"], f"{times['mm']['median']:.2f} ms"]
            + [cell(times[name]) if name in times else "" for name in names if name != "mm"]
        )
    return table(["N x K x D", "threads", "mm", *(name for name in names if name != "mm")], rows)


def verdict(what: str, value: float, bound: float, *, at_least: bool = False) -> list[str]:
    met = value >= bound if at_least else value <= bound
    sign = ">=" if at_least else "<="
    by = f"by {abs(value / bound - 1) * 100:.0f}%"
    return [what, f"{sign} {bound:g}", f"{value:.2f}", f"met {by}" if met else f"missed {by}"]


def worst(cases: list[dict[str, Any]], codes: int, name: str = "vqssl", over: str = "mm") -> float:
    chosen = [case["times"] for case in cases if case["shape"][1] == codes]
    return max(times[name]["median"] / times[over]["median"] for times in chosen)


def search_targets(cases: list[dict[str, Any]]) -> list[list[str]]:
    rows = [
        verdict("search / mm, worst at K = 2048", worst(cases, 2048), 1.15),
        verdict("search / mm, worst at K = 8192", worst(cases, 8192), 0.9),
    ]
    sizes = sorted({case["shape"][1] for case in cases})
    if "faiss" in cases[0]["times"]:
        rows.append(verdict("search / faiss, worst", max(worst(cases, k, over="faiss") for k in sizes), 0.9))
    slowest = max(worst(cases, k, over="cdist + argmin") for k in sizes)
    rows.append(verdict("cdist + argmin / search, worst", 1 / slowest, 2.0, at_least=True))
    return rows


def step_targets(cases: list[dict[str, Any]]) -> list[list[str]]:
    peer = "vector-quantize-pytorch"
    return [
        verdict("step / mm, worst at K >= 2048", max(worst(cases, 2048), worst(cases, 8192)), 1.4),
        verdict("step / mm at K = 512", worst(cases, 512), 1.7),
        verdict(f"{peer} / step, worst at K = 2048", 1 / worst(cases, 2048, over=peer), 10, at_least=True),
        verdict(
            f"{peer} / step, worst elsewhere",
            1 / max(worst(cases, k, over=peer) for k in (512, 8192)), 6, at_least=True,
        ),
        verdict(
            f"{peer} / step, both cosine, worst at K = 2048",
            1 / worst(cases, 2048, "vqssl cosine", f"{peer} cosine"), 6, at_least=True,
        ),
    ]  # fmt: skip


def search_section(device: str, result: dict[str, Any]) -> str:
    text = heading(f"Search, {device}", result) + by_case(result["cases"])
    differing: dict[str, int] = {}
    for case in result["cases"]:
        for name, rows in case["rows differing"].items():
            differing[name] = differing.get(name, 0) + rows
    listed = ", ".join(f"{name} {rows}" for name, rows in differing.items())
    text += f"\nRows that differ from float64, over all shapes: {listed}.\n"
    if device == "cpu":
        text += "\n" + table(["target", "bound", "measured", ""], search_targets(result["cases"]))
    names = list(result["exactness"][0]["percent differing"])
    text += "\nPercent of rows with another code than in float64 (products of inputs rounded to that format):\n\n"
    text += table(
        ["material", *names],
        [
            [row["material"], *(f"{row['percent differing'][name]:.3f}" for name in names)]
            for row in result["exactness"]
        ],
    )
    return text + f"\n![Time against N, K and D](results/{device}.sweep.png)\n"


def plot_sweep(device: str, result: dict[str, Any]) -> None:
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
    figure.savefig(RESULTS / f"{device}.sweep.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def step_section(device: str, result: dict[str, Any]) -> str:
    text = heading(f"Training step, {device}", result) + by_case(result["cases"])
    if device == "cpu":
        text += "\n" + table(["target", "bound", "measured", ""], step_targets(result["cases"]))
    return text


def memory_section(device: str, result: dict[str, Any]) -> str:
    bound = result["bound MiB (3 N D 4 + 16 MB)"]
    text = heading(f"Memory of a training step, {device}", result)
    text += f"N x K x D = {' x '.join(map(str, result['shape']))}; the tokens take {result['tokens MiB']} MiB.\n\n"
    rows = [[name, entry["MiB, first step"], entry["MiB"]] for name, entry in result["peak"].items()]
    text += table(["quantiser", "peak MiB, first step", "later steps (kept buffers not counted)"], rows)
    target = verdict("vqssl, first step, MiB", result["peak"]["vqssl"]["MiB, first step"], bound)
    return text + "\n" + table(["target", "bound", "measured", ""], [target])


def dissect_section(device: str, result: dict[str, Any]) -> str:
    times = result["times"]
    text = heading(f"A step of pretraining, {device}", result)
    text += (
        f"ResNet-18 at {result['size']} px, {result['views']} views of {result['batch']} images, K = 2048 at three "
        "scales. Milliseconds:\n\n"
    )
    rows = [[name, f"{e['median']:.0f} [{e['q25']:.0f}, {e['q75']:.0f}]"] for name, e in times.items()]
    return text + table(["", "median"], rows) + f"\nQuantisation and fusion add {result['added percent']}%.\n"


def usage_section(device: str, result: dict[str, Any]) -> str:
    text = heading(f"Codebook usage while an encoder trains, {device}", result)
    text += (
        f"{result['images']:,} images ({result['data']}), {result['steps']} steps of BYOL; {result['tokens a step']:,} "
        f"tokens of width {result['dim']} a step ({result['scale']}). At the end, over the last window of steps: "
        "perplexity as a share of K; codes that got less than a tenth of the fair share; squared distance of token and "
        "code, and squared move of a used code in a step, both relative to the tokens' variance. State, and the "
        "median time of a step's forward pass.\n\n"
    )
    rows = [
        [
            name,
            f"{entry['perplexity'][-1] / entry['codes']:.0%}",
            f"{entry['dead'][-1] / entry['codes']:.0%}",
            f"{entry['error'][-1]:.3f}",
            f"{entry['move'][-1]:.1e}",
            entry["MiB of state"],
            f"{entry['ms a step']:.1f}",
        ]
        for name, entry in result["observers"].items()
    ]
    text += table(["codebook", "perplexity / K", "dead", "error", "move", "MiB", "ms"], rows)
    return text + f"\n![Usage, error and moves over the steps](results/{device}.codebook_usage.png)\n"


def plot_usage(device: str, result: dict[str, Any]) -> None:
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
    figure.savefig(RESULTS / f"{device}.codebook_usage.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def page() -> str:
    sections = {
        "search": search_section,
        "train_step": step_section,
        "memory": memory_section,
        "dissect_step": dissect_section,
        "codebook_usage": usage_section,
    }
    text = HEAD
    for name, section in sections.items():
        for device, result in load(name):
            text += section(device, result)
    if not any(RESULTS.glob("cuda.*.json")):
        text += "\n## GPU\n\nNot run yet: `benchmarks/gpu_all.sh` runs it all where there is one.\n"
    return text


def main() -> None:
    PAGE.write_text(page())
    for device, result in load("search"):
        plot_sweep(device, result)
    for device, result in load("codebook_usage"):
        plot_usage(device, result)
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
