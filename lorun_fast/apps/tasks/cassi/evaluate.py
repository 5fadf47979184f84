"""``lorun-fast evaluate MODEL`` for snapshot spectral imaging: measure, restore and score spectral cubes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lorun_fast.apps import files, images, metrics, models, progress, reports, restoring, runtime, tables, tiling
from lorun_fast.apps.runtime import not_negative, seed
from lorun_fast.apps.tasks import cassi
from lorun_fast.apps.tasks.cassi import colour, cubes, options, pictures, scores
from lorun_fast.apps.tasks.cassi.measure import add_sensor_noise, noisy
from lorun_fast.operators import CASSI

EPILOG = """\
Cubes are .mat (any version), .npy or .npz files, or folders of gray band images; as (L, H, W) or (H, W, L). The
usual KAIST test files (scene01.mat ... with img, 256 x 256 x 28) are read as they are.
PSNR is that of each band of the cube clipped to [0, 1], then the mean; --mst-psnr shows that of MST's test code
instead (cubes times 256, rounded, not clipped, peak 255). Both are in the JSON. SAM is the spectral angle in degrees.
Seconds run from y in memory to the cube in memory, after one untimed cube.

JSON keys: mean.psnr, .psnr_mst, .ssim, .sam, .seconds, .start_psnr, .psnr_bands, and the same for each of cubes[].

examples:
  lorun-fast evaluate cassi KAIST/ --mask mask.mat --json kaist.json
  lorun-fast evaluate cassi CAVE/ --mask mask.mat --windows all --mst-psnr --save restored/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast evaluate`` for these networks."""
    parser.add_argument(
        "model", metavar="MODEL", help="a shipped network (cassi), a .safetensors file, or a finished run's folder"
    )
    parser.add_argument("cubes", nargs="+", type=Path, metavar="DIR", help="cubes, and folders of cubes or band images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="write NAME.png (truth, restored, spectra) and NAME_bands.png there"
    )
    files.add_overwrite(parser)
    parser.add_argument("--mst-psnr", action="store_true", help="show PSNR in the convention of MST's test code")
    options.add_cubes(parser)
    options.add_windows(parser)
    parser.add_argument(
        "--noise", type=not_negative, default=0.0, metavar="SIGMA", help="standard deviation of noise on y (default: 0)"
    )
    add_sensor_noise(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    tiling.add_argument(parser)
    options.add_mask(parser.add_argument_group("Phi (default: the network's own mask)"))
    options.add_wavelengths(parser)
    runtime.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with runtime.chosen(args) as how:
        return _run(args, how)


def _parts(args: argparse.Namespace, paths: list[Path], full: CASSI) -> Iterator[tuple[str, np.ndarray, CASSI]]:
    """(name, cube, its operator) of every window of every file."""
    for path in paths:
        cube = cubes.load_cube(path, bands=full.bands, key=args.key, axes=args.axes, peak=args.peak)
        for suffix, part in options.windows(cube.values, tuple(full.mask.shape[-2:]), args.windows):
            yield f"{cube.name}{suffix}", part, options.fitted(full, *part.shape[1:], str(path))


def _run(args: argparse.Namespace, how: runtime.Runtime) -> int:
    model = models.load(args.model, how.device)
    own = model.net.op
    step = own.step if args.step is None else args.step
    full = options.operator(args, own.bands, step) if args.mask else CASSI(own.mask.detach().cpu(), own.bands, step)
    net = tiling.tiled(restoring.prepared(model.net, how), args.tile)
    wavelengths = options.wavelengths(args, own.bands)
    paths = cubes.find_cubes(args.cubes)
    inputs = [Path(args.model), *([args.mask] if args.mask else []), *paths]
    reports.check(args, inputs)
    # Reading everything once finds a cube that does not fit before minutes of work.
    names = [name for path in progress.over(paths, "reading") for name, _, _ in _parts(args, [path], full)]
    saved = files.unique_names([Path(f"{name}.png") for name in names])
    if args.save is not None:
        outputs = [f"{name}{end}.png" for name in saved for end in ("", "_bands", "_colour")]
        files.make_outputs(args.save, outputs, args.overwrite, inputs)
    rows: list[dict] = []
    with progress.bar(len(names), "evaluating", "cube") as bar:
        for index, (name, truth, op) in enumerate(_parts(args, paths, full)):
            y = noisy(op, truth, args, index)
            device_op = op.to(how.device)
            if not rows:
                restoring.restore(net, y, None, how, op=device_op)
            x, seconds = restoring.restore(net, y, None, how, op=device_op)
            start = device_op.initial(torch.from_numpy(y).to(how.device)).cpu().numpy()[0]
            rows.append(
                {
                    "name": name,
                    "size": list(truth.shape[1:]),
                    "seconds": seconds,
                    **scores.score(x[0], truth),
                    "start_psnr": float(np.mean(scores.psnr_bands(start, truth))),
                }
            )
            if args.save is not None:
                _save(args.save / saved[index], truth, x[0], wavelengths, rows[-1])
            bar.update()
    report = _report(args, model, full, how, rows, wavelengths)
    if args.json is not None:
        reports.write(args.json, report)
    print(_table(report, "psnr_mst" if args.mst_psnr else "psnr"))
    print(f"{args.model}: {cassi.describe(full)}; {how.describe()}")
    return 0


def _save(path: Path, truth: np.ndarray, x: np.ndarray, wavelengths: np.ndarray, row: dict) -> None:
    panels = [("original", truth), (f"restored, {row['psnr']:.2f} dB", x)]
    points = pictures.spread_points(truth)
    pictures.overview(path.with_name(f"{path.name}.png"), panels, wavelengths, row["name"], points)
    both = np.concatenate([pictures.strip(cube, wavelengths) for cube in (truth, x)], 1)
    images.save(path.with_name(f"{path.name}_bands.png"), both)
    images.save(path.with_name(f"{path.name}_colour.png"), colour.to_srgb(x, wavelengths))


def _report(
    args: argparse.Namespace, model: models.Model, op: CASSI, how: runtime.Runtime, rows: list[dict], wavelengths
) -> dict:
    keys = ("psnr", "psnr_mst", "ssim", "sam", "seconds", "start_psnr")
    return {
        **reports.network(model),
        **cassi.facts(op),
        "mask_file": None if args.mask is None else args.mask.name,
        "windows": args.windows,
        "tile": args.tile,
        "noise": args.noise,
        "sensor_noise": args.sensor_noise,
        "seed": args.seed,
        "wavelengths": wavelengths.tolist(),
        "metrics": scores.DESCRIPTION,
        **reports.machine(how),
        "mean": {
            **{key: metrics.mean([row[key] for row in rows]) for key in keys},
            "psnr_bands": [metrics.mean(band) for band in zip(*(row["psnr_bands"] for row in rows), strict=True)],
        },
        "cubes": rows,
    }


def _table(report: dict, psnr: str) -> str:
    def line(row: dict) -> list[str]:
        digits = {psnr: 2, "ssim": 4, "sam": 2, "start_psnr": 2, "seconds": 3}
        return [tables.fixed(row[key], places) for key, places in digits.items()]

    rows = [[row["name"], tables.image_size(*row["size"]), *line(row)] for row in report["cubes"]]
    title = "PSNR dB (MST)" if psnr == "psnr_mst" else "PSNR dB"
    header = ["cube", "size", title, "SSIM", "SAM deg", "start dB", "seconds"]
    return tables.table(header, rows, footer=[f"mean of {len(rows)}", "", *line(report["mean"])])
