"""``lorun-fast measure``: images to simulated measurements."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorun_fast.apps import files, images, measurements, progress, restoring
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import not_negative, seed
from lorun_fast.apps.tasks import cs

EPILOG = """\
The .npz holds plain arrays (no pickles): y, size, name, task, noise, phi and block_size, for colour also channel.
docs/cli.md describes each, for those who write such a file from a sensor's data: only y is required.

examples:
  lorun-fast measure photos/ --ratio 25 -o y.npz
  lorun-fast measure a.png b.tif --phi phi_0_25_1089.mat --block-size 33 --noise 0.01 -o y.npz
  lorun-fast measure photos/ --model runs/cs/model.safetensors --colour channels -o y.npz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast measure``."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files and folders")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="measurement file, .npz")
    parser.add_argument(
        "--colour",
        choices=images.COLOURS,
        default="y",
        help="what is measured of a colour image: its luma (y, default), or each of R, G and B (channels)",
    )
    parser.add_argument(
        "--noise",
        type=not_negative,
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of Gaussian noise on y, for images in [0, 1] (default: 0)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise and of --gaussian (default: 0)")
    cs.add_operator_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".npz":
        raise UserError(f"-o: expected a name that ends in .npz, got {args.output}")
    op = cs.operator(args)
    paths = images.find(args.images)
    files.check_file(args.output, [*paths, *([args.phi] if args.phi else [])])
    names = files.unique_names(paths)
    measurements.check_names(paths, names)
    items = []
    with progress.bar(len(paths), "measuring") as bar:
        for i, (name, path) in enumerate(zip(names, paths, strict=True)):
            image = images.load(path, args.colour)
            channels = measurements.CHANNELS if len(image) == 3 else ("",)
            ys = restoring.measure(op, image[:, None], args.noise, restoring.noise_source(args.seed, i))
            items += [
                measurements.Measurement(name, y, image.shape[1:], channel)
                for y, channel in zip(ys, channels, strict=True)
            ]
            bar.update()
    file = measurements.MeasurementFile(items, cs.operator_arrays(op), cs.NAME, args.noise)
    measurements.write(args.output, file)
    print(f"{args.output}: {len(paths)} images, {cs.describe(op)}")
    return 0
