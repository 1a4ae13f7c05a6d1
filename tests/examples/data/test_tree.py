"""What folders of images mean: classes, splits, folds, masks; and trees that mean nothing known."""

import numpy as np
import pytest

from examples.pretrain.data import Reading, load_images, train_test_split
from tests.examples.data.loading import grey, read, refuses, save


def tree(folder, rng, names):
    for name in names:
        save(folder, name, grey(rng))
    return folder


def each(*folders, count=3):
    return [f"{folder}/{folder.replace('/', '-')}{number}.png" for folder in folders for number in range(count)]


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val", "test"), ("Training", "Testing")])
def test_split_folders_with_classes_keep_both(tmp_path, rng, parts):
    data = read(tree(tmp_path, rng, each(*(f"{part}/{kind}" for part in parts for kind in ("NORMAL", "PNEUMONIA")))))
    assert data.label_names == ("NORMAL", "PNEUMONIA")
    for name, label, side in zip(data.names, data.labels, data.split, strict=True):
        assert data.label_names[label] == name.split("/")[1]
        assert name.lower().startswith(side)
    _, test = train_test_split(data)
    assert set(data.split[test]) == {"test"}


def test_split_folders_without_classes_are_a_split(tmp_path, rng):
    data = read(tree(tmp_path, rng, each("train", "test")))
    assert data.labels is None
    assert data.split.tolist() == ["test"] * 3 + ["train"] * 3


def test_validation_is_the_test_side_where_there_is_no_other(tmp_path, rng):
    data = read(tree(tmp_path, rng, each("train/a", "train/b", "valid/a", "valid/b")))
    assert set(data.split) == {"train", "test"}


def test_train_folder_alone_names_no_split(tmp_path, rng):
    data = read(tree(tmp_path, rng, each("train/a", "train/b")))
    assert data.label_names == ("a", "b")
    assert data.split is None


@pytest.mark.parametrize("spelling", ["fold{}", "Fold_{}", "kfold-{}"])
def test_folds_keep_together_and_are_no_classes(tmp_path, rng, spelling):
    folds = [spelling.format(number) for number in range(4)]
    data = read(tree(tmp_path, rng, each(*(f"{fold}/{kind}" for fold in folds for kind in "ab"))))
    assert data.label_names == ("a", "b")
    assert data.split is None
    train, test = train_test_split(data)
    assert not set(data.groups[train]) & set(data.groups[test])
    assert set(data.groups) == set(folds)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (each("train/a", "test/a", "other"), ("train", "read as a split", "['other'] beside them", "labels.csv")),
        ([*each("train/a", "test/a"), "x.png"], ("read as a split", "images outside of them", "labels.csv")),
        ([*each("fold1", "fold2"), "notes/x.png"], ("read as folds", "['notes']", "labels.csv")),
        ([*each("train/a", "test/a"), "test/x.png"], ("in a folder of their class, or none", "'x.png'", "labels.csv")),
        (
            each(*(f"patient{number:02}" for number in range(12)), count=1),
            ("share a class", "12 classes for 12", "group"),
        ),
        ([*each("images", count=2), *each("masks", count=2)], ("same names", "'images0'", "3 more", "partner")),
    ],
    ids=["beside", "outside", "folds", "depths", "patients", "masks"],
)
def test_tree_that_means_nothing_known_is_refused(tmp_path, rng, names, parts):
    refuses(tree(tmp_path, rng, names), *parts)


def test_a_class_an_image_is_refused_in_every_source(tmp_path, rng):
    tree(tmp_path, rng, [f"{number}.png" for number in range(12)])
    table = "".join(f"{number}.png,patient {number}\n" for number in range(12))
    (tmp_path / "labels.csv").write_text("name,label\n" + table)
    refuses(tmp_path, "/labels.csv", "share a class", "12 classes for 12 images", "as groups")
    np.savez(tmp_path / "x.npz", images=np.zeros((12, 4, 4), np.uint8), labels=np.arange(12))
    refuses(tmp_path / "x.npz", "share a class", "12 classes for 12 images", "as groups")


# ---- masks ----


@pytest.mark.parametrize("end", ["", "_mask"])
def test_images_beside_masks_are_paired_by_name(tmp_path, rng, end):
    masks = {}
    for name in ("b", "sub/a", "c"):
        save(tmp_path, f"images/{name}.jpg", grey(rng), quality=95)
        masks[name] = (grey(rng) > 99).astype(np.uint8) * 255
        save(tmp_path, f"masks/{name}{end}.png", masks[name])
    data = read(tmp_path)
    assert data.names.tolist() == ["images/b.jpg", "images/c.jpg", "images/sub/a.jpg"]
    np.testing.assert_array_equal(data.masks, [masks["b"], masks["c"], masks["sub/a"]])
    assert data.labels is None
    rows = "name,group,label\nimages/sub/a.jpg,p,1\nimages/b.jpg,q,0\nimages/c.jpg,q,0\n"
    (tmp_path / "labels.csv").write_text(rows)
    assert read(tmp_path).labels.tolist() == [0, 0, 1]
    assert read(tmp_path).masks is not None


def test_masks_of_classes_need_their_kind_and_follow_crop_and_size(tmp_path, rng):
    mask = np.repeat(np.array([[0, 1, 2, 3] * 3], np.uint8), 8, 0)
    save(tmp_path, "images/a.png", grey(rng, (16, 24)))
    save(tmp_path, "masks/a.png", mask)
    refuses(tmp_path, "values 1, 2, 3", "--mask-kind", size=8)
    data = load_images(tmp_path, 8, reading=Reading(mask_kind="classes"), progress=False)
    np.testing.assert_array_equal(data.masks[0], np.array([0, 1, 2, 4] * 3)[2:10][None].repeat(8, 0))


def test_mask_of_another_shape_is_refused(tmp_path, rng):
    save(tmp_path, "images/a.png", grey(rng, (6, 8)))
    path = save(tmp_path, "masks/a.png", grey(rng, (6, 6)))
    refuses(path.parent.parent, "masks/a.png", "shape of its image, (6, 8), got (6, 6)")
