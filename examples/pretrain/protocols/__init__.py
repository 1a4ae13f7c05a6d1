"""Protocols that evaluate a pretrained encoder, one a file. To add one: write its file, and add its line below."""

from examples.pretrain.protocols import anatomy, codes, finetune, lesion_cells, linear, localise, segment
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject

__all__ = ["PROTOCOLS", "Protocol", "Scores", "Settings", "Subject"]

PROTOCOLS: dict[str, Protocol] = {
    "linear": linear.PROTOCOL,
    "finetune": finetune.PROTOCOL,
    "segment-frozen": segment.FROZEN,
    "segment-tuned": segment.TUNED,
    "localise": localise.PROTOCOL,
    "lesion-cells": lesion_cells.PROTOCOL,
    "anatomy": anatomy.PROTOCOL,
    "codes": codes.PROTOCOL,
}
