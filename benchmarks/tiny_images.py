"""Write what `gpu_science.sh` reads, of a few generated X-rays: python -m benchmarks.tiny_images FOLDER."""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from examples.pretrain.phantoms import make_phantoms


def write_tiny_images(folder: Path, count: int = 96, image_size: int = 32) -> None:
    """Write `images.zip` of PNGs, `about.npz` of their names, groups and labels, and `masks.npz` of their lesions."""
    drawn = make_phantoms(count, image_size)
    assert drawn.labels is not None
    assert drawn.masks is not None
    assert drawn.groups is not None
    names = [f"{number:04}.png" for number in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, image in zip(names, drawn.images, strict=True):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "png")
            archive.writestr(name, content.getvalue())
    np.savez(folder / "about.npz", names=names, groups=drawn.groups, labels=drawn.labels.any(1).astype(int))
    np.savez(folder / "masks.npz", images=drawn.images, groups=drawn.groups, masks=drawn.masks, mask_kind="bits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_tiny_images(parser.parse_args().folder)
