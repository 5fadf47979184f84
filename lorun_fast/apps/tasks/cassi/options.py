"""Options that several commands of this task share."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import at_least_one, none_or_more, not_negative
from lorun_fast.apps.tasks.cassi import colour, cubes
from lorun_fast.operators import CASSI

AUTO = "auto"


def positive(text: str) -> float:
    """The argparse type of factors and peaks."""
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def scale(text: str) -> float | str:
    """The argparse type of --scale."""
    return AUTO if text == AUTO else positive(text)


def add_mask(group, step: int | None = None) -> None:
    """--mask, --mask-key, --shifted, --step."""
    group.add_argument(
        "--mask", type=Path, metavar="FILE", help="coded aperture (H, W) or (L, H, W): .mat, .npy, .npz or a gray image"
    )
    group.add_argument(
        "--mask-key", metavar="NAME", help="variable in the mask's file (default: the only one that fits)"
    )
    group.add_argument(
        "--shifted",
        action="store_true",
        help="the mask's file holds Phi as it lies on the detector, (L, H, W + step*(L-1)), such as mask_3d_shift",
    )
    text = "default: the file's or the network's" if step is None else f"default {step}"
    group.add_argument("--step", type=none_or_more, default=step, help=f"columns between neighbouring bands ({text})")


def add_cubes(group) -> None:
    """--key, --axes, --peak."""
    group.add_argument("--key", metavar="NAME", help="variable in the cubes' files (default: the only one that fits)")
    group.add_argument(
        "--axes", choices=cubes.AXES, default="auto", help="order of a cube's axes (default: told by the band count)"
    )
    group.add_argument(
        "--peak",
        type=positive,
        metavar="VALUE",
        help="value in the cubes that stands for 1 (default: 1; 255 and 65535 for 8- and 16-bit integers)",
    )


def add_wavelengths(group) -> None:
    """--wavelengths."""
    group.add_argument(
        "--wavelengths",
        type=positive,
        nargs="+",
        metavar="NM",
        help="of the bands, or the first and the last, for the colour pictures (default: the usual 28 from 453.5 to "
        "648; 400 to 700 for another count)",
    )


def add_bands(group) -> None:
    """--bands."""
    group.add_argument(
        "--bands", type=at_least_one, metavar="L", help="number of bands (default: told by the mask or cube)"
    )


def wavelengths(args: argparse.Namespace, bands: int) -> np.ndarray:
    """(L,) in nm. Raises UserError for another count than L or 2, or where they do not grow."""
    given = args.wavelengths
    if given is None:
        return colour.default_wavelengths(bands)
    if len(given) not in (2, bands):
        raise UserError(f"--wavelengths: expected {bands} numbers, or the first and the last, got {len(given)}")
    values = np.array(given) if len(given) == bands else np.linspace(*given, bands)
    if bands > 1 and not (np.diff(values) > 0).all():
        raise UserError(f"--wavelengths: expected growing numbers, got {', '.join(f'{v:g}' for v in given)}")
    return values


def operator(args: argparse.Namespace, bands: int, step: int) -> CASSI:
    """The operator of --mask for so many bands. Raises UserError where they do not fit."""
    mask = cubes.load_mask(args.mask, args.mask_key, bands=bands)
    if args.shifted:
        if mask.ndim != 3:
            raise UserError(
                f"{args.mask}: expected Phi of shape (L, H, W + step*(L-1)) for --shifted, got {mask.shape}"
            )
        if mask.shape[-1] <= step * (bands - 1):
            raise UserError(
                f"{args.mask}: expected more than step*(L-1) = {step * (bands - 1)} columns for --shifted, "
                f"got {mask.shape[-1]}"
            )
        return CASSI.from_phi(torch.from_numpy(mask), step)
    return CASSI(torch.from_numpy(mask), bands, step)


def fitted(op: CASSI, height: int, width: int, source: str) -> CASSI:
    """``op`` for a cube of this size: its mask's upper left corner. Raises UserError for a mask that is smaller."""
    rows, columns = op.mask.shape[-2:]
    if (rows, columns) == (height, width):
        return op
    if rows < height or columns < width:
        raise UserError(
            f"{source}: expected a mask of at least {height} x {width} (or --windows middle or all), "
            f"got one of {rows} x {columns}"
        )
    return CASSI(op.mask.detach()[..., :height, :width], op.bands, op.step)


def windows(cube: np.ndarray, side: tuple[int, int], which: str) -> list[tuple[str, np.ndarray]]:
    """(suffix of the name, part): the whole cube, its middle, or as many windows of ``side`` as fit side by side.

    A cube that is smaller than ``side`` along an axis stays whole along it.
    """
    if which == "whole":
        return [("", cube)]
    height, width = (min(own, want) for own, want in zip(cube.shape[1:], side, strict=True))
    rows, columns = (own // want for own, want in zip(cube.shape[1:], (height, width), strict=True))
    if which == "middle" or rows * columns == 1:
        top, left = (cube.shape[1] - height) // 2, (cube.shape[2] - width) // 2
        return [("", cube[:, top : top + height, left : left + width])]
    return [
        (f"_{i}{j}", cube[:, i * height : (i + 1) * height, j * width : (j + 1) * width])
        for i in range(rows)
        for j in range(columns)
    ]


def add_windows(parser) -> None:
    """--windows."""
    parser.add_argument(
        "--windows",
        choices=("whole", "middle", "all"),
        default="whole",
        help="of a cube larger than the mask: refuse it (whole, default), take a window of the mask's size from its "
        "middle, or all such windows that fit side by side",
    )
