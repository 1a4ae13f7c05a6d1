"""Images and labels from folders of PNG and JPEG files."""

import numpy as np
import pytest
from PIL import Image

from examples.pretrain.data import load_images
from tests.examples.data.loading import grey, read, refuses, save, says


def test_images_come_in_the_order_of_their_names(tmp_path, rng, capsys):
    arrays = {name: grey(rng) for name in ("b.png", "sub/c.PNG", "a.png", "Z.png")}
    for name, array in arrays.items():
        save(tmp_path, name, array)
    (tmp_path / "notes.txt").write_text("not an image")
    save(tmp_path, ".thumbnails/d.png", grey(rng))
    data = read(tmp_path)
    np.testing.assert_array_equal(data.images, [arrays[name] for name in ("Z.png", "a.png", "b.png", "sub/c.PNG")])
    assert (data.labels, data.groups, data.label_names) == (None, None, ())
    assert capsys.readouterr().err == ""
    load_images(tmp_path, 6)
    assert "4/4" in capsys.readouterr().err


def test_colour_modes_become_grey_or_rgb(tmp_path, rng):
    flat, colour = grey(rng), grey(rng, (6, 6, 3))
    kinds = {
        "grey": (flat, flat),
        "bilevel": (flat > 99, (flat > 99).astype(np.uint8) * 255),
        "alpha": (np.stack([flat, 255 - flat], -1), flat),
        "equal": (np.repeat(flat[..., None], 3, -1), flat),
        "rgb": (colour, colour),
        "rgba": (np.concatenate([colour, flat[..., None]], -1), colour),
    }
    for name, (array, expected) in kinds.items():
        save(tmp_path / name, "one.png", array)
        np.testing.assert_array_equal(read(tmp_path / name).images[0], expected, err_msg=name)
    save(tmp_path / "palette", "one.png", flat)
    Image.fromarray(colour).quantize(8).save(tmp_path / "palette" / "one.png")
    shown = np.asarray(Image.fromarray(colour).quantize(8).convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path / "palette").images[0], shown)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG"])
@pytest.mark.parametrize("colour", [False, True])
def test_jpeg_is_read(tmp_path, colour, suffix):
    array = np.tile(np.arange(0, 240, 15, dtype=np.uint8), (16, 1))
    array = np.stack([array, array[::-1].T, 255 - array], -1) if colour else array
    save(tmp_path, f"one.{suffix}", array, quality=95, subsampling=0) if colour else save(
        tmp_path, f"one.{suffix}", array
    )
    images = read(tmp_path, 16).images
    assert images.shape == (1, *array.shape)
    np.testing.assert_allclose(images[0].astype(int), array.astype(int), atol=8)


def test_exif_orientation_is_applied(tmp_path):
    array = np.tile(np.arange(0, 240, 15, dtype=np.uint8), (16, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    save(tmp_path, "one.jpg", array, exif=exif)
    np.testing.assert_allclose(read(tmp_path, 16).images[0].astype(int), array[::-1, ::-1].astype(int), atol=8)


def test_a_mix_of_depths_and_colours_becomes_16_bit_rgb(tmp_path, rng):
    deep, flat, colour = grey(rng, dtype=np.uint16), grey(rng), grey(rng, (6, 6, 3))
    save(tmp_path, "a.png", deep)
    np.testing.assert_array_equal(read(tmp_path).images, [deep])
    save(tmp_path, "b.png", flat)
    data = read(tmp_path)
    assert data.images.dtype == np.uint16
    np.testing.assert_array_equal(data.images, [deep, flat.astype(int) * 257])
    save(tmp_path, "c.png", colour)
    data = read(tmp_path)
    assert data.channels == 3
    np.testing.assert_array_equal(data.images[2], colour.astype(int) * 257)
    for channel in range(3):
        np.testing.assert_array_equal(data.images[:2, ..., channel], [deep, flat.astype(int) * 257])


def test_images_of_different_sizes_get_one_size(tmp_path, rng):
    for i, shape in enumerate([(3, 9), (20, 11), (6, 6), (1, 1)]):
        save(tmp_path, f"{i}.png", grey(rng, shape))
    assert read(tmp_path).images.shape == (4, 6, 6)


# ---- labels ----


def folder_of(tmp_path, rng, names=("1.png", "2.png", "in/3.png")):
    for name in names:
        save(tmp_path, name, grey(rng))
    return tmp_path


@pytest.mark.parametrize(
    ("table", "labels", "names", "groups"),
    [
        ("name,class\nin/3.png,well\n1.png,ill\n2.png,well\n", [0, 1, 1], ("ill", "well"), None),
        ("name,class\n1.png,10\n2.png,9\nin\\3.png,10\n", [1, 0, 1], ("9", "10"), None),
        ("name,group,class\n1.png,p,0\n2.png,q,1\nin/3.png,p,1\n", [0, 1, 1], ("0", "1"), ["p", "q", "p"]),
        ("a,name,b\n1,1.png,0\n1,2.png,1\n0,in/3.png,0\n", [[1, 0], [1, 1], [0, 0]], ("a", "b"), None),
        ("\ufeffname,class\r\n\r\n 1.png , a \r\n2.png,b\r\nin/3.png,b\r\n", [0, 1, 1], ("a", "b"), None),
    ],
    ids=["names", "numbers", "groups", "findings", "spreadsheet"],
)
def test_labels_csv_gives_classes_findings_and_groups(tmp_path, rng, table, labels, names, groups):
    (folder_of(tmp_path, rng) / "labels.csv").write_text(table, encoding="utf-8", newline="")
    data = read(tmp_path)
    assert data.labels.tolist() == labels
    assert data.labels.dtype == (np.int64 if data.labels.ndim == 1 else np.uint8)
    assert data.label_names == names
    assert groups == (None if data.groups is None else data.groups.tolist())


def rows(*lines, header="name,class"):
    return "\n".join([header, *lines]) + "\n"


THREE = ("1.png,a", "2.png,b", "in/3.png,a")


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ("", ("header", "`name`", "[]")),
        (rows("1.png", header="name"), ("header", "label columns", "['name']")),
        (rows("1.png,p", header="name,group"), ("header", "label columns", "['name', 'group']")),
        (rows(*THREE, header="file,class"), ("header", "`name`", "['file', 'class']")),
        (rows(*THREE, header="name,name"), ("header", "all different", "['name', 'name']")),
        (rows("1.png,", *THREE[1:]), ("line 2", "2 columns", "'1.png'")),
        (rows(THREE[0], "", "2.png", THREE[2]), ("line 4", "2 columns", "'2.png'")),
        (rows(*THREE[:2], "in/3.png,a,b"), ("line 4", "2 columns", "'in/3.png'")),
        (rows(*THREE, THREE[1]), ("line 5", "'2.png'", "second time", "one row")),
        (rows(*THREE[1:]), ("1 images have no row", "'1.png'", "add a row")),
        (rows(*THREE, "4.png,a", "5.png,a"), ("2 rows name no image", "'4.png'", "take them out")),
        (rows("1.png,a", "2.png,3", "in/3.png,a"), ("'class'", "all names or all whole numbers", "['3', 'a']")),
        (rows("1.png,1", "2.png,0.5", "in/3.png,1"), ("'class'", "all whole numbers", "['0.5', '1']")),
        (rows("1.png,1", "2.png,nan", "in/3.png,1"), ("'class'", "all whole numbers", "['1', 'nan']")),
        (
            rows("1.png,1,0", "2.png,0,2", "in/3.png,1,1", header="name,a,b"),
            ("findings", "0 or 1", "'2' in column 'b'", "single column"),
        ),
    ],
)
def test_a_labels_csv_that_does_not_fit_is_refused_by_line(tmp_path, rng, table, parts):
    path = folder_of(tmp_path, rng) / "labels.csv"
    path.write_text(table)
    # before any image is opened: this one is damaged, and the table is named all the same
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, str(path), *parts)


def test_a_labels_csv_must_be_utf8(tmp_path, rng):
    path = folder_of(tmp_path, rng) / "labels.csv"
    path.write_bytes(rows("1.png,früh", *THREE[1:]).encode("latin-1"))
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, str(path), "UTF-8", "save it as")


def test_sub_folders_are_classes_if_every_image_is_in_one_of_several(tmp_path, rng):
    data = read(folder_of(tmp_path, rng, ("well/1.png", "ill/9.png", "well/deep/2.png")))
    assert data.labels.tolist() == [0, 1, 1]  # ill/9, well/1, well/deep/2
    assert data.label_names == ("ill", "well")
    assert data.groups is None
    save(tmp_path, "stray.png", grey(rng))
    assert read(tmp_path).labels is None
    assert read(tmp_path / "well").labels is None
    save(tmp_path, "one/only/1.png", grey(rng))
    assert read(tmp_path / "one").labels is None  # a single class says nothing


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("name,class\n")
    (tmp_path / "scan.tif").write_bytes(b"II*\0")
    refuses(tmp_path, "no images found", ".png, .jpg, .jpeg, .dcm or .dicom", "sub-folders")
