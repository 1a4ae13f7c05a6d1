# ruff: noqa: E501  (lines of markdown)
"""Make docs/reliability.md, and what docs/training.md includes, of the kept results.

`python -m tests.reliability.report`; test_report.py holds the pages to the files.
"""

import json

from tests.reliability.record import RESULTS

DOCS = RESULTS.parent
PAGE, SYNC = DOCS / "reliability.md", RESULTS / "sync.md"


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def page() -> str:
    suite = load("suite")["files"]

    def tests(*names):
        found = [suite[name] for name in names]
        passed = sum(one.get("passed", 0) for one in found)
        rest = [f"{sum(one.get(kind, 0) for one in found)} {kind}" for kind in ("failed", "skipped")]
        files = ", ".join(f"`{name}.py`" for name in names)
        return f"{files}: {passed} passed" + "".join(f", {part}" for part in rest if not part.startswith("0 "))

    ranks, kills, fuzz, band, long_run = (load(name) for name in ("ranks", "kills", "fuzz", "band", "long_run"))
    runs = ranks["runs"]
    worlds = " and ".join(str(one["ranks"]) for one in runs)
    compared = sum(one["tensors compared between ranks"] for one in runs)
    differ = sum(one["of them that differ"] for one in runs)
    worst = {
        part: max(float(one[f"{kind}: off from one process"][part]) for one in runs for kind in ("euclidean", "cosine"))
        for part in ("loss", "gradient", "state")
    }
    rows = [
        (
            "Ranks stay equal to the bit: codes, teacher, under DDP and FSDP2, with k-means and revival",
            f"{worlds} processes, {runs[0]['steps']} steps: {differ} of {compared} tensors differ",
            ranks["command"],
        ),
        (
            "Ranks are one process on the joined batch, values and gradients (float64)",
            f"loss off by {worst['loss']:.0e}, gradients {worst['gradient']:.0e}, state {worst['state']:.0e}",
            ranks["command"],
        ),
        (
            "Uneven, empty, fully masked and junk batches hang nobody; a module built before the ranks met; `process_group=`; "
            "one all-reduce of statistics for all scales",
            tests("test_ranks", "test_distributed"),
            "pytest tests/reliability/test_ranks.py tests/test_distributed.py",
        ),
        (
            "Killed with SIGKILL at any moment, a run goes on from a whole checkpoint and ends equal to the bit",
            f"{kills['kills']} kills, {kills['while a checkpoint was being written']} of them in the middle of writing one: "
            f"{kills['checkpoints that went back or broke']} checkpoints lost, "
            f"{kills['of them other than in the unbroken run']} of {kills['values in the last checkpoint']} values differ",
            kills["command"],
        ),
        (
            "A run under torchrun goes on with another number of ranks; a hostile or cut file is refused, and nothing in it "
            "runs; weights as safetensors",
            tests("test_resume"),
            "pytest tests/reliability/test_resume.py",
        ),
        (
            "Whatever a call is given, it works and leaves sound state, or is refused in our own words and leaves all as it was",
            f"{fuzz['inputs']:,} inputs to {len(fuzz['calls'])} calls: {fuzz['worked']:,} worked, {fuzz['refused']:,} refused, "
            f"{fuzz['other errors, changed or unsound state']} neither",
            fuzz["command"],
        ),
        (
            "Offsets beyond 2^31, threads, inference mode, copies, files, moves, states of another size or version",
            tests("test_hostile"),
            "pytest tests/reliability/test_hostile.py",
        ),
        (
            "Autocast stays on course: 500 steps end where float32's do",
            "; ".join(
                f"{name}: loss {100 * band['loss off by'][name]:.1f}% off (band {100 * band['bands']['loss']:.0f}%), perplexity "
                f"{100 * band['perplexity off by'][name]:.1f}% ({100 * band['bands']['perplexity']:.0f}%)"
                for name in band["loss off by"]
            ),
            band["command"],
        ),
        (
            "State stays float32 under `.half()`; a step that overflows is skipped and poisons nothing",
            tests("test_precision"),
            "pytest tests/reliability/test_precision.py",
        ),
        (
            "A whole training step compiles to one graph, once; exported programs and ONNX answer alike; torch.func; no "
            "double update under checkpointing and accumulation",
            tests("test_compile_and_export"),
            "pytest tests/reliability/test_compile_and_export.py",
        ),
        (
            "Under deterministic algorithms two runs are equal to the bit; a thousand steps leak nothing",
            tests("test_long_run"),
            "pytest tests/reliability/test_long_run.py",
        ),
        (
            "A long run neither leaks nor dies, and loses no count",
            f"{long_run['steps']:,} steps: memory +{long_run['memory growth MiB after the first tenth']} MiB, "
            f"{long_run['numbers that are not finite']} junk numbers, {long_run['dead codes at the end']} of "
            f"{long_run['codes']} codes dead, sum of counts off by {long_run['sum(cluster_size) off by at most']}",
            long_run["command"],
        ),
    ]
    versions = load("suite")["versions"]
    return f"""# Reliability

What the library promises, the test or script that holds it, and what that found. This page is made by
`python -m tests.reliability.report` from the results in `docs/reliability/`; nothing in it is typed by hand. Figures are of torch
{versions["torch"]}, Python {versions["python"]}, two CPU cores; ranks are processes over gloo. On a GPU none of this has been run yet.

{table(["promise", "figure", "command"], [(promise, figure, f"`{command}`") for promise, figure, command in rows])}
What is not promised: several threads that train one codebook leave it sound, but whose update comes last is open; statistics
by atomics on a GPU differ in the last bit between runs unless deterministic algorithms are asked for; `torch.inference_mode` around
the *construction* of a module makes it one that torch itself refuses to train.

## The long run

Features of which a third stands still, a third drifts, and a third jumps halfway; with revival and without
(`{long_run["command"]}`):

![Codes in use, distance of tokens and codes, and memory over {long_run["steps"]:,} steps](reliability/long_run.png)
"""


def span(values) -> str:
    low, middle, high = (f"{value:.3g}" for value in values)
    return f"{middle} ({low}–{high})"


def sync() -> str:
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
    return f"""A step sends two all-reduces, for all scales of a quantiser together: the statistics, 4 (K (D + 1) + 2 W) bytes a codebook
(W ranks), and the tokens that dead codes may become, 4 K D bytes, where there is a revival. Counted for {scales} codebooks of
K = {codes}, D = {dim} (`{record["command"]}`): {" + ".join(f"{size / 1e6:.2f} MB" for size in two["bytes"])},
{per_book / 1e6:.2f} MB a codebook. Between {two["ranks"]} processes of one machine over gloo they take {two["ms"]:.1f} ms, between {four["ranks"]}
{four["ms"]:.1f} ms. In a ring each rank sends 2 (W - 1) / W times the bytes, however many ranks there are:

{table(["ranks", "MB sent a rank and step"], [(ranks, f"{size:.2f}") for ranks, size in ring])}
ResNet-18's gradients, for comparison, are 44.7 MB before that factor (11.2 million parameters in float32). What grows with the ranks is
the latency of two calls, not the volume. So synchronising less often seldom pays; where it does, call `quantize` at each step and
`update_` at every T-th, with the decay to the power of T. What that does to codes on features that drift and jump (those of
the long run, K = {small["codes"]}, {small["tokens a step"]} tokens a step, {small["steps"]:,} steps): squared distance of token and code (median step) / steps
until it is back within twice that after the jump / perplexity at the end, with the tokens of the T-th step alone or of all T; the
median of {small["seeds"]} seeds, and their range:

{table(["T", "the T-th step's tokens", "all tokens since"], rows)}"""


def main() -> None:
    PAGE.write_text(page())
    SYNC.write_text(sync())
    print(f"written: docs/{PAGE.name}, docs/{SYNC.relative_to(DOCS)}")


if __name__ == "__main__":
    main()
