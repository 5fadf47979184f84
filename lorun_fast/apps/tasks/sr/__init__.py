"""Super-resolution with a known blur: any kernel and scale by one network, for they enter through the operator."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from lorun_fast.apps import images
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.measurements import MeasurementFile, numbers
from lorun_fast.apps.progress import note
from lorun_fast.apps.runtime import Runtime, not_negative
from lorun_fast.apps.tasks.sr import kernels, pictures
from lorun_fast.network import LoRun
from lorun_fast.operators import BlurDownsample

NAME = "sr"
DEMO_MODEL = "sr"
NOISE_LEVEL = True
LAYOUT = ("channels", "rows", "columns")
OPERATOR_KEYS = ("kernel", "scale", "edges")

# The shipped network has seen noise up to this standard deviation.
_MOST_NOISE = 25 / 255


def describe(op: BlurDownsample) -> str:
    """One line: scale and kernel size."""
    kh, kw = op.kernel.shape[-2:]
    return f"x{op.scale}, kernel {kh}x{kw}"


def facts(op: BlurDownsample) -> dict:
    """The same for JSON."""
    return {"scale": op.scale, "kernel_size": list(op.kernel.shape[-2:])}


def operator_arrays(op: BlurDownsample, edges: str = "wrap") -> dict[str, np.ndarray]:
    """Kernel and scale as a measurement file holds them, and how the image goes on beyond its edges."""
    return {
        "kernel": op.kernel.detach().float().cpu().numpy(),
        "scale": np.int64(op.scale),
        "edges": np.str_(edges),
    }


def default_model(file: MeasurementFile) -> str:
    """One network restores all."""
    return DEMO_MODEL


def add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``restore`` for super-resolution."""
    group = parser.add_argument_group("super-resolution")
    group.add_argument(
        "--sigma",
        type=not_negative,
        metavar="SIGMA",
        help="noise level of y, for images in [0, 1] (default: what the file says)",
    )
    group.add_argument(
        "--edges",
        choices=pictures.EDGES,
        help="how the image goes on beyond its edges: periodically, as simulated measurements do, or mirrored, for "
        "photographs (default: what the file says, else wrap)",
    )


def _edges(file: MeasurementFile) -> str:
    return str(file.operator.get("edges", pictures.EDGES[0]))


def operator_for(
    file: MeasurementFile, op: BlurDownsample, path: Path, model: str, args: argparse.Namespace
) -> BlurDownsample:
    """The operator of the file. Raises UserError where kernel, scale, channels or an image size do not fit."""
    missing = [key for key in ("kernel", "scale") if key not in file.operator]
    if missing:
        raise UserError(f"{path}: expected the keys kernel and scale, got no {' and no '.join(missing)}")
    kernel = numbers(path, "kernel", file.operator["kernel"])
    if kernel.ndim != 2 or kernel.size == 0:
        raise UserError(f"{path}: kernel: expected shape (kh, kw), got {kernel.shape}")
    scale = file.operator["scale"]
    if scale.shape != () or scale.dtype.kind not in "iu" or scale < 1:
        raise UserError(f"{path}: scale: expected one whole number of at least 1, got {scale}")
    if _edges(file) not in pictures.EDGES:
        raise UserError(f"{path}: edges: expected {' or '.join(pictures.EDGES)}, got {_edges(file)!r}")
    args.edges = args.edges or _edges(file)
    kernels.warn_of_sum(f"{path}: kernel", kernel)
    scale = int(scale)
    for item in file.items:
        channels, rows, columns = item.y.shape
        if channels not in (1, 3):
            raise UserError(f"{path}: expected y of shape (1 or 3, rows, columns), got {item.y.shape}")
        if item.size is not None and (rows, columns) != tuple(-(-side // scale) for side in item.size):
            raise UserError(
                f"{path}: expected y of {-(-item.size[0] // scale)} x {-(-item.size[1] // scale)} pixels for the "
                f"{item.size[0]} x {item.size[1]} image {item.name!r} (height x width) at scale {scale}, "
                f"got {rows} x {columns}"
            )
        kernels.check_size(f"{path}: kernel", kernel, rows * scale, columns * scale, repr(item.name))
    return BlurDownsample(torch.from_numpy(kernel), scale)


def sigma(file: MeasurementFile, args: argparse.Namespace) -> float:
    """--sigma, or the noise that the file says its measurements have."""
    level = file.noise if args.sigma is None else args.sigma
    if level > _MOST_NOISE + 1e-6:
        note(f"a noise level of {level:.4g} is beyond the 25/255 = {_MOST_NOISE:.4g} that the shipped network has seen")
    return level


def restore(
    net: LoRun,
    y: np.ndarray,
    size: tuple[int, int] | None,
    how: Runtime,
    *,
    op: BlurDownsample,
    sigma: float,
    args: argparse.Namespace,
) -> tuple[np.ndarray, float]:
    """As restoring.restore, with --edges and --tile, for gray and colour."""
    return pictures.restore(net, y, size, how, op=op, sigma=sigma, edges=args.edges, tile=args.tile)


def suffixes(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the files that :func:`save` writes."""
    return (".png",)


def save(path: Path, x: np.ndarray, args: argparse.Namespace) -> None:
    """One PNG, gray or colour."""
    images.save(path.with_name(f"{path.name}.png"), x, args.bits)
