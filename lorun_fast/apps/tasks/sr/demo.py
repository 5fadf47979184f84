"""``lorun-fast demo sr``: photographs that scikit-image carries, blurred, reduced and restored."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from skimage import data

from lorun_fast.apps import figures, files, images, metrics, models, progress, restoring, runtime, tables
from lorun_fast.apps.runtime import Runtime
from lorun_fast.apps.tasks import sr
from lorun_fast.apps.tasks.sr import kernels, pictures
from lorun_fast.network import LoRun
from lorun_fast.operators import BlurDownsample

EPILOG = """\
Writes NAME_original.png, NAME_small.png (the measurement y), NAME_start.png (x_0, y upsampled by bicubic) and
NAME_restored.png for each photograph, and comparison.png, into the output folder. The photographs come inside
scikit-image: nothing is downloaded.

examples:
  lorun-fast demo sr
  lorun-fast demo sr --model runs/sr/model.safetensors -o demo-output/mine
"""


@dataclass(frozen=True)
class _Case:
    """A photograph, how it is measured, and a detail (top, left, side) worth enlarging."""

    name: str
    scale: int
    blur: str
    kernel: np.ndarray
    noise: float
    detail: tuple[int, int, int]


def _cases() -> list[_Case]:
    oblique = kernels.gaussian(2.4, ratio=0.4, angle=math.pi / 5)
    return [
        _Case("astronaut", 2, "motion", kernels.motion(np.random.default_rng(3)), 0.0, (60, 175, 96)),
        _Case("chelsea", 3, "oblique Gaussian", oblique, 0.0, (75, 110, 80)),
        _Case("coffee", 4, "Gaussian", kernels.gaussian(2.0), 0.0, (245, 295, 96)),
        _Case("camera", 2, "Gaussian, noise 5/255", kernels.gaussian(1.6), 5 / 255, (80, 190, 96)),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast demo sr``."""
    runtime.add_demo_arguments(parser)
    files.add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    with runtime.chosen(args) as how:
        name = args.model or sr.DEMO_MODEL
        model = models.load(name, how.device, sr.NAME)
        kinds = ("original", "small", "start", "restored")
        outputs = [f"{case.name}_{kind}.png" for case in _cases() for kind in kinds]
        files.make_outputs(args.output, [*outputs, "comparison.png"], args.overwrite)
        print(f"{name}: any kernel and scale, {model.net.stages} stages; {how.describe()}")
        net = restoring.prepared(model.net, how)
        rows, comparisons = [], []
        for case in progress.over(_cases(), "restoring"):
            row, comparison = _one(case, net, how, args.output)
            rows.append(row)
            comparisons.append(comparison)
    title = f"One network for all kernels and scales: bicubic start x_0 and {model.net.stages} stages"
    figures.save(args.output / "comparison.png", comparisons, title)
    means = [metrics.mean([row[i] for row in rows]) for i in range(4, 9)]
    print(
        tables.table(
            ["photograph", "size", "scale", "blur", "PSNR dB", "SSIM", "start dB", "start SSIM", "seconds"],
            [[*row[:4], *tables.scores(row[4:])] for row in rows],
            footer=["mean", "", "", "", *tables.scores(means)],
        )
    )
    print(f"{args.output / 'comparison.png'} shows them; {time.perf_counter() - began:.1f} s in all")
    return 0


def _one(case: _Case, net: LoRun, how: Runtime, folder: Path):
    """The table's row and the figure's row of one photograph."""
    original = pictures.fitted(images.from_array(getattr(data, case.name)(), "channels"), case.scale, "crop")
    op = BlurDownsample(torch.from_numpy(case.kernel), case.scale).to(how.device)
    y = restoring.measure(op, original[None], case.noise, np.random.default_rng(0), how.device)
    restored, seconds = pictures.restore(net, y, None, how, op=op, sigma=case.noise)
    with torch.inference_mode():
        start = op.initial(torch.from_numpy(y).to(how.device)).cpu().numpy()[0]
    restored = restored[0]
    for kind, image in (("original", original), ("small", y[0]), ("start", start), ("restored", restored)):
        images.save(folder / f"{case.name}_{kind}.png", image)
    psnr, ssim = metrics.score(restored, original)
    start_psnr, start_ssim = metrics.score(start, original)
    panels = [
        (f"{case.name}, original", original),
        (f"x{case.scale}, {case.blur}: start x_0, {start_psnr:.2f} dB", start),
        (f"restored, {psnr:.2f} dB", restored),
    ]
    size = tables.image_size(*original.shape[1:])
    row = (case.name, size, f"x{case.scale}", case.blur, psnr, ssim, start_psnr, start_ssim, seconds)
    return row, figures.Comparison(panels, case.detail)
