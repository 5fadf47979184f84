"""Reading and writing images as float arrays (C, H, W) in [0, 1]."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from lorun_fast.apps import files
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.apps.progress import note

SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("bmp", "gif", "jp2", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp")
)
COLOURS = ("y", "channels")
# Users open files of their own, among them larger ones than Pillow takes for an attack: the limit is ours, in load().
Image.MAX_IMAGE_PIXELS = None
_MOST_PIXELS = 10**9
# An integer image that stays below this was made for fewer than 16 bits, or is nearly black.
_DARK = 2**12
_PHOTOMETRIC, _BITS, _SAMPLES, _FORMAT = 262, 258, 277, 339  # tags of a TIFF
_KINDS = {1: "unsigned integer", 2: "signed integer", 3: "floating point", 5: "complex integer", 6: "complex"}


def find(arguments: Sequence[Path]) -> list[Path]:
    """The image files that these files and folders name. Raises as :func:`files.find`."""
    return files.find(arguments, SUFFIXES, "images", "an image")


def load(path: Path, colour: str) -> np.ndarray:
    """An image as float32 (C, H, W) in [0, 1].

    colour: "y" gives one channel, the full-range BT.601 luma 0.299 R + 0.587 G + 0.114 B, rounded as the file is
        (8-bit files to 8 bits); "channels" gives three for a colour image, one for a gray one.
    8-, 12- and 16-bit, palette, bilevel, CMYK and float files ([0, 1] only) are read, transparency is laid on white,
    the EXIF orientation applied, and only the first of several frames taken.
    Raises UserError for anything that is not a readable image.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            if width * height > _MOST_PIXELS:
                raise UserError(f"expected at most {_MOST_PIXELS:,} pixels, got {path}: {width} x {height}")
            _warn_of_losses(path, opened)
            tags = dict(getattr(opened, "tag_v2", {}))
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"expected an image, got {path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"expected an image, got {path}: {_what_it_is(path)}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise UserError(f"expected a complete image, got {path}: {first_line(error)}") from error
    return _wide(path, image, tags) if image.mode[0] in "IF" else _eight_bit(image, colour)


def from_array(pixels: np.ndarray, colour: str) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) as :func:`load` would read it from a file."""
    return _eight_bit(Image.fromarray(pixels), colour)


def _what_it_is(path: Path) -> str:
    if path.stat().st_size == 0:
        return "an empty file"
    unknown = "not an image that can be read"
    if path.suffix.lower() not in (".tif", ".tiff"):
        return unknown
    try:
        with path.open("rb") as f:
            tags = TiffImagePlugin.ImageFileDirectory_v2(f.read(8))
            f.seek(tags.next)
            tags.load(f)
        bits, kind = tags[_BITS][0], _KINDS.get(tags.get(_FORMAT, (1,))[0], "unknown")
    except Exception:  # of damaged files, nearly anything
        return unknown
    return (
        f"a TIFF of {tags.get(_SAMPLES, 1)} x {bits}-bit {kind} samples, photometric interpretation "
        f"{tags.get(_PHOTOMETRIC)}, a kind that is not read (32-bit floating point is, in gray)"
    )


def _warn_of_losses(path: Path, image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        note(f"{path}: only the first of {image.n_frames} frames is read")
    if image.mode[0] in "IF" or not image.tile:
        return
    args = image.tile[0][-1]
    if image.format == "PPM":
        deep = isinstance(args, tuple) and args[-1] > 255  # the largest value
    else:
        # Raw modes of 16 bits a channel are called so ("RGB;16B"); "BGR;16" is 16 bits a pixel, which loses nothing.
        deep = re.search(r"(RGB|LA|CMYK)\w*;16", str(args))
    if deep:
        note(f"{path}: 16-bit {'gray with transparency' if 'LA;' in str(args) else 'colour'} is read at 8 bits")


def _wide(path: Path, image: Image.Image, tags: dict) -> np.ndarray:
    """tags: of a TIFF, which Pillow does not act on in these modes."""
    values = np.asarray(image)
    if image.mode == "F":
        limit, want = 1, "values in [0, 1] in a floating-point image"
    else:
        limit = 4095 if tags.get(_BITS) == (12,) else 65535
        want = f"values in 0..{limit} in an integer image"
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest <= limit):  # also catches NaN
        raise UserError(f"expected {want}, got {path}: {lowest:g} to {highest:g}")
    if limit == 65535 and 0 < highest < _DARK:
        note(f"{path}: values up to {highest} only, where {limit} is white: it is read nearly black")
    scaled = (values.astype(np.float32) / np.float32(limit))[None]
    return 1 - scaled if tags.get(_PHOTOMETRIC) == 0 else scaled


def _eight_bit(image: Image.Image, colour: str) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode == "RGB" and colour == "y":
        image = image.convert("L")
    values = np.asarray(image)
    if values.ndim == 3:
        gray = (values == values[..., :1]).all()
        values = values[..., 0] if gray else values.transpose(2, 0, 1)
    values = values if values.ndim == 3 else values[None]
    return np.ascontiguousarray(values, dtype=np.float32) / np.float32(255)


def save(path: Path, image: np.ndarray, bits: int = 8) -> None:
    """Writes (1 or 3, H, W) in [0, 1], clipped and rounded, as a PNG of 8 or 16 bits; complete or not at all."""
    levels = 2**bits - 1
    pixels = np.rint(np.clip(image, 0, 1).astype(np.float64) * levels).astype(np.uint16 if bits == 16 else np.uint8)
    pixels = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    with files.replacing(path) as f:
        if bits == 16:
            _write_png16(f, pixels)
        else:
            Image.fromarray(np.ascontiguousarray(pixels)).save(f, "PNG")


def _write_png16(f: BinaryIO, pixels: np.ndarray) -> None:
    """uint16 (H, W) or (H, W, 3): Pillow writes 16 bits only in gray."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    colour_type = 0 if pixels.ndim == 2 else 2
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter 0, none, before each row
    f.write(b"\x89PNG\r\n\x1a\n")
    f.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)))
    f.write(chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)))
    f.write(chunk(b"IEND", b""))
