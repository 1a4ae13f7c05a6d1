"""Images from files and folders, and the split. Every message is held to its three parts: rule, what came, cure."""

import doctest
import importlib
import io
import zipfile

import numpy as np
import pydicom
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset

from examples.pretrain.data import ImageSet, load_images, train_test_split
from examples.pretrain.data.resize import resize


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def says(error, *parts):
    """Whether the message has all parts, in this order."""
    message, at = str(error.value), 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not where it should be in {message!r}"
        at = message.index(part, at) + len(part)


def refuses(path, *parts, size=4):
    """Loading fails and names the path first."""
    with pytest.raises(ValueError, match=r".+") as error:
        load_images(path, size, progress=False)
    says(error, str(path), *parts)


@pytest.mark.parametrize("name", ["data.imageset", "data.folder", "data.split", "phantoms"])
def test_the_examples_in_the_docstrings_hold(name):
    failed, _ = doctest.testmod(importlib.import_module(f"examples.pretrain.{name}"), optionflags=doctest.ELLIPSIS)
    assert failed == 0


# ---- ImageSet ----


def test_an_image_set_carries_everything_into_a_subset(rng):
    data = ImageSet(
        rng.integers(0, 256, (4, 6, 6, 3), np.uint8),
        np.array([0, 1, 2, 1]),
        np.array(["a", "b", "b", "c"]),
        rng.integers(0, 2, (4, 6, 6), np.uint8),
        np.array(["train", "test", "val", "test"]),
        ("x", "y", "z"),
    )
    for index in ([3, 1], np.array([False, True, False, True]), slice(1, 3), []):
        part = data.subset(index)
        where = np.arange(4)[index if len(part) else slice(0)]
        assert len(part) == len(where) == (0 if isinstance(index, list) and not index else 2)
        for name in ("images", "labels", "groups", "masks", "split"):
            np.testing.assert_array_equal(getattr(part, name), getattr(data, name)[where])
        assert part.label_names == data.label_names
    assert data.channels == 3
    assert ImageSet(data.masks).channels == 1


IMAGES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"images": IMAGES.astype(np.float32)}, ("uint8 or uint16", "float32", "scale")),
        ({"images": IMAGES[0]}, ("(N, H, W)", "(4, 4)", "drop")),
        ({"images": IMAGES[..., None]}, ("(N, H, W)", "(3, 4, 4, 1)", "images[..., 0]")),
        ({"images": IMAGES[:, :3]}, ("square", "(3, 3, 4)", "load_images")),
        ({"labels": np.zeros(2, int)}, ("labels", "each of the 3", "(2,)", "same list")),
        ({"labels": np.zeros(3)}, ("labels", "integer", "float64")),
        ({"labels": np.zeros((3, 2, 2), int)}, ("labels", "(N, L)", "(3, 2, 2)")),
        ({"groups": np.zeros((3, 1), int)}, ("groups", "(N,)", "(3, 1)", "each patient")),
        ({"groups": np.zeros(3)}, ("groups", "integers or strings", "float64", "each patient")),
        ({"masks": np.zeros((3, 2, 2), np.uint8)}, ("masks", "(3, 4, 4)", "(3, 2, 2)", "size of the images")),
        ({"masks": np.zeros((3, 4, 4))}, ("masks", "uint8", "float64", "astype")),
        ({"split": np.array("train")}, ("split", "each of the 3", "()")),
    ],
)
def test_an_image_set_refuses_what_does_not_fit(arguments, parts):
    with pytest.raises(ValueError, match=r".+") as error:
        ImageSet(**{"images": IMAGES, **arguments})
    says(error, *parts)


# ---- cropping and resizing ----


@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (4, 9), (4, 4), (4, 10, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_centre_square_is_cut_out_unchanged(rng, shape, dtype):
    image = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    top, left = (shape[0] - 4) // 2, (shape[1] - 4) // 2
    cut = resize(image, 4)
    assert cut.dtype == dtype
    np.testing.assert_array_equal(cut, image[top : top + 4, left : left + 4])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_shrinking_averages_and_growing_interpolates_within_the_range(dtype):
    top = np.iinfo(dtype).max
    checks = (np.indices((64, 64)).sum(0) % 2 * top).astype(dtype)
    inner = resize(checks, 8)[2:-2, 2:-2].astype(float)
    np.testing.assert_allclose(inner, top / 2, rtol=0.02)  # without antialiasing: 0 and `top`

    ramp = np.tile(np.linspace(0, top, 8), (8, 1)).astype(dtype)
    grown = resize(ramp, 32)
    assert grown.dtype == dtype
    assert (np.diff(grown.astype(int), axis=1) >= 0).all()
    assert (grown.min(), grown.max()) == (0, top)
    if dtype == np.uint16:
        assert (grown % 257 != 0).any()  # more than 8 bits survive


@given(value=st.integers(0, 65535), side=st.integers(1, 40), size=st.integers(1, 40))
def test_a_constant_stays_constant(value, side, size):
    assert (resize(np.full((side, side + 3), value, np.uint16), size) == value).all()


# ---- npz ----


def write(folder, **arrays):
    path = folder / "data.npz"
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "test")])
@pytest.mark.parametrize("colour", [(), (3,)], ids=["grey", "rgb"])
def test_a_medmnist_file(tmp_path, rng, parts, colour):
    arrays = {f"{part}_images": rng.integers(0, 256, (n, 8, 8, *colour), np.uint8) for n, part in enumerate(parts, 2)}
    arrays |= {f"{part}_labels": np.resize([[7], [3]], (n, 1)).astype(np.uint8) for n, part in enumerate(parts, 2)}
    data = load_images(write(tmp_path, **arrays), 8)
    np.testing.assert_array_equal(data.images, np.concatenate([arrays[f"{part}_images"] for part in parts]))
    assert data.split.tolist() == [part for n, part in enumerate(parts, 2) for _ in range(n)]
    assert data.label_names == ("3", "7")
    codes = np.concatenate([arrays[f"{part}_labels"].ravel() for part in parts]) == 7
    np.testing.assert_array_equal(data.labels, codes.astype(np.int64))
    assert (data.labels.dtype, data.groups, data.masks) == (np.int64, None, None)
    # the split that is named is kept, whatever fraction is asked for
    train, test = train_test_split(data, 0.9, seed=5)
    assert set(data.split[test]) == {"test"}
    assert set(data.split[train]) == set(parts) - {"test"}
    assert len(train) + len(test) == len(data)
    assert load_images(tmp_path / "data.npz", 5).images.shape == (len(data), 5, 5, *colour)


def test_a_medmnist_file_of_findings(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]], np.uint8)
    path = write(tmp_path, train_images=IMAGES, train_labels=labels, test_images=IMAGES, test_labels=labels)
    data = load_images(path, 4)
    np.testing.assert_array_equal(data.labels, np.concatenate([labels, labels]))
    assert data.labels.dtype == np.uint8
    assert data.label_names == ("finding 0", "finding 1", "finding 2")


def test_a_keyed_file(tmp_path, rng):
    images = rng.integers(0, 65536, (4, 6, 8), np.uint16)
    masks = rng.choice(np.array([0, 1, 2, 3, 80], np.uint8), (4, 6, 8))
    path = write(
        tmp_path,
        images=images.astype(">u2"),
        labels=np.array(["viral", "none", "none", "bacterial"]),
        groups=np.array(["p1", "p2", "p1", "p3"]),
        masks=masks,
        # official splits leak patients: whoever names `split` or the like gets no say
        split=np.array(["train", "test", "test", "train"]),
        official_split=np.array([0, 1, 1, 0]),
        names=np.array(["a.png", "b.png", "c.png", "d.png"]),
    )
    data = load_images(path, 6)
    assert data.images.dtype == np.dtype("=u2")
    np.testing.assert_array_equal(data.images, images[:, :, 1:7])
    np.testing.assert_array_equal(data.masks, masks[:, :, 1:7])
    assert data.labels.tolist() == [2, 1, 1, 0]
    assert data.label_names == ("bacterial", "none", "viral")
    assert data.groups.tolist() == ["p1", "p2", "p1", "p3"]
    assert data.split is None
    train, test = train_test_split(data, 0.4)
    assert not set(data.groups[train]) & set(data.groups[test])
    # masks hold bits: resizing must not invent values between them
    assert set(np.unique(load_images(path, 17).masks)) <= {0, 1, 2, 3, 80}


def test_a_keyed_file_needs_only_images(tmp_path):
    data = load_images(str(write(tmp_path, images=IMAGES)), np.int64(2))
    assert data.images.shape == (3, 2, 2)
    assert (data.labels, data.groups, data.masks, data.split, data.label_names) == (None, None, None, None, ())


@pytest.mark.parametrize(
    ("labels", "codes", "names"),
    [
        (np.array([5, -1, 5]), [1, 0, 1], ("-1", "5")),
        (np.array([[2], [0], [2]], np.uint8), [1, 0, 1], ("0", "2")),
        (np.array([True, False, True]), [1, 0, 1], ("False", "True")),
        (np.array([b"yes", b"no", b"yes"]), [1, 0, 1], ("no", "yes")),
        (np.array([[True, False], [False, False], [True, True]]), [[1, 0], [0, 0], [1, 1]], ("finding 0", "finding 1")),
    ],
)
def test_labels_of_a_keyed_file(tmp_path, labels, codes, names):
    masks = np.ones((3, 4, 4), bool)
    data = load_images(write(tmp_path, images=IMAGES, labels=labels, masks=masks), 4)
    assert data.labels.tolist() == codes
    assert data.label_names == names
    assert data.masks.dtype == np.uint8


@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, -1])
def test_a_truncated_npz(tmp_path, rng, kept):
    path = write(tmp_path, images=rng.integers(0, 256, (9, 9, 9), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    refuses(path, "not a readable .npz", "truncated", "numpy.savez_compressed")


def test_a_damaged_npz(tmp_path, rng):
    path = write(tmp_path, images=rng.integers(0, 256, (9, 9, 9), np.uint8))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    refuses(path, "`images`", "damaged", "again")


@pytest.mark.parametrize(
    ("kept", "parts"),
    [(0, ("not a numpy array", "numpy.savez")), (80, ("damaged", "again")), (200, ("damaged", "again"))],
)
def test_an_npz_with_a_short_array(tmp_path, kept, parts):
    array = io.BytesIO()
    np.save(array, np.zeros((9, 9, 9), np.uint8))
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", array.getvalue()[:kept])
    refuses(path, "`images`", *parts)


MED = {
    f"{part}_{kind}": IMAGES if kind == "images" else np.arange(3)
    for part in ("train", "test")
    for kind in ("images", "labels")
}


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({}, ("must hold `images`", "train_images", "no keys", "rename")),
        ({"x": IMAGES, "y": IMAGES}, ("must hold `images`", "found x, y", "rename")),
        ({f"k{i:02}": IMAGES for i in range(14)}, ("k11 and 2 more", "rename")),
        (
            {k: v for k, v in MED.items() if k != "test_labels"},
            ("test_labels", "found test_images, train_images", "rename"),
        ),
        ({"images": IMAGES / 255}, ("uint8 or uint16", "float64", "scale")),
        ({"images": IMAGES[:, :0]}, ("at least one pixel", "(3, 0, 4)")),
        ({"images": IMAGES[None, None]}, ("(N, H, W)", "(1, 1, 3, 4, 4)", "slice by slice")),
        ({"images": IMAGES, "labels": np.arange(4)}, ("labels", "each of the 3", "(4,)", "same list")),
        ({"images": IMAGES, "labels": np.arange(3.0)}, ("labels", "integers", "float64", "astype")),
        ({"images": IMAGES, "labels": np.array([[0, 2]] * 3)}, ("labels", "0 or 1", "2", "one number an image")),
        ({"images": IMAGES, "labels": np.array([["a", "b"]] * 3)}, ("labels", "0 or 1", "'a'", "one number an image")),
        ({"images": IMAGES, "labels": np.array([{}] * 3)}, ("`labels`", "pickled", "never loaded", "astype")),
        ({"images": IMAGES, "groups": np.arange(2)}, ("groups", "each of the 3", "(2,)", "same list")),
        ({"images": IMAGES, "groups": np.arange(3.0)}, ("groups", "integers or strings", "float64", "each patient")),
        ({"images": IMAGES, "masks": IMAGES[:2]}, ("masks", "(3, 4, 4)", "(2, 4, 4)", "size of the images")),
        ({**MED, "train_labels": np.arange(2)}, ("train_labels", "each of the 3", "(2,)", "same list")),
        (
            {**MED, "test_images": np.zeros((3, 5, 5), np.uint8)},
            ("images of all splits", "agree", "test (3, 5, 5) uint8"),
        ),
        ({**MED, "test_labels": np.zeros((3, 2), int)}, ("labels of all splits", "agree", "test (3, 2)")),
    ],
)
def test_an_npz_that_does_not_fit(tmp_path, arrays, parts):
    refuses(write(tmp_path, **arrays), *parts)


def test_files_that_are_no_npz(tmp_path):
    text, array, pictures = tmp_path / "a.npz", tmp_path / "b.npy", tmp_path / "c.zip"
    text.write_text("no numbers here")
    np.save(array, IMAGES)
    with zipfile.ZipFile(pictures, "w") as archive:
        archive.writestr("one.jpeg", b"JFIF")
    refuses(text, "not a readable .npz", "another format", "folder of images")
    refuses(array, "single .npy array", "numpy.savez")
    refuses(pictures, "must hold `images`", "one.jpeg", "unpack a zip")
    with pytest.raises(FileNotFoundError) as error:
        load_images(tmp_path / "absent", 4)
    says(error, "no file or folder", "absent", "give an .npz")


@pytest.mark.parametrize(
    ("size", "kind", "got"),
    [(0, ValueError, "0"), (-3, ValueError, "-3"), (32.0, TypeError, "32.0"), (True, TypeError, "True")],
)
def test_image_size_is_a_positive_whole_number(tmp_path, size, kind, got):
    with pytest.raises(kind) as error:
        load_images(write(tmp_path, images=IMAGES), size)
    says(error, "image_size must be", got)


# ---- pictures in a folder ----


def grey(rng, shape=(6, 6), dtype=np.uint8):
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def save(folder, name, array, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read(folder, size=6):
    return load_images(folder, size, progress=False)


def test_pictures_are_read_in_the_order_of_their_names(tmp_path, rng, capsys):
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


def test_grey_rgb_and_palette_pictures(tmp_path, rng):
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
def test_jpeg(tmp_path, colour, suffix):
    array = np.tile(np.arange(0, 240, 15, dtype=np.uint8), (16, 1))
    array = np.stack([array, array[::-1].T, 255 - array], -1) if colour else array
    save(tmp_path, f"one.{suffix}", array, quality=95, subsampling=0) if colour else save(
        tmp_path, f"one.{suffix}", array
    )
    images = read(tmp_path, 16).images
    assert images.shape == (1, *array.shape)
    np.testing.assert_allclose(images[0].astype(int), array.astype(int), atol=8)


def test_a_photograph_is_turned_upright(tmp_path):
    array = np.tile(np.arange(0, 240, 15, dtype=np.uint8), (16, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    save(tmp_path, "one.jpg", array, exif=exif)
    np.testing.assert_allclose(read(tmp_path, 16).images[0].astype(int), array[::-1, ::-1].astype(int), atol=8)


def test_16_bit_png_keeps_its_depth_and_lifts_the_others_to_it(tmp_path, rng):
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


def test_pictures_of_all_sizes_become_one(tmp_path, rng):
    for i, shape in enumerate([(3, 9), (20, 11), (6, 6), (1, 1)]):
        save(tmp_path, f"{i}.png", grey(rng, shape))
    assert read(tmp_path).images.shape == (4, 6, 6)


# ---- labels of a folder ----


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
def test_labels_csv(tmp_path, rng, table, labels, names, groups):
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
def test_a_labels_csv_that_does_not_fit(tmp_path, rng, table, parts):
    path = folder_of(tmp_path, rng) / "labels.csv"
    path.write_text(table)
    # before any image is opened: this one is damaged, and the table is named all the same
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, str(path), *parts)


def test_a_labels_csv_of_another_encoding(tmp_path, rng):
    path = folder_of(tmp_path, rng) / "labels.csv"
    path.write_bytes(rows("1.png,früh", *THREE[1:]).encode("latin-1"))
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, str(path), "UTF-8", "save it as")


def test_sub_folders_are_classes_where_all_images_are_in_one_of_several(tmp_path, rng):
    data = read(folder_of(tmp_path, rng, ("well/1.png", "ill/9.png", "well/deep/2.png")))
    assert data.labels.tolist() == [0, 1, 1]  # ill/9, well/1, well/deep/2
    assert data.label_names == ("ill", "well")
    assert data.groups is None
    save(tmp_path, "stray.png", grey(rng))
    assert read(tmp_path).labels is None
    assert read(tmp_path / "well").labels is None
    save(tmp_path, "one/only/1.png", grey(rng))
    assert read(tmp_path / "one").labels is None  # a single class says nothing


def test_a_folder_without_images(tmp_path):
    (tmp_path / "labels.csv").write_text("name,class\n")
    (tmp_path / "scan.tif").write_bytes(b"II*\0")
    refuses(tmp_path, "no images found", ".png, .jpg, .jpeg, .dcm or .dicom", "sub-folders")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.dcm"])
@pytest.mark.parametrize("kept", [0, 20, 0.7, "text"])
def test_a_corrupt_image_names_its_file(tmp_path, rng, name, kept):
    save(tmp_path, "a.png", grey(rng))
    path = tmp_path / "sub" / name
    if name == "x.dcm":
        path.parent.mkdir()
        write_dicom(path, grey(rng, (64, 64)))
    else:
        save(tmp_path / "sub", name, grey(rng, (64, 64)))
    whole = path.read_bytes()
    path.write_bytes(
        b"text, not pixels" if kept == "text" else whole[: int(kept * len(whole)) if kept == 0.7 else kept]
    )
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, str(path), "cannot be read as an image", "take it out of the folder")


# ---- DICOM ----


def write_dicom(path, pixels, kind="MONOCHROME2", bits=None, **tags):
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    file.SOPInstanceUID = "1.2.3.4"
    file.set_pixel_data(pixels, kind, bits or pixels.dtype.itemsize * 8)
    for tag, value in tags.items():
        setattr(file, tag, value)
    file.save_as(path, enforce_file_format=True)
    return file


def read_dicom(folder, *arguments, **tags):
    write_dicom(folder / "one.dcm", *arguments, **tags)
    image = read(folder).images[0]
    assert image.dtype == np.uint16
    return image


def full(share):
    return np.rint(65535 * share)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 10), (np.uint16, 12), (np.uint16, 16)])
def test_dicom_depths_and_monochrome1(tmp_path, rng, dtype, bits):
    top = 2**bits - 1
    pixels = rng.integers(0, top, (6, 6), dtype, endpoint=True)
    pixels[0, :2] = 0, top
    shown = read_dicom(tmp_path, pixels, "MONOCHROME2", bits)
    np.testing.assert_array_equal(shown, full(pixels / top))
    assert shown[0, :2].tolist() == [0, 65535]
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, "MONOCHROME1", bits), 65535 - shown)


def test_signed_dicom_fills_the_range_from_its_lowest_value(tmp_path, rng):
    pixels = rng.integers(-2048, 2048, (6, 6), np.int16)
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, bits=12), full((pixels + 2048) / 4095))


@pytest.mark.parametrize(("slope", "intercept"), [(2, -1024), (0.5, 7), (-1, 4095)])
def test_a_rescale_keeps_or_turns_the_order(tmp_path, rng, slope, intercept):
    pixels = rng.integers(0, 4096, (6, 6), np.uint16)
    shown = read_dicom(tmp_path, pixels, bits=12, RescaleSlope=slope, RescaleIntercept=intercept)
    share = pixels / 4095
    np.testing.assert_array_equal(shown, full(share if slope > 0 else 1 - share))


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(("slope", "intercept"), [(None, None), (1, -1000), (-1, 4095), (-2, 100)])
def test_a_window_is_that_of_the_standard(tmp_path, rng, slope, intercept, kind):
    pixels = rng.integers(0, 4096, (6, 6), np.uint16)
    tags = {} if slope is None else {"RescaleSlope": slope, "RescaleIntercept": intercept}
    values = pixels if slope is None else pixels.astype(float) * slope + intercept
    centre, width = float(np.median(values)), 1500
    shown = read_dicom(tmp_path, pixels, kind, 12, WindowCenter=centre, WindowWidth=width, **tags)
    # PS3.3 C.11.2.1.2: linear over the window, flat beyond
    share = np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)
    assert 0 < (share == 0).mean() < 0.6
    np.testing.assert_allclose(shown, full(share if kind == "MONOCHROME2" else 1 - share), atol=1)


@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_lookup_table(tmp_path, rng, sequence):
    pixels = rng.integers(0, 256, (6, 6), np.uint8)
    bits = 16 if sequence == "ModalityLUTSequence" else 12  # which may be 8 or 16 only, and 10 to 16
    top = 2**bits - 1
    table = rng.permutation(np.linspace(0, top, 256).astype(int)).tolist()
    item = Dataset()
    item.LUTDescriptor = [256, 0, bits]
    item.LUTData = table
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    if sequence == "ModalityLUTSequence":
        item.ModalityLUTType = "US"
    shown = read_dicom(tmp_path, pixels, **{sequence: [item]})
    np.testing.assert_array_equal(shown, full(np.array(table)[pixels] / top))


def test_colour_dicom(tmp_path, rng):
    pixels = grey(rng, (6, 6, 3))
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, "RGB"), pixels.astype(int) * 257)
    deep = rng.integers(0, 4096, (6, 6, 3), np.uint16)
    np.testing.assert_array_equal(read_dicom(tmp_path, deep, "RGB", 12), full(deep / 4095))
    pixels[...] = pixels[..., :1]
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, "RGB"), pixels[..., 0].astype(int) * 257)


def test_compressed_dicom(tmp_path, rng):
    pixels = grey(rng)
    file = write_dicom(tmp_path / "one.dcm", pixels)
    file.compress(pydicom.uid.RLELossless)
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path).images[0], pixels.astype(int) * 257)


def test_dicom_files_are_found_by_suffix_or_preamble(tmp_path, rng):
    names = ["1.dcm", "2.DICOM", "3", "sub/1.2.840.10008.7"]
    (tmp_path / "sub").mkdir()
    pixels = [grey(rng) for _ in names]
    for name, array in zip(names, pixels, strict=True):
        write_dicom(tmp_path / name, array)
    for name in ("DICOMDIR", "report.sr"):  # an index, and a suffix of something else
        write_dicom(tmp_path / name, grey(rng))
    (tmp_path / "README").write_text("no preamble")
    np.testing.assert_array_equal(read(tmp_path).images, [array.astype(int) * 257 for array in pixels])


@pytest.mark.parametrize(
    ("shape", "kind", "tags", "parts"),
    [
        ((3, 6, 6), "MONOCHROME2", {"NumberOfFrames": 3}, ("3 frames", "single frames", "split it")),
        ((6, 6), "PALETTE COLOR", {}, ("MONOCHROME1, MONOCHROME2 or RGB", "not PALETTE COLOR")),
        ((6, 6), "MONOCHROME2", {"RescaleSlope": 0, "RescaleIntercept": 1}, ("RescaleSlope is 0",)),
    ],
)
def test_dicom_that_cannot_be_read_says_why(tmp_path, rng, shape, kind, tags, parts):
    write_dicom(tmp_path / "one.dcm", grey(rng, shape), kind, **tags)
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, str(tmp_path / "one.dcm"), "cannot be read", *parts, "take it out")


# ---- the split ----


def labelled_by(numbers):
    """One tiny image for each number, equal where the numbers are."""
    return np.repeat(np.array(numbers, np.uint8), 4).reshape(-1, 2, 2)


def components(groups, contents):
    """How many sets of images nothing ties together: the slow way."""
    tied = [{("group", g), ("content", c)} for g, c in zip(groups, contents, strict=True)]
    merged = []
    for node in tied:
        touching = [other for other in merged if other & node]
        merged = [other for other in merged if not other & node] + [set().union(node, *touching)]
    return len(merged)


IMAGE = st.tuples(st.integers(0, 12), st.integers(0, 30), st.integers(0, 2))


@given(
    images=st.lists(IMAGE, min_size=1, max_size=60),
    labelled=st.booleans(),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
@example(images=[(i, i, i % 2) for i in range(12)], labelled=True, fraction=0.5, seed=0)
@example(images=[(0, 0, 0), (0, 1, 1), (1, 1, 0), (2, 2, 1)], labelled=True, fraction=0.5, seed=0)
@example(images=[(0, 0, 0), (1, 0, 1)], labelled=False, fraction=0.5, seed=0)
def test_no_patient_and_no_image_is_on_both_sides(images, labelled, fraction, seed):
    groups, contents, labels = (np.array(column) for column in zip(*images, strict=True))
    data = ImageSet(labelled_by(contents), labels if labelled else None, groups)
    if components(groups, contents) < 2:
        with pytest.raises(ValueError, match="at least 2 groups"):
            train_test_split(data, fraction, seed)
        return
    train, test = train_test_split(data, fraction, seed)
    assert sorted([*train, *test]) == list(range(len(images)))
    assert len(train) > 0
    assert len(test) > 0
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    assert not set(groups[train]) & set(groups[test])
    assert not set(contents[train]) & set(contents[test])
    again = train_test_split(data, fraction, seed)
    np.testing.assert_array_equal(again[0], train)
    np.testing.assert_array_equal(again[1], test)


def test_groups_may_be_names_and_images_without_groups_are_patients_of_their_own():
    images = labelled_by(range(40))
    names = np.array([f"p{i // 4}" for i in range(40)])
    train, test = train_test_split(ImageSet(images, groups=names), 0.3)
    assert not set(names[train]) & set(names[test])
    assert len(test) == 12
    _, test = train_test_split(ImageSet(images), 0.3)
    assert len(test) == 12
    assert len(set(test // 4)) > 3


def test_another_seed_gives_another_split():
    for data in (ImageSet(labelled_by(range(60))), ImageSet(labelled_by(range(60)), np.arange(60) % 3)):
        assert len({tuple(train_test_split(data, 0.25, seed)[1]) for seed in range(5)}) == 5


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.75])
def test_classes_are_shared_out_evenly(fraction):
    labels = np.repeat(np.arange(240) < 48, 1).astype(int)
    groups = np.random.default_rng(0).integers(0, 200, 240) * 2 + labels
    data = ImageSet((np.arange(240 * 4).reshape(240, 2, 2)).astype(np.uint16), labels, groups)
    for seed in range(8):
        _, test = train_test_split(data, fraction, seed)
        # chance alone would scatter the 48 by 2 to 4
        assert abs(labels[test].sum() - 48 * fraction) <= 2
        assert abs(len(test) - 240 * fraction) <= 6


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_the_fraction_is_between_0_and_1(fraction):
    with pytest.raises(ValueError, match="test_fraction must be between 0 and 1") as error:
        train_test_split(ImageSet(IMAGES), fraction)
    says(error, str(fraction))


def test_data_that_cannot_fill_two_sides():
    for data, got in (
        (ImageSet(IMAGES), "got 1 over 3 images"),  # three times the same
        (ImageSet(labelled_by(range(3)), groups=np.array([4, 4, 4])), "got 1 over 3 images"),
        (ImageSet(IMAGES[:0]), "got 0 over 0 images"),
    ):
        with pytest.raises(ValueError, match="at least 2 groups") as error:
            train_test_split(data)
        says(error, got, "add patients")


def test_a_named_split_must_have_two_sides_and_keep_patients_on_one():
    images = labelled_by(range(3))
    for names in (["train", "val", "train"], ["test"] * 3):
        with pytest.raises(ValueError, match="both") as error:
            train_test_split(ImageSet(images, split=np.array(names)))
        says(error, '"train" and "test"', str(sorted(set(names))), "drop the split")
    split = np.array(["train", "test", "val"])
    with pytest.raises(ValueError, match="each group on one side") as error:
        train_test_split(ImageSet(images, groups=np.array(["a", "b", "b"]), split=split))
    says(error, "1 groups", "first b", "drop the split")
    train, test = train_test_split(ImageSet(images, groups=np.array(["a", "b", "a"]), split=split))
    assert (train.tolist(), test.tolist()) == ([0, 2], [1])


def test_real_radiographs_are_split_by_patient(real_data):
    data = load_images(real_data / "kermany_cxr_64.npz", 64)
    assert data.images.shape == (5856, 64, 64)
    assert data.label_names == ("0", "1", "2")
    assert data.split is None  # the official one has 170 patients on both sides
    train, test = train_test_split(data, 0.2)
    assert len(train) + len(test) == 5856
    assert not set(data.groups[train]) & set(data.groups[test])
    assert not {data.images[i].tobytes() for i in train} & {data.images[i].tobytes() for i in test}
    assert abs(len(test) / 5856 - 0.2) < 0.02
    shares = [np.bincount(data.labels[side]) / len(side) for side in (train, test)]
    np.testing.assert_allclose(*shares, atol=0.02)
