"""Decoded images in a cache: the same as without, found again, resumed after a kill, and never of other images."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.pretrain.data import Reading, cache, cache_of, load_images
from examples.pretrain.data.stored import StoredImages
from tests.examples.data.loading import grey, save
from tests.profiles import few


@pytest.fixture
def folder(tmp_path, rng):
    """Fill three shards with images of two depths, of which one is in colour, beside masks."""
    for number in range(2 * cache.SHARD + 5):
        pixels = grey(rng, dtype=np.uint16 if number == 3 else np.uint8)
        if number == cache.SHARD:
            pixels = grey(rng, (6, 6, 3))
        save(tmp_path / "data", f"images/{number:03}.png", pixels)
        save(tmp_path / "data", f"masks/{number:03}.png", (grey(rng) % 4).astype(np.uint8))
    return tmp_path / "data"


def load(folder, *, size=4, **choices):
    choices = {"mask_kind": "classes", "cache": folder.parent / "cache", **choices}
    return load_images(folder, size, reading=Reading(**choices), progress=False)


def places(folder):
    return sorted(path.name for path in (folder.parent / "cache").iterdir())


def assert_same_set(ours, theirs):
    for name in ("images", "labels", "groups", "masks", "split", "names"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.images.dtype == theirs.images.dtype
    assert (ours.label_names, ours.fingerprint) == (theirs.label_names, theirs.fingerprint)


def test_cached_images_are_the_same_and_stay_in_their_file(folder):
    plain = load(folder, cache=None)
    for _ in range(2):
        kept = load(folder)
        assert isinstance(kept.images, StoredImages)
        assert_same_set(kept, plain)
    (place,) = places(folder)
    assert place.startswith("data-4px-")
    files = sorted(path.name for path in (folder.parent / "cache" / place).iterdir())
    assert files == ["fill.lock", "images.npy", "index.json", "kept.npy", "masks.npy"]
    assert_same_set(load(folder, size=6), load(folder, size=6, cache=None))
    assert len(places(folder)) == 2


def test_decoding_draws_nothing_from_the_global_generator(folder):
    state = torch.random.get_rng_state()
    load(folder)
    assert torch.equal(state, torch.random.get_rng_state())


def counted(monkeypatch, fail_at=None):
    """Count the images that are decoded in this process; fail at one."""
    seen = []
    read = cache.decoded

    def counting(folder, catalogue, size, numbers):
        for number, found in zip(numbers, read(folder, catalogue, size, numbers), strict=True):
            if number == fail_at:
                raise KeyboardInterrupt
            seen.append(number)
            yield found

    monkeypatch.setattr(cache, "decoded", counting)
    return seen


def fill(folder):
    for _ in cache_of(folder, 4, Reading(mask_kind="classes", cache=folder.parent / "cache")).fill(
        progress=False, workers=0
    ):
        pass


def test_full_cache_is_not_decoded_again(folder, monkeypatch):
    load(folder)
    seen = counted(monkeypatch)
    fill(folder)
    assert not seen


def test_interrupted_decoding_goes_on_where_it_was(folder, monkeypatch):
    seen = counted(monkeypatch, fail_at=cache.SHARD + 7)
    with pytest.raises(KeyboardInterrupt):
        fill(folder)
    monkeypatch.undo()
    (place,) = places(folder)
    (folder.parent / "cache" / place / "shard-000001-x.npz.1.partial").write_bytes(b"half")
    seen = counted(monkeypatch)
    fill(folder)
    assert seen == list(range(cache.SHARD, 2 * cache.SHARD + 5))
    monkeypatch.undo()
    assert_same_set(load(folder), load(folder, cache=None))
    assert not list((folder.parent / "cache").rglob("*.partial"))


def test_killed_process_leaves_no_half_cache(folder):
    def work():
        reading = Reading(mask_kind="classes", cache=folder.parent / "cache")
        next(cache_of(folder, 4, reading).fill(progress=False, workers=0))
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (place,) = places(folder)
    assert any((folder.parent / "cache" / place).glob("shard-*.npz"))
    assert_same_set(load(folder), load(folder, cache=None))


@pytest.mark.parametrize("change", few(["pixels", "new", "time", "mask"], 2))
def test_changed_files_have_a_cache_of_their_own(folder, rng, change):
    load(folder)
    path = folder / ("masks" if change == "mask" else "images") / "005.png"
    if change == "new":
        save(folder, "images/new.png", grey(rng))
        save(folder, "masks/new.png", np.zeros((6, 6), np.uint8))
    elif change == "time":
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        save(folder, path.relative_to(folder).as_posix(), np.full((6, 6), 1, np.uint8))
    assert_same_set(load(folder), load(folder, cache=None))
    assert len(places(folder)) == 2


def test_moved_folder_of_the_same_name_finds_its_cache(folder, monkeypatch):
    load(folder)
    (folder.parent / "elsewhere").mkdir()
    moved = Path(shutil.move(folder, folder.parent / "elsewhere" / "data"))
    seen = counted(monkeypatch)
    for _ in cache_of(moved, 4, Reading(mask_kind="classes", cache=folder.parent / "cache")).fill(
        progress=False, workers=0
    ):
        pass
    assert not seen


@pytest.mark.parametrize("first", [True, False])
def test_bad_files_are_listed_or_end_the_load_whoever_filled_the_cache(folder, first):
    (folder / "images" / "002.png").write_bytes(b"broken")
    for skip in (first, not first):
        if not skip:
            with pytest.raises(ValueError, match=r"002\.png: cannot be read"):
                load(folder)
            continue
        kept = load(folder, skip_bad=True)
        assert_same_set(kept, load(folder, skip_bad=True, cache=None))
        (said,) = kept.left_out
        assert "002.png: cannot be read" in said
    assert len(places(folder)) == 1


def test_labels_are_read_anew(folder):
    load(folder)
    names = [f"images/{number:03}.png" for number in range(2 * cache.SHARD + 5)]
    (folder / "labels.csv").write_text("name,label\n" + "".join(f"{name},{int(name > 'images/1')}\n" for name in names))
    assert_same_set(load(folder), load(folder, cache=None))
    assert len(places(folder)) == 1


def test_cache_among_the_images_is_refused(folder):
    for inside in (folder, folder / "images" / "cache"):
        with pytest.raises(ValueError, match="must not be among the images"):
            load(folder, cache=inside)


def test_npz_has_no_cache(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 4, 4), np.uint8))
    reading = Reading(cache=tmp_path / "cache")
    assert cache_of(tmp_path / "x.npz", 4, reading) is None
    assert len(load_images(tmp_path / "x.npz", 4, reading=reading)) == 3


def test_index_says_what_it_is_of(folder):
    load(folder)
    (place,) = places(folder)
    index = json.loads((folder.parent / "cache" / place / "index.json").read_text())
    assert (index["count"], index["folder"]) == (2 * cache.SHARD + 5, str(folder))
    assert replace(Reading(), cache=Path("x")) == Reading(cache=Path("x"))
