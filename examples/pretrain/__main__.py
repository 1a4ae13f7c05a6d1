"""Pretraining and linear probes from one command; see `python3 examples --help`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from examples.pretrain import agreement, ranks
from examples.pretrain.augment import check_augmentation, to_float
from examples.pretrain.data import ImageSet, cache_of, load_images, train_test_split
from examples.pretrain.data.cache import Cache
from examples.pretrain.devices import check_device
from examples.pretrain.encoder import check_encoder
from examples.pretrain.endings import told
from examples.pretrain.kept import kept
from examples.pretrain.lock import hold
from examples.pretrain.methods import METHODS, title_of
from examples.pretrain.methods.ranges import check_options
from examples.pretrain.optimization import check_optimization
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.precision import check_device_can
from examples.pretrain.presets import PRESETS, Experiment
from examples.pretrain.protocols.knn import knn_monitor
from examples.pretrain.protocols.linear import FRACTIONS, check_labels, probe_encoder
from examples.pretrain.ranges import check_distinct, check_range, check_sizes
from examples.pretrain.records import provenance, write_record
from examples.pretrain.reports import pictures
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.reports.text import any_terminal, write_text
from examples.pretrain.run_folder import folder_to_resume, folder_to_start, hold_new, refuse_among_images
from examples.pretrain.train import Monitor, Run
from examples.pretrain.turns import train_in_turns
from examples.pretrain.untrained import encoder_of_file, random_encoder

NOT_SETTINGS = ("data", "weights", "out", "resume", "seconds", "reading")
"""Options of the command that its record does not repeat as settings."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes; errors end in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0] not in PRESETS and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "demo")  # the default preset
    any_terminal()
    config = tyro.extras.overridable_config_cli(PRESETS, args=arguments, prog="python3 examples")
    with told(go_on="the same command with --resume continues from there"), ranks.joined(device_of(config)):
        experiment(config)


def device_of(config: Experiment) -> str:
    """Return the device to train on."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def experiment(config: Experiment) -> dict:
    """Pretrain with each method, probe, write table and pictures; return the record in `table.json`.

    Under torchrun all ranks pretrain. Rank 0 does the rest; the others return an empty dict.
    """
    start = time.perf_counter()
    agreement.on_all(lambda: check(config))
    agreement.check_equal({"options": options_of(config)})
    out = ranks.decided_by_first(lambda: folder_of(config))
    fill_cache(config)
    train, test = agreement.on_all(lambda: sides_of(config))
    monitor = monitor_of(train, config)
    runs = agreement.on_all(lambda: runs_of(train, config, out, device_of(config)))
    agreement.check_equal({method: run.facts() for method, run in runs.items()})
    # Nothing has been written so far: what is refused leaves no trace.
    ranks.decided_by_first(lambda: hold(out) if config.resume else hold_new(out))
    with kept(*(run.folder for run in runs.values())):
        result = pretrain_and_probe(config, runs, monitor, train, test, out)
    if result:
        print(f"done in {(time.perf_counter() - start) / 60:.1f} min")
    return result


def pretrain_and_probe(
    config: Experiment, runs: dict[str, Run], monitor: Monitor | None, train: ImageSet, test: ImageSet, out: Path
) -> dict:
    """Train all runs, and write table and pictures into `out`; return the record, on rank 0.

    Where the time is over first, there is no table, and the record is empty.

    Raises:
        Unwritten: a checkpoint cannot be written; or a table or picture, once everything else is.
    """
    say = print if ranks.rank() == 0 else lambda *_, **__: None
    say(f"{len(train)} training and {len(test)} test images of {config.image_size} px; results in {out}", flush=True)
    for method, run in runs.items():
        if run.epoch:
            say(f"{method}: continuing after epoch {run.epoch}", flush=True)
        if config.seconds is None:
            run.train(monitor=monitor)
    if config.seconds is not None and not train_in_turns(list(runs.values()), config.seconds, monitor=monitor):
        reached = ", ".join(f"{method} {run.epoch}" for method, run in runs.items())
        epochs = config.optimization.epochs
        say(f"{config.seconds:g} s are over. Epochs of {epochs}: {reached}. The same command with --resume continues")
        if ranks.rank() == 0:
            outputs = Outputs()
            draw({method: run for method, run in runs.items() if run.rows}, test, out, outputs)
            outputs.check()
        return {}

    if ranks.rank() > 0:
        return {}
    table = {}
    if train.labels is None:
        print("no labels, no probes: the encoders are in the checkpoints")
    else:
        table = probes(runs, train, test, config)
    result = {
        **provenance(command(), device_of(config)),
        "seed": config.seed,
        "data": None if config.data is None else config.data.name,
        "weights": None if config.weights is None else config.weights.name,
        "config": {name: part for name, part in asdict(config).items() if name not in NOT_SETTINGS},
        "reading": {name: choice for name, choice in asdict(config.reading).items() if name != "cache"},
        "images": {"train": len(train), "test": len(test)},
        "ranks": ranks.world_size(),
        "auc": table,
        "runs": {
            method: {
                "pretrained_on": run.devices,
                "seconds": run.seconds,
                "steps": run.epoch * run.steps_per_epoch,
                **run.rows[-1],
            }
            for method, run in runs.items()
        },
    }
    outputs = Outputs()
    outputs.add(lambda: write_record(out / "table.json", result), out / "table.json")
    if table:
        markdown = markdown_of(table)
        print(f"\nmacro AUC (%) of a linear probe on the frozen encoder, by share of labels\n\n{markdown}\n")
        outputs.add(lambda: write_text(out / "table.md", markdown + "\n"), out / "table.md")
    draw(runs, test, out, outputs)
    print(f"pictures: {', '.join(str(path) for path in outputs.written if path.suffix == '.png') or 'none'}")
    for run in runs.values():
        run.check_files("checkpoint.pt", "metrics.csv")
    outputs.check()
    return result


def command() -> str:
    """Return the command line, with the names of files but not their folders."""
    return " ".join(["python3 examples", *(Path(part).name if "/" in part else part for part in sys.argv[1:])])


def options_of(config: Experiment) -> dict[str, Any]:
    """Return the options that ranks must share: all but the place of the images, which are compared themselves."""
    options = {name: value for name, value in asdict(config).items() if name not in ("data", "weights")}
    return options | {"out": None if config.out is None else str(config.out.absolute())}


def check(config: Experiment) -> None:
    """Raise ValueError or FileNotFoundError unless options are in their ranges, and methods and data exist."""
    unknown = [method for method in config.methods if method not in METHODS]
    if unknown or not config.methods:
        raise ValueError(
            f"methods must be one or more of {', '.join(METHODS)}, got {' '.join(config.methods) or 'none'}"
        )
    check_distinct("--methods", config.methods)
    for method in config.methods:
        check_options(method, config.options[method])
    check_range("--subsets", config.subsets, least=1)
    if config.seconds is not None:
        check_range("--seconds", config.seconds, above=0)
    check_sizes(config.image_size, config.phantoms, drawn=config.data is None)
    check_range("--seed", config.seed, least=0, most=2**32 - 1)
    check_optimization(config.optimization)
    check_augmentation(config.augmentation)
    check_encoder(config.encoder)
    check_device(device_of(config))
    check_device_can(config.optimization, device_of(config))
    if config.weights is not None:
        encoder_of_file(config.weights, 1, config.encoder)  # refused before hours of training
    if config.data is not None and not config.data.exists():
        raise FileNotFoundError(f"no file or folder at {config.data}: give an .npz file or a folder of images")


def folder_of(config: Experiment) -> Path:
    """Return the folder for the results; a folder that holds a run is continued, never overwritten."""
    out = (folder_to_resume if config.resume else folder_to_start)(config.name, config.out)
    refuse_among_images(config.data, [out, *(out / method for method in config.methods)])
    return out


def fill_cache(config: Experiment) -> None:
    """Decode the images on rank 0, if they are to be cached, while the others wait."""
    data = config.data
    if data is None or config.reading.cache is None:
        return
    cache, key = agreement.on_all(lambda: found_cache(data, config))
    if cache is None:
        return
    agreement.check_equal({"images to decode": key})
    ranks.while_first_works(cache.fill(progress=ranks.rank() == 0))
    agreement.on_all(lambda: check_shared(cache))
    if ranks.rank() == 0:
        print(f"decoded images: {cache.place}, {cache.bytes / 1e9:.2g} GB", flush=True)


def found_cache(data: Path, config: Experiment) -> tuple[Cache | None, str]:
    """Return the cache of the images, and its name, which depends on all files."""
    cache = cache_of(data, config.image_size, config.reading)
    return cache, "" if cache is None else cache.place.name


def check_shared(cache: Cache) -> None:
    """Raise ValueError unless this rank sees what rank 0 has decoded."""
    if not cache.is_full():
        raise ValueError(f"--cache must be on a file system that all ranks share, got {cache.directory}: give another")


def images_of(config: Experiment) -> ImageSet:
    """Load the images, or draw phantoms."""
    if config.data is not None:
        return load_images(config.data, config.image_size, reading=config.reading)
    if ranks.rank() == 0:
        print(f"drawing {config.phantoms} thorax phantoms", flush=True)
    return make_phantoms(config.phantoms, config.image_size, seed=config.seed)


def sides_of(config: Experiment) -> tuple[ImageSet, ImageSet]:
    """Return training and test images, whose labels the probes can use.

    Raises:
        ValueError: the images cannot be split, or have labels that no probe can be scored by.
    """
    data = images_of(config)
    if data.left_out and ranks.rank() == 0:
        print(f"left out {len(data.left_out)} of {len(data) + len(data.left_out)} images:", *data.left_out, sep="\n  ")
    train, test = (data.subset(index) for index in train_test_split(data, seed=config.seed))
    if train.labels is not None and test.labels is not None:
        check_labels(train.labels, test.labels, FRACTIONS, config.subsets, config.seed)
    return train, test


def monitor_of(train: ImageSet, config: Experiment) -> Monitor | None:
    """Return the probe that runs after every epoch; None, and say why, if the labels do not suit one."""
    if train.labels is None:
        return None
    try:
        return knn_monitor(train, seed=config.seed)
    except ValueError as error:
        if ranks.rank() == 0:
            print(f"no kNN probe after each epoch: {error}", flush=True)
        return None


def runs_of(train: ImageSet, config: Experiment, out: Path, device: str) -> dict[str, Run]:
    """Return a run for each method, continued from its checkpoint with --resume; all of them before one trains."""
    runs = {method: Run(train, config.pretraining(method, device=device), out / method) for method in config.methods}
    if config.resume:
        for run in runs.values():
            run.resume()
    return runs


def probes(
    runs: dict[str, Run], train: ImageSet, test: ImageSet, config: Experiment
) -> dict[str, dict[str, list[float]]]:
    """Return the AUC by encoder and share of labels; "random" is the encoder before pretraining.

    With `--weights` there is "imagenet", the encoder of that file.
    """
    some_run = next(iter(runs.values()))
    untrained = {"random": random_encoder(train.channels, config.encoder, config.seed)}
    if config.weights is not None:
        untrained["imagenet"] = encoder_of_file(config.weights, train.channels, config.encoder)
    encoders = [(name, some_run, encoder.to(some_run.config.device)) for name, encoder in untrained.items()]
    encoders += [(method, run, run.method.encoder) for method, run in runs.items()]
    return {
        name: probe_encoder(run, encoder, train, test, subsets=config.subsets, seed=config.seed)
        for name, run, encoder in encoders
    }


def markdown_of(table: dict[str, dict[str, list[float]]]) -> str:
    """Return the table of AUCs (%): mean and standard deviation over the label subsets."""
    shares = [f"{fraction:g}" for fraction in FRACTIONS]
    lines = [
        "| encoder | " + " | ".join(f"{float(share):.0%}" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
    ]
    for name, row in table.items():
        cells = []
        for share in shares:
            scores = 100 * np.array(row[share])
            spread = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
            cells.append(f"{scores.mean():.1f}{spread}")
        lines.append(f"| {title_of(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, Run], test: ImageSet, out: Path, outputs: Outputs) -> None:
    """Draw the curves of all runs, and the code maps of each run that has codes."""
    rows = {method: run.rows for method, run in runs.items()}
    outputs.add(lambda: pictures.curves(rows, out / "curves.png"), out / "curves.png")
    some = test.subset(slice(0, 512))
    for method, run in runs.items():
        codes = run.codes(to_float(some.images))
        if codes is not None:
            maps, patches = out / method / "code_maps.png", out / method / "codes.png"
            outputs.add(partial(pictures.code_maps, some, codes, maps, codes=run.code_vectors()), maps)
            outputs.add(partial(pictures.code_patches, some, next(iter(codes.values())), patches), patches)


if __name__ == "__main__":
    main()
