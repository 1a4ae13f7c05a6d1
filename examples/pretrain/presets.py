"""Named recipes. `python3 examples NAME --help` lists the options of each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.pretrain.augment import Augmentation
from examples.pretrain.data import Reading
from examples.pretrain.encoder import EncoderOptions
from examples.pretrain.methods import default_options
from examples.pretrain.methods.adamv2 import AdamV2Options
from examples.pretrain.methods.byol import BYOLOptions
from examples.pretrain.methods.coboom import CoBooMOptions
from examples.pretrain.methods.dino import DINOOptions
from examples.pretrain.methods.dissect_codes import DiSSECTCodesOptions
from examples.pretrain.methods.dissect_options import DiSSECTOptions
from examples.pretrain.methods.dissect_places import DiSSECTPlacesOptions
from examples.pretrain.methods.mlvicx import MLVICXOptions
from examples.pretrain.methods.otcxr import OTCXROptions
from examples.pretrain.optimization import Optimization
from examples.pretrain.train import Pretraining


@dataclass(frozen=True)
class Experiment:
    """Pretrain without labels, then probe the frozen encoders with few labels."""

    name: str
    """Name of the preset, and of the folder under runs/ if --out is left out."""
    data: Path | None = None
    """An .npz (MedMNIST's layout, or images, labels, groups) or a folder of pictures or DICOM; else phantoms."""
    out: Path | None = None
    """Folder for checkpoints, logs, table and pictures. A new one under runs/ if left out."""
    resume: bool = False
    """Continue the run in --out, or the preset's latest under runs/."""
    seconds: float | None = None
    """Stop pretraining after as many seconds, with as many epochs of each method; --resume continues. No limit if left
    out."""
    methods: tuple[str, ...] = ("byol", "dissect", "dissect_codes")
    """Names of methods; each has its own options below. An untrained encoder is always in the table."""
    weights: Path | None = None
    """State file of an ImageNet ResNet-18: its encoder joins the table as "imagenet". For the preset `paper`."""
    image_size: int = 64
    """Side of the images in pixels."""
    phantoms: int = 2000
    """Number of phantoms to draw if there are no --data."""
    subsets: int = 5
    """Random subsets of the labels for each share below 100%."""
    seed: int = 0
    """Of the split, the weights, the batches and the label subsets."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    options: Annotated[dict[str, Any], tyro.conf.arg(name="")] = field(default_factory=default_options)
    """Of each method, by its name."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimization: Optimization = field(default_factory=Optimization)
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)

    def pretraining(self, method: str, *, device: str = "cpu") -> Pretraining:
        """Return the settings of one method's run."""
        return Pretraining(
            method,
            self.options[method],
            encoder=self.encoder,
            augmentation=self.augmentation,
            optimization=self.optimization,
            seed=self.seed,
            device=device,
        )


SMALL_ENCODER = EncoderOptions(width=12, stem_stride=2)
SMALL_BYOL = BYOLOptions(hidden_dim=512, momentum=0.99)
SMALL_DISSECT = DiSSECTOptions(byol=SMALL_BYOL, codebook_size=256)
SMALL_OPTIONS = default_options() | {
    "byol": SMALL_BYOL,
    "dissect": SMALL_DISSECT,
    "dissect_codes": DiSSECTCodesOptions(dissect=SMALL_DISSECT),
    "dissect_places": DiSSECTPlacesOptions(dissect=SMALL_DISSECT),
    # Heads as wide as BYOL's, and a teacher as fast.
    "coboom": CoBooMOptions(byol=SMALL_BYOL, codebook_size=256, hidden_dim=512),
    "dino": DINOOptions(prototypes=256, hidden_dim=512, momentum=0.99),
    "mlvicx": MLVICXOptions(dim=512, side_dim=128),
    "adamv2": AdamV2Options(prototypes=256, hidden_dim=512, momentum=0.99),
    "otcxr": OTCXROptions(dim=128, hidden_dim=512),
}
# With the paper's crop and flip alone, a small encoder learns brightness as a shortcut. Harder views than these (crops
# from 0.4, jitter 0.4) are not learnt in 800 steps, and the features fall behind the random encoder's.
SMALL_AUGMENTATION = Augmentation(crop_scale=(0.6, 1.0), jitter=0.2)

PRESETS = {
    "demo": (
        "Generated phantoms, a few minutes on two CPU cores.",
        Experiment(
            "demo",
            image_size=32,
            phantoms=5000,
            encoder=replace(SMALL_ENCODER, width=8),
            options=SMALL_OPTIONS,
            # Weaker crops: a phantom's findings are small, and a finding that is cropped away is not learnt.
            augmentation=Augmentation(crop_scale=(0.7, 1.0), jitter=0.2),
            optimization=Optimization("adamw", lr=4e-3, weight_decay=1e-4, batch_size=64, epochs=14, warmup_epochs=2),
        ),
    ),
    "small": (
        "For a CPU and real data: a narrow ResNet at 32 px, about 800 steps on 4,400 images.",
        Experiment(
            "small",
            image_size=32,
            encoder=SMALL_ENCODER,
            options=SMALL_OPTIONS,
            augmentation=SMALL_AUGMENTATION,
            optimization=Optimization("adamw", lr=2e-3, weight_decay=1e-4, batch_size=64, epochs=12, warmup_epochs=1),
        ),
    ),
    "paper": (
        "The paper's: ResNet-18 at 224 px, three codebooks of 2048, LARS for 300 epochs. For a GPU.",
        Experiment("paper", image_size=224),
    ),
}
