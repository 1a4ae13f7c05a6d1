"""Images from npz files: MedMNIST's layout, named arrays, and damaged or foreign files."""

import io
import zipfile

import numpy as np
import pytest

from examples.pretrain.data import load_images, train_test_split
from tests.examples.data.loading import refuses, says

IMAGES = np.zeros((3, 4, 4), np.uint8)


def write(folder, **arrays):
    path = folder / "data.npz"
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "test")])
@pytest.mark.parametrize("colour", [(), (3,)], ids=["grey", "rgb"])
def test_medmnist_keeps_its_splits(tmp_path, rng, parts, colour):
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


@pytest.mark.parametrize("side", [28, 64, 128, 224])
def test_medmnist_of_every_size_is_read(tmp_path, rng, side):
    arrays = {f"{part}_images": rng.integers(0, 256, (2, side, side), np.uint8) for part in ("train", "val", "test")}
    labels = {f"{part}_labels": np.array([[0], [1]], np.uint8) for part in ("train", "val", "test")}
    data = load_images(write(tmp_path, **arrays, **labels), side)
    np.testing.assert_array_equal(data.images, np.concatenate(list(arrays.values())))


def test_medmnist_findings_are_multi_hot(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]], np.uint8)
    path = write(tmp_path, train_images=IMAGES, train_labels=labels, test_images=IMAGES, test_labels=labels)
    data = load_images(path, 4)
    np.testing.assert_array_equal(data.labels, np.concatenate([labels, labels]))
    assert data.labels.dtype == np.uint8
    assert data.label_names == ("finding 0", "finding 1", "finding 2")


def test_named_arrays_are_cropped_and_an_official_split_is_ignored(tmp_path, rng):
    images = rng.integers(0, 65536, (4, 6, 8), np.uint16)
    masks = rng.choice(np.array([0, 1, 2, 3, 80], np.uint8), (4, 6, 8))
    path = write(
        tmp_path,
        images=images.astype(">u2"),
        labels=np.array(["viral", "none", "none", "bacterial"]),
        groups=np.array(["p1", "p2", "p1", "p3"]),
        masks=masks,
        mask_kind="bits",
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


def test_images_alone_are_enough(tmp_path):
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
def test_labels_become_class_numbers_or_findings(tmp_path, labels, codes, names):
    masks = np.ones((3, 4, 4), bool)
    data = load_images(write(tmp_path, images=IMAGES, labels=labels, masks=masks), 4)
    assert data.labels.tolist() == codes
    assert data.label_names == names
    assert data.masks.dtype == np.uint8


@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, -1])
def test_a_truncated_npz_is_refused(tmp_path, rng, kept):
    path = write(tmp_path, images=rng.integers(0, 256, (9, 9, 9), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    refuses(path, "not a readable .npz", "truncated", "numpy.savez_compressed")


def test_a_damaged_npz_is_refused(tmp_path, rng):
    path = write(tmp_path, images=rng.integers(0, 256, (9, 9, 9), np.uint8))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    refuses(path, "`images`", "damaged", "again")


@pytest.mark.parametrize(
    ("kept", "parts"),
    [(0, ("not a numpy array", "numpy.savez")), (80, ("damaged", "again")), (200, ("damaged", "again"))],
)
def test_an_npz_with_a_short_array_is_refused(tmp_path, kept, parts):
    array = io.BytesIO()
    np.save(array, np.zeros((9, 9, 9), np.uint8))
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", array.getvalue()[:kept])
    refuses(path, "`images`", *parts)


def test_a_header_of_more_values_than_memory_holds_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 32, 32)})
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    refuses(path, "`images`", "more values than memory holds", "damaged")


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
def test_arrays_of_another_layout_are_refused(tmp_path, arrays, parts):
    refuses(write(tmp_path, **arrays), *parts)


def test_files_that_are_no_npz_are_refused(tmp_path):
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


# ---- axes and labels as other programs write them ----


@pytest.mark.parametrize(
    ("shape", "cure", "right"),
    [
        ((5, 9, 9, 1), "images[..., 0]", lambda images: images[..., 0]),
        ((5, 9, 9, 4), "images[..., :3]", lambda images: images[..., :3]),
        ((5, 1, 9, 9), "images[:, 0]", lambda images: images[:, 0]),
        ((5, 3, 9, 9), "np.moveaxis(images, 1, -1)", lambda images: images.transpose(0, 2, 3, 1)),
        ((5, 4, 9, 9), "np.moveaxis(images[:, :3], 1, -1)", lambda images: images[:, :3].transpose(0, 2, 3, 1)),
    ],
)
def test_cure_of_wrong_axes_gives_the_right_images(tmp_path, rng, shape, cure, right):
    images = rng.integers(0, 256, shape, np.uint8)
    refuses(write(tmp_path, images=images), "(N, H, W)", str(shape), cure)
    path = write(tmp_path, images=eval(cure, {"np": np, "images": images}))
    np.testing.assert_array_equal(load_images(path, 9).images, right(images))


@pytest.mark.parametrize("shape", [(5, 1, 28), (5, 3, 28), (5, 28, 4)])
def test_grey_images_with_a_side_like_channels_are_refused(tmp_path, shape):
    refuses(write(tmp_path, images=np.zeros(shape, np.uint8)), str(shape), "looks like channels")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("labels", [[0, 1, np.nan], [[0, 1], [np.nan, 1], [0, 0]]])
def test_labels_that_are_nan_are_refused_also_as_integers(tmp_path, labels):
    refuses(
        write(tmp_path, images=IMAGES, labels=np.array(labels)), "must be known, got NaN for 1", "take its image out"
    )
    for dtype in (np.int64, np.int32):
        whole = np.array(labels).astype(dtype)
        whole[np.isnan(labels)] = np.iinfo(dtype).min  # as on x86; other processors give 0
        refuses(write(tmp_path, images=IMAGES, labels=whole), "which NaN becomes", "take its image out")


def test_uncertain_findings_are_refused_in_their_own_words(tmp_path):
    labels = np.array([[0, 1], [-1, 1], [0, -1]])
    refuses(write(tmp_path, images=IMAGES, labels=labels), "got -1", "uncertain or unknown, 2 times", "0 or 1 for each")


# ---- names of labels ----


def named(folder, labels, names):
    np.savez(folder / "named.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels, label_names=names)
    return folder / "named.npz"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([3, 5, 3, 5]), ["normal", "pneumonia"]),
        (np.array([[0, 1], [1, 1], [0, 0], [1, 0]]), ["nodule", "effusion"]),
    ],
)
def test_a_file_names_its_classes_or_findings(tmp_path, labels, names):
    assert load_images(named(tmp_path, labels, np.array(names)), 8).label_names == tuple(names)


@pytest.mark.parametrize(
    "names",
    [
        np.array(["one"]),
        np.array(["same", "same"]),
        np.array([0, 1]),
        np.array([["a", "b"]]),
        np.array(["a", "b", "c"]),
    ],
)
@pytest.mark.parametrize("labels", [np.array([3, 5, 3, 5]), np.array([[0, 1], [1, 1], [0, 0], [1, 0]])])
def test_names_that_do_not_fit_the_labels_are_refused(tmp_path, labels, names):
    with pytest.raises(
        ValueError, match=r"named\.npz: `label_names` must be 2 different strings, one a (class|finding)"
    ):
        load_images(named(tmp_path, labels, names), 8)
