"""Measure the data path of the example: decoding, an epoch from the cache, and memory by the number of images.

    python -m benchmarks.data                              speed on 2,000 pictures, memory at 10,000 and 50,000
    python -m benchmarks.data --pictures 200 --counts 500  quick
    python -m benchmarks.data --libraries FOLDER           with lightly's loader, see `lightly_loader.py`

Speed: pictures a second of one decoder, of the cache's workers, and of a warm epoch (every image once, as batches of
floats) from tensors in memory, from the cache, from MONAI's `PersistentDataset` and `DataLoader`, and from lightly's
`LightlyDataset`. Memory: the peak of a process that normalises, fingerprints, loads an epoch of batches, encodes,
fine-tunes and trains a decoder of masks, beyond its peak after the same with 64 images. Pages of the file that are
mapped count; masks, which the example holds in memory, are a single one here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.dataloader import DataLoader
from monai.data.dataset import PersistentDataset
from monai.transforms.compose import Compose
from monai.transforms.utility.array import Lambda  # only MONAI's own transforms are kept by its cache
from PIL import Image
from torch import Tensor, nn

from benchmarks.lightly_loader import lightly_rates
from benchmarks.provenance import provenance
from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet, Reading, load_images
from examples.pretrain.data.cache import Cache
from examples.pretrain.data.catalogue import read_image
from examples.pretrain.data.folder import catalogue_of
from examples.pretrain.data.resize import resize
from examples.pretrain.data.stored import StoredImages
from examples.pretrain.encoder import EncoderOptions
from examples.pretrain.loader import load_batches
from examples.pretrain.methods import default_options
from examples.pretrain.optimization import Optimization
from examples.pretrain.protocols import Settings, Subject, finetune, segment
from examples.pretrain.protocols.subject import lacking_masks
from examples.pretrain.train import Pretraining, Run

SIDE = 224
BATCH = 64


def generate(folder: Path, count: int, side: int = 512) -> None:
    """Write smooth grey pictures with some noise, which compress like radiographs."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        noise = rng.integers(0, 8, (side, side), np.uint8)
        Image.fromarray(np.asarray(coarse) // 2 + noise).save(folder / f"{number:06}.png", compress_level=1)


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def speed(place: Path, count: int, libraries: Path | None = None) -> dict[str, float]:
    """Return pictures a second, by what was measured; lightly's too, if there is a folder of its libraries."""
    folder, cores = place / "pictures", len(os.sched_getaffinity(0))
    generate(folder, count)
    cache = Cache(folder, catalogue_of(folder, Reading()), SIDE, place / "cache")
    some = cache.catalogue.names[: max(1, count // 10)]

    def one_by_one() -> None:
        for name in some:
            resize(read_image(folder / name), SIDE)

    found = {"one decoder": len(some) / seconds(one_by_one)}
    found[f"cache filled by {cores} workers"] = count / seconds(lambda: list(cache.fill(progress=False)))
    stored = load_images(folder, SIDE, reading=Reading(cache=place / "cache"), progress=False).images
    batches = list(torch.randperm(count).split(BATCH))

    def epoch(images: Any) -> None:
        for batch in load_batches(images, batches, pin=False):
            assert batch.shape[1:] == (1, SIDE, SIDE)

    in_memory = to_float(np.asarray(stored))
    for name, images in (("epoch from memory", in_memory), ("epoch from the cache", to_float(stored))):
        epoch(images)
        found[name] = count / seconds(lambda images=images: epoch(images))  # type: ignore[misc]

    def decode(path: Path) -> Tensor:
        return torch.from_numpy(resize(read_image(path), SIDE))[None]

    def as_float(image: Tensor) -> Tensor:
        return torch.as_tensor(image).float() / 255

    dataset = PersistentDataset(
        [folder / name for name in cache.catalogue.names],
        Compose([Lambda(decode, track_meta=False), Lambda(as_float, track_meta=False)]),
        cache_dir=place / "monai",
        weights_only=False,
    )
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=cores)
    found["first epoch of MONAI's PersistentDataset"] = count / seconds(lambda: list(map(len, loader)))
    found["warm epoch of MONAI's PersistentDataset"] = count / seconds(lambda: list(map(len, loader)))
    return found if libraries is None else found | lightly_rates(libraries, folder, SIDE, BATCH, cores)


class Mean(nn.Module):
    """Average of the pixels: an encoder that costs nothing beside the loading."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return `(B, C)` means, and no maps."""
        return x.mean((2, 3)), []


def peak() -> float:
    """Return the largest memory that this process held so far, in MB; `getrusage` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def through(path: Path) -> None:
    """Go through everything that a run and its evaluation do with all images of a file, but for pretraining steps."""
    config = Pretraining(
        "byol",
        default_options()["byol"],
        encoder=EncoderOptions(width=8),
        optimization=Optimization(batch_size=BATCH),
    )
    images = StoredImages(path)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[: SIDE // 4, : SIDE // 4] = 1
    data = ImageSet(
        images,  # type: ignore[arg-type]
        (np.arange(len(images)) % 2)[:, None].astype(np.uint8),
        masks=np.broadcast_to(mask, images.shape),
    )
    run = Run(data, config, path.parent)
    assert run.fingerprint
    floats: Any = to_float(data.images)
    for _ in load_batches(floats, list(torch.randperm(len(data)).split(BATCH)), pin=False):
        pass
    assert len(run.encode(floats, Mean())) == len(data)
    test = data.subset(slice(0, BATCH))
    subject = Subject("byol", 0, run, run.method.encoder, data, test, (data, test))
    settings = Settings(steps=2, batch_size=8)
    assert lacking_masks(subject) is None
    finetune.finetuned(subject, data, settings, 0)
    net = segment.trained(subject, data, 1, settings, 0, frozen=False)
    segment.dice(subject, net, test, 1)


def use(path: Path) -> None:
    """Go through everything that a run does with all its images, and print the peaks of memory in MB."""
    few = path.with_name("few.npy")
    np.save(few, np.load(path, mmap_mode="r")[:BATCH])
    through(few)
    before = peak()
    through(path)
    print(json.dumps(round(peak() - before, 1)))


def memory(place: Path, count: int) -> float:
    """Return the peak memory in MB of a process that goes through `count` images."""
    path = place / "images.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SIDE, SIDE))
    rng = np.random.default_rng(0)
    for start in range(0, count, 256):
        array[start : start + 256] = rng.integers(0, 256, (min(256, count - start), SIDE, SIDE), np.uint8)
    array.flush()
    del array
    command = [sys.executable, "-m", "benchmarks.data", "--use", str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    path.unlink()
    return float(said.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000, help="number of pictures for speed; 0 measures none")
    parser.add_argument("--counts", type=int, nargs="*", default=[10_000, 50_000], help="numbers of images for memory")
    parser.add_argument("--libraries", type=Path, help="folder with lightly and torchvision")
    parser.add_argument("--out", type=Path, help="file for the record")
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.use is not None:
        return use(options.use)
    with tempfile.TemporaryDirectory() as folder:
        rates = speed(Path(folder), options.pictures, options.libraries) if options.pictures else {}
        for name, rate in rates.items():
            print(f"{name:45} {rate:8.0f} images/s", flush=True)
        peaks = {}
        for count in options.counts:
            peaks[str(count)] = memory(Path(folder), count)
            print(f"peak at {count} images of {SIDE} px: {peaks[str(count)]} MB", flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {**provenance("python -m benchmarks.data"), "images a second": rates, "peak in MB by images": peaks}
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
