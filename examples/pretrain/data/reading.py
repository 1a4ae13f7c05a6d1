"""The choices of a reader: what files leave open, as options of every command that reads images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Policy = Literal["zeros", "ones", "ignore", "leave-out"]


@dataclass(frozen=True)
class Reading:
    """How images, masks and findings are read where their files leave a choice."""

    skip_bad: bool = False
    """Leave out images that cannot be read, and list them; otherwise the first one ends the load."""
    mask_kind: Literal["classes", "bits"] | None = None
    """Values of masks: class numbers 1 to 8 (255 is ignored), or bits, one a structure. Asked for where it matters."""
    cache: Path | None = None
    """Directory for the decoded images of folders: they are decoded once, and not held in memory."""
    unknown: Policy | None = None
    """What findings that a table leaves blank count as. ignore: not at all, in losses and AUC; leave-out: their images
    are left out. Asked for where it matters."""
    uncertain: Policy | None = None
    """The same for findings of -1."""
