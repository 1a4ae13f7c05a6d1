# ruff: noqa: E501  (lines of markdown)
"""Make docs/reliability.md and its figure, and a section of docs/training.md, from the reliability records.

`python -m tests.reliability.report` writes page and figure; test_report.py compares the page with the records. The
section is written when the documentation is built.
"""

from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.provenance import ROOT
from examples.pretrain.reports.figure import new_figure, plain_log, save_figure
from tests.reliability.long_run import PARTS

PAGE = ROOT / "docs" / "reliability.md"
FIGURE = ROOT / "docs" / "pictures" / "long_run.png"


def load(kind):
    """Return the newest CPU record of a kind; of one day's, the last in the file."""
    found = [one for one in records.load("reliability") if one["kind"] == kind and not records.on_gpu(one)]
    return max(reversed(found), key=lambda one: one["date"])


def table(header, rows):
    """Return a markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def counts(*names) -> str:
    """Return how many tests of these files passed, failed and were skipped."""
    found = [load("suite")["files"][name] for name in names]
    parts = {kind: sum(one.get(kind, 0) for one in found) for kind in ("passed", "failed", "skipped")}
    files = ", ".join(f"`{name}.py`" for name in names)
    return f"{files}: " + ", ".join(f"{count} {kind}" for kind, count in parts.items() if count or kind == "passed")


def promises() -> list[tuple[str, str, str]]:
    """Return rows of promise, figure and command."""
    ranks, kills, fuzz, band, long_run = (load(kind) for kind in ("ranks", "kills", "fuzz", "band", "long_run"))
    runs = ranks["runs"]
    worlds = " and ".join(str(one["ranks"]) for one in runs)
    compared = sum(one["tensors compared between ranks"] for one in runs)
    differ = sum(one["of them that differ"] for one in runs)
    worst = {
        part: max(float(one[f"{kind}: off from one process"][part]) for one in runs for kind in ("euclidean", "cosine"))
        for part in ("loss", "gradient", "state")
    }
    return [
        (
            "Codes and teacher stay equal to the bit on all ranks: under DDP and FSDP2, with k-means and revival",
            f"{worlds} processes, {runs[0]['steps']} steps: {differ} of {compared} tensors differ",
            ranks["command"],
        ),
        (
            "Several ranks compute what one process computes on the joined batch, values and gradients (float64)",
            f"loss off by {worst['loss']:.0e}, gradients {worst['gradient']:.0e}, state {worst['state']:.0e}",
            ranks["command"],
        ),
        (
            "No rank hangs on batches that are uneven, empty, fully masked or not finite; a module may be built before the process group; "
            "`process_group=` is respected; one all-reduce sends the statistics of all scales",
            counts("test_ranks", "test_distributed"),
            "pytest --thorough tests/reliability/test_ranks.py tests/test_distributed.py",
        ),
        (
            "A run killed with SIGKILL at any moment resumes from a whole checkpoint and ends equal to the bit",
            f"{kills['kills']} kills, {kills['while a checkpoint was being written']} of them while a checkpoint was written: "
            f"{kills['checkpoints that went back or broke']} checkpoints lost, "
            f"{kills['of them other than in the unbroken run']} of {kills['values in the last checkpoint']} values differ",
            kills["command"],
        ),
        (
            "A run under torchrun resumes with another number of ranks; a truncated or hostile file is refused and none of it is "
            "executed; weights are saved as safetensors",
            counts("test_resume"),
            "pytest --thorough tests/reliability/test_resume.py",
        ),
        (
            "Every call works and leaves finite state, or raises an error of vqssl's own and changes nothing",
            f"{fuzz['inputs']:,} inputs to {len(fuzz['calls'])} calls: {fuzz['worked']:,} worked, {fuzz['refused']:,} refused, "
            f"{fuzz['other errors, changed or unsound state']} neither",
            fuzz["command"],
        ),
        (
            "Offsets beyond 2^31, threads, inference mode, copies, files, moves between devices, states of another size or version",
            counts("test_hostile"),
            "pytest --thorough tests/reliability/test_hostile.py",
        ),
        (
            "500 steps under autocast end close to 500 steps in float32",
            "; ".join(
                f"{name}: loss {100 * band['loss off by'][name]:.1f}% off (band {100 * band['bands']['loss']:.0f}%), perplexity "
                f"{100 * band['perplexity off by'][name]:.1f}% ({100 * band['bands']['perplexity']:.0f}%)"
                for name in band["loss off by"]
            ),
            band["command"],
        ),
        (
            "State stays float32 under `.half()`; a step that overflows is skipped and changes no state",
            counts("test_precision"),
            "pytest --thorough tests/reliability/test_precision.py",
        ),
        (
            "A whole training step compiles to one graph, once; exported programs and ONNX give the same results; torch.func works; no "
            "double update under activation checkpointing and gradient accumulation",
            counts("test_compile_and_export"),
            "pytest --thorough tests/reliability/test_compile_and_export.py",
        ),
        (
            "Two runs under deterministic algorithms are equal to the bit; a thousand steps leak no memory",
            counts("test_long_run"),
            "pytest --thorough tests/reliability/test_long_run.py",
        ),
        (
            "A long run leaks no memory, leaves no dead codes and keeps its counts",
            f"{long_run['steps']:,} steps: memory +{long_run['memory growth MiB after the first tenth']} MiB, "
            f"{long_run['numbers that are not finite']} numbers not finite, {long_run['dead codes at the end']} of "
            f"{long_run['codes']} codes dead, sum of counts off by {long_run['sum(cluster_size) off by at most']}",
            long_run["command"],
        ),
    ]


KINDS = {
    "agreement": "ranks that disagree",
    "codebook_state": "states of a codebook",
    "codes": "codes and sums",
    "files": "files of a run",
    "full_disk": "disks, outputs, memory",
    "health": "files for health",
    "images": "images",
    "lost_ranks": "ranks that die",
    "odd_options": "odd options",
    "protocols": "protocols",
    "ranks": "ranks that wait",
    "runs": "runs and options",
    "search": "the search",
    "signals": "signals",
    "teacher": "the teacher",
}
"""What the files of `benchmarks/attempts/` try to break."""


def attempt_records() -> dict[str, dict]:
    """Return the newest CPU record that holds attempts of a kind, by kind."""
    every = [
        one for one in records.load("reliability") if one["kind"].startswith("attempts") and not records.on_gpu(one)
    ]
    return {row["kind"]: one for one in sorted(every, key=lambda one: one["date"]) for row in one["rows"]}


def attempts() -> str:
    """Return the section of the page on what was tried in order to break the library and the example."""
    found = attempt_records()
    own = {kind: [row for row in record["rows"] if row["kind"] == kind] for kind, record in sorted(found.items())}
    counted = [
        (
            KINDS[kind],
            len(rows),
            sum(row["before"]["survived"] for row in rows),
            sum(row["after"]["survived"] for row in rows),
            len(rows) - sum(row["after"]["survived"] for row in rows),
        )
        for kind, rows in own.items()
    ]
    total = ("all", *(sum(column) for column in list(zip(*counted, strict=True))[1:]))
    broke = [
        row for rows in own.values() for row in rows if not (row["before"]["survived"] and row["after"]["survived"])
    ]
    lost = [
        (row["attempt"], seen(row["after"]), seen(row["before"]), row["right"], KINDS[row["kind"]]) for row in broke
    ]
    runs = {one["command"]: one for one in found.values()}
    made = "\n".join(f"- `{name}`: before is {one['old']}, now is {one['commit']}" for name, one in runs.items())
    return f"""These commands try to break library and example on purpose, on an older commit (before) and on a newer one (now):

{made}

An attempt survives if the right thing happens: the work is done, or it is refused in a sentence before anything is lost.

{table(["what is broken", "attempts", "survived before", "survive now", "lost now"], [*counted, total])}
<details>
<summary>The {len(lost)} attempts that did not survive before: what was done, what is right, what was seen</summary>

{table(["attempt", "now", "before", "right", "kind"], [[cell(value) for value in row] for row in lost])}
</details>
"""


def seen(outcome: dict) -> str:
    """Return what was seen, cut to a line at the end of a word."""
    text = outcome["seen"].replace(str(ROOT), ".")
    return text if len(text) <= 140 else text[:137].rpartition(" ")[0] + " ..."


def cell(text: str) -> str:
    """Return text that markdown shows as it is."""
    for character in "\\`*_|<>[]$":
        text = text.replace(character, "\\" + character)
    return text


def page() -> str:
    """Return docs/reliability.md."""
    suite, long_run = load("suite"), load("long_run")
    models = {load(kind)["device"] for kind in ("suite", "ranks", "kills", "fuzz", "band", "long_run")}
    named = " and ".join(sorted(model or "a CPU whose model was not recorded" for model in models))
    rows = [(promise, figure, f"`{command}`") for promise, figure, command in promises()]
    return f"""# Reliability

What the library promises, what was measured, and the test or script that measures it. `python -m tests.reliability.report` makes this page
from `benchmarks/results/reliability.jsonl`; no figure is typed by hand. The figures are of {suite["date"]}, torch {suite["versions"]["torch"]},
Python {suite["versions"]["python"]}, two cores of {named}; ranks are processes over gloo. On a GPU, an NVIDIA H200, only the checks of `python -m benchmarks.gpu_check` and a trial of the loss band have run; nothing on this page is from there.

{table(["promise", "figure", "command"], rows)}
Each script writes its record to `runs/reliability/`; `python -m benchmarks.records add reliability FILE...` keeps it.

Not promised:

- Several threads that train one codebook leave it finite, but which update comes last is undefined.
- Statistics by atomics on a GPU differ in the last bit between runs, unless deterministic algorithms are enabled.
- torch refuses to train a module that was *constructed* under `torch.inference_mode`.

## Attempts to break it

{attempts()}
## The long run

A third of the clusters is constant, a third drifts, and a third jumps halfway; with revival and without
(`{long_run["command"]}`):

![Codes in use, distance of tokens and codes, and memory over {long_run["steps"]:,} steps](pictures/{FIGURE.name})
"""


def draw(record: dict, path: Path) -> None:
    """Draw perplexity, error and memory over the steps of the long run."""
    rows = record["rows"]
    step = [row["step"] for row in rows]
    figure = new_figure(figsize=(8, 5.6), layout="constrained")
    axes = list(figure.subplot_mosaic("AB;CC", height_ratios=(3, 1.6)).values())
    axes[0].plot(step, [row["perplexity"] for row in rows], label="with revival")
    axes[0].plot(step, [row["perplexity"] for row in record["without revival"]["rows"]], "--", label="without")
    axes[0].set(title=f"codes in use, in effect (perplexity, of {record['codes']})", ylim=(0, record["codes"]))
    axes[0].legend(loc="lower left")
    for number, name in enumerate(PARTS):
        marks: dict[str, Any] = {"marker": "osD"[number], "markersize": 4, "markevery": (4 * number, 12)}
        axes[1].plot(step, [row[name] for row in rows], label=name, **marks)
    axes[1].set(title="squared distance of token and code", yscale="log")
    plain_log(axes[1].yaxis)
    axes[1].legend()
    axes[2].plot(step, [row["MiB"] for row in rows])
    most = max(row["MiB"] for row in rows)
    axes[2].set(title="memory of the process (MiB)", ylim=(0, 1.3 * most))
    for panel in axes:
        panel.set(xlabel="step", xticks=range(0, step[-1] + 1, 5000))
        panel.grid()
    save_figure(figure, path, dpi=110)


def span(values) -> str:
    """Return a median with its range."""
    low, middle, high = (f"{value:.3g}" for value in values)
    return f"{middle} ({low}–{high})"


def synchronisation() -> str:
    """Return the section of docs/training.md on what synchronising costs."""
    record = load("sync")
    book = record["codebook"]
    codes, dim, scales = book["codes"], book["dim"], book["scales"]
    two, four = record["travel"]
    per_book = sum(two["bytes"]) / scales
    ring = [(ranks, 2 * (ranks - 1) / ranks * sum(two["bytes"]) / 1e6) for ranks in (8, 64, 1024)]
    rows = [
        (
            row["every"],
            *(
                " / ".join(span(row[kind][figure]) for figure in ("error", "steps to recover", "perplexity"))
                for kind in ("last step's tokens", "all steps' tokens")
            ),
        )
        for row in record["intervals"]
    ]
    small = record["interval codebook"]
    return f"""A step sends two all-reduces for all scales of a quantiser together. One carries the statistics, 4 (K (D + 1) + 2 W) bytes a codebook
with W ranks; the other the replacement candidates for dead codes, 4 K D bytes, where there is a revival. `{record["command"]}` counts, for
{scales} codebooks of K = {codes} and D = {dim}, {" + ".join(f"{size / 1e6:.2f} MB" for size in two["bytes"])}, or {per_book / 1e6:.2f} MB a codebook. Over gloo they take {two["ms"]:.1f} ms between
{two["ranks"]} processes of one machine, and {four["ms"]:.1f} ms between {four["ranks"]}. In a ring each rank sends 2 (W - 1) / W times the bytes, which hardly grows with W:

{table(["ranks", "MB sent a rank and step"], [(ranks, f"{size:.2f}") for ranks, size in ring])}
For comparison, ResNet-18's gradients are 44.7 MB before that factor (11.2 million parameters in float32). More ranks add latency to two calls, not
volume, so synchronising less often is seldom worth it. Where it is, call `quantize` at each step and `update_` at every T-th, with the
decay to the power of T. The table shows the effect on codes of features that drift and jump (those of the long run, K = {small["codes"]},
{small["tokens a step"]} tokens a step, {small["steps"]:,} steps). Its cells are the squared distance of token and code (median step) / the number of steps until it is
back within twice that after the jump / the perplexity at the end, as the median of {small["seeds"]} seeds and their range. The update
gets the tokens of the T-th step alone, or all tokens since the last update:

{table(["T", "the T-th step's tokens", "all tokens since"], rows)}"""


def main() -> None:
    """Write the page and its figure."""
    PAGE.write_text(page(), encoding="utf-8")
    FIGURE.parent.mkdir(exist_ok=True)
    draw(load("long_run"), FIGURE)
    print(f"written: docs/{PAGE.name}, docs/{FIGURE.relative_to(PAGE.parent)}")


if __name__ == "__main__":
    main()
