"""A zip of images and an npz of their labels become a folder that loads as the original arrays."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from examples.pretrain.data import load_images
from examples.pretrain.data.labelled_folder import labelled_folder


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def parts(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8), np.uint8)
    names = np.array(["e.png", "b.png", "d.png", "a.png", "c.png"])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(str(name), png(image))
    about = {"names": names, "groups": np.array(["p", "q", "p", "r", "s"]), "labels": np.array([2, 0, 2, 1, 0])}
    np.savez(tmp_path / "about.npz", **about)
    return tmp_path, images, about


def test_every_image_keeps_its_label_and_group(parts):
    folder, images, about = parts
    for _ in range(2):  # a second time into the same folder too
        made = labelled_folder(folder / "images.zip", folder / "about.npz", folder / "made")
    data = load_images(made, 8, progress=False)
    order = np.argsort(about["names"])
    np.testing.assert_array_equal(data.images, images[order])
    np.testing.assert_array_equal(data.labels, about["labels"][order])
    np.testing.assert_array_equal(data.groups, about["groups"][order])


def test_a_table_of_other_images_is_refused_on_loading(parts):
    folder, _, about = parts
    np.savez(folder / "about.npz", **{name: values[:4] for name, values in about.items()})
    made = labelled_folder(folder / "images.zip", folder / "about.npz", folder / "made")
    with pytest.raises(ValueError, match=r"1 images have no row, first 'c\.png'"):
        load_images(made, 8, progress=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": None}, r"must hold names, groups and labels of the images, got names, labels"),
        ({"labels": np.arange(3)}, r"a name, a group and a label for each image, got \[5, 5, 3\]"),
    ],
)
def test_an_incomplete_table_is_refused_before_anything_is_unpacked(parts, changes, says):
    folder, _, about = parts
    np.savez(folder / "about.npz", **{name: value for name, value in {**about, **changes}.items() if value is not None})
    with pytest.raises(ValueError, match=says):
        labelled_folder(folder / "images.zip", folder / "about.npz", folder / "made")
    assert not (folder / "made").exists()
