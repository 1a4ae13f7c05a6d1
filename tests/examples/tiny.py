"""The smallest settings that exercise everything: a narrow encoder, 16 codes, three epochs of three steps."""

from dataclasses import replace
from typing import Any

from examples.pretrain.augment import Augmentation
from examples.pretrain.encoder import Encoder, EncoderOptions
from examples.pretrain.methods import METHODS, default_options
from examples.pretrain.methods.adamv2 import AdamV2Options
from examples.pretrain.methods.byol import BYOLOptions
from examples.pretrain.methods.coboom import CoBooMOptions
from examples.pretrain.methods.dino import DINOOptions
from examples.pretrain.methods.dira import DiRAOptions
from examples.pretrain.methods.dissect_codes import DiSSECTCodesOptions
from examples.pretrain.methods.dissect_options import DiSSECTOptions
from examples.pretrain.methods.dissect_places import DiSSECTPlacesOptions
from examples.pretrain.methods.mlvicx import MLVICXOptions
from examples.pretrain.methods.otcxr import OTCXROptions
from examples.pretrain.methods.pcrlv2 import PCRLv2Options
from examples.pretrain.methods.simsiam import SimSiamOptions
from examples.pretrain.methods.transvw import TransVWOptions
from examples.pretrain.optimization import Optimization
from examples.pretrain.train import Pretraining

ENCODER = EncoderOptions(width=8, stem_stride=2)
BYOL = BYOLOptions(dim=8, hidden_dim=16, momentum=0.9)
DISSECT = DiSSECTOptions(byol=BYOL, codebook_size=16)
OPTIONS: dict[str, Any] = {
    **default_options(),
    "byol": BYOL,
    "dissect": DISSECT,
    "dissect_codes": DiSSECTCodesOptions(dissect=DISSECT, hidden_dim=16),
    "dissect_places": DiSSECTPlacesOptions(dissect=DISSECT, hidden_dim=16),
    "simsiam": SimSiamOptions(dim=8, bottleneck=4),
    "coboom": CoBooMOptions(byol=BYOL, codebook_size=16, hidden_dim=16),
    "dino": DINOOptions(prototypes=16, hidden_dim=16, bottleneck=8, momentum=0.9),
    "pcrlv2": PCRLv2Options(dim=8, hidden_dim=16),
    "dira": DiRAOptions(dim=8, hidden_dim=16, queue=32, momentum=0.9, warmup=0.0),
    "transvw": TransVWOptions(words=4, members=8),
    "mlvicx": MLVICXOptions(dim=16, side_dim=8),
    "adamv2": AdamV2Options(prototypes=16, hidden_dim=16, bottleneck=8, momentum=0.9, alone=0.0),
    "otcxr": OTCXROptions(dim=8, hidden_dim=16),
}
QUICK = Optimization("adamw", lr=1e-3, weight_decay=1e-4, batch_size=16, epochs=3, warmup_epochs=1)


def pretraining(method: str = "dissect", optimization: Optimization = QUICK, **changes: Any) -> Pretraining:
    """Return tiny settings; `changes` are the method's own options."""
    options = replace(OPTIONS[method], **changes)
    return Pretraining(method, options, ENCODER, Augmentation(), optimization)


def tiny_method(name: str, options: Any = None, encoder: EncoderOptions = ENCODER, total_steps: int = 10) -> Any:
    """Return a tiny method for grey images."""
    return METHODS[name](
        Encoder(1, encoder), OPTIONS[name] if options is None else options, total_steps=total_steps, seed=0
    )
