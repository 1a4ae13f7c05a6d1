"""What pretrained encoders are worth: each protocol a command, and all of them one.

    python -m examples.pretrain.evaluate --runs runs/small-1 --data images.npz            # all that the images allow
    python -m examples.pretrain.evaluate linear finetune --runs runs/s0 runs/s1 runs/s2 --data images.npz
    python -m examples.pretrain.evaluate segment-frozen --runs runs/small-1 --data images.npz --masks lungs.npz
    python -m examples.pretrain.evaluate --report --out runs/evaluation                    # tables and pictures again

`--runs` are folders that the example or the sweep wrote, one or several seeds of pretraining. Encoders of one seed,
and one that was never trained, are judged on the same subsets of the labels, by the same recipe, which was not tuned
for any of them. Results are a JSON for each protocol, encoder and seed; what is there already, of the same checkpoint,
images and settings, is not done again.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

import vqssl
from examples.pretrain import evaluation_report, finished_runs
from examples.pretrain.finished_runs import Found, Images, digest, find, subject_of
from examples.pretrain.probe import subset_size
from examples.pretrain.protocols import PROTOCOLS, Settings, Subject
from examples.pretrain.protocols.segment import presence
from examples.pretrain.train import differences, write_whole

Name = Literal["linear", "finetune", "segment-frozen", "segment-tuned", "localise", "anatomy", "codes"]


@dataclass(frozen=True)
class Evaluation:
    protocols: tyro.conf.Positional[tuple[Name, ...]] = ()
    """All that the images allow, if left out."""
    runs: tuple[Path, ...] = ()
    """Folders of runs: of the example, with byol/ or dissect/ in them, or of the sweep."""
    data: Path | None = None
    """The images that the runs were trained on; left out for the demo's phantoms."""
    masks: Path | None = None
    """Images with masks, where those of --data have none; tested on patients that were not pretrained on."""
    phantoms: int = 5000
    encoders: tuple[str, ...] = ()
    """Which of the runs, for example byol full; all if left out."""
    out: Path = Path("runs/evaluation")
    part: str = "0/1"
    """I/N: the I-th of N equal shares of the work, for N processes at once."""
    device: str = "cpu"
    unfinished: bool = False
    """Judge runs that have not come to their end too, as byol@3 after three epochs."""
    report: bool = False
    """Only tables and pictures of what is there."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)

    @property
    def images(self) -> Images:
        return Images(self.data, self.masks, self.phantoms)


def main(config: Evaluation) -> str:
    """Measures what is missing in `config.out`; returns the tables, as markdown."""
    if not config.report:
        found = find(config.runs, config.encoders, device=config.device, unfinished=config.unfinished)
        measure(found, config)
    text = evaluation_report.write(config.out)
    print(text)
    return text


def measure(found: Sequence[Found], config: Evaluation) -> None:
    """Every protocol of every encoder that has no result yet, then the pictures of the first seed."""
    work = [(name, each) for each in found for name in (config.protocols or PROTOCOLS)]
    share, shares = map(int, config.part.split("/"))
    config.out.mkdir(parents=True, exist_ok=True)
    finished_runs.file.cache_clear()  # a file may be another than at the last call
    # Hours of measuring are not to end in a table that takes in something else.
    for path in config.out.glob("*-seed*.json"):
        refuse_others(path, {"settings": asdict(config.settings)})
    said: set[str] = set()
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
        missing = PROTOCOLS[name].lacking(subject)
        if missing is not None:
            if name in config.protocols:
                raise ValueError(f"the protocol {name} needs {missing}")
            if name not in said:
                tqdm.write(f"{name}: left out, it needs {missing}")
            said.add(name)
            continue
        record = {
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
            "command": command(config),
            "versions": {"vqssl": vqssl.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        lines = ",\n".join(f' "{key}": {json.dumps(value, allow_nan=False)}' for key, value in record.items())
        write_whole(path, ("{\n" + lines + "\n}\n").encode())
        new.add(name)
    if share == 0:
        pictures(found, new, config)


def basis_of(each: Found, subject: Subject, settings: Settings) -> dict[str, Any]:
    """All that a result depends on."""
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
    """How many images a share of the labels or masks is."""
    found = {}
    if subject.train.labels is not None:
        labels = subject.train.labels
        found["labels"] = {f"{100 * share:g}%": subset_size(labels, share) for share in settings.shares}
    if subject.masked is not None:
        masks = presence(subject.masked[0])
        found["masks"] = {f"{100 * share:g}%": subset_size(masks, share) for share in settings.mask_shares}
    return found


def refuse_others(path: Path, basis: dict[str, Any]) -> None:
    """A result that is there must be of what is asked for now."""
    record = json.loads(path.read_text())
    theirs = {key: record.get(key) for key in basis}
    changed = [
        f"{name} was {a}, is {b}"
        for name, a, b in differences(theirs, json.loads(json.dumps(basis)))
        # on another device it is the same; and what needs no masks is the same with them and without
        if name != "pretraining.device" and not (name.startswith("images.masked") and None in (a, b))
    ]
    if changed:
        raise ValueError(f"{path} is a result of something else: {'; '.join(changed)}. Give another --out")


def pictures(found: Sequence[Found], new: set[str], config: Evaluation) -> None:
    """Of the first seed, for protocols with new results or without pictures: some train anew for theirs."""
    subjects: list[Subject] = []
    for name in config.protocols or PROTOCOLS:
        protocol = PROTOCOLS[name]
        if protocol.draw is None or (name not in new and any(config.out.glob(f"{name}*.png"))):
            continue
        subjects = subjects or [
            subject_of(each, config.images) for each in found if each.config.seed == found[0].config.seed
        ]
        able = [subject for subject in subjects if protocol.lacking(subject) is None]
        if able:
            protocol.draw(able, config.settings, config.out)


def command(config: Evaluation) -> str:
    """As it was given, folders by their number and files by their name."""
    parts = ["python -m examples.pretrain.evaluate", *config.protocols, f"--runs {len(config.runs)} folder(s)"]
    parts += [f"--{name} {path.name}" for name, path in (("data", config.data), ("masks", config.masks)) if path]
    parts += [f"--encoders {' '.join(config.encoders)}"] if config.encoders else []
    for option in fields(Settings):
        value = getattr(config.settings, option.name)
        if value != option.default:
            text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            parts.append(f"--{option.name.replace('_', '-')} {text}")
    return " ".join(parts)


if __name__ == "__main__":
    try:
        main(tyro.cli(Evaluation))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
