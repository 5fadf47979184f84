"""``lorun-fast demo cs``: photographs that scikit-image carries, restored by a shipped network."""

from __future__ import annotations

import argparse
import time

import numpy as np
from skimage import data

from lorun_fast.apps import figures, files, images, metrics, models, progress, restoring, runtime, tables
from lorun_fast.apps.tasks import cs
from lorun_fast.network import LoRun

EPILOG = """\
Writes NAME_original.png, NAME_start.png (x_0, what the stages start from) and NAME_restored.png for each photograph,
and comparison.png, into the output folder. The photographs come inside scikit-image: nothing is downloaded.

examples:
  lorun-fast demo
  lorun-fast demo cs --model runs/cs/model.safetensors -o demo-output/mine --dtype bf16
"""

# Photographs in scikit-image's wheel, each with a detail (top, left, side) worth enlarging.
_PHOTOGRAPHS = {
    "camera": (80, 190, 96),
    "astronaut": (60, 175, 96),
    "chelsea": (75, 110, 80),
    "coffee": (245, 295, 96),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast demo``."""
    runtime.add_demo_arguments(parser)
    files.add_overwrite(parser)
    parser.add_argument(
        "--colour",
        choices=images.COLOURS,
        default="channels",
        help="of a colour photograph: each of R, G, B is measured and restored (channels, default), or its luma (y)",
    )


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    with runtime.chosen(args) as how:
        name = args.model or cs.DEMO_MODEL
        model = models.load(name, how.device, cs.NAME)
        outputs = [f"{name}_{kind}.png" for name in _PHOTOGRAPHS for kind in ("original", "start", "restored")]
        files.make_outputs(args.output, [*outputs, "comparison.png"], args.overwrite)
        print(f"{name}: {model.task.describe(model.net.op)}, {model.net.stages} stages; {how.describe()}")
        net = restoring.prepared(model.net, how)
        rows, comparisons = [], []
        for photograph in progress.over(list(_PHOTOGRAPHS), "restoring"):
            row, comparison = _one(photograph, net, how, args)
            rows.append(row)
            comparisons.append(comparison)
    title = f"{model.task.describe(model.net.op)}: x_0 and a {model.net.stages}-stage network"
    figures.save(args.output / "comparison.png", comparisons, title)
    means = [metrics.mean([row[i] for row in rows]) for i in range(2, 7)]
    print(
        tables.table(
            ["photograph", "size", "PSNR dB", "SSIM", "start dB", "start SSIM", "seconds"],
            [[row[0], row[1], *tables.scores(row[2:])] for row in rows],
            footer=["mean", "", *tables.scores(means)],
        )
    )
    print(f"{args.output / 'comparison.png'} shows them; {time.perf_counter() - began:.1f} s in all")
    return 0


def _one(name: str, net: LoRun, how: runtime.Runtime, args: argparse.Namespace):
    """The table's row and the figure's row of one photograph."""
    original = images.from_array(getattr(data, name)(), args.colour)
    size = original.shape[1:]
    y = restoring.measure(net.op, original[:, None], 0.0, np.random.default_rng(0), how.device)
    parts = []
    seconds = 0.0
    for members in restoring.batches([0] * len(y), how.batch):
        x, elapsed = restoring.restore(net, y[members], size, how)
        parts.append(x[:, 0])
        seconds += elapsed
    restored = np.concatenate(parts)
    start = restoring.start(net, y, size, how)[:, 0]
    for kind, image in (("original", original), ("start", start), ("restored", restored)):
        images.save(args.output / f"{name}_{kind}.png", image)
    psnr, ssim = metrics.score(restored, original)
    start_psnr, start_ssim = metrics.score(start, original)
    panels = [
        (f"{name}, original", original),
        (f"start x_0, {start_psnr:.2f} dB", start),
        (f"restored, {psnr:.2f} dB", restored),
    ]
    row = (name, tables.image_size(*size), psnr, ssim, start_psnr, start_ssim, seconds)
    return row, figures.Comparison(panels, _PHOTOGRAPHS[name])
