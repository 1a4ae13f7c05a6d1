"""What the folders of images mean: classes, splits, folds, or images beside their masks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from examples.pretrain.data.catalogue import Catalogue, read_image
from examples.pretrain.data.imageset import number_classes
from examples.pretrain.data.reading import Reading

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FOLD = re.compile(r"(k-?)?fold[ _-]?\d+")
CURE = "write labels.csv with the columns name, group and label, or one of the last two, beside them"


def by_folders(names: list[str], folder: Path) -> Catalogue:
    """Return a catalogue of images that no table describes, with what their folders mean.

    * `train/CLASS/`, `val/CLASS/`, `test/CLASS/` are a split with classes; `train/` and `test/` alone are a split.
      Without a test folder, the validation folder is the test side. One of them alone names no split.
    * `fold0/CLASS/`, `fold1/CLASS/`, ... are folds: images of one fold stay on one side of a split that is drawn.
    * Several folders that hold all images are classes.
    * Otherwise, the images have no labels.

    Raises:
        ValueError: folders of a split stand beside others, or hold images with and without a class.
    """
    tops = [_top(name) for name in names]
    kinds = {top.lower() for top in tops if top is not None}
    splits, folds = kinds & SPLITS.keys(), {kind for kind in kinds if FOLD.fullmatch(kind)}
    if splits or folds:
        meant = splits or folds
        if meant != kinds or None in tops:
            others = sorted(kinds - meant) or "images outside of them"
            raise ValueError(
                f"{folder}: the folders {', '.join(sorted(meant))} are read as {'a split' if splits else 'folds'} and "
                f"must hold all images, got {others} beside them: move those, or {CURE}"
            )
        inner = _classes([name.partition("/")[2] for name in names], folder)
        if len(kinds) == 1:
            return replace(inner, names=names)
        if splits:
            return replace(inner, names=names, split=_split(tops))
        return replace(inner, names=names, groups=np.array(tops))
    if None in tops or len(set(tops)) < 2:
        return Catalogue(names)
    return replace(_classes(names, folder), names=names)


def _top(name: str) -> str | None:
    return name.split("/")[0] if "/" in name else None


def _split(tops: list[str | None]) -> np.ndarray:
    sides = np.array([SPLITS[str(top).lower()] for top in tops])
    if "test" not in sides:
        sides[sides == "val"] = "test"
    return sides


def _classes(names: list[str], folder: Path) -> Catalogue:
    """Return the first level of folders as classes; no labels if there are none."""
    tops = [_top(name) for name in names]
    if tops.count(None) == len(tops):
        return Catalogue(names)
    if None in tops:
        raise ValueError(
            f"{folder}: all images of a split or fold must be in a folder of their class, or none, got "
            f"{names[tops.index(None)]!r} outside: move it, or {CURE}"
        )
    try:
        labels, label_names = number_classes(np.array(tops))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Catalogue(names, labels, label_names)


def is_masked(names: list[str]) -> bool:
    """Return True for a tree of `images/` and `masks/` and nothing else."""
    return {name.split("/")[0].lower() if "/" in name else "" for name in names} == {"images", "masks"}


def pair_masks(names: list[str], folder: Path, reading: Reading) -> Catalogue:
    """Return the images of `images/` with the masks of `masks/`, of the same name, perhaps with `_mask` at its end.

    Raises:
        ValueError: an image has no mask, or a mask no image.
    """
    images = {_stem(name): name for name in names if name.lower().startswith("images/")}
    masks = {_stem(name): name for name in names if name.lower().startswith("masks/")}
    if len(images) + len(masks) < len(names):
        raise ValueError(f"{folder}: two images, or two masks, differ in their suffix only: take one out")
    alone = sorted([*(images.keys() - masks.keys()), *(masks.keys() - images.keys())])
    if alone:
        raise ValueError(
            f"{folder}: images/ and masks/ must hold files of the same names, got {alone[0]!r} in one of them only "
            f"(and {len(alone) - 1} more): add or take out its partner"
        )
    ordered = sorted(images)
    inner = by_folders([images[stem].partition("/")[2] for stem in ordered], folder / "images")
    return replace(
        inner,
        names=[images[stem] for stem in ordered],
        mask_of=_MaskFiles(folder, {images[stem]: masks[stem] for stem in ordered}),
        mask_kind=reading.mask_kind,
        depends=tuple(masks[stem] for stem in ordered),
    )


@dataclass(frozen=True)
class _MaskFiles:
    """The masks of images, in files of their own by the names of the images."""

    folder: Path
    files: dict[str, str]

    def __call__(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        path = self.folder / self.files[name]
        mask = read_image(path)
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise ValueError(f"{path}: a mask must be grey of 8 bits, got {mask.shape} {mask.dtype}: convert it")
        if mask.shape == shape:
            return mask
        if mask.shape[0] * shape[1] == mask.shape[1] * shape[0]:
            return resize_to(mask, shape)
        raise ValueError(f"{path}: a mask must have the shape of its image, {shape}, got {mask.shape}: resize it")


def resize_to(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a mask at the shape of its image, by its nearest values."""
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))


def _stem(name: str) -> str:
    path = PurePosixPath(name.partition("/")[2])
    return (path.parent / path.stem.removesuffix("_mask")).as_posix()
