"""A folder of images with `labels.csv`, made from a zip of images and an npz of their labels.

python -m examples.pretrain.data.labelled_folder kermany_cxr_224.zip kermany_cxr_64.npz kermany-224
python3 examples paper --data kermany-224
"""

from __future__ import annotations

import contextlib
import csv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from examples.pretrain.endings import told
from examples.pretrain.unwritten import writing


def labelled_folder(
    images: tyro.conf.Positional[Path], about: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path]
) -> Path:
    """Unpack a zip and write the table of its labels beside the images.

    `load_images` checks that table and images belong together.

    Args:
        images: a zip of images.
        about: an npz with `names` as in the zip, `labels` and `groups`, ``(N,)`` each.
        folder: the destination; created if needed. Files of the same name are overwritten.

    Returns:
        `folder`.

    Raises:
        ValueError: the npz lacks one of the three, or they differ in length; or one of the files is damaged.
        Unwritten: the folder cannot be written to.
    """
    columns = ("names", "groups", "labels")
    with _whole_zip(about), np.load(about) as file:
        missing = [name for name in columns if name not in file]
        if missing:
            raise ValueError(
                f"{about} must hold names, groups and labels of the images, got {', '.join(file) or 'nothing'}"
            )
        rows = [file[name] for name in columns]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(f"{about} must hold a name, a group and a label for each image, got {lengths} of them")
    with _whole_zip(images), zipfile.ZipFile(images) as archive, writing(folder):
        archive.extractall(folder)
    with writing(folder / "labels.csv"), (folder / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["name", "group", "label"])
        writer.writerows(zip(*rows, strict=True))
    return folder


@contextlib.contextmanager
def _whole_zip(path: Path) -> Iterator[None]:
    try:
        yield
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} must be a whole zip, and is not ({error}): fetch it again") from error


if __name__ == "__main__":
    with told():
        print(tyro.cli(labelled_folder))
