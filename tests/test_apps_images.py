"""Reading and writing images: modes, depths, transparency, orientation, exactness."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from lorun_fast.apps import images
from lorun_fast.apps.errors import UserError

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (9, 13), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8)
LUMA = COLOUR @ np.array([0.299, 0.587, 0.114])


def test_gray(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "a.png")
    for colour in images.COLOURS:
        got = images.load(tmp_path / "a.png", colour)
        assert got.shape == (1, 9, 13) and got.dtype == np.float32
        np.testing.assert_array_equal(got[0], GRAY.astype(np.float32) / np.float32(255))


def test_colour(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.bmp")
    channels = images.load(tmp_path / "a.bmp", "channels")
    np.testing.assert_allclose(channels, COLOUR.transpose(2, 0, 1) / 255, atol=1e-7)
    luma = images.load(tmp_path / "a.bmp", "y")
    assert luma.shape == (1, 9, 13)
    np.testing.assert_allclose(luma[0] * 255, LUMA, atol=0.51)


def test_gray_pixels_in_a_colour_file_are_gray(tmp_path):
    Image.fromarray(np.repeat(GRAY[..., None], 3, 2)).save(tmp_path / "a.png")
    Image.fromarray(GRAY).convert("P").save(tmp_path / "b.png")
    for name in "ab":
        for colour in images.COLOURS:
            np.testing.assert_allclose(images.load(tmp_path / f"{name}.png", colour), GRAY[None] / 255, atol=1e-7)


def test_palette_is_not_read_as_numbers(tmp_path):
    indexed = Image.fromarray(COLOUR).quantize(16)
    indexed.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as stored:
        assert stored.mode == "P"
    colours = np.asarray(indexed.convert("RGB"))
    got = images.load(tmp_path / "a.tif", "channels")
    np.testing.assert_allclose(got, colours.transpose(2, 0, 1) / 255, atol=1e-7)
    got = images.load(tmp_path / "a.tif", "y")
    np.testing.assert_allclose(got[0] * 255, colours @ np.array([0.299, 0.587, 0.114]), atol=0.51)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    alpha = np.zeros((9, 13), np.uint8)
    alpha[:4] = 255
    if mode == "P":
        image = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8), "L").convert("P")
        image.putpalette([10, 10, 10, 50, 50, 50])
        image.save(tmp_path / "a.png", transparency=0)
        want = np.where(alpha > 0, 50, 255)
    else:
        pixels = np.repeat(GRAY[..., None], 3 if mode == "RGBA" else 1, 2)
        Image.fromarray(np.concatenate([pixels, alpha[..., None]], 2)).save(tmp_path / "a.png")
        want = np.where(alpha > 0, GRAY, 255)
    for colour in images.COLOURS:
        np.testing.assert_allclose(images.load(tmp_path / "a.png", colour), want[None] / 255, atol=1e-7)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(suffix, tmp_path):
    values = RNG.integers(0, 65536, (9, 13), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(images.load(tmp_path / f"a.{suffix}", "y")[0], values / 65535, atol=1e-7)


def test_bilevel_cmyk_and_float(tmp_path):
    bits = GRAY > 128
    Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.load(tmp_path / "a.png", "channels"), bits[None].astype(np.float32))
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "a.tif")
    np.testing.assert_allclose(
        images.load(tmp_path / "a.tif", "channels"), COLOUR.transpose(2, 0, 1) / 255, atol=1.01 / 255
    )
    values = RNG.random((9, 13), dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "f.tif")
    np.testing.assert_array_equal(images.load(tmp_path / "f.tif", "y")[0], values)


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan])
def test_float_values_outside_the_unit_interval_are_refused(value, tmp_path):
    values = np.full((9, 13), 0.5, np.float32)
    values[3, 3] = value
    Image.fromarray(values).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"expected values in \[0, 1\]"):
        images.load(tmp_path / "f.tif", "y")


def test_orientation_is_applied(tmp_path):
    image = Image.fromarray(GRAY)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(images.load(tmp_path / "a.png", "y")[0], np.rot90(GRAY, -1) / 255, atol=1e-7)


def test_only_the_first_frame_and_a_note(tmp_path, capsys):
    frames = [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(images.load(tmp_path / "a.tif", "y")[0], GRAY / 255, atol=1e-7)
    assert "only the first of 2 frames" in capsys.readouterr().err


def _png_samples(path):
    """(depth, colour type, samples) of an unfiltered PNG: an independent reader, as Pillow's has 8 bits in colour."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks[kind] = chunks.get(kind, b"") + body
        at += 12 + length
    width, height, depth, colour_type = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all()
    samples = np.ascontiguousarray(rows[:, 1:]).view(">u2").reshape(height, width, -1)
    return depth, colour_type, samples


def test_sixteen_bit_files_hold_sixteen_bits(tmp_path, capsys):
    values = RNG.random((3, 9, 13), dtype=np.float32)
    images.save(tmp_path / "c.png", values, 16)
    depth, colour_type, samples = _png_samples(tmp_path / "c.png")
    assert (depth, colour_type) == (16, 2)
    np.testing.assert_allclose(samples.transpose(2, 0, 1) / 65535, values, atol=0.51 / 65535)
    np.testing.assert_allclose(images.load(tmp_path / "c.png", "channels"), values, atol=1.01 / 255)
    assert "16-bit colour is read at 8 bits" in capsys.readouterr().err
    images.save(tmp_path / "g.png", values[:1], 16)
    assert _png_samples(tmp_path / "g.png")[:2] == (16, 0)
    np.testing.assert_allclose(images.load(tmp_path / "g.png", "y"), values[:1], atol=0.51 / 65535)


def _tiff(path, values, photometric=1, bits=None):
    """An uncompressed TIFF of (H, W) or (H, W, 3): Pillow does not write all of these kinds."""
    height, width, samples = (*values.shape, 1)[:3]
    bits = bits or 8 * values.dtype.itemsize
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [
        (256, width), (257, height), (258, *[bits] * samples), (259, 1), (262, photometric), (273, 0), (277, samples),
        (278, height), (279, values.nbytes), (339, *[kind] * samples),
    ]  # fmt: skip
    at, more, entries = 8 + 2 + 12 * len(tags) + 4, b"", b""
    for tag, *numbers in tags:
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, more = struct.pack("<I", at + len(more)), more + packed
        entries += struct.pack("<HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    entries = entries.replace(struct.pack("<HHII", 273, 3, 1, 0), struct.pack("<HHII", 273, 3, 1, at + len(more)))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + more + values.tobytes())


WIDE = (np.arange(54, dtype=np.uint16) * 1200).reshape(6, 9)


@pytest.mark.parametrize("values", [WIDE, (WIDE / 65535).astype(np.float32), (WIDE >> 8).astype(np.uint8)])
def test_a_tiff_whose_zero_is_white(values, tmp_path):
    _tiff(tmp_path / "a.tif", values, photometric=0)
    limit = 1 if values.dtype == np.float32 else np.iinfo(values.dtype).max
    np.testing.assert_allclose(images.load(tmp_path / "a.tif", "y")[0], 1 - values / limit, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_values_far_below_white_get_a_note(dtype, tmp_path, capsys):
    _tiff(tmp_path / "a.tif", (WIDE >> 4).astype(dtype))
    np.testing.assert_allclose(images.load(tmp_path / "a.tif", "y")[0], (WIDE >> 4) / 65535, atol=1e-7)
    assert f"{tmp_path / 'a.tif'}: values up to {WIDE.max() >> 4} only" in capsys.readouterr().err
    _tiff(tmp_path / "a.tif", WIDE.astype(dtype))
    images.load(tmp_path / "a.tif", "y")
    assert capsys.readouterr().err == ""


def test_twelve_bits_a_sample(tmp_path, capsys):
    packed = np.array([0xFF, 0xF8, 0x00], np.uint8)  # 4095 and 2048
    _tiff(tmp_path / "a.tif", packed[None], bits=12)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[10:22] = struct.pack("<HHII", 256, 3, 1, 2)  # the width
    (tmp_path / "a.tif").write_bytes(content)
    np.testing.assert_allclose(images.load(tmp_path / "a.tif", "y")[0, 0], [1, 2048 / 4095], atol=1e-6)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["png", "ppm", "tif"])
def test_what_sixteen_bits_lose_is_told(suffix, tmp_path, capsys):
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":  # gray with transparency
        header = struct.pack(">IIBBBBB", 6, 9, 16, 4, 0, 0, 0)
        rows = zlib.compress(b"".join(b"\0" + b"\x80\0\xff\xff" * 6 for _ in range(9)))
        chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        )
    elif suffix == "ppm":
        path.write_bytes(b"P6 9 6 65535\n" + np.stack([WIDE] * 3, -1).astype(">u2").tobytes())
    else:
        _tiff(path, np.stack([WIDE] * 3, -1), photometric=2)
    images.load(path, "y")
    kind = "gray with transparency" if suffix == "png" else "colour"
    assert f"{path}: 16-bit {kind} is read at 8 bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "channels", "said"),
    [
        (np.float64, 1, "1 x 64-bit floating point"),
        (np.float16, 1, "1 x 16-bit floating point"),
        (np.float32, 3, "3 x 32-bit floating point"),
    ],
)
def test_the_kind_of_a_tiff_that_is_not_read_is_named(dtype, channels, said, tmp_path):
    values = np.zeros((6, 9, 3)[: 2 + (channels > 1)], dtype)
    _tiff(tmp_path / "a.tif", values, photometric=2 if channels > 1 else 1)
    with pytest.raises(UserError, match=said):
        images.load(tmp_path / "a.tif", "y")


def test_large_images(tmp_path, monkeypatch):
    """Pillow warns above 89 and refuses above 179 megapixels; a header alone shows how far it gets."""
    header = struct.pack(">IIBBBBB", 20000, 10000, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 9, b"IDAT"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"complete image, got .*(truncated|unexpected|unrecognized)"):
            images.load(tmp_path / "a.png", "y")
    monkeypatch.setattr(images, "_MOST_PIXELS", 10**8)
    with pytest.raises(UserError, match=r"at most 100,000,000 pixels, got .*a\.png: 20000 x 10000"):
        images.load(tmp_path / "a.png", "y")


def test_saving_clips_and_rounds(tmp_path):
    values = np.array([[[-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]]], np.float32)
    images.save(tmp_path / "a.png", values)
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image).tolist() == [[0, 0, 0, 1, 255, 255]]


def test_eight_bit_colour_gets_no_note(tmp_path, capsys):
    """Also where a decoder's arguments hold a 16, such as the 2160 bytes of this row."""
    for suffix in ("bmp", "png", "tif", "jpg", "ppm"):
        Image.new("RGB", (720, 2)).save(tmp_path / f"a.{suffix}")
        images.load(tmp_path / f"a.{suffix}", "channels")
    assert capsys.readouterr().err == ""


def test_finding_names_each_file_once(tmp_path):
    for name in ("b.png", "a.tif", "c.JPG"):
        (tmp_path / name).touch()
    found = images.find([tmp_path / "b.png", tmp_path, tmp_path / ".." / tmp_path.name / "a.tif"])
    assert [p.name for p in found] == ["b.png", "a.tif", "c.JPG"]
