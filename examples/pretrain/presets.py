"""Named recipes. `python3 examples NAME --help` lists what can be changed about each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from examples.pretrain.augment import Augmentation
from examples.pretrain.model import Model
from examples.pretrain.train import Optimization


@dataclass(frozen=True)
class Experiment:
    """Pretrain without labels, then probe the frozen encoders with few."""

    name: str
    """Of the preset; also of the folder under runs/ where nothing else is said."""
    data: Path | None = None
    """An .npz (MedMNIST's layout, or images, labels, groups) or a folder of PNG, JPEG or DICOM; else phantoms."""
    out: Path | None = None
    """Folder for checkpoints, logs, table and pictures. A new one under runs/ if left out."""
    resume: bool = False
    """Continue the run in --out, or the preset's latest under runs/."""
    methods: tuple[str, ...] = ("byol", "dissect")
    image_size: int = 64
    phantoms: int = 2000
    """How many phantoms to draw where there is no data."""
    subsets: int = 5
    """Random subsets of the labels for each share below 100%."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    model: Model = field(default_factory=Model)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimization: Optimization = field(default_factory=Optimization)


SMALL_MODEL = Model(width=12, stem_stride=2, codebook_size=256, hidden_dim=512, teacher_momentum=0.99)
# The paper's crop and flip alone leave brightness as a shortcut, which a small encoder takes. Harder views than these
# (crops from 0.4, jitter 0.4) are not learnt in 800 steps, and the features fall behind the random encoder's.
SMALL_AUGMENTATION = Augmentation(crop_scale=(0.6, 1.0), jitter=0.2)

PRESETS = {
    "demo": (
        "Generated phantoms, a few minutes on two CPU cores.",
        Experiment(
            "demo",
            image_size=32,
            phantoms=5000,
            model=replace(SMALL_MODEL, width=8),
            # Gentler: a phantom's findings are small, and what a crop may cut away is not learnt.
            augmentation=Augmentation(crop_scale=(0.7, 1.0), jitter=0.2),
            optimization=Optimization("adamw", lr=4e-3, weight_decay=1e-4, batch_size=64, epochs=14, warmup_epochs=2),
        ),
    ),
    "small": (
        "For a CPU and real data: a narrow ResNet at 32 px, about 800 steps on 4,400 images.",
        Experiment(
            "small",
            image_size=32,
            model=SMALL_MODEL,
            augmentation=SMALL_AUGMENTATION,
            optimization=Optimization("adamw", lr=2e-3, weight_decay=1e-4, batch_size=64, epochs=12, warmup_epochs=1),
        ),
    ),
    "paper": (
        "The paper's: ResNet-18 at 224 px, three codebooks of 2048, LARS for 300 epochs. For a GPU.",
        Experiment("paper", image_size=224),
    ),
}
