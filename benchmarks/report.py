"""Tables and pictures from the kept records: `python -m benchmarks.report` writes RESULTS.md and results/*.png."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.figures import draw_codebook_usage, draw_search
from benchmarks.records import RESULTS, Record, load, on_gpu

PAGE = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

`python -m benchmarks.report` makes this page from the records in `results/`; no figure is typed by hand. Times are
given as ratios to the matrix product of tokens and codes alone, `torch.mm(x, codes.T, out=...)`, in the same run: every
method that scores all codes has to compute it. Figures are medians, with the quartiles in brackets. The targets are
the project's own.
"""


def places(name: str) -> dict[str, Record]:
    """Return the records of one benchmark by place: ``cpu``, ``gpu``, and with a number for every further model."""
    found: dict[str, Record] = {}
    for record in load(name):
        kind = "gpu" if on_gpu(record) else "cpu"
        same = sum(place.startswith(kind) for place in found)
        found[f"{kind}-{same + 1}" if same else kind] = record
    return found


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a markdown table."""
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def heading(title: str, where: str, result: Record) -> str:
    """Return the title of a section, and how its figures were made."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = f", commit {result['commit']}" if result["commit"] else ""
    made = f"`{result['command']}` on {result['device']}, {result['date']}{commit}; {versions}."
    return f"\n## {title}, {where.upper()}\n\n{made}\n\n"


def cell(entry: dict[str, float]) -> str:
    """Return a ratio with its quartiles."""
    return f"{entry['ratio']:.2f} [{entry['q25'] / entry['median'] * entry['ratio']:.2f}, " + (
        f"{entry['q75'] / entry['median'] * entry['ratio']:.2f}]"
    )


def by_case(cases: list[dict[str, Any]]) -> str:
    """Return a table of ratios, one row a shape and number of threads."""
    names = list(cases[0]["times"])
    rows = []
    for case in cases:
        shape = " x ".join(map(str, case["shape"]))
        if case.get("codes", "random") != "random":
            shape += f", codes {case['codes']} from the tokens"
        times = case["times"]
        rows.append(
            [shape, case["threads"], f"{times['mm']['median']:.2f} ms"]
            + [cell(times[name]) if name in times else "" for name in names if name != "mm"]
        )
    return table(["N x K x D", "threads", "mm", *(name for name in names if name != "mm")], rows)


def verdict(what: str, value: float, bound: float, *, at_least: bool = False) -> list[str]:
    """Return a row that says whether a target is met, and by how much."""
    met = value >= bound if at_least else value <= bound
    sign = ">=" if at_least else "<="
    by = f"by {abs(value / bound - 1) * 100:.0f}%"
    return [what, f"{sign} {bound:g}", f"{value:.2f}", f"met {by}" if met else f"missed {by}"]


def worst(cases: list[dict[str, Any]], codes: int, name: str = "vqssl", over: str = "mm") -> float:
    """Return the largest ratio of two medians among the cases with so many codes."""
    chosen = [case["times"] for case in cases if case["shape"][1] == codes]
    return max(times[name]["median"] / times[over]["median"] for times in chosen)


def search_targets(cases: list[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the search's targets."""
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
    """Return the rows of the training step's targets."""
    peer = "vector-quantize-pytorch"
    drawn = [case for case in cases if case.get("codes") == "drawn"]
    cases = [case for case in cases if case not in drawn]
    more = [] if not drawn else [
        verdict("step / mm, codes drawn from fewer tokens", worst(drawn, 8192), 1.8),
        verdict(f"{peer} / step, the same", 1 / worst(drawn, 8192, over=peer), 5, at_least=True),
        verdict(
            f"{peer} / step, the same, both cosine",
            1 / worst(drawn, 8192, "vqssl cosine", f"{peer} cosine"), 5, at_least=True,
        ),
    ]  # fmt: skip
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
        *more,
    ]  # fmt: skip


def search_section(where: str, result: Record) -> str:
    """Return the section on the time and exactness of the search."""
    text = heading("Search", where, result) + by_case(result["cases"])
    differing: dict[str, int] = {}
    for case in result["cases"]:
        for name, rows in case["rows differing"].items():
            differing[name] = differing.get(name, 0) + rows
    listed = ", ".join(f"{name} {rows}" for name, rows in differing.items())
    text += f"\nRows whose code differs from float64's, over all shapes: {listed}.\n"
    if not on_gpu(result):
        text += "\n" + table(["target", "bound", "measured", ""], search_targets(result["cases"]))
    names = list(result["exactness"][0]["percent differing"])
    text += "\nPercentage of rows whose code differs from float64's (products of inputs rounded to that format):\n\n"
    text += table(
        ["material", *names],
        [
            [row["material"], *(f"{row['percent differing'][name]:.3f}" for name in names)]
            for row in result["exactness"]
        ],
    )
    return text + f"\n![Time against N, K and D](results/search.{where}.png)\n"


def step_section(where: str, result: Record) -> str:
    """Return the section on the time of a training step."""
    text = heading("Training step", where, result) + by_case(result["cases"])
    if not on_gpu(result):
        text += "\n" + table(["target", "bound", "measured", ""], step_targets(result["cases"]))
    return text


def memory_section(where: str, result: Record) -> str:
    """Return the section on the peak memory of a training step."""
    bound = result["bound MiB (3 N D 4 + 16 MB)"]
    text = heading("Memory of a training step", where, result)
    text += f"N x K x D = {' x '.join(map(str, result['shape']))}; the tokens take {result['tokens MiB']} MiB.\n\n"
    rows = [[name, entry["MiB, first step"], entry["MiB"]] for name, entry in result["peak"].items()]
    text += table(["quantiser", "peak MiB, first step", "later steps, without buffers that are kept"], rows)
    target = verdict("vqssl, first step, MiB", result["peak"]["vqssl"]["MiB, first step"], bound)
    return text + "\n" + table(["target", "bound", "measured", ""], [target])


def dissect_section(where: str, result: Record) -> str:
    """Return the section on a step of pretraining with and without quantisation."""
    text = heading("A step of pretraining", where, result)
    if "settings" not in result:  # records of the first form: one setting, all scales
        result = {"settings": [_first_setting(result)]}
    text += (
        "One step of BYOL, and of the methods that also quantise the teacher's maps: DiSSECT (codes, fusion, refined "
        "target) and DiSSECT with code prediction. ResNet-18, two views. Time over that of BYOL's step; milliseconds "
        "[quartiles] in the first row.\n\n"
    )
    settings = result["settings"]
    names = list(dict.fromkeys(name for setting in settings for name in setting["times"]))
    rows = []
    for name in names:
        cells = []
        for setting in settings:
            entry = setting["times"].get(name)
            if entry is None:
                cells.append("–")
            elif name == "byol":
                cells.append(f"{entry['median']:.0f} [{entry['q25']:.0f}, {entry['q75']:.0f}]")
            else:
                cells.append(f"{entry['ratio']:.2f}")
        rows.append([name, *cells])
    return text + table(["", *(f"{each['title']}, K = {each['codes']:,}" for each in settings)], rows)


def _first_setting(result: Record) -> Record:
    """Return a record of the first form as one of its settings."""
    title = f"width 64, {result['size']} px, batch {result['batch']}"
    return {"title": title, "codes": 2048, "times": result["times"]}


def usage_section(where: str, result: Record) -> str:
    """Return the section on codebooks while an encoder trains."""
    text = heading("Codebook usage while an encoder trains", where, result)
    text += (
        f"{result['images']:,} images ({result['data']}), {result['steps']} steps of BYOL; {result['tokens a step']:,} "
        f"tokens of width {result['dim']} a step ({result['scale']}). Columns, over the last window of steps: "
        "perplexity divided by K; dead codes, which got less than a tenth of an equal share of the tokens; squared "
        "distance of token and code, and squared move of a used code in a step, both divided by the tokens' variance; "
        "memory of the state; median time of the forward pass.\n\n"
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
    return text + f"\n![Usage, error and moves over the steps](results/codebook_usage.{where}.png)\n"


def old_against_new_section(where: str, result: Record) -> str:
    """Return the section on a training step of two commits."""
    rows = [
        [
            f"{row['tokens']} x {row['codes']} x {row['width']}",
            ", ".join([row["metric"], row["dtype"], *(["masked"] if row["masked"] else [])]),
            f"{row['ratio'][1]:.3f} [{row['ratio'][0]:.3f}, {row['ratio'][2]:.3f}]",
            f"{row['old_mib']:.1f}",
            f"{row['new_mib']:.1f}",
        ]
        for row in result["rows"]
    ]
    return (
        heading(f"A training step against commit {result['old']}", where, result)
        + f"CPU time of a step of `EMACodebook`, new over old, at commit {result['commit']}: the median over pairs of "
        "neighbouring steps, and quartiles. Peak memory is that of the profiler.\n\n"
        + table(["N x K x D", "tokens", "time, new / old", "old, MiB", "new, MiB"], rows)
    )


def quantisers_section(where: str, result: Record) -> str:
    """Return the section on quantisers of several codes, and on passes of k-means."""
    rows = [
        [name, " x ".join(map(str, found["shape"])), *(times(found["times"][who]) for who in found["times"])]
        for name, found in result["steps"].items()
    ]
    k_means = result["k_means"]
    passes = ", ".join(f"{who} {times(entry)}" for who, entry in k_means["times"].items())
    return (
        heading("Quantisers of several codes", where, result)
        + "A training step, forward and backward; the indices agree with the other library's first.\n\n"
        + table(["quantiser", "tokens", *next(iter(result["steps"].values()))["times"]], rows)
        + f"\n20 passes of k-means over {k_means['tokens']:,} tokens of width {k_means['dim']}, {k_means['codes']} "
        f"codes, from one start: {passes}.\n"
    )


def times(entry: Record) -> str:
    """Return a time in milliseconds, and its ratio to ours."""
    return f"{entry['median']:.1f} ms ({entry['ratio']:.2f})"


def fitting_section(where: str, result: Record) -> str:
    """Return the section on the error of fit_codebook beside other k-means."""
    peers = [name for name in result["rows"][0] if name.startswith("vqssl / ")]
    rows = [
        [row["material"], row["codes"], *(f"{row[peer]['mean']:.4f}, {row[peer]['worst']:.4f}" for peer in peers)]
        for row in result["rows"]
    ]
    worst_mean = max(row["vqssl / faiss"]["mean"] for row in result["rows"])
    return (
        heading("Error of k-means over a data set", where, result)
        + f"{result['tokens']:,} tokens of width 16, at most {result['passes']} passes, {result['seeds']} seeds; each "
        "library starts by its own rule. Mean squared distance of a token from its nearest code, relative to the other "
        "library's: mean over seeds, and the worst seed.\n\n"
        + table(["tokens", "codes", *peers], rows)
        + "\n"
        + table(["target", "bound", "measured", ""], [verdict("error / faiss's, worst mean", worst_mean, 1.01)])
    )


def resizing_section(where: str, result: Record) -> str:
    """Return the section on resized codebooks."""
    rows = []
    for name, found in result["materials"].items():
        for row in found["rows"]:
            ratio = row["error, resized / fresh"]
            rows.append(
                [
                    name,
                    f"{result['size']} to {row['codes']}",
                    f"{ratio['mean']:.3f} [{ratio['least']:.3f}, {ratio['most']:.3f}]",
                    *(
                        f"{row[each]['perplexity / K']:.0%}, {row[each]['dead / K']:.0%}"
                        for each in ("resized", "fresh")
                    ),
                ]
            )
    return (
        heading("A resized codebook beside a fresh one", where, result)
        + f"`vqssl.experimental.resized` after {result['steps before']} steps, then {result['looks'][-1]} steps of "
        f"both on the same batches, {result['seeds']} seeds. Error: resized over fresh, the mean over seeds, the least "
        "and the most. Usage: perplexity over K, and dead codes.\n\n"
        + table(["tokens", "codes", "error, resized / fresh", "usage, resized", "usage, fresh"], rows)
    )


SECTIONS: dict[str, Callable[[str, Record], str]] = {
    "search": search_section,
    "train_step": step_section,
    "memory": memory_section,
    "dissect_step": dissect_section,
    "codebook_usage": usage_section,
    "old_against_new": old_against_new_section,
    "quantisers": quantisers_section,
    "fitting": fitting_section,
    "resizing": resizing_section,
}
PICTURES: dict[str, Callable[[Record, Path], None]] = {
    "search": draw_search,
    "codebook_usage": draw_codebook_usage,
}


def page() -> str:
    """Return RESULTS.md."""
    text = HEAD
    for name, section in SECTIONS.items():
        for where, record in places(name).items():
            text += section(where, record)
    if not any(on_gpu(record) for name in SECTIONS for record in load(name)):
        text += "\n## GPU\n\nNot run yet: `benchmarks/gpu_all.sh` runs all of it on a GPU.\n"
    return text


def main() -> None:
    """Write the page and its pictures."""
    PAGE.write_text(page(), encoding="utf-8")
    for name, draw in PICTURES.items():
        for where, record in places(name).items():
            draw(record, RESULTS / f"{name}.{where}.png")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
