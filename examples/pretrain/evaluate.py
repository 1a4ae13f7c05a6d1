"""Evaluation of finished runs by one protocol, several or all.

    python -m examples.pretrain.evaluate --runs runs/small-1 --data images.npz            # all that the images allow
    python -m examples.pretrain.evaluate linear finetune --runs runs/s0 runs/s1 runs/s2 --data images.npz
    python -m examples.pretrain.evaluate segment-frozen --runs runs/small-1 --data images.npz --masks lungs.npz
    python -m examples.pretrain.evaluate --report --out runs/evaluation                    # tables and pictures again

`--runs` are folders that the example or the sweep wrote, of one or several pretraining seeds. All encoders of a seed,
and an untrained one, are evaluated on the same label subsets with the same settings, which were tuned for none. Results
are one JSON for each protocol, encoder and seed. A result of the same checkpoint, images and settings is not measured
again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tqdm import tqdm

from examples.pretrain import finished_runs
from examples.pretrain.checkpoint import differences
from examples.pretrain.data import Reading
from examples.pretrain.devices import check_device
from examples.pretrain.endings import told
from examples.pretrain.finished_runs import Found, Images, digest, find, subject_of
from examples.pretrain.protocols import PROTOCOLS, Settings, Subject
from examples.pretrain.protocols.labels import subset_size
from examples.pretrain.protocols.segment import presence
from examples.pretrain.protocols.subject import check_settings, count_planes
from examples.pretrain.ranges import check_distinct, check_range, share_of
from examples.pretrain.records import provenance, read_record, write_record
from examples.pretrain.reports import evaluation as report
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.reports.text import any_terminal
from examples.pretrain.run_folder import refuse_among_images
from examples.pretrain.unwritten import writing

if TYPE_CHECKING:  # a type checker cannot read the names of the table
    Name = str
else:
    Name = Literal[tuple(PROTOCOLS)]

GO_ON = "the same command measures what is missing"
"""What to do after the command was stopped: every result is a file of its own."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluate finished runs."""

    protocols: tyro.conf.Positional[tuple[Name, ...]] = ()
    """Protocols; all that the images allow if left out."""
    runs: tuple[Path, ...] = ()
    """Folders of runs: of the example, which hold byol/ or dissect/, or of the sweep."""
    data: Path | None = None
    """The images that the runs were trained on; the demo's phantoms if left out."""
    masks: Path | None = None
    """Images with masks, where those of --data have none; tested on patients that were not pretrained on."""
    phantoms: int = 5000
    """Number of phantoms that the runs drew."""
    encoders: tuple[str, ...] = ()
    """Names of runs, for example byol full; all if left out."""
    weights: Path | None = None
    """State file of an ImageNet ResNet-18, for runs of its width: evaluated as the encoder imagenet."""
    out: Path = Path("runs/evaluation")
    """Folder for the JSON of each result, for tables and pictures."""
    part: str = "0/1"
    """I/N: the I-th of N equal shares of the work, for N processes at once."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    unfinished: bool = False
    """Evaluate unfinished runs too, as byol@3 after three epochs."""
    report: bool = False
    """Write tables and pictures of the results so far, and measure nothing."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)

    @property
    def images(self) -> Images:
        """Source of the images."""
        return Images(self.data, self.masks, self.phantoms, self.reading)


def main(config: Evaluation) -> str:
    """Measure what is missing in `config.out`; return the tables as markdown."""
    check_settings(config.settings)
    check_device(config.device)
    check_range("--phantoms", config.phantoms, least=1)
    for name, values in (("--runs", config.runs), ("protocols", config.protocols), ("--encoders", config.encoders)):
        if values:
            check_distinct(name, values)
    refuse_among_images(config.data, [config.out])
    outputs = Outputs()
    if not config.report:
        found = find(
            config.runs, config.encoders, device=config.device, unfinished=config.unfinished, weights=config.weights
        )
        outputs = measure(found, config)
    text = report.write(config.out, outputs)
    print(text)
    outputs.check()
    return text


def measure(found: Sequence[Found], config: Evaluation) -> Outputs:
    """Run every protocol on every encoder without a result, then draw the pictures of the first seed, and return those.

    Raises:
        ValueError: a result in `config.out` is of other runs, images or settings; the images lack what a protocol needs
            that was named.
    """
    work = [(name, each) for each in found for name in (config.protocols or PROTOCOLS)]
    share, shares = share_of(config.part)
    with writing(config.out):
        config.out.mkdir(parents=True, exist_ok=True)
    finished_runs.file.cache_clear()  # a file may have changed since the last call
    # Before hours of measuring: a result with other settings does not belong in the table.
    for path in config.out.glob("*-seed*.json"):
        refuse_others(path, {"settings": asdict(config.settings)})
    left_out = lacking(found, config)
    new: set[str] = set()
    bar = tqdm(work[share::shares], desc="protocols x encoders x seeds")
    for name, each in bar:
        bar.set_postfix_str(f"{name} of {each.name}, seed {each.config.seed}")
        path = config.out / f"{name}-{each.name}-seed{each.config.seed}.json"
        subject = subject_of(each, config.images)
        basis = basis_of(each, subject, config.settings)
        if path.exists():
            refuse_others(path, basis)
            continue
        if (name, each.name, each.config.seed) in left_out:
            continue
        record = {
            **provenance(command(config), config.device),
            "kind": "evaluation",
            "pretrained_on": list(each.devices),
            "protocol": name,
            "encoder": each.name,
            "seed": each.config.seed,
            "scores": {
                column: [round(value, 4) for value in values]
                for column, values in PROTOCOLS[name].measure(subject, config.settings).items()
            },
            **basis,
            "drawn": drawn(subject, config.settings),
            "data": None if config.data is None else config.data.name,
            "masks": None if config.masks is None else config.masks.name,
        }
        write_record(path, record, allow_nan=False)
        new.add(name)
    return pictures(found, new, config) if share == 0 else Outputs()


def lacking(found: Sequence[Found], config: Evaluation) -> set[tuple[str, str, int]]:
    """Return protocol, encoder and seed of what cannot be measured, and say so once a protocol.

    All runs are looked at before one is measured: what is missing is said before hours of measuring.

    Raises:
        ValueError: it cannot be measured, and was named.
    """
    left_out: set[tuple[str, str, int]] = set()
    for each in found:
        subject = subject_of(each, config.images)
        for name in config.protocols or PROTOCOLS:
            missing = PROTOCOLS[name].unfit(subject, config.settings)
            if missing is None:
                continue
            if name in config.protocols:
                raise ValueError(f"the protocol {name} needs {missing}")
            if name not in {other for other, *_ in left_out}:
                tqdm.write(f"{name}: left out, it needs {missing}")
            left_out.add((name, each.name, each.config.seed))
    return left_out


def basis_of(each: Found, subject: Subject, settings: Settings) -> dict[str, Any]:
    """Return everything that a result depends on."""
    sides = {"train": subject.train, "test": subject.test}
    if subject.masked is not None and subject.masked[0] is not subject.train:
        sides |= {"masked train": subject.masked[0], "masked test": subject.masked[1]}
    return {
        "settings": asdict(settings),
        "images": {name: {"count": len(side), "sha256": digest(side)} for name, side in sides.items()},
        "pretraining": each.pretraining,
        "checkpoint": each.checkpoint,
    }


def drawn(subject: Subject, settings: Settings) -> dict[str, dict[str, int]]:
    """Return the number of images in each share of the labels and masks."""
    found = {}
    if subject.train.labels is not None:
        labels = subject.train.labels
        found["labels"] = {f"{100 * share:g}%": subset_size(labels, share) for share in settings.shares}
    if subject.masked is not None:
        masks = presence(subject.masked[0], count_planes(*subject.masked))
        found["masks"] = {f"{100 * share:g}%": subset_size(masks, share) for share in settings.mask_shares}
    return found


def refuse_others(path: Path, basis: dict[str, Any]) -> None:
    """Raise ValueError unless the result in `path` is of the same basis."""
    record = read_record(path)
    theirs = {key: record.get(key) for key in basis}
    changed = [
        f"{name} was {a}, is {b}"
        for name, a, b in differences(theirs, json.loads(json.dumps(basis)))
        # The device does not matter, nor masks that are only there once: the protocol did not need them.
        if name != "pretraining.device" and not (name.startswith("images.masked") and None in (a, b))
    ]
    if changed:
        raise ValueError(f"{path} holds another result: {'; '.join(changed)}. Give another --out")


def pictures(found: Sequence[Found], new: set[str], config: Evaluation) -> Outputs:
    """Draw the first seed, for protocols with new results or without pictures; some protocols train again for it."""
    outputs = Outputs()
    subjects: list[Subject] = []
    for name in config.protocols or PROTOCOLS:
        protocol = PROTOCOLS[name]
        if protocol.draw is None or (name not in new and any(config.out.glob(f"{name}*.png"))):
            continue
        subjects = subjects or [
            subject_of(each, config.images) for each in found if each.config.seed == found[0].config.seed
        ]
        able = [subject for subject in subjects if protocol.unfit(subject, config.settings) is None]
        if able:
            outputs.add(partial(protocol.draw, able, config.settings, config.out), config.out / name)
    return outputs


def command(config: Evaluation) -> str:
    """Return the command line, with the number of folders and the names of files."""
    parts = ["python -m examples.pretrain.evaluate", *config.protocols, f"--runs {len(config.runs)} folder(s)"]
    parts += [f"--{name} {path.name}" for name, path in (("data", config.data), ("masks", config.masks)) if path]
    parts += [f"--encoders {' '.join(config.encoders)}"] if config.encoders else []
    for options, option in ((each, option) for each in (config.reading, config.settings) for option in fields(each)):
        value = getattr(options, option.name)
        if value != option.default and option.name != "cache":
            text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            parts.append(f"--{option.name.replace('_', '-')} {text}")
    return " ".join(parts)


if __name__ == "__main__":
    any_terminal()
    given = tyro.cli(Evaluation, prog="python -m examples.pretrain.evaluate")
    with told(go_on=GO_ON, start=GO_ON):
        main(given)
