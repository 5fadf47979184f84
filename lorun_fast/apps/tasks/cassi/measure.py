"""``lorun-fast measure cassi``: spectral cubes to simulated measurements."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from lorun_fast.apps import files, measurements, models, progress, restoring
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import not_negative, seed
from lorun_fast.apps.tasks import cassi
from lorun_fast.apps.tasks.cassi import cubes, options, sensor
from lorun_fast.operators import CASSI

EPILOG = """\
Cubes are .mat (any version), .npy or .npz files, or folders of gray band images; as (L, H, W) or (H, W, L). The mask
may be larger than a cube: its upper left corner is used. All cubes of one measurement file have one size.
The .npz holds plain arrays: y (N, H, W + step*(L-1)), size, name, task, noise, mask, bands and step.

examples:
  lorun-fast measure cassi scene01.mat --mask mask.mat -o y.npz
  lorun-fast measure cassi balloons_ms/ --mask mask.npy --step 1 --sensor-noise -o y.npz
  lorun-fast measure cassi CAVE/ --mask mask.mat --windows all -o y.npz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast measure cassi``."""
    parser.add_argument(
        "cubes", nargs="+", type=Path, metavar="CUBES", help="cubes, and folders of cubes or band images"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="measurement file, .npz")
    options.add_cubes(parser)
    options.add_windows(parser)
    parser.add_argument(
        "--noise",
        type=not_negative,
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of Gaussian noise on y, for cubes in [0, 1] (default: 0)",
    )
    add_sensor_noise(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    group = parser.add_argument_group("Phi (--mask or --model)")
    options.add_mask(group)
    options.add_bands(group)
    group.add_argument("--model", metavar="NAME|FILE", help="the mask of this network instead of --mask")


def add_sensor_noise(parser) -> None:
    """--sensor-noise."""
    parser.add_argument(
        "--sensor-noise",
        action="store_true",
        help=f"shot noise of a sensor with quantum efficiency {sensor.QUANTUM_EFFICIENCY} and {sensor.LEVELS} levels "
        "for y from 0 to L/step",
    )


def noisy(op: CASSI, x: np.ndarray, args: argparse.Namespace, index: int) -> np.ndarray:
    """y (1, H, W + step*(L-1)) of a cube (L, H, W) with the noise that the options name. index: among the inputs."""
    rng = restoring.noise_source(args.seed, index)
    y = restoring.measure(op, np.ascontiguousarray(x)[None], 0.0, rng)
    if args.sensor_noise:
        source = torch.Generator().manual_seed(int(rng.integers(2**62)))
        y = sensor.expose(torch.from_numpy(y), op.bands / max(1, op.step), generator=source).numpy()
    return y + np.float32(args.noise) * rng.standard_normal(y.shape, dtype=np.float32) if args.noise else y


def operator(args: argparse.Namespace, bands: int) -> CASSI:
    """The operator that --mask or --model names, for cubes with so many bands."""
    if (args.mask is None) == (args.model is None):
        raise UserError(f"expected one of --mask and --model, got {'both' if args.mask else 'neither'}")
    if args.mask is not None:
        return options.operator(args, bands, 2 if args.step is None else args.step)
    model = models.load(args.model, task=cassi.NAME)
    own = model.net.op
    if own.bands != bands:
        raise UserError(f"--model: expected {bands} bands as the cubes, got {own.bands} in {args.model}")
    return own if args.step in (None, own.step) else CASSI(own.mask.detach(), bands, args.step)


def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".npz":
        raise UserError(f"-o: expected a name that ends in .npz, got {args.output}")
    paths = cubes.find_cubes(args.cubes)
    files.check_file(args.output, [*paths, *([args.mask] if args.mask else [])])
    bands: int | None = args.bands
    full: CASSI | None = None
    op: CASSI | None = None
    names = files.unique_names([Path(f"{cubes.name_of(path)}.mat") for path in paths])
    measurements.check_names(paths, names)
    items: list[measurements.Measurement] = []
    with progress.bar(len(paths), "measuring", "cube") as bar:
        for name, path in zip(names, paths, strict=True):
            cube = cubes.load_cube(path, bands=bands, key=args.key, axes=args.axes, peak=args.peak).values
            bands = len(cube)
            full = operator(args, bands) if full is None else full
            for suffix, part in options.windows(cube, tuple(full.mask.shape[-2:]), args.windows):
                own = options.fitted(full, *part.shape[1:], str(path))
                if op is not None and own.mask.shape != op.mask.shape:
                    raise UserError(
                        f"{path}: expected {op.mask.shape[-2]} x {op.mask.shape[-1]} pixels as the cubes before it "
                        f"(one file, one mask), got {part.shape[1]} x {part.shape[2]}"
                    )
                op = own
                y = noisy(op, part, args, len(items))[0]
                items.append(measurements.Measurement(f"{name}{suffix}", y, part.shape[1:]))
            bar.update()
    file = measurements.MeasurementFile(items, cassi.operator_arrays(op), cassi.NAME, args.noise)
    measurements.write(args.output, file)
    print(f"{args.output}: {len(items)} measurements of {len(paths)} cubes, {cassi.describe(op)}")
    return 0
