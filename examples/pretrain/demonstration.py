"""A small pretrained encoder and its codebooks, made by one command, to try things with.

    python -m examples.pretrain.demonstration       # some minutes on a CPU; goes on after an interruption

BYOL with code prediction learns from generated thorax phantoms at 32 px, as in `python3 examples demo`. What it learns
is no use on real images: it is a demonstration of the files and of how to load them. --out holds `encoder.safetensors`,
for `load_encoder` of `examples.pretrain.pretrained`, and `codebooks.safetensors`, for `vqssl.load`: the codes are those
of the encoder's maps. Their metadata say how they were made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import vqssl
from examples.pretrain.data import train_test_split
from examples.pretrain.endings import told
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS
from examples.pretrain.pretrained import write_part
from examples.pretrain.ranges import check_range, check_sizes
from examples.pretrain.records import provenance, rounded
from examples.pretrain.reports.text import any_terminal
from examples.pretrain.train import Run
from examples.pretrain.unwritten import writing

METHOD = "dissect_codes"
PURPOSE = (
    "A demonstration of vqssl: pretrained on generated thorax phantoms, without labels. Not for real images, and not "
    "for any clinical use."
)


@dataclass(frozen=True)
class Demonstration:
    """Pretrain a small encoder with codebooks on phantoms, and write both to files."""

    out: Path = Path("runs/demonstration")
    """Folder for the two files, and for the run in run/."""
    phantoms: int = PRESETS["demo"][1].phantoms
    """Number of phantoms to draw; a quarter of them is kept for tests."""
    epochs: int = PRESETS["demo"][1].optimization.epochs
    """Passes over the training images."""
    seed: int = 0
    """Of the phantoms, the weights and the batches."""


def main(config: Demonstration) -> tuple[Path, Path]:
    """Train what is missing, and return the files of encoder and codebooks.

    Raises:
        ValueError: an option is out of its range, or --out holds a run of other settings.
        Unwritten: a file cannot be written.
    """
    preset = PRESETS["demo"][1]
    check_sizes(preset.image_size, config.phantoms, drawn=True)
    check_range("--epochs", config.epochs, least=1)
    check_range("--seed", config.seed, least=0, most=2**32 - 1)
    optimization = replace(
        preset.optimization,
        epochs=config.epochs,
        warmup_epochs=min(preset.optimization.warmup_epochs, config.epochs - 1),
    )
    plan = replace(preset, seed=config.seed, optimization=optimization).pretraining(METHOD)
    torch.set_num_threads(1)  # another number of threads rounds differently
    images = make_phantoms(config.phantoms, preset.image_size, seed=config.seed)
    train = images.subset(train_test_split(images, seed=config.seed)[0])
    with writing(config.out):
        config.out.mkdir(parents=True, exist_ok=True)
    run = Run(train, plan, config.out / "run")
    run.resume()
    run.train()
    notes = {
        "purpose": PURPOSE,
        "images": f"{len(train)} of {config.phantoms} generated phantoms of {preset.image_size} px",
        **provenance(command(config), plan.device),
        **run.notes,
        "last epoch": rounded(run.rows[-1]),
    }
    encoder, codebooks = config.out / "encoder.safetensors", config.out / "codebooks.safetensors"
    write_part(encoder, run.method.target_encoder, run.normalize, notes)
    with writing(codebooks):
        vqssl.save(run.method.quantizer.eval(), codebooks, notes=notes)
    for path in (encoder, codebooks):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return encoder, codebooks


def command(config: Demonstration) -> str:
    """Return the command line that makes the same files."""
    default = Demonstration()
    options = [
        f" --{name} {getattr(config, name)}"
        for name in ("phantoms", "epochs", "seed")
        if getattr(config, name) != getattr(default, name)
    ]
    return "python -m examples.pretrain.demonstration" + "".join(options)


if __name__ == "__main__":
    any_terminal()
    given = tyro.cli(Demonstration, prog="python -m examples.pretrain.demonstration")
    with told():
        main(given)
