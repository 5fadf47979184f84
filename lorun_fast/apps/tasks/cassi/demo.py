"""``lorun-fast demo cassi``: a synthetic spectral cube, measured in one shot and restored by a shipped network."""

from __future__ import annotations

import argparse
import time

import numpy as np

from lorun_fast.apps import files, images, models, restoring, runtime, tables
from lorun_fast.apps.tasks import cassi
from lorun_fast.apps.tasks.cassi import colour, cubes, pictures, scores, synthetic

EPILOG = """\
The cube is made from a photograph inside scikit-image, with smooth spectra: nothing is downloaded. It is an example
of the command, not a test: real spectra are harder. Writes comparison.png (original, restored, measurement, spectra),
cassi_bands.png (original above, restored below), cassi_colour.png and cassi.npy into the output folder.

examples:
  lorun-fast demo cassi
  lorun-fast demo cassi --model runs/cassi/model.safetensors -o demo-output/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast demo cassi``."""
    runtime.add_demo_arguments(parser)
    files.add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    with runtime.chosen(args) as how:
        name = args.model or cassi.DEMO_MODEL
        model = models.load(name, how.device, cassi.NAME)
        outputs = ("comparison.png", "cassi_bands.png", "cassi_colour.png", "cassi.npy")
        files.make_outputs(args.output, outputs, args.overwrite)
        op = model.net.op
        print(f"{name}: {cassi.describe(op)}, {model.net.stages} stages; {how.describe()}")
        wavelengths = colour.default_wavelengths(op.bands)
        truth = synthetic.cube(*op.mask.shape[-2:], wavelengths)
        y = restoring.measure(op, truth[None], 0.0, restoring.noise_source(0, 0), how.device)
        start = restoring.start(model.net, y, None, how)[0]
        x, seconds = restoring.restore(restoring.prepared(model.net, how), y, None, how)
    restored = x[0]
    before, after = scores.score(start, truth), scores.score(restored, truth)
    pictures.overview(
        args.output / "comparison.png",
        [("original", truth), (f"restored, {after['psnr']:.2f} dB", restored)],
        wavelengths,
        f"{op.bands} bands from one measurement, {model.net.stages} stages",
        pictures.spread_points(truth),
        y[0],
    )
    both = [pictures.strip(cube, wavelengths) for cube in (truth, restored)]
    images.save(args.output / "cassi_bands.png", np.concatenate(both, 1))
    images.save(args.output / "cassi_colour.png", colour.to_srgb(restored, wavelengths))
    cubes.save_cube(args.output / "cassi", restored, "npy")
    rows = [
        [kind, *(tables.fixed(row[key], digits) for key, digits in (("psnr", 2), ("ssim", 4), ("sam", 2)))]
        for kind, row in (("start x_0", before), ("restored", after))
    ]
    print(tables.table(["synthetic cube", "PSNR dB", "SSIM", "SAM deg"], rows))
    total = time.perf_counter() - began
    print(f"{args.output / 'comparison.png'} shows it; {seconds:.2f} s in the network, {total:.1f} s in all")
    return 0
