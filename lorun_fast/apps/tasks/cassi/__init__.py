"""Snapshot spectral imaging: where the mask comes from, and whether measurements fit a network."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from lorun_fast.apps import images
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.measurements import MeasurementFile, numbers
from lorun_fast.apps.tasks.cassi import colour, cubes, options, pictures
from lorun_fast.operators import CASSI

NAME = "cassi"
DEMO_MODEL = "cassi"
NOISE_LEVEL = False
LAYOUT = ("rows", "columns")
OPERATOR_KEYS = ("mask", "bands", "step")
# Where --scale auto puts the brightest measurement, as a share of L / step, a measurement of an all-one cube through
# a mask that is open everywhere.
_AUTO_PEAK = 0.8


def operator_arrays(op: CASSI) -> dict[str, np.ndarray]:
    """The mask as a measurement file holds it."""
    return {
        "mask": op.mask.detach().float().cpu().numpy(),
        "bands": np.int64(op.bands),
        "step": np.int64(op.step),
    }


def describe(op: CASSI) -> str:
    """One line: bands, step, mask."""
    height, width = op.mask.shape[-2:]
    kind = {2: "mask", 3: "one mask per band", 4: "one mask per sample"}[op.mask.ndim]
    return f"{op.bands} bands, step {op.step}, {kind} {height} x {width} (height x width)"


def facts(op: CASSI) -> dict:
    """The same for JSON."""
    return {"bands": op.bands, "step": op.step, "mask": list(op.mask.shape)}


def default_model(file: MeasurementFile) -> str:
    """The one network that is shipped."""
    return DEMO_MODEL


def add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``restore`` for snapshot spectral imaging."""
    group = parser.add_argument_group("snapshot spectral imaging")
    options.add_mask(group)
    group.add_argument(
        "--scale",
        type=options.scale,
        default=1.0,
        metavar="VALUE",
        help="factor on y, so that y = Phi x for cubes in [0, 1]; auto: the largest y becomes 0.8 L/step (default 1)",
    )
    group.add_argument(
        "--cube",
        choices=("npy", "mat"),
        default="npy",
        help="format of the restored cube: .npy (L, H, W), or .mat with img (H, W, L) (default: npy)",
    )
    options.add_wavelengths(group)


def operator_for(file: MeasurementFile, op: CASSI, path: Path, model: str, args: argparse.Namespace) -> CASSI | None:
    """The operator of the file's mask, or of --mask; None for the network's own. --scale becomes the file's factor.

    Raises UserError when bands, mask, step, the shape of y or an image size do not fit the network or one another.
    """
    step = _whole(path, file, "step", op.step)
    bands = _whole(path, file, "bands", op.bands)
    step = args.step if args.step is not None else step
    if bands != op.bands:
        raise UserError(f"{path}: expected {op.bands} bands as in {model}, got {bands}")
    chosen = None
    if args.mask is not None:
        chosen = options.operator(args, op.bands, step)
    elif "mask" in file.operator:
        mask = file.operator["mask"]
        if mask.ndim not in (2, 3) or (mask.ndim == 3 and len(mask) != bands) or mask.size == 0:
            raise UserError(f"{path}: mask: expected (H, W) or ({bands}, H, W), got shape {mask.shape}")
        chosen = CASSI(torch.from_numpy(numbers(path, "mask", mask)), bands, step)
    elif step != op.step:
        chosen = CASSI(op.mask.detach().cpu(), bands, step)
    used = op if chosen is None else chosen
    height, width = used.mask.shape[-2:]
    want = (height, width + step * (bands - 1))
    for item in file.items:
        if item.y.shape != want:
            source = (
                "--mask" if args.mask is not None else "its mask" if "mask" in file.operator else f"that of {model}"
            )
            raise UserError(
                f"{path}: expected y of {want[0]} x {want[1]} (rows x columns) for the {height} x {width} mask "
                f"({source}), {bands} bands and step {step}, got {item.y.shape[0]} x {item.y.shape[1]}"
            )
        if item.size not in (None, (height, width)):
            raise UserError(f"{path}: expected size {(height, width)} as the mask, got {item.size}")
    factor = args.scale
    if factor == options.AUTO:
        brightest = max(float(item.y.max()) for item in file.items)
        if brightest <= 0:
            raise UserError(f"{path}: expected a positive y for --scale auto, got at most {brightest:g}")
        factor = _AUTO_PEAK * bands / max(1, step) / brightest
    file.factor = factor
    return chosen


def sigma(file: MeasurementFile, args: argparse.Namespace) -> None:
    """These networks take no noise level."""


def suffixes(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the files named after a measurement that :func:`save` writes."""
    return ".png", f".{args.cube}", "_bands.png"


def save(path: Path, x: np.ndarray, args: argparse.Namespace) -> list[Path]:
    """The cube, a colour picture and a strip of bands: NAME.npy or NAME.mat, NAME.png, NAME_bands.png."""
    wavelengths = options.wavelengths(args, len(x))
    cube = cubes.save_cube(path, x, args.cube)
    picture, strip = (path.with_name(f"{path.name}{end}.png") for end in ("", "_bands"))
    images.save(picture, colour.to_srgb(x, wavelengths), args.bits)
    images.save(strip, pictures.strip(x, wavelengths))
    return [cube, picture, strip]


def _whole(path: Path, file: MeasurementFile, key: str, default: int) -> int:
    if key not in file.operator:
        return default
    value = file.operator[key]
    if value.shape != () or value.dtype.kind not in "iu" or value < 0:
        raise UserError(f"{path}: {key}: expected one whole number of at least 0, got {value.ravel()[:3].tolist()}")
    return int(value)
