"""Reading and writing images as float arrays (C, H, W) in [0, 1]."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from lorun_fast.apps import files
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.apps.progress import note

SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("bmp", "gif", "jp2", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp")
)
COLOURS = ("y", "channels")


def find(arguments: Sequence[Path]) -> list[Path]:
    """The image files that these files and folders name. Raises as :func:`files.find`."""
    return files.find(arguments, SUFFIXES, "images", "an image")


def load(path: Path, colour: str) -> np.ndarray:
    """An image as float32 (C, H, W) in [0, 1].

    colour: "y" gives one channel, the full-range BT.601 luma 0.299 R + 0.587 G + 0.114 B, rounded as the file is
        (8-bit files to 8 bits); "channels" gives three for a colour image, one for a gray one.
    8- and 16-bit, palette, bilevel, CMYK and float files ([0, 1] only) are read, transparency is laid on white,
    the EXIF orientation applied, and only the first of several frames taken.
    Raises UserError for anything that is not a readable image.
    """
    try:
        with Image.open(path) as opened:
            _warn_of_losses(path, opened)
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise UserError(f"expected an image, got {path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"expected an image, got {path}: {_what_it_is(path)}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise UserError(f"expected a complete image, got {path}: {first_line(error)}") from error
    return _wide(path, image) if image.mode[0] in "IF" else _eight_bit(image, colour)


def from_array(pixels: np.ndarray, colour: str) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) as :func:`load` would read it from a file."""
    return _eight_bit(Image.fromarray(pixels), colour)


def _what_it_is(path: Path) -> str:
    return "an empty file" if path.stat().st_size == 0 else "not an image that can be read"


def _warn_of_losses(path: Path, image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        note(f"{path}: only the first of {image.n_frames} frames is read")
    # Raw modes of 16 bits a channel begin so ("RGB;16B"); "BGR;16" is 16 bits a pixel, which loses nothing.
    if image.mode in ("RGB", "RGBA") and image.tile and "RGB" in (raw := str(image.tile[0][-1])) and ";16" in raw:
        note(f"{path}: 16-bit colour is read at 8 bits")


def _wide(path: Path, image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F":
        scale, limit, want = 1.0, 1.0, "values in [0, 1] in a floating-point image"
    else:
        scale, limit, want = 65535.0, 65535, "values in 0..65535 in an integer image"
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest <= limit):  # also catches NaN
        raise UserError(f"expected {want}, got {path}: {lowest:g} to {highest:g}")
    return (values.astype(np.float32) / np.float32(scale))[None]


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
