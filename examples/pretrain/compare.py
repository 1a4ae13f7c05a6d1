"""All methods under equal conditions, as in the paper's Tables I to III; resumable, one JSON line a run.

    python -m examples.pretrain.compare --methods all --data images.npz             # tunes, pretrains, evaluates
    python -m examples.pretrain.compare --methods byol dino --seeds 0 1 2 --data images.npz
    python -m examples.pretrain.compare --report --out runs/compare                 # table and picture again

Every method gets the same images, split, encoder, augmentations and number of steps. Its learning rate and loss weights
are chosen once, on a validation part of the training images, among as many trials as any other method has. Then it is
pretrained with every seed, and linear probe and fine-tuning are measured with the same settings. What is finished is
never run again; what was killed goes on from its last whole epoch. For several processes, give each some of the methods
and the same --out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from tqdm import tqdm

from examples.pretrain import evaluate
from examples.pretrain.data import ImageSet, load_images, train_test_split
from examples.pretrain.devices import check_device
from examples.pretrain.endings import told
from examples.pretrain.finished_runs import digest, find
from examples.pretrain.methods import METHODS, title_of
from examples.pretrain.passes import forward_passes
from examples.pretrain.phantoms import phantom_file
from examples.pretrain.presets import PRESETS, Experiment
from examples.pretrain.protocols import Settings
from examples.pretrain.protocols.linear import check_labels
from examples.pretrain.protocols.subject import check_settings
from examples.pretrain.ranges import check_distinct, check_range, check_sizes
from examples.pretrain.records import kept_record, provenance, rounded, write_record
from examples.pretrain.reports import comparison as report
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.reports.text import any_terminal
from examples.pretrain.run_folder import refuse_among_images
from examples.pretrain.train import Pretraining, Run
from examples.pretrain.tuning import Parts, best, try_out, tuned_values, validation_parts, varied
from examples.pretrain.untrained import encoder_of_file

if TYPE_CHECKING:  # a type checker cannot read the names of the table
    Chosen = str
else:
    Chosen = Literal[("all", *METHODS)]


@dataclass(frozen=True)
class Comparison:
    """Tune, pretrain and evaluate every method: hours; resumable.

    The defaults make 117 pretraining runs, 6 trials and 3 seeds of 13 methods, and evaluate 39 of them. In the
    records 36 runs of 812 steps at 32 px took 98 to 230 seconds each, on one core of an AMD EPYC: BYOL and two forms of
    DiSSECT, with the narrower encoder of --preset demo. 117 such runs take three to eight hours, without the
    evaluation. What is finished is never run again.

    Every method gets the same images, split, encoder, augmentations and number of steps. Learning rate and loss weights
    are chosen once a method on a part of the training images, among equally many trials. Then each seed is pretrained,
    and linear probe and fine-tuning are measured. The same command with the same --out goes on where it was stopped.
    For several processes, give each some of the methods and the same --out.

    --out gets table.md, gap.png, shares.png, and runs.jsonl with one line a run.

    A try of a few minutes: --preset demo --phantoms 200 --epochs 2 --trials 2 --seeds 0 --shares 0.2 --steps 5
    """

    methods: tuple[Chosen, ...] = ("all",)
    """Names of methods. An untrained encoder is always in the table."""
    data: Path | None = None
    """Images with labels, and groups to split by; phantoms, which are kept in --out, if left out."""
    weights: Path | None = None
    """State file of an ImageNet ResNet-18, which joins the table; for a preset of its width."""
    out: Path = Path("runs/compare")
    """Folder for trials, runs, results, table and pictures."""
    preset: Literal["demo", "small", "paper"] = "small"
    """Encoder, augmentations, optimizer, length and starting options: those of `python3 examples PRESET`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of pretraining; the split is the same for all."""
    trials: int = 6
    """Settings of learning rate and loss weights that each method tries; 1 keeps the preset's."""
    epochs: int | None = None
    """Passes over the training images; the preset's if left out."""
    image_size: int | None = None
    """Side of the images in pixels; the preset's if left out."""
    phantoms: int | None = None
    """Number of phantoms to draw if there are no --data; the preset's if left out."""
    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4)
    """Shares of the labels, of linear probe and fine-tuning."""
    subsets: int = 3
    """Random label subsets for each share below 100%."""
    steps: int = 200
    """Steps of fine-tuning."""
    protocols: tuple[evaluate.Name, ...] = ("linear", "finetune")
    """What is measured; see `python -m examples.pretrain.evaluate --help`."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    report: bool = False
    """Write table and pictures of the results so far, and run nothing."""

    @property
    def settings(self) -> Settings:
        """The settings of all protocols."""
        return Settings(shares=self.shares, mask_shares=self.shares, subsets=self.subsets, steps=self.steps)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(METHODS) if self.methods == ("all",) else self.methods


def main(config: Comparison) -> str:
    """Run what is missing; return the table as markdown."""
    if not config.report:
        check(config)
        compare(config)
    outputs = Outputs()
    text = report.write(config.out, outputs)
    print(text)
    print(f"written: {', '.join(str(path) for path in outputs.written)}")
    outputs.check()
    return text


def check(config: Comparison) -> None:
    """Raise ValueError or FileNotFoundError unless options are in their ranges, and methods and files exist."""
    unknown = [name for name in config.names if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods must be all, or some of {', '.join(METHODS)}, got {' '.join(unknown)}")
    check_distinct("--methods", config.names)
    check_distinct("--seeds", config.seeds)
    check_distinct("--protocols", config.protocols)
    for seed in config.seeds:
        check_range("each of --seeds", seed, least=0, most=2**32 - 1)
    check_range("--trials", config.trials, least=1)
    if config.epochs is not None:
        check_range("--epochs", config.epochs, least=1)
    preset = preset_of(config)
    check_sizes(preset.image_size, preset.phantoms, drawn=config.data is None)
    check_settings(config.settings)
    check_device(config.device)
    refuse_among_images(config.data, [config.out])
    if config.data is not None and not config.data.exists():
        raise FileNotFoundError(f"no file or folder at {config.data}: give an .npz file or a folder of images")
    if config.weights is not None:
        encoder_of_file(config.weights, 1, preset_of(config).encoder)


def preset_of(config: Comparison) -> Experiment:
    """Return the preset, with the length and the sizes that the command changes."""
    preset = PRESETS[config.preset][1]
    epochs = preset.optimization.epochs if config.epochs is None else config.epochs
    return replace(
        preset,
        image_size=preset.image_size if config.image_size is None else config.image_size,
        phantoms=preset.phantoms if config.phantoms is None else config.phantoms,
        optimization=replace(preset.optimization, epochs=epochs),
    )


def images_of(config: Comparison) -> tuple[Path, ImageSet]:
    """Return the file or folder of the images, and those to train on.

    Raises:
        ValueError: they have no labels, or labels that the probes cannot use.
    """
    preset, path = preset_of(config), config.data
    if path is None:
        path = phantom_file(config.out, preset.phantoms, preset.image_size)
    data = load_images(path, preset.image_size)
    train, test = (data.subset(index) for index in train_test_split(data))
    if data.labels is None:
        raise ValueError(f"{path} must hold labels for the probes, and holds none: see load_images for their place")
    check_sides(train, test, config.shares, config.subsets)
    return path, train


def check_sides(train: ImageSet, test: ImageSet, shares: tuple[float, ...], subsets: int) -> None:
    """Raise ValueError unless probes can be fit to the labels of one side and scored on the other."""
    assert train.labels is not None
    assert test.labels is not None
    check_labels(train.labels, test.labels, shares, subsets)


def compare(config: Comparison) -> None:
    """Tune and pretrain every method, and evaluate all runs.

    Raises:
        ValueError: a method cannot work with the images or the preset, a record in `config.out` is of other settings,
            or all trials of a method diverged.
        Diverged: a run with the chosen settings diverged.
    """
    if config.device == "cpu":
        torch.set_num_threads(1)  # another number of threads rounds differently
    path, train = images_of(config)
    preset = preset_of(config)
    plans = {name: preset.pretraining(name, device=config.device) for name in config.names}
    parts = validation_parts(train)
    if config.trials > 1:
        check_sides(parts.fit, parts.validation, config.shares, 2)
    # Before hours of training: each method is built and takes a step, on the smallest set of images.
    fewest = parts.fit if config.trials > 1 else train
    passes = {name: forward_passes(fewest, plan, config.out) for name, plan in plans.items()}
    folders = []
    with tqdm(total=len(plans) * (config.trials * (config.trials > 1) + len(config.seeds)), desc="runs") as bar:
        for name, folder in pretrained(config, plans, passes, train, parts, bar):
            bar.set_postfix_str(f"{name}: done")
            folders.append(folder)
    # Images as a file: the evaluation reads it for every encoder, and finds the split of its run again.
    wanted = evaluate.Evaluation(
        protocols=config.protocols,
        runs=tuple(folders),
        data=path,
        weights=config.weights,
        out=config.out / "evaluation",
        device=config.device,
        settings=config.settings,
    )
    found = find(wanted.runs, (), device=config.device, unfinished=False, weights=config.weights)
    evaluate.measure(found, wanted)


def pretrained(
    config: Comparison,
    plans: dict[str, Pretraining],
    passes: dict[str, float],
    train: ImageSet,
    parts: Parts,
    bar: tqdm,
) -> Iterator[tuple[str, Path]]:
    """Choose the settings of each method, pretrain it with each seed, and yield its name and the folder of the run."""
    chosen = {}
    for name, plan in plans.items():
        trials = []
        for trial in range(config.trials) if config.trials > 1 else ():
            bar.set_postfix_str(f"{name}, trial {trial + 1} of {config.trials}")
            where = config.out / "trials" / f"{name}-{trial}"
            trials.append(try_out(parts, plan, trial, where, shares=config.shares, command=command(config)))
            bar.update()
        chosen[name] = varied(plan, best(trials) if trials else 0)
    # Seeds in the outer loop: an interrupted comparison has all methods with fewer seeds.
    for seed in config.seeds:
        for name, plan in chosen.items():
            bar.set_postfix_str(f"{name}, seed {seed}")
            folder = config.out / "runs" / f"{name}-seed{seed}"
            pretrain(replace(plan, seed=seed), passes[name], train, folder, config)
            bar.update()
            yield name, folder


def pretrain(plan: Pretraining, passes: float, train: ImageSet, folder: Path, config: Comparison) -> None:
    """Pretrain once and write the record of the run, unless the folder has it.

    Raises:
        ValueError: the folder holds a run of other settings or images.
        Diverged: the run diverged.
    """
    basis: dict[str, Any] = {
        "config": {name: value for name, value in asdict(plan).items() if name != "device"},
        "images": {"count": len(train), "sha256": digest(train)},
        "trials": config.trials,
    }
    path = folder / "run.json"
    if kept_record(path, basis) is not None:
        return
    run = Run(train, plan, folder)
    run.resume()
    run.train(quiet=True)
    record = {
        **provenance(command(config), plan.device),
        "pretrained_on": run.devices,
        "kind": "comparison",
        "variant": plan.method,
        "title": title_of(plan.method, plan.options),
        "seed": plan.seed,
        "chosen": rounded(tuned_values(plan)),
        "steps": run.epoch * run.steps_per_epoch,
        "forward_passes": round(passes, 3),
        "seconds": round(run.seconds, 1),
        "last_epoch": rounded(run.rows[-1]),
        **basis,
    }
    write_record(path, record, allow_nan=False)


def command(config: Comparison) -> str:
    """Return the command line, with the names of files but not their folders."""
    default = Comparison()
    parts = ["python -m examples.pretrain.compare"]
    for name, value in vars(config).items():
        if name in ("out", "report", "device") or value == getattr(default, name):
            continue
        text = value.name if isinstance(value, Path) else value
        parts.append(f"--{name.replace('_', '-')} {' '.join(map(str, text)) if isinstance(text, tuple) else text}")
    return " ".join(parts)


if __name__ == "__main__":
    any_terminal()
    given = tyro.cli(Comparison, prog="python -m examples.pretrain.compare")
    with told():
        main(given)
