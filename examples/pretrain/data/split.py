"""A split into training and test images that keeps each patient, and each identical image, on one side."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold

from examples.pretrain.data.imageset import ImageSet


def train_test_split(data: ImageSet, test_fraction: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices of the training and of the test images.

    No group is on both sides. A split that the data name is kept: "train" and "val" against "test".
    Otherwise byte-identical images count as one group, together with all images of the groups they are in, so that no
    test image occurs in training. Single-class labels are stratified as far as whole groups allow.

    Args:
        data: the images.
        test_fraction: share of the test side, in (0, 1); approximate, because groups stay whole. Ignored
            where the data name their split.
        seed: of the shuffle; the same seed gives the same split.

    Raises:
        ValueError: ``test_fraction`` is outside (0, 1), the data cannot fill two sides, or the named split has a group
            on both.

    >>> data = ImageSet(np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), groups=np.array([7, 7, 8, 8]))
    >>> train, test = train_test_split(data, 0.5)
    >>> set(data.groups[train]) & set(data.groups[test])
    set()
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, both excluded, got {test_fraction}")
    if data.split is not None:
        return _named_split(data)
    units = _independent_units(data)
    count = int(units.max()) + 1 if len(units) else 0
    if count < 2:
        raise ValueError(
            f"a split needs at least 2 groups of different images, got {count} over {len(data)} images: "
            "add patients, or check the group ids"
        )
    in_test = _stratified(data, units, test_fraction, seed)
    if in_test is None:
        # An absolute number of groups: given a fraction, scikit-learn may round one side down to none.
        held_out = min(max(round(test_fraction * count), 1), count - 1)
        shuffle = GroupShuffleSplit(n_splits=1, test_size=held_out, random_state=seed)
        _, index = next(shuffle.split(units, groups=units))
        in_test = np.zeros(len(data), dtype=bool)
        in_test[index] = True
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def _named_split(data: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Return the split that the data name."""
    assert data.split is not None
    in_test = data.split == "test"
    if in_test.all() or not in_test.any():
        raise ValueError(
            'the split named by the data must hold both "train" and "test" images, got '
            f"{sorted(set(data.split.tolist()))}: drop the split to have one drawn"
        )
    if data.groups is not None:
        both = np.intersect1d(data.groups[in_test], data.groups[~in_test])
        if len(both):
            raise ValueError(
                f"the split named by the data must keep each group on one side, got {len(both)} groups on both, "
                f"first {both[0]!s}: drop the split to have one drawn"
            )
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def _independent_units(data: ImageSet) -> np.ndarray:
    """Return ``(N,)`` component numbers: images that share a group or are identical are in one component."""
    count = len(data)
    groups = np.arange(count) if data.groups is None else data.groups
    digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in data.images], dtype="U64")
    _, group = np.unique(groups, return_inverse=True)
    _, content = np.unique(digests, return_inverse=True)
    # A graph of images (the first `count` nodes), groups and contents (`count` nodes reserved for each).
    image = np.tile(np.arange(count), 2)
    other = np.concatenate([count + group, 2 * count + content])
    edges = coo_array((np.ones(2 * count, np.int8), (image, other)), shape=(3 * count, 3 * count))
    _, component = connected_components(edges, directed=False)
    return np.unique(component[:count], return_inverse=True)[1]


def _stratified(data: ImageSet, units: np.ndarray, test_fraction: float, seed: int) -> np.ndarray | None:
    """Return ``(N,)`` booleans that mark a test side stratified by class, or None where that is impossible."""
    if data.labels is None or data.labels.ndim != 1:
        return None
    # The test side is `share.numerator` out of `share.denominator` folds.
    share = Fraction(test_fraction).limit_denominator(20)
    groups_a_class = [len(np.unique(units[data.labels == label])) for label in np.unique(data.labels)]
    if not 0 < share < 1 or min(groups_a_class) < share.denominator:
        return None
    folds = StratifiedGroupKFold(share.denominator, shuffle=True, random_state=seed)
    in_test = np.zeros(len(data), dtype=bool)
    for fold, (_, index) in enumerate(folds.split(units, data.labels, units)):
        if fold < share.numerator:
            in_test[index] = True
    # Very uneven groups may leave folds empty.
    return in_test if in_test.any() and not in_test.all() else None
