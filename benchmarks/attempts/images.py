"""Files that are not the images, tables and archives that their names promise."""

import contextlib
import io
import os
import resource
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from benchmarks.attempts.attempt import Outcome, attempt
from examples.pretrain.data import load_images

PIXELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        Image.fromarray(PIXELS).save(folder / "fine.png")
        yield folder


def _refusal(path: Path) -> str:
    """Return the sentence that refuses to load a path, or what happened instead after "loaded" or "raw"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = load_images(path, 8, progress=False)
        except ValueError as error:
            return str(error)
        except Exception as error:
            return f"raw {type(error).__name__}: {error}"
    return f"loaded {len(data)} images, labels {None if data.labels is None else data.labels.tolist()}"


def _all_refused(contents: dict[str, bytes]) -> Outcome:
    """Load each file beside a good one; all must be refused in one line that names the file."""
    wrong = []
    for name, content in contents.items():
        with _folder() as folder:
            (folder / name).write_bytes(content)
            said = _refusal(folder)
            if str(folder / name) not in said or "\n" in said or said.startswith(("raw", "loaded")):
                wrong.append(f"{name}: {said}")
    return Outcome(not wrong, f"{len(contents) - len(wrong)} of {len(contents)} refused by name. {'; '.join(wrong)}")


def _encoded(format: str, **options: object) -> bytes:
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, format, **options)
    return content.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n%%EOF\n"


@attempt("a PostScript file named .png, .jpg or .jpeg", right="refused, and no other program is started")
def postscript() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        sign, program = Path(place) / "started", Path(place) / "gs"
        program.write_text(f"#!/bin/sh\ntouch {sign}\nexit 1\n")
        program.chmod(0o755)
        os.environ["PATH"] = f"{place}:{os.environ['PATH']}"
        outcome = _all_refused({f"x{suffix}": EPS for suffix in (".png", ".jpg", ".JPEG")})
        return Outcome(outcome.survived and not sign.exists(), f"program started: {sign.exists()}. {outcome.seen}")


@attempt("pictures of eleven other formats named .png", right="refused by name: the suffix promises PNG or JPEG")
def other_pictures() -> Outcome:
    formats = ("GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "PCX", "ICO", "SGI", "JPEG2000", "PDF")
    return _all_refused({f"{name.lower()}.png": _encoded(name) for name in formats})


@attempt("SVG, HTML, WMF, FITS, a zip, nothing and noise named .jpg", right="refused by name")
def no_pictures() -> Outcome:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.png", _encoded("PNG"))
    cards = ("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 16", "NAXIS2  = 16", "END")
    fits = "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)
    wmf = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 16, 16, 72) + bytes(4) + b"\0\0\x01\0\x09\0" + bytes(40)
    contents = {
        "svg.jpg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "html.jpg": b"<!DOCTYPE html><html><img src='http://example.org/x.png'></html>",
        "wmf.jpg": wmf,
        "fits.jpg": fits,
        "zip.jpg": packed.getvalue(),
        "nothing.jpg": b"",
        "noise.jpg": np.random.default_rng(0).bytes(4096),
    }
    return _all_refused(contents)


@attempt("a PNG named .jpg and a JPEG named .png", right="both are read: they are common, and harmless")
def png_named_jpg() -> Outcome:
    with _folder() as folder:
        (folder / "a.jpg").write_bytes(_encoded("PNG"))
        (folder / "b.png").write_bytes(_encoded("JPEG"))
        said = _refusal(folder)
        return Outcome(said.startswith("loaded 3"), said)


@attempt("an animated PNG, an animated GIF named .png", right="refused by name: one picture a file")
def animations() -> Outcome:
    more = [Image.fromarray(255 - PIXELS)]
    return _all_refused(
        {"film.png": _encoded("PNG", save_all=True, append_images=more),
         "gif.png": _encoded("GIF", save_all=True, append_images=more)}
    )  # fmt: skip


@attempt("a PNG and a JPEG cut at nine places", right="refused by name")
def truncated_pictures() -> Outcome:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    contents = {}
    for format in ("PNG", "JPEG"):
        content = io.BytesIO()
        large.save(content, format)
        whole = content.getvalue()
        for part in range(1, 10):
            contents[f"{part}.{format.lower()}"] = whole[: len(whole) * part // 10]
    return _all_refused(contents)


@attempt("a PNG with one bit of its pixels flipped, 100 places", right="none loads other pixels silently")
def flipped_bits_of_a_png() -> Outcome:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    whole = content.getvalue()
    silent = 0
    with tempfile.TemporaryDirectory() as place:
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[rng.integers(41, len(whole) - 16)] ^= 1 << rng.integers(8)
            Path(place, "x.png").write_bytes(damaged)
            with contextlib.suppress(ValueError):
                silent += not np.array_equal(load_images(place, 64, progress=False).images[0], pixels)
    return Outcome(silent == 0, f"{silent} of 100 loaded other pixels")


def _bomb(side: int) -> bytes:
    """Return a PNG of side x side black pixels, packed a thousandfold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + side)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@attempt("a PNG of 12,000 x 12,000 pixels in 140 KB", right="refused by name, without taking the memory")
def decompression_bomb() -> Outcome:
    content = _bomb(12_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = _all_refused({"bomb.png": content})
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return Outcome(outcome.survived and taken < 60, f"{taken} MiB taken. {outcome.seen}")


def _dicom(**changes: object) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    values = {"Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    values |= {
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": PIXELS.tobytes(),
    }
    for name, value in {**values, **changes}.items():
        setattr(dataset, name, value)
    return dataset


def _stored(dataset: FileDataset) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()


@attempt("a DICOM file named .png, a PNG and an empty file named .dcm", right="refused by name")
def dicom_named_png() -> Outcome:
    return _all_refused({"scan.png": _stored(_dicom()), "picture.dcm": _encoded("PNG"), "nothing.dcm": b""})


@attempt(
    "a DICOM file of an unknown transfer syntax, of a video, of the wrong length", right="refused in one line by name"
)
def transfer_syntaxes() -> Outcome:
    contents = {}
    for name, syntax in (
        ("unknown", "1.2.3.4.5"),
        ("video", "1.2.840.10008.1.2.4.102"),
        ("ls", "1.2.840.10008.1.2.4.80"),
    ):
        dataset = _dicom()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        dataset.PixelData = encapsulate([PIXELS.tobytes()])
        dataset["PixelData"].is_undefined_length = True
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pydicom.dcmwrite(content, dataset, implicit_vr=False, little_endian=True, enforce_file_format=False)
        contents[f"{name}.dcm"] = content.getvalue()
    contents["short.dcm"] = _stored(_dicom(PixelData=PIXELS.tobytes()[:100]))
    return _all_refused(contents)


@attempt("a DICOM header of 65,535 x 65,535 pixels over 100 bytes", right="refused by name, without taking the memory")
def dicom_bomb() -> Outcome:
    dataset = _dicom(Rows=65535, Columns=65535)
    dataset.file_meta.TransferSyntaxUID = RLELossless
    dataset.PixelData = encapsulate([struct.pack("<16I", 1, 64, *([0] * 14)) + b"\x81\0" * 50])
    dataset["PixelData"].is_undefined_length = True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = _all_refused({"bomb.dcm": _stored(dataset)})
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return Outcome(outcome.survived and taken < 200, f"{taken} MiB taken. {outcome.seen}")


@attempt("DICOM files whose slope, intercept or window is nan or inf", right="refused by name, not read as noise")
def dicom_nan() -> Outcome:
    contents = {}
    for value in ("nan", "inf"):
        contents[f"slope {value}.dcm"] = _stored(_dicom(RescaleSlope=value, RescaleIntercept="0"))
        contents[f"intercept {value}.dcm"] = _stored(_dicom(RescaleSlope="1", RescaleIntercept=value))
        contents[f"centre {value}.dcm"] = _stored(_dicom(WindowCenter=value, WindowWidth="100"))
        contents[f"width {value}.dcm"] = _stored(_dicom(WindowCenter="100", WindowWidth=value))
    return _all_refused(contents)


# ---- archives ----


def _npz_refused(path: Path) -> Outcome:
    said = _refusal(path)
    fine = str(path) in said and "\n" not in said and not said.startswith(("raw", "loaded"))
    return Outcome(fine, said)


@attempt("an npz with pickled objects that start a program", right="refused, and nothing is started")
def pickled_npz() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        path, sign = Path(place) / "x.npz", Path(place) / "started"

        class Payload:
            def __reduce__(self) -> tuple[object, ...]:
                return Path.touch, (sign,)

        np.savez(path, images=np.array([Payload()], object))
        outcome = _npz_refused(path)
        return Outcome(outcome.survived and not sign.exists(), outcome.seen)


@attempt("an npz whose header states 10^15 images", right="refused by name")
def npz_bomb() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.npz"
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 32, 32)}
        )
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", header.getvalue() + bytes(4096))
        return _npz_refused(path)


@attempt("an npz with one bit flipped, 200 places", right="read as it was, or refused in one line by name")
def flipped_bits_of_an_npz() -> Outcome:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8), np.uint8)
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.npz"
        np.savez_compressed(path, images=images, labels=np.arange(8) % 2)
        whole = path.read_bytes()
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            said = _refusal(path)
            if said.startswith("loaded"):
                if not np.array_equal(load_images(path, 8).images, images):
                    wrong.append("other images")
            elif str(path) not in said or said.startswith("raw"):
                wrong.append(said)
    return Outcome(not wrong, f"{len(wrong)} of 200 wrong. {'; '.join(wrong[:2])}")


# ---- tables and links ----


def _with_labels(table: bytes) -> str:
    with _folder() as folder:
        for name in ("a.png", "b.png"):
            Image.fromarray(PIXELS).save(folder / name)
        (folder / "labels.csv").write_bytes(table)
        return _refusal(folder)


@attempt("class numbers 2^53 and 2^53 + 1 in labels.csv", right="two classes")
def labels_above_floats() -> Outcome:
    said = _with_labels(b"name,class\na.png,9007199254740992\nb.png,9007199254740993\nfine.png,9007199254740993.0\n")
    return Outcome(said.endswith("labels [0, 1, 1]"), said)


@attempt("class numbers of 30 digits in labels.csv", right="refused in one line by name, or told apart")
def labels_beyond_64_bits() -> Outcome:
    said = _with_labels(b"name,class\na.png,%d\nb.png,%d\nfine.png,1\n" % (10**30, 10**30 + 1))
    return Outcome("labels.csv" in said and not said.startswith("raw"), said)


@attempt("classes 'a' and 'a' with a NUL byte in labels.csv", right="refused by line")
def labels_with_nul() -> Outcome:
    said = _with_labels(b"name,class\na.png,a\nb.png,a\0\nfine.png,b\n")
    return Outcome("labels.csv" in said and "line 3" in said and not said.startswith("raw"), said)


@attempt("labels.csv is a link to a file that is gone", right="refused by name, not read as no labels")
def labels_link() -> Outcome:
    with _folder() as folder:
        (folder / "labels.csv").symlink_to(folder / "gone.csv")
        said = _refusal(folder)
        return Outcome("labels.csv" in said, said)


@attempt("half of the images are in a linked folder", right="all are read")
def linked_folder() -> Outcome:
    with _folder() as folder, tempfile.TemporaryDirectory() as elsewhere:
        Image.fromarray(PIXELS).save(Path(elsewhere, "more.png"))
        (folder / "linked").symlink_to(elsewhere)
        said = _refusal(folder)
        return Outcome(said.startswith("loaded 2"), said)


@attempt("links to the folder itself, to its parent and to a sister", right="each image is read once")
def link_loops() -> Outcome:
    with _folder() as folder:
        sub = folder / "z"
        sub.mkdir()
        Image.fromarray(PIXELS).save(sub / "more.png")
        for name, target in (("a", folder), ("b", sub), ("z/c", folder)):
            (folder / name).symlink_to(target)
        said = _refusal(folder)
        return Outcome(said.startswith("loaded 2"), said)


@attempt("a linked picture and a linked folder that are gone", right="refused by name, not left out silently")
def broken_links() -> Outcome:
    said = []
    for name in ("gone.png", "gone"):
        with _folder() as folder:
            (folder / name).symlink_to(folder / "nowhere")
            said.append(_refusal(folder))
    return Outcome(not any(one.startswith(("loaded", "raw")) for one in said), "; ".join(said))
