"""``lorun-fast measure sr``: images to simulated measurements, blurred and reduced."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from lorun_fast.apps import files, images, measurements, progress, restoring
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import at_least_one, not_negative, seed
from lorun_fast.apps.tasks import sr
from lorun_fast.apps.tasks.sr import kernels, pictures
from lorun_fast.operators import BlurDownsample

EPILOG = """\
y = (x * kernel) at every scale-th pixel + noise: circular convolution, the upper left pixel of each cell kept, as
scipy.ndimage.convolve(x, kernel, mode="wrap")[::s, ::s]. The .npz holds plain arrays: y (channels, rows, columns),
size, name, task, noise, kernel, scale, edges (docs/cli.md).

examples:
  lorun-fast measure sr photos/ --kernel kernels_12.mat --index 3 --scale 3 -o y.npz
  lorun-fast measure sr a.png --gaussian 1.6 --scale 4 --noise 0.02 -o y.npz
  lorun-fast measure sr small.png --kernel k.png --scale 2 --measured -o y.npz    # small.png is y: restore it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast measure sr``."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files and folders")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="measurement file, .npz")
    parser.add_argument("--scale", type=at_least_one, required=True, metavar="S", help="2, 3, 4; 1 is deblurring")
    group = parser.add_argument_group("kernel (one of --kernel, --gaussian)")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--kernel", type=Path, metavar="FILE", help="a .mat (matrix or cell array, any version), .npy, .npz or .png"
    )
    source.add_argument(
        "--gaussian", type=not_negative, metavar="WIDTH", help="a 25x25 Gaussian of this standard deviation in pixels"
    )
    group.add_argument("--key", help=kernels.KEY_HELP)
    group.add_argument("--index", type=at_least_one, metavar="I", help="which of several kernels, from 1")
    group.add_argument("--normalise", action="store_true", help="divide the kernel by its sum")
    parser.add_argument(
        "--size",
        choices=pictures.SIZES,
        default="crop",
        help="of an image that the scale does not divide: crop it (default), or reflect it at the bottom and at the "
        "right; what is restored is cropped again",
    )
    parser.add_argument(
        "--colour",
        choices=images.COLOURS,
        default="channels",
        help="of a colour image: R, G and B (channels, default), or its luma (y)",
    )
    parser.add_argument(
        "--noise",
        type=not_negative,
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of Gaussian noise on y, for images in [0, 1] (default: 0)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--measured",
        action="store_true",
        help="the images are blurred and small already: they become y as they are; --noise says what noise they have",
    )


def kernel_of(args: argparse.Namespace) -> np.ndarray:
    """The kernel that the options name. Raises UserError where there are several and no --index."""
    if args.gaussian is not None:
        if args.gaussian == 0:
            raise UserError("--gaussian: expected a width above 0, got 0")
        if args.key is not None or args.index is not None:
            raise UserError("expected --kernel beside --key and --index, got --gaussian")
        return kernels.gaussian(args.gaussian)
    found = kernels.load(args.kernel, args.key)
    if args.index is None and len(found) > 1:
        raise UserError(f"{args.kernel}: expected --index 1 to {len(found)}, which of its kernels, got none")
    index = args.index or 1
    if index > len(found):
        raise UserError(f"--index: expected 1 to {len(found)} as {args.kernel} holds, got {index}")
    kernel = found[index - 1]
    if args.normalise:
        return kernels.normalised(kernel)
    kernels.warn_of_sum(str(args.kernel), kernel)
    return kernel


def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".npz":
        raise UserError(f"-o: expected a name that ends in .npz, got {args.output}")
    kernel = kernel_of(args)
    op = BlurDownsample(torch.from_numpy(kernel), args.scale)
    paths = images.find(args.images)
    files.check_file(args.output, [*paths, *([args.kernel] if args.kernel else [])])
    names = files.unique_names(paths)
    measurements.check_names(paths, names)
    items = []
    with progress.bar(len(paths), "measuring") as bar:
        for i, (name, path) in enumerate(zip(names, paths, strict=True)):
            image = images.load(path, args.colour)
            if args.measured:
                size = tuple(side * args.scale for side in image.shape[1:])
                y = image
            else:
                try:
                    x = pictures.fitted(image, args.scale, args.size)
                except UserError as error:
                    raise UserError(f"{path}: {error}") from None
                size = x.shape[1:] if args.size == "crop" else image.shape[1:]
                rng = restoring.noise_source(args.seed, i)
                y = restoring.measure(op, x[None], args.noise, rng)[0]
            kernels.check_size(str(args.kernel or "--gaussian"), kernel, *size, str(path))
            items.append(measurements.Measurement(name, y, size))
            bar.update()
    arrays = sr.operator_arrays(op, "reflect" if args.measured else "wrap")
    measurements.write(args.output, measurements.MeasurementFile(items, arrays, sr.NAME, args.noise))
    print(f"{args.output}: {len(paths)} images, {sr.describe(op)}")
    return 0
