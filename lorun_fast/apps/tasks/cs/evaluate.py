"""``lorun-fast evaluate``: measure, restore and score a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lorun_fast.apps import files, images, metrics, models, progress, reports, restoring, runtime, tables, tiling
from lorun_fast.apps.runtime import not_negative, seed

EPILOG = """\
PSNR is 10 log10(1 / MSE) in dB of images clipped to [0, 1]; SSIM is scikit-image's on 0..255 with its default 7x7
window. --colour y scores the BT.601 luma, as the field does; channels measures and scores R, G and B together.
Seconds run from y in memory to the image in memory, after one untimed image; in a batch, its time over its images.

JSON keys: mean.psnr, mean.ssim, mean.seconds, images[].name, .psnr, .ssim, .seconds, .size, .start_psnr, .start_ssim
(the start is x_0), and the model, Phi, settings and versions. A value that is not finite or undefined is null.

examples:
  lorun-fast evaluate cs-25 Set11/ --json set11.json
  lorun-fast evaluate runs/cs/model.safetensors photos/ --colour channels --save restored/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast evaluate``."""
    parser.add_argument(
        "model", metavar="MODEL", help="a shipped network (cs-25), a .safetensors file, or a finished run's folder"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="DIR", help="folders of images, and image files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the restored images there, as 8-bit PNGs")
    files.add_overwrite(parser)
    parser.add_argument(
        "--colour", choices=images.COLOURS, default="y", help="of a colour image: its luma (default) or each channel"
    )
    parser.add_argument(
        "--noise", type=not_negative, default=0.0, metavar="SIGMA", help="standard deviation of noise on y (default: 0)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    tiling.add_argument(parser)
    runtime.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with runtime.chosen(args) as how:
        return _run(args, how)


def _run(args: argparse.Namespace, how: runtime.Runtime) -> int:
    model = models.load(args.model, how.device)
    net = tiling.tiled(restoring.prepared(model.net, how), args.tile)
    paths = images.find(args.images)
    inputs = [Path(args.model), *paths]
    reports.check(args, inputs)
    # Reading everything once finds an unreadable image before hours of work, and tells what can share a batch.
    shapes = [images.load(path, args.colour).shape for path in progress.over(paths, "reading")]
    names = [f"{name}.png" for name in files.unique_names(paths)]
    if args.save is not None:
        files.make_outputs(args.save, names, args.overwrite, inputs)
    rows: list[dict] = [{} for _ in paths]
    warm = False
    with progress.bar(len(paths), "evaluating") as bar:
        for members in restoring.batches(shapes, how.batch):
            channels, *size = shapes[members[0]]
            originals = [images.load(paths[i], args.colour) for i in members]
            ys = [
                restoring.measure(
                    model.net.op, x[:, None], args.noise, restoring.noise_source(args.seed, i), how.device
                )
                for i, x in zip(members, originals, strict=True)
            ]
            y = np.concatenate(ys)
            if not warm:
                for _ in range(1 if how.device.type == "cpu" else 2):  # a GPU records a size when it comes again
                    restoring.restore(net, y, size, how)
                warm = True
            x, seconds = restoring.restore(net, y, size, how)
            x0 = restoring.start(model.net, y, size, how)
            for n, (i, original) in enumerate(zip(members, originals, strict=True)):
                own = slice(n * channels, (n + 1) * channels)
                rows[i] = _row(paths[i].name, original, x[own, 0], x0[own, 0], seconds / len(members))
                if args.save is not None:
                    images.save(args.save / names[i], x[own, 0])
            bar.update(len(members))
    report = _report(args, model, how, rows)
    if args.json is not None:
        reports.write(args.json, report)
    print(_table(report))
    print(f"{args.model}: {model.task.describe(model.net.op)}; {how.describe()}")
    return 0


def _row(name: str, original: np.ndarray, image: np.ndarray, start: np.ndarray, seconds: float) -> dict:
    psnr, ssim = metrics.score(image, original)
    start_psnr, start_ssim = metrics.score(start, original)
    return {
        "name": name,
        "size": list(original.shape[1:]),
        "psnr": psnr,
        "ssim": ssim,
        "seconds": seconds,
        "start_psnr": start_psnr,
        "start_ssim": start_ssim,
    }


def _report(args: argparse.Namespace, model: models.Model, how: runtime.Runtime, rows: list[dict]) -> dict:
    scores = ("psnr", "ssim", "seconds", "start_psnr", "start_ssim")
    return {
        **reports.network(model),
        **model.task.facts(model.net.op),
        "colour": args.colour,
        "noise": args.noise,
        "seed": args.seed,
        "tile": args.tile,
        "metrics": metrics.DESCRIPTION,
        **reports.machine(how),
        "mean": {key: metrics.mean([row[key] for row in rows]) for key in scores},
        "images": rows,
    }


def _table(report: dict) -> str:
    def line(row: dict) -> list[str]:
        return [
            tables.fixed(row["psnr"], 2),
            tables.fixed(row["ssim"], 4),
            tables.fixed(row["start_psnr"], 2),
            tables.fixed(row["start_ssim"], 4),
            tables.fixed(row["seconds"], 3),
        ]

    rows = [[row["name"], tables.image_size(*row["size"]), *line(row)] for row in report["images"]]
    header = ["image", "size", "PSNR dB", "SSIM", "start dB", "start SSIM", "seconds"]
    return tables.table(header, rows, footer=[f"mean of {len(rows)}", "", *line(report["mean"])])
