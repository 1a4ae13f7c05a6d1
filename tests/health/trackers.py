"""Run docs/logging.md with W&B, MLflow and trackio themselves, offline; test_trackers.py runs this file beside them.

``python -m tests.health.trackers`` prints the name of each tracker that gives back every figure at its step.
"""

import json
import math
import os
import re
import sqlite3
import tempfile
import traceback
from importlib import import_module
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logging.md"
BLOCK = 2**15
"""Bytes a block of W&B's file, which is a log as LevelDB writes it."""


def read_wandb():
    """Return what the offline run holds: step to figures."""
    import_module("wandb").teardown()  # waits for the process that writes: the end of a run does not
    (path,) = Path("wandb").glob("offline-run-*/*.wandb")
    module, found = import_module("wandb.proto.wandb_internal_pb2"), {}
    for data in records(path.read_bytes()):
        record = module.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
    return found


def records(data):
    """Yield the records of a log: each in pieces, with 7 bytes before a piece, whose last three are length and kind."""
    whole, at = b"", 7  # W&B's own header
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little for a header: empty to the end of the block
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield whole
            whole = b""


def read_mlflow():
    client = import_module("mlflow").MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'codes'")
    (run,) = client.search_runs([experiment.experiment_id])
    found = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found.setdefault(point.step, {})[name] = point.value
    return found


def read_trackio():
    (run,) = import_module("trackio").Api().runs("codes")
    connection = sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{run.project}.db")
    rows = connection.execute("SELECT step, metrics FROM metrics WHERE run_id = ?", [run.id])
    return {step: json.loads(figures) for step, figures in rows}


READERS = {"Weights & Biases": read_wandb, "MLflow": read_mlflow, "trackio": read_trackio}


def blocks():
    """Return the code of the page: the loop first, then that of each tracker by its heading."""
    text = PAGE.read_text(encoding="utf-8")
    found = dict(re.findall(r"^## ([^\n]*)\n\n```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE))
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], found


def given_figures(names):
    """Replace `train` on the page by one that also keeps what it logs; return where."""
    train, kept = names["train"], {}

    def keeping(log):
        def log_and_keep(figures, step):
            kept[step] = dict(figures)
            log(figures, step)

        train(log_and_keep)

    names["train"] = keeping
    return kept


def check(title):
    """Run the loop and a tracker's block, and compare what the tracker holds with what it was given."""
    loop, of_tracker = blocks()
    names = {}
    torch.manual_seed(0)
    exec(compile(loop, "loop", "exec"), names)
    kept = given_figures(names)
    exec(compile(of_tracker[title], title, "exec"), names)
    assert list(kept) == [100, 200, 300]
    for figures in kept.values():
        assert {"loss", "codebook/codebooks.1/perplexity", "codebook/codebooks.1/level"} <= figures.keys()
        assert all(map(math.isfinite, figures.values()))
    assert "codebook/codebooks.0/drift" in kept[200].keys() - kept[100].keys()
    found = READERS[title]()
    assert found.keys() == kept.keys()
    for step, figures in kept.items():
        assert found[step] == figures, (step, set(found[step].items()) ^ set(figures.items()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ |= {"HOME": folder, "TRACKIO_DIR": folder, "WANDB_SILENT": "true", "DO_NOT_TRACK": "true"}
        for name in READERS:
            try:
                check(name)
            except Exception:  # the other trackers are still checked
                traceback.print_exc()
            else:
                print(f"gives back every figure: {name}", flush=True)
        os.chdir(PAGE.parent)
