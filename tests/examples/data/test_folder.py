"""Images and labels from folders of pictures."""

import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from examples.pretrain.data import Reading, load_images
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


def test_table_of_groups_alone_keeps_patients_together(tmp_path, rng):
    table = "name,group\nin/3.png,p\n2.png,q\n1.png,p\n"
    (folder_of(tmp_path, rng) / "labels.csv").write_text(table)
    data = read(tmp_path)
    assert (data.labels, data.label_names) == (None, ())
    assert data.groups.tolist() == ["p", "q", "p"]


def rows(*lines, header="name,class"):
    return "\n".join([header, *lines]) + "\n"


THREE = ("1.png,a", "2.png,b", "in/3.png,a")


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ("", ("header", "`name`", "[]")),
        (rows("1.png", header="name"), ("header", "label columns", "['name']")),
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
    (tmp_path / "IM0001").write_bytes(b"\x08\0")
    refuses(tmp_path, "no images found", "got 2 other files, first 'IM0001'", "PNG, JPEG, TIFF", "suffix .dcm")


# ---- files that are not what their names promise ----


@pytest.mark.parametrize("format", ["EPS", "GIF", "TIFF", "BMP", "WEBP", "PPM", "PDF", "ICO"])
@pytest.mark.parametrize("suffix", ["png", "JPG"])
def test_content_of_another_format_is_refused_and_no_other_decoder_is_tried(tmp_path, rng, monkeypatch, format, suffix):
    path = tmp_path / f"x.{suffix}"
    save(tmp_path, path.name, grey(rng, (16, 16)), format=format)
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: started.append(1))
    refuses(tmp_path, "/x.", "neither PNG nor JPEG", "take it out")
    assert not started


def test_png_and_jpeg_are_read_by_any_name_of_a_picture(tmp_path, rng):
    for number, suffix in enumerate(("jpg", "png", "tif", "bmp", "webp")):
        save(tmp_path, f"{number}.{suffix}", grey(rng), format="PNG")
        save(tmp_path, f"{number}j.{suffix}", grey(rng), format="JPEG")
    assert len(read(tmp_path)) == 10


def test_animation_is_refused(tmp_path, rng):
    save(tmp_path, "x.png", grey(rng), save_all=True, append_images=[Image.fromarray(grey(rng))])
    refuses(tmp_path, "/x.png", "animation of 2 frames", "split it")


def test_picture_above_the_safe_size_is_refused_before_it_is_decoded(tmp_path, rng, monkeypatch):
    save(tmp_path, "x.png", grey(rng, (20, 20)))
    for limit in (150, 399):  # Pillow raises an error above twice its limit, and only warns between
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refuses(tmp_path, "/x.png", "400 pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert len(read(tmp_path)) == 1


# ---- links ----


def test_linked_folders_are_searched_once_and_loops_end(tmp_path, rng):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    save(folder, "sub/a.png", grey(rng))
    save(elsewhere, "b.png", grey(rng))
    (folder / "linked").symlink_to(elsewhere)
    assert read(folder).names.tolist() == ["linked/b.png", "sub/a.png"]
    for link, target in (("again", folder / "sub"), ("sub/up", folder), ("linked/back", folder)):
        (folder / link).symlink_to(target)
    with pytest.warns(UserWarning, match="counted once") as warned:
        assert read(folder).names.tolist() == ["linked/b.png", "sub/a.png"]
    assert len(warned) == 3


@pytest.mark.parametrize("name", ["gone.png", "gone", "labels.csv"])
def test_link_that_leads_nowhere_is_refused(tmp_path, rng, name):
    save(tmp_path, "a.png", grey(rng))
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    refuses(tmp_path, f"/{name}", "must be a file", "mend or remove it")


# ---- classes that are numbers ----


def test_whole_numbers_are_told_apart_at_any_size(tmp_path, rng):
    table = folder_of(tmp_path, rng) / "labels.csv"
    table.write_text(rows(f"1.png,{2**53}", f"2.png,{2**53 + 1}.0", f"in/3.png,{-(2**63)}"))
    data = read(tmp_path)
    assert data.labels.tolist() == [1, 2, 0]
    assert data.label_names == (str(-(2**63)), str(2**53), str(2**53 + 1))
    table.write_text(rows("1.png,1e3", "2.png,1000", "in/3.png,+1000.0"))
    assert read(tmp_path).label_names == ("1000",)
    table.write_text(rows("1.png,1_0", "2.png,1_00", "in/3.png,1_0"))  # names, not Python's 10 and 100
    assert read(tmp_path).label_names == ("1_0", "1_00")
    for large in (2**63, 10**40, "1e999999", "inf"):
        table.write_text(rows(f"1.png,{large}", "2.png,1", "in/3.png,1"))
        refuses(tmp_path, "/labels.csv", "all names or all whole numbers of at most 64 bits")


def test_nul_byte_in_a_table_is_refused_by_line(tmp_path, rng):
    (folder_of(tmp_path, rng) / "labels.csv").write_bytes(b"name,class\n1.png,a\n2.png,a\0\nin/3.png,b\n")
    refuses(tmp_path, "/labels.csv", "line 3", "NUL", "save it as CSV UTF-8")


# ---- pictures of other kinds ----


@pytest.mark.parametrize(("suffix", "options"), [("tif", {}), ("TIFF", {"compression": "tiff_lzw"}), ("bmp", {})])
@pytest.mark.parametrize("colour", [(), (3,)], ids=["grey", "rgb"])
def test_tiff_and_bmp_are_read_beside_png(tmp_path, rng, suffix, options, colour):
    pixels = grey(rng, (6, 6, *colour))
    save(tmp_path, f"a.{suffix}", pixels, **options)
    save(tmp_path, "b.png", pixels)
    np.testing.assert_array_equal(read(tmp_path).images, [pixels, pixels])


def test_webp_is_read_and_deep_tiff_keeps_its_depth(tmp_path, rng):
    pixels = grey(rng)
    save(tmp_path / "webp", "a.webp", np.repeat(pixels[..., None], 3, -1), lossless=True)
    np.testing.assert_array_equal(read(tmp_path / "webp").images[0], pixels)
    deep = grey(rng, dtype=np.uint16)
    save(tmp_path / "tif", "a.tif", deep)
    assert read(tmp_path / "tif").images.dtype == np.uint16
    np.testing.assert_array_equal(read(tmp_path / "tif").images[0], deep)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("x.tif", np.ones((6, 6), np.float32), "its pixels are floats: scale them"),
        ("x.tif", np.full((6, 6), 70000, np.int32), "must be of 8 or 16 bits, got 70000 to 70000: scale them"),
        ("x.tif", np.full((6, 6), -1, np.int32), "must be of 8 or 16 bits, got -1 to -1: scale them"),
    ],
)
def test_depth_that_would_be_lost_is_refused(tmp_path, name, array, said):
    save(tmp_path, name, array)
    refuses(tmp_path, f"/{name}", said)


def test_deep_grey_with_transparency_is_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"".join(b"\0" + bytes(4 * 6) for _ in range(6)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 6, 16, 4, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    refuses(tmp_path, "/x.png", "16-bit grey with transparency", "write it without transparency")


@pytest.mark.parametrize(("suffix", "kind"), [("tif", "a file of 2 pages"), ("webp", "an animation of 2 frames")])
def test_several_pages_are_refused(tmp_path, rng, suffix, kind):
    save(tmp_path, f"x.{suffix}", grey(rng), save_all=True, append_images=[Image.fromarray(grey(rng))])
    refuses(tmp_path, f"/x.{suffix}", kind, "split it")


@pytest.mark.parametrize("name", ["b.gif", "sub/b.JP2", "b.nii.gz"])
def test_images_of_formats_that_are_not_read_are_named(tmp_path, rng, name):
    save(tmp_path, "a.png", grey(rng))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=f"1 files are of formats that are not read, first '{name}': convert"):
        assert len(read(tmp_path)) == 1


# ---- tables as others write them ----


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_match_however_their_accents_are_composed(tmp_path, rng, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    name = "Thorax_Müller/胸部ガ.png"
    save(tmp_path, unicodedata.normalize(form, name), grey(rng))
    save(tmp_path, "b.png", grey(rng))
    table = unicodedata.normalize(other, f"name,class\n{name},1\nb.png,0\n")
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    data = read(tmp_path)
    assert [str(name).startswith("b") for name in data.names] == [label == 0 for label in data.labels]
    save(tmp_path, unicodedata.normalize(other, name), grey(rng))
    refuses(tmp_path, "/labels.csv", "letters composed in two ways", "rename one")


def test_table_in_capitals_is_read_and_two_tables_are_refused(tmp_path, rng):
    (folder_of(tmp_path, rng) / "Labels.CSV").write_text(rows(*THREE))
    assert read(tmp_path).label_names == ("a", "b")
    (tmp_path / "labels.csv").write_text(rows(*THREE))
    refuses(tmp_path, "/Labels.CSV", "one table", "Labels.CSV and labels.csv", "take one out")


@pytest.mark.parametrize(("yes", "no"), [("1.0", "0.0"), ("True", "false"), ("1", "-0"), ("1e0", "0")])
def test_findings_are_read_as_written_by_pandas(tmp_path, rng, yes, no):
    table = rows(f"1.png,{yes},{no}", f"2.png,{no},{yes}", f"in/3.png,{yes},{yes}", header="name,a,b")
    (folder_of(tmp_path, rng) / "labels.csv").write_text(table)
    assert read(tmp_path).labels.tolist() == [[1, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("lines", "header", "parts"),
    [
        (("1.png,1,", "2.png,,0", "in/3.png,1,1"), "name,a,b", ("must be known", "a blank", "'b' for '1.png' (and 1")),
        (("1.png,1,0", "2.png,-1.0,0", "in/3.png,1,1"), "name,a,b", ("must be known", "got -1", "'a' for '2.png'")),
        (("1.png,1,0", "2.png,0,NaN", "in/3.png,1,1"), "name,a,b", ("must be known", "got NaN", "'b' for '2.png'")),
        (
            ("1.png,1,45", "2.png,-1,1", "in/3.png,1,7"),
            "name,a,age",
            ("must hold 0 or 1", "'45' in column 'age'", "take out columns that are no findings (age)"),
        ),
        (("1.png,a|b", "2.png,a", "in/3.png,none"), "name,a", ("one class", "'a|b'", "one column of 0 and 1")),
        (("1.png,1", "2.png,-1", "in/3.png,0"), "name,a", ("-1, 0 and 1", "uncertain, no and yes", "names if")),
        (("1.png,a", "2.png,nan", "in/3.png,b"), "name,a", ("'a'", "NaN is no class", "take its images out")),
    ],
)
def test_what_is_unknown_or_no_finding_is_refused_in_its_own_words(tmp_path, rng, lines, header, parts):
    (folder_of(tmp_path, rng) / "labels.csv").write_text(rows(*lines, header=header))
    refuses(tmp_path, "/labels.csv", *parts)


# ---- files that cannot be read ----


def test_skip_bad_lists_what_it_left_out(tmp_path, rng):
    pixels = [grey(rng) for _ in range(3)]
    for number, array in enumerate(pixels):
        save(tmp_path, f"{number}.png", array)
    (tmp_path / "labels.csv").write_text("name,group,class\n0.png,p,a\n1.png,q,b\n2.png,r,c\n")
    (tmp_path / "1.png").write_bytes(b"broken")
    refuses(tmp_path, "/1.png", "cannot be read")
    data = load_images(tmp_path, 6, reading=Reading(skip_bad=True), progress=False)
    np.testing.assert_array_equal(data.images, [pixels[0], pixels[2]])
    assert (data.labels.tolist(), data.groups.tolist()) == ([0, 2], ["p", "r"])
    assert data.names.tolist() == ["0.png", "2.png"]
    (said,) = data.left_out
    assert said.startswith(f"{tmp_path}/1.png: cannot be read")


def test_skip_bad_needs_one_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of its 1 images can be read, the first: .*a\.png"):
        load_images(tmp_path, 6, reading=Reading(skip_bad=True), progress=False)
