"""Pictures as cameras, scanners and editors write them, and as somebody writes them who means harm:
what is opened looks as in a viewer, and what is refused is named."""
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from engine import limits
from engine.checks import printable
from engine.pictures import FORMATS, contact_sheet, open_image
from tests.conftest import ROOT


def stored(image, kind, **how):
    f = io.BytesIO()
    image.save(f, kind, **how)
    f.seek(0)
    return f


@pytest.fixture
def flag():
    """60 x 40, red, with a blue field at the top left."""
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 20, 20))
    return image


# -------------------------------------------------------------------------------- orientation

def exif(*tags):
    """EXIF by hand, with kinds of values that Pillow would not write. tags: (number, kind, how
    many, bytes)"""
    start = 8 + 2 + 12 * len(tags) + 4
    table = struct.pack("<H", len(tags))
    more = b""
    for number, kind, n, value in sorted(tags):
        if len(value) > 4:
            place = struct.pack("<I", start + len(more))
            more += value
            value = place
        table += struct.pack("<HHI", number, kind, n) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + bytes(4) + more


def turned(value):
    return 274, 3, 1, struct.pack("<H", value)


# Where the blue field must be shown: column, row. 6, for example: the camera was held upright.
CORNERS = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1),
           0: (0, 0), 9: (0, 0)}


@pytest.mark.parametrize("value, corner", CORNERS.items())
def test_orientation(flag, value, corner):
    image = open_image(stored(flag, "jpeg", exif=exif(turned(value)), quality=95))
    assert image.size == ((40, 60) if 5 <= value <= 8 else (60, 40))
    x, y = (5 if low == 0 else side - 6 for low, side in zip(corner, image.size))
    assert image.getpixel((x, y))[2] > 200


# 282: horizontal resolution, 531: position of colours, 270: description, 256: width.
ILL_TYPED = {
    "282 as text": (282, 2, 6, b"72/1\0\0"),
    "531 as text": (531, 2, 4, b"abc\0"),
    "531 as a fraction": (531, 5, 1, bytes(8)),
    "270 as a number": (270, 3, 1, b"\1\0"),
    "256 as text": (256, 2, 5, b"1234\0"),
    "a kind that there is not": (282, 99, 1, b"1"),
    "a table beyond the end": (0x8769, 4, 1, b"\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("tag", ILL_TYPED.values(), ids=ILL_TYPED)
def test_an_ill_typed_tag_beside_the_orientation_does_no_harm(flag, tag):
    image = open_image(stored(flag, "jpeg", exif=exif(turned(6), tag), quality=95))
    assert image.size == (40, 60)
    assert image.getpixel((34, 5))[2] > 200


def test_damaged_metadata_leave_a_picture_as_it_is_stored(flag):
    as_text = exif((274, 2, 2, b"6\0"))
    for garbage in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", as_text):
        assert open_image(stored(flag, "jpeg", exif=garbage)).size == (60, 40)


@pytest.mark.parametrize("kind, how", [
    ("png", {}), ("webp", dict(lossless=True)), ("tiff", {}),
    ("tiff", dict(compression="tiff_lzw"))])
def test_orientation_in_other_formats(flag, kind, how):
    """Pillow turns some of them by itself: once is enough."""
    if kind == "tiff":
        how = how | dict(tiffinfo={274: 6})
    else:
        tags = Image.Exif()
        tags[274] = 6
        how = how | dict(exif=tags)
    image = open_image(stored(flag, kind, **how))
    assert image.size == (40, 60)
    assert image.getpixel((34, 5)) == (0, 0, 255)


# -------------------------------------------------------------------------- brightness, colours

@pytest.mark.parametrize("value, seen", [(0, 0), (200, 200), (255, 255), (128 << 8, 128)])
def test_grey_of_32_bits_holds_8_or_16_bits(value, seen):
    image = Image.fromarray(np.full((4, 4), value, np.int32))
    assert open_image(stored(image, "tiff")).getpixel((0, 0)) == (seen,) * 3


@pytest.mark.parametrize("dtype, scale", [(np.uint8, 1), (np.uint16, 256)])
def test_what_is_transparent_in_a_grey_picture_is_white(dtype, scale):
    values = np.full((4, 4), 100 * scale, dtype)
    values[0] = 0
    image = open_image(stored(Image.fromarray(values), "png", transparency=0))
    assert image.getpixel((0, 0)) == (255,) * 3 and image.getpixel((0, 1)) == (100,) * 3


@pytest.mark.parametrize("value", [-5, 1 << 24])
def test_grey_of_32_bits_that_may_mean_anything_is_refused(value):
    image = Image.fromarray(np.full((4, 4), value, np.int32))
    with pytest.raises(ValueError, match=f"its values go from {value} to {value}"):
        open_image(stored(image, "tiff"))


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(device, kind, space, tags):
    """A colour profile (ICC, version 2). tags: {four letters: bytes}"""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
            b"cprt": b"text" + bytes(4) + b"none\0",
            b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)} | tags
    start = 128 + 4 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    body = b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, kind, device, space) + bytes(12)
    head += b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


# Display P3's red, green and blue in XYZ, adapted to D50 (the columns of its public profile).
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
# sRGB's, likewise.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def display_p3():
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256))
    tags = {letter + b"TRC": curve for letter in (b"r", b"g", b"b")}
    for letter, xyz in zip((b"r", b"g", b"b"), P3):
        tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*xyz)
    return profile(b"RGB ", b"mntr", b"XYZ ", tags)


def test_display_p3_becomes_srgb():
    """Against the definition, computed here."""
    colour = (200, 100, 50)
    image = Image.new("RGB", (8, 8), colour)
    linear = (np.array(colour) / 255) ** (round(2.2 * 256) / 256)
    linear = np.linalg.solve(np.array(SRGB).T, np.array(P3).T @ linear)
    want = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    for kind in ("png", "tiff"):
        seen = open_image(stored(image, kind, icc_profile=display_p3())).getpixel((0, 0))
        assert np.abs(np.array(seen) - want).max() <= 1.5, (seen, want)
    assert np.abs(want - colour).max() > 10
    # What is transparent is white all the same, and what is not has its colour.
    image = image.convert("RGBA")
    image.putpixel((1, 0), (*colour, 0))
    clear = open_image(stored(image, "png", icc_profile=display_p3()))
    assert clear.getpixel((0, 0)) == seen
    assert clear.getpixel((1, 0)) == (255, 255, 255)


def printer():
    """An ink table: paper is white, cyan is a grey of L* = 50, all else is black."""
    nodes = np.zeros((2, 2, 2, 2, 3), np.uint8)
    nodes[..., 1:] = 128
    nodes[0, 0, 0, 0, 0] = 255
    nodes[1, 0, 0, 0, 0] = 128
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += 4 * ramp + nodes.tobytes() + 3 * ramp
    return profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": table})


def test_inks_are_what_their_profile_says():
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (0, 8, 16, 16))
    how = dict(quality=100, subsampling=0)
    seen = open_image(stored(image, "jpeg", icc_profile=printer(), **how))
    # L* = 50 is 119 in sRGB.
    assert np.abs(np.array(seen.getpixel((8, 2))) - 119).max() <= 2
    assert min(seen.getpixel((8, 13))) >= 253
    plain = open_image(stored(image, "jpeg", **how)).getpixel((8, 2))
    assert plain[0] < 10 and min(plain[1:]) > 245


def test_a_profile_that_does_not_fit_is_ignored(flag):
    seen = open_image(stored(flag, "png")).tobytes()
    too_long = display_p3() + bytes(limits.MAX_PROFILE_BYTES)
    for wrong in (b"nonsense", printer(), display_p3()[:200], too_long):
        assert open_image(stored(flag, "tiff", icc_profile=wrong)).tobytes() == seen


# --------------------------------------------------------------------------------- what is refused

def test_only_named_formats_are_opened(flag):
    for kind in FORMATS:
        assert open_image(stored(flag, kind)).size == (60, 40)
    for kind in ("ppm", "tga", "ico", "eps", "jpeg2000", "pcx", "sgi", "dib"):
        with pytest.raises(ValueError, match="not a readable picture: none of JPEG, PNG"):
            open_image(stored(flag, kind))


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow would start Ghostscript on PostScript, whatever the file is called."""
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho yes > {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    file = tmp_path / "a.jpg"
    Image.new("RGB", (10, 10)).save(file, "eps")
    # Pillow remembers where it found a program: a process of its own.
    code = "import sys; from engine.pictures import open_image; open_image(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True,
                          text=True)
    assert "not a readable picture" in done.stderr
    assert not started.exists()
    # It would have, without the list of formats.
    code = "import sys; from PIL import Image; Image.open(sys.argv[1]).load()"
    subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True)
    assert started.exists()


def test_a_message_names_the_file_and_not_an_object(flag):
    cut = io.BytesIO(stored(flag, "jpeg").getvalue()[:400])
    for file in (io.BytesIO(b"nonsense"), cut):
        with pytest.raises(ValueError, match="^a.tar: 7, byte 512, target: not a ") as e:
            open_image(file, "a.tar: 7, byte 512, target")
        assert "BytesIO" not in str(e.value)


def test_a_picture_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for file, message in ((tmp_path / "fifo.png", "not a regular file"), ("/dev/zero", "regular"),
                          (tmp_path, "not a regular file"), (tmp_path / "none.png", "missing")):
        with pytest.raises(ValueError, match=f"{file}.*{message}"):
            open_image(file)


def only_a_header(width, height):
    """A PNG that says this size, and has no pixels."""
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum
    size = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b""))


def test_a_picture_has_limits(tmp_path, flag):
    with pytest.raises(ValueError, match="more than 2399 pixels: 60 x 40"):
        open_image(stored(flag, "png"), most=60 * 40 - 1)
    assert open_image(stored(flag, "png"), most=60 * 40).size == (60, 40)
    # 9400 x 9400: before it is decoded.
    huge = io.BytesIO(only_a_header(9400, 9400))
    with pytest.raises(ValueError, match=f"more than {limits.MAX_PIXELS} pixels: 9400 x 9400"):
        open_image(huge)
    large = tmp_path / "large.png"
    with open(large, "wb") as f:
        f.truncate(limits.MAX_PICTURE_BYTES + 1)
    with pytest.raises(ValueError, match="expected at most"):
        open_image(large)


@pytest.mark.parametrize("size", [(27, 29), (60, 29), (31, 639), (1, 1)])
def test_pictures_of_odd_sizes_are_opened(size):
    assert open_image(stored(Image.new("RGB", size, "red"), "png")).size == size


# ---------------------------------------------------------------------------------- to look at

def test_names_from_files_are_escaped_and_cut():
    assert printable("a\x1b[2J\nb\udcff\u202e") == r"a\x1b[2J\nb\udcff\u202e"
    assert printable("Straße 5, 東京") == "Straße 5, 東京"
    assert printable("x" * 1000) == "x" * limits.MAX_NAME_CHARACTERS + "..."


@pytest.mark.parametrize("side", [1, 4, 8, 20, 64])
def test_a_sheet_has_room_for_small_pictures_and_long_texts(side):
    texts = ["", "a", "a red circle left of a blue square", "x" * 500, "東京 " * 50, "a\x1b\nb"]
    pictures = [Image.new("RGB", (side, side), "red") for _ in texts]
    page = contact_sheet(pictures, texts, columns=3)
    assert page.width < 3 * max(side, 24) + 40
    colours = dict((colour, n) for n, colour in page.getcolors(1 << 20))
    assert colours[255, 0, 0] == len(texts) * side * side
    assert contact_sheet(pictures).height < page.height


def test_a_sheet_shows_pictures_of_other_sizes_uncropped():
    """The first one and those of a given size, too."""
    wide, small = Image.new("RGB", (90, 30), "red"), Image.new("RGB", (16, 16), "blue")
    page = contact_sheet([wide, small], size=(16, 16), scale=2, columns=2)
    assert page.size == (2 * 40 + 8, 32 + 16)
    colours = dict((colour, n) for n, colour in page.getcolors(1 << 20))
    assert colours[0, 0, 255] == 32 * 32
    # 32 x 10.67 of 32 x 32.
    assert 32 * 10 <= colours[255, 0, 0] <= 32 * 11
