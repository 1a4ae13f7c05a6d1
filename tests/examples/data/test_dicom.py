"""DICOM files of a folder: depths, rescale, window, lookup tables, and files that cannot be read."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from tests.examples.data.loading import grey, read, save, says


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
def test_stored_bits_fill_the_range_and_monochrome1_is_inverted(tmp_path, rng, dtype, bits):
    top = 2**bits - 1
    pixels = rng.integers(0, top, (6, 6), dtype, endpoint=True)
    pixels[0, :2] = 0, top
    shown = read_dicom(tmp_path, pixels, "MONOCHROME2", bits)
    np.testing.assert_array_equal(shown, full(pixels / top))
    assert shown[0, :2].tolist() == [0, 65535]
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, "MONOCHROME1", bits), 65535 - shown)


def test_signed_values_fill_the_range_from_the_lowest(tmp_path, rng):
    pixels = rng.integers(-2048, 2048, (6, 6), np.int16)
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, bits=12), full((pixels + 2048) / 4095))


@pytest.mark.parametrize(("slope", "intercept"), [(2, -1024), (0.5, 7), (-1, 4095)])
def test_a_negative_rescale_slope_inverts(tmp_path, rng, slope, intercept):
    pixels = rng.integers(0, 4096, (6, 6), np.uint16)
    shown = read_dicom(tmp_path, pixels, bits=12, RescaleSlope=slope, RescaleIntercept=intercept)
    share = pixels / 4095
    np.testing.assert_array_equal(shown, full(share if slope > 0 else 1 - share))


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(("slope", "intercept"), [(None, None), (1, -1000), (-1, 4095), (-2, 100)])
def test_a_window_follows_the_standard(tmp_path, rng, slope, intercept, kind):
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
def test_a_lookup_table_is_applied(tmp_path, rng, sequence):
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


def test_colour_dicom_is_read(tmp_path, rng):
    pixels = grey(rng, (6, 6, 3))
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, "RGB"), pixels.astype(int) * 257)
    deep = rng.integers(0, 4096, (6, 6, 3), np.uint16)
    np.testing.assert_array_equal(read_dicom(tmp_path, deep, "RGB", 12), full(deep / 4095))
    pixels[...] = pixels[..., :1]
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, "RGB"), pixels[..., 0].astype(int) * 257)


def test_compressed_dicom_is_read(tmp_path, rng):
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
        ((6, 6), "MONOCHROME2", {"Rows": 65535, "Columns": 65535}, ("65535 x 65535 pixels", "at most 89,478,485")),
    ],
)
def test_unsupported_dicom_is_refused_with_the_reason(tmp_path, rng, shape, kind, tags, parts):
    write_dicom(tmp_path / "one.dcm", grey(rng, shape), kind, **tags)
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, str(tmp_path / "one.dcm"), "cannot be read", *parts, "take it out")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.dcm"])
@pytest.mark.parametrize("kept", [0, 20, 0.7, "text"])
def test_a_damaged_image_is_refused_by_name(tmp_path, rng, name, kept):
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


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_rescale_or_window_that_is_no_number_is_refused(tmp_path, rng):
    for tag in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        for value in ("nan", "inf", "-inf"):
            tags = {"RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": 9, "WindowWidth": 9, tag: value}
            write_dicom(tmp_path / "one.dcm", grey(rng, (6, 6)), **tags)
            with pytest.raises(ValueError, match=f"{tag} must be finite, got {value}"):
                read(tmp_path)


# ---- tables ----


def table(values, first=0, bits=16, kind="OW"):
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(values) % 65536, first, bits])
    item.add_new("LUTData", kind, np.asarray(values, "<u2").tobytes() if kind == "OW" else np.asarray(values).tolist())
    return item


@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("kind", ["OW", "US"])
def test_tables_of_any_depth_keep_deep_pixels_in_order(tmp_path, sequence, bits, kind):
    pixels = np.linspace(0, 4095, 36, dtype=np.uint16).reshape(6, 6)
    values = np.arange(4096) * 2**bits // 4096
    shown = read_dicom(tmp_path, pixels, bits=12, **{sequence: [table(values, bits=bits, kind=kind)]})
    np.testing.assert_array_equal(shown, full(values[pixels] / (2**bits - 1)))


def test_entries_that_do_not_fill_the_stated_depth_fill_the_range(tmp_path, rng):
    pixels = rng.integers(0, 4096, (6, 6), np.uint16)
    shown = read_dicom(tmp_path, pixels, bits=12, VOILUTSequence=[table(np.arange(4096), bits=16)])
    np.testing.assert_array_equal(shown, full(pixels / 4095))


def test_table_clips_values_beyond_its_ends(tmp_path, rng):
    pixels = rng.integers(-2048, 2048, (6, 6), np.int16)
    values = np.arange(1024) * 4
    item = table(values, first=-512, bits=12)
    shown = read_dicom(tmp_path, pixels, bits=12, VOILUTSequence=[item])
    np.testing.assert_array_equal(shown, full(values[np.clip(pixels + 512, 0, 1023)] / 4095))


def test_packed_table_of_bytes_is_read(tmp_path, rng):
    pixels = grey(rng)
    item = table(range(256), bits=8)
    item.LUTData = bytes(range(255, -1, -1))
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, VOILUTSequence=[item]), (255 - pixels.astype(int)) * 257)


@pytest.mark.parametrize(("cut", "said"), [(100, "256 entries of LUTDescriptor, got 50"), (None, "all 0")])
def test_table_that_cannot_be_meant_is_refused(tmp_path, rng, cut, said):
    item = table(np.zeros(256) if cut is None else np.arange(256))
    item.LUTData = item.LUTData[:cut]
    with pytest.raises(ValueError, match=said):
        read_dicom(tmp_path, grey(rng), VOILUTSequence=[item])


# ---- frames ----


@pytest.mark.filterwarnings("ignore:The number of bytes of pixel data is sufficient", "ignore:A value of '0'")
@pytest.mark.parametrize("stated", ["absent", None, 0, 1])
def test_frames_that_the_header_does_not_state_are_refused(tmp_path, rng, stated):
    file = write_dicom(tmp_path / "one.dcm", grey(rng))
    file.PixelData = file.PixelData * 3
    if stated != "absent":
        file.NumberOfFrames = stated
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    with pytest.raises(ValueError, match="3 frames, only single frames are read: split it"):
        read(tmp_path)


def compressed(array, kind="JPEG2000", **options):
    content = io.BytesIO()
    Image.fromarray(array).save(content, kind, **options)
    return content.getvalue()


def write_compressed(path, frames, like, syntax, **tags):
    file = write_dicom(path, like, **tags)
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate(frames)
    file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True
    file.save_as(path, enforce_file_format=True)


J2K = {"irreversible": False, "no_jp2": True}


@pytest.mark.parametrize(
    "syntax", [pydicom.uid.JPEG2000Lossless, pydicom.uid.JPEGBaseline8Bit, pydicom.uid.RLELossless]
)
def test_compressed_frames_that_the_header_does_not_state_are_refused(tmp_path, rng, syntax):
    pixels = grey(rng, (16, 16))
    if syntax == pydicom.uid.RLELossless:
        file = write_dicom(tmp_path / "x", pixels)
        file.compress(syntax)
        frame = next(pydicom.encaps.generate_frames(file.PixelData, number_of_frames=1))
        (tmp_path / "x").unlink()
    else:
        frame = compressed(pixels, "JPEG") if "JPEG B" in syntax.name else compressed(pixels, **J2K)
    write_compressed(tmp_path / "one.dcm", [frame], pixels, syntax)
    assert read(tmp_path, 16).images.shape == (1, 16, 16)
    write_compressed(tmp_path / "one.dcm", [frame, frame], pixels, syntax)
    with pytest.raises(ValueError, match="2 frames, only single frames are read: split it"):
        read(tmp_path, 16)


# ---- tags ----

FULL = {"WindowCenter": 128, "WindowWidth": 256}


@pytest.mark.parametrize(
    "tags",
    [
        {**FULL, "VOILUTFunction": ""},
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"RescaleSlope": 1, "RescaleIntercept": None},
        {"RescaleSlope": None, "RescaleIntercept": 0},
        {"WindowCenter": 9, "WindowWidth": None},
        {"WindowCenter": None, "WindowWidth": None},
        {"NumberOfFrames": None},
        {"HighBit": None},
        {"PixelPaddingValue": None},
        {**FULL, "VOILUTSequence": [Dataset()]},
        {**FULL, "VOILUTSequence": []},
        {**FULL, "ModalityLUTSequence": []},
    ],
    ids=str,
)
def test_empty_optional_tag_is_as_an_absent_one(tmp_path, rng, tags):
    pixels = grey(rng)
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, **tags), pixels.astype(int) * 257)


@pytest.mark.parametrize(
    "tag", ["Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"]
)
@pytest.mark.parametrize("empty", [True, False])
def test_needed_tag_that_is_empty_or_absent_is_named(tmp_path, rng, tag, empty):
    file = write_dicom(tmp_path / "one.dcm", grey(rng))
    if empty:
        setattr(file, tag, None)
    else:
        delattr(file, tag)
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    with pytest.raises(ValueError, match=rf"must have the tag {tag} \(0028,.*absent or empty"):
        read(tmp_path)


@pytest.mark.parametrize("width", [0, 0.4, -3])
def test_window_without_width_is_refused_by_tag(tmp_path, rng, width):
    with pytest.raises(ValueError, match=r"\(0028,1051\) Window Width must be greater"):
        read_dicom(tmp_path, grey(rng), WindowCenter=9, WindowWidth=width)


@pytest.mark.parametrize("place", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_window_and_rescale_of_a_functional_group_count(tmp_path, rng, place):
    pixels = rng.integers(0, 4096, (6, 6), np.uint16)
    tags = {"WindowCenter": 1000, "WindowWidth": 1500, "RescaleSlope": 2, "RescaleIntercept": -1024}
    right = read_dicom(tmp_path, pixels, bits=12, **tags)
    window, rescale, group = Dataset(), Dataset(), Dataset()
    for item, names in ((window, list(tags)[:2]), (rescale, list(tags)[2:])):
        for name in names:
            setattr(item, name, tags[name])
    group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [rescale]
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, bits=12, **{place: [group]}), right)
    # What stands at the top level comes first.
    narrow = read_dicom(tmp_path, pixels, bits=12, **{place: [group]}, WindowCenter=0, WindowWidth=10)
    assert (narrow != right).any()


@pytest.mark.parametrize("name", ["FloatPixelData", "DoubleFloatPixelData", None])
def test_file_without_whole_pixels_is_refused_in_plain_words(tmp_path, rng, name):
    file = write_dicom(tmp_path / "one.dcm", grey(rng))
    del file.PixelData
    if name is not None:
        setattr(file, name, np.zeros(36).tobytes())
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    said = "no PixelData (7FE0,0010)" if name is None else "only whole numbers in PixelData (7FE0,0010)"
    with pytest.raises(ValueError, match=r".+") as error:
        read(tmp_path)
    says(error, "one.dcm", name or "", said)


# ---- bits ----


@pytest.mark.filterwarnings("ignore:The .* value .* doesn't match the JPEG 2000 data")
@pytest.mark.parametrize("kind", ["native", "RLE", "JPEG 2000"])
def test_bits_that_are_not_stored_are_not_seen(tmp_path, rng, kind):
    pixels = rng.integers(0, 4096, (6, 6), np.uint16)
    overlaid = pixels | rng.integers(0, 16, (6, 6), np.uint16) << 12
    file = write_dicom(tmp_path / "one.dcm", pixels, bits=12)
    file.PixelData = overlaid.tobytes()
    if kind == "RLE":
        file.compress(pydicom.uid.RLELossless)
    if kind == "JPEG 2000":
        frame = compressed(overlaid, **J2K)
        write_compressed(tmp_path / "one.dcm", [frame], pixels, pydicom.uid.JPEG2000Lossless, bits=12)
    else:
        file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path).images[0], full(pixels / 4095))


def test_sign_that_is_not_extended_is(tmp_path, rng):
    pixels = rng.integers(-2048, 2048, (6, 6), np.int16)
    file = write_dicom(tmp_path / "one.dcm", pixels, bits=12)
    file.PixelData = (pixels & 0x0FFF).tobytes()
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path).images[0], full((pixels + 2048) / 4095))


@pytest.mark.parametrize("high", [11, 13, 15])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_stored_bits_end_at_high_bit(tmp_path, rng, high, dtype):
    low = -2048 if dtype == np.int16 else 0
    pixels = rng.integers(low, low + 4096, (6, 6), dtype)
    file = write_dicom(tmp_path / "one.dcm", pixels, bits=12)
    file.PixelData = (pixels << (high - 11)).astype(dtype).tobytes()
    file.HighBit = high
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path).images[0], full((pixels.astype(int) - low) / 4095))


@pytest.mark.parametrize("high", [5, 16])
def test_high_bit_that_cannot_be_is_refused(tmp_path, rng, high):
    with pytest.raises(ValueError, match=rf"HighBit \(0028,0102\) must be 11 for 12 bits stored, got {high}"):
        read_dicom(tmp_path, grey(rng).astype(np.uint16), bits=12, HighBit=high)


# ---- files without preamble or transfer syntax ----


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("meta", [True, False])
def test_file_without_preamble_or_transfer_syntax_is_read(tmp_path, rng, implicit, meta):
    pixels = grey(rng)
    file = write_dicom(tmp_path / "one.dcm", pixels)
    content = DicomBytesIO()
    content.is_implicit_VR, content.is_little_endian = implicit, True
    write_dataset(content, file)
    element = b"\x02\x00\x00\x00UL\x04\x00\x00\x00\x00\x00"  # the length of an empty header
    start = bytes(128) + b"DICM" + element if meta else b""
    (tmp_path / "one.dcm").write_bytes(start + content.getvalue())
    np.testing.assert_array_equal(read(tmp_path).images[0], pixels.astype(int) * 257)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"\x08\x00" + bytes(99)])
def test_other_content_named_dcm_is_refused_in_plain_words(tmp_path, content):
    (tmp_path / "one.dcm").write_bytes(content)
    with pytest.raises(ValueError, match=r"one\.dcm: cannot be read as an image") as error:
        read(tmp_path)
    assert "force" not in str(error.value)


# ---- padding and presentation ----


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(4095, None), (0, None), (0, 100), (4095, 4000)])
def test_padding_is_background(tmp_path, rng, kind, value, limit):
    pixels = rng.integers(0, 4096, (6, 6), np.uint16)
    pixels[0, :4] = value, value, limit or value, 2000
    tags = {"PixelPaddingValue": value} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    low, high = sorted((value, limit or value))
    right = np.where((low <= pixels) & (pixels <= high), 0, read_dicom(tmp_path, pixels, kind, 12))
    np.testing.assert_array_equal(read_dicom(tmp_path, pixels, kind, 12, **tags), right)


def test_padding_of_signed_pixels_is_background(tmp_path, rng):
    pixels = rng.integers(-1024, 1024, (6, 6), np.int16)
    pixels[0, :3] = -2000
    assert (read_dicom(tmp_path, pixels, PixelPaddingValue=-2000)[0, :3] == 0).all()


def test_monochrome1_is_inverted_once(tmp_path, rng):
    pixels = grey(rng)
    shown = read_dicom(tmp_path, pixels, "MONOCHROME1", PresentationLUTShape="INVERSE")
    np.testing.assert_array_equal(shown, 65535 - pixels.astype(int) * 257)
