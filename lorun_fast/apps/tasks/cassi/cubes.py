"""Spectral cubes and coded apertures from the files that users keep them in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorun_fast.apps import images, measurements
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.files import below, replacing
from lorun_fast.apps.matrices import ARRAYS, load_variables
from lorun_fast.apps.progress import note
from lorun_fast.apps.tasks.cassi import colour, scenes

AXES = ("auto", "lhw", "hwl")
_PACKED = ".npy.xz"
# Cubes that were interpolated to other wavelengths overshoot [0, 1] a little.
_SLACK = 0.1


@dataclass(frozen=True)
class Cube:
    """values (L, H, W) float32, about [0, 1]."""

    name: str
    values: np.ndarray


def _is_array(path: Path) -> bool:
    return path.suffix.lower() in ARRAYS or path.name.lower().endswith(_PACKED)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES and not path.name.startswith(".")


def name_of(path: Path) -> str:
    """The name without .mat, .npy, .npz or .npy.xz; a folder's own name."""
    return re.sub(r"(\.npy\.xz|\.mat|\.npy|\.npz)$", "", path.name, flags=re.IGNORECASE)


def find_cubes(arguments: Sequence[Path]) -> list[Path]:
    """The cubes that these files and folders name, each once, in a fixed order.

    A folder stands for the .mat, .npy and .npz files in it; without any, for the folders of band images that it is or
    that lie anywhere below it. Raises UserError for a name that does not exist and for a folder without cubes.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        if not argument.exists():
            raise UserError(f"expected a spectral cube or a folder of them, got {argument}: no such file")
        cubes = [argument]
        if argument.is_dir():
            cubes = sorted(p for p in argument.iterdir() if p.is_file() and _is_array(p) and p.name[0] != ".")
            if not cubes:
                cubes = sorted({p.parent for p in below(argument, images.SUFFIXES)})
            if not cubes:
                raise UserError(f"expected .mat, .npy, .npz or band images in {argument}, got none")
        for path in cubes:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def pick(
    path: Path, arrays: dict[str, np.ndarray], key: str | None, dims: tuple[int, ...], usual: Sequence[str], option: str
) -> tuple[str, np.ndarray]:
    """(name, array): the variable ``key``, or the one with a usual name, or the only one with so many dimensions."""
    if "" in arrays:
        key = ""
    if key is None:
        fitting = [k for k, v in arrays.items() if v.ndim in dims and v.dtype.kind in "fiu"]
        named = [k for k in usual if k in fitting]
        if len(fitting) != 1 and not named:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in sorted(arrays.items())) or "none"
            raise UserError(
                f"{path}: expected one variable with {' or '.join(map(str, dims))} axes (or {option}), got {shapes}"
            )
        key = named[0] if named else fitting[0]
    if key not in arrays:
        raise UserError(f"{path}: expected a variable {key!r} ({option}), got {', '.join(sorted(arrays)) or 'none'}")
    if arrays[key].ndim not in dims or arrays[key].size == 0:
        raise UserError(f"{path}: expected {' or '.join(map(str, dims))} axes, got shape {arrays[key].shape}")
    return key, arrays[key]


def bands_first(path: Path, cube: np.ndarray, bands: int | None, axes: str = "auto") -> np.ndarray:
    """(L, H, W) from (L, H, W) or (H, W, L).

    bands: L where it is known. axes: "lhw", "hwl", or "auto": the axis that is L long, or the shorter of the first and
    the last. Raises UserError where no axis fits, and where "auto" cannot tell.
    """
    first, last = cube.shape[0], cube.shape[-1]
    if axes == "auto":
        fits = [bands in (None, first), bands in (None, last)] if bands is None else [first == bands, last == bands]
        if bands is None and first != last:
            fits = [first < last, last < first]
        if all(fits):
            raise UserError(f"{path}: expected --axes lhw or hwl for a cube of shape {cube.shape}, got neither")
        if not any(fits):
            raise UserError(
                f"{path}: expected {bands} bands as (L, H, W) or (H, W, L), got a cube of shape {cube.shape}"
            )
        axes = "lhw" if fits[0] else "hwl"
    if axes == "hwl":
        cube = np.moveaxis(cube, -1, 0)
    if bands not in (None, len(cube)):
        raise UserError(f"{path}: expected {bands} bands, got {len(cube)} in a cube of shape {tuple(cube.shape)}")
    return cube


def load_cube(
    path: Path, *, bands: int | None = None, key: str | None = None, axes: str = "auto", peak: float | None = None
) -> Cube:
    """A cube from a .mat, .npy or .npz file, or from a folder of gray band images, in the order of their numbers.

    Scenes packed as ``.npy.xz`` (scenes.py) are interpolated to the usual wavelengths of ``bands`` bands, or of 28.
    bands, axes: see :func:`bands_first`. key: variable in the file. peak: the value that stands for 1 (default: 1 for
    floating point, 255 and 65535 for 8- and 16-bit integers).
    Raises UserError for what cannot be read, other band counts, NaN, and values outside [0, 1] after the division.
    """
    if path.name.lower().endswith(_PACKED):
        scene = scenes.companded(path, colour.default_wavelengths(bands or 28))
        return Cube(name_of(path), scene.crop(0, 0, scene.height, scene.width))
    if path.is_dir():
        values = _band_images(path)
        if bands not in (None, len(values)):
            raise UserError(f"{path}: expected {bands} bands, got {len(values)} band images")
    else:
        arrays = load_variables(path, "a spectral cube")
        key, values = pick(path, arrays, key, (3,), ("img", "cube", "hsi", "truth"), "--key")
        levels = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}.get(values.dtype, 1.0)
        values = measurements.numbers(path, key or "array", bands_first(path, values, bands, axes))
        values = values / np.float32(levels if peak is None else peak)
    lowest, highest = float(values.min()), float(values.max())
    if lowest < -_SLACK or highest > 1 + _SLACK:
        raise UserError(
            f"{path}: expected values in [0, 1] (--peak VALUE names what stands for 1), got {lowest:g} to {highest:g}"
        )
    return Cube(name_of(path), np.ascontiguousarray(values, np.float32))


def _numbers_in(path: Path) -> tuple:
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem))


def _band_images(folder: Path) -> np.ndarray:
    """(L, H, W); colour images in the folder are previews and are left out with a note."""
    planes: list[np.ndarray] = []
    for path in sorted((p for p in folder.iterdir() if p.is_file() and _is_image(p)), key=_numbers_in):
        image = images.load(path, "channels")
        if len(image) == 3:
            note(f"{path}: left out, a band is a gray image")
            continue
        if planes and image.shape[1:] != planes[0].shape:
            raise UserError(f"{path}: expected a band of {planes[0].shape} pixels as before, got {image.shape[1:]}")
        planes.append(image[0])
    if not planes:
        raise UserError(f"expected gray band images in {folder}, got none")
    return np.stack(planes)


def load_mask(path: Path, key: str | None = None, *, bands: int | None = None) -> np.ndarray:
    """A coded aperture (H, W), or (L, H, W) one per band, from .mat, .npy, .npz or a gray image; float32.

    Raises UserError for what cannot be read, NaN, zeros only, and where (L, H, W) or (H, W, L) does not fit ``bands``.
    """
    mask = _read_mask(path, key, bands)
    if not mask.any():
        raise UserError(f"{path}: expected a mask with some values other than zero, got none")
    return mask


def _read_mask(path: Path, key: str | None, bands: int | None) -> np.ndarray:
    if path.is_file() and _is_image(path):
        return images.load(path, "y")[0]
    arrays = load_variables(path, "a mask")
    key, values = pick(path, arrays, key, (2, 3), ("mask", "mask_3d_shift", "mask_3d"), "--mask-key")
    if values.ndim == 3:
        values = bands_first(path, values, bands)
    elif values.dtype == np.uint8 and values.max() > 1:
        values = values / np.float32(255)
    return np.ascontiguousarray(measurements.numbers(path, key or "array", values))


def save_cube(path: Path, cube: np.ndarray, kind: str) -> Path:
    """Writes (L, H, W) as .npy, or as .mat with the variable ``img`` (H, W, L), as others keep them."""
    path = path.with_name(f"{path.name}.{kind}")
    with replacing(path) as f:
        if kind == "mat":
            from scipy.io import savemat

            savemat(f, {"img": np.moveaxis(cube, 0, -1)}, do_compression=True)
        else:
            np.save(f, cube)
    return path
