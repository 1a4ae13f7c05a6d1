"""DICOM files of a folder: depths, rescale, window, lookup tables, and files that cannot be read."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset

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
