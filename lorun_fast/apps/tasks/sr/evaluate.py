"""``lorun-fast evaluate`` for super-resolution: every image, kernel and scale, by a published protocol."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from lorun_fast.apps import files, images, metrics, models, progress, reports, restoring, runtime, tables, tiling
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.apps.runtime import at_least_one, not_negative, seed
from lorun_fast.apps.tasks.sr import heatmap, kernels, pictures, protocol
from lorun_fast.operators import BlurDownsample

EPILOG = """\
--protocol usrnet is that of USRNet's Table 1: the uint8 image cropped to multiples of lcm(s, 8), blurred circularly,
truncated to whole gray levels, every s-th pixel kept; the restored image rounded to uint8; PSNR over R, G and B, s^2
pixels left out at every border. --protocol float rounds nothing. "start" is x_0, bicubic upsampling without a shift.
Seconds run from y in memory to the image in memory, after one untimed image; in a batch, its time over its images.

JSON keys: mean[], of each scale: scale, psnr, start_psnr, seconds; kernels[], of each scale and kernel: scale, kernel
(from 1, its place in the file), psnr, start_psnr, seconds, images[].name, .psnr, .start_psnr; the model, settings,
hashes of the kernels and image files, and versions. Means over a kernel's images, then over the kernels. A value that
is not finite is null.

With --json, the rows so far are in FILE.part until FILE is written; --resume goes on from them.

examples:
  lorun-fast evaluate sr BSD68/ --kernels kernels_12.mat --json bsd68.json --figure bsd68.png
  lorun-fast evaluate sr photos/ --kernels k.png --scale 2 --protocol float --noise 0.01
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast evaluate`` for super-resolution."""
    parser.add_argument(
        "model", metavar="MODEL", help="a shipped network (sr), a .safetensors file, or a finished run's folder"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="DIR", help="folders of images, and image files")
    parser.add_argument(
        "--kernels",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .mat (matrix, stack or cell array, any version), .npy, .npz or .png file of one or more kernels",
    )
    parser.add_argument(
        "--key", help="variable in the .mat or .npz file (default: the only one, or kernels, kernel or k)"
    )
    parser.add_argument("--index", type=at_least_one, nargs="+", metavar="I", help="only these kernels, from 1")
    parser.add_argument("--normalise", action="store_true", help="divide each kernel by its sum")
    parser.add_argument("--scale", type=at_least_one, nargs="+", default=[2, 3, 4], metavar="S", help="default: 2 3 4")
    parser.add_argument("--protocol", choices=protocol.NAMES, default="usrnet", help="default: usrnet")
    parser.add_argument(
        "--noise",
        type=not_negative,
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of noise on y, which the network is told (default: 0)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    tiling.add_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from FILE.part, which --json keeps until its FILE is complete: a row per kernel and scale",
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write a heat map there, as a PNG")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the restored images there, as 8-bit PNGs")
    files.add_overwrite(parser)
    runtime.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with runtime.chosen(args) as how:
        return _run(args, how)


def _chosen_kernels(args: argparse.Namespace) -> dict[int, np.ndarray]:
    """The kernels by their place in the file, from 1."""
    found = dict(enumerate(kernels.load(args.kernels, args.key), 1))
    unknown = [i for i in args.index or () if i not in found]
    if unknown:
        raise UserError(f"--index: expected 1 to {len(found)} as {args.kernels} holds, got {unknown[0]}")
    found = {i: found[i] for i in args.index or found}
    if args.normalise:
        return {i: kernels.normalised(kernel) for i, kernel in found.items()}
    for i, kernel in found.items():
        kernels.warn_of_sum(f"{args.kernels}: kernel {i}", kernel)
    return found


def _run(args: argparse.Namespace, how: runtime.Runtime) -> int:
    if args.resume and args.json is None:
        raise UserError("--resume: expected --json FILE, whose FILE.part has the rows so far, got none")
    model = models.load(args.model, how.device)
    net = restoring.prepared(model.net, how)
    blur = _chosen_kernels(args)
    paths = images.find(args.images)
    inputs = [Path(args.model), args.kernels, *paths]
    reports.check(args, inputs)
    # Reading everything once finds an unreadable image before hours of work.
    pixels = [images.load(path, "channels") for path in progress.over(paths, "reading")]
    for path, image in zip(paths, pixels, strict=True):
        for scale in args.scale:
            try:
                size = protocol.original(image, scale).shape[1:]
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            for i, kernel in blur.items():
                kernels.check_size(f"{args.kernels}: kernel {i}", kernel, *size, str(path))
    names = files.unique_names(paths)
    if args.save is not None:
        saved = [f"{name}_x{scale}_k{i}.png" for name in names for scale in args.scale for i in blur]
        files.make_outputs(args.save, saved, args.overwrite, [*inputs, *([args.figure] if args.figure else [])])
    settings = {
        **reports.network(model),
        "protocol": args.protocol,
        "definition": protocol.__doc__,
        "kernels_file": args.kernels.name,
        "key": args.key,
        "normalise": args.normalise,
        "kernels_sha256": {str(i): _sha256(repr(k.shape).encode() + k.tobytes()) for i, k in blur.items()},
        "images_sha256": [_sha256(path.read_bytes()) for path in paths],
        "dtype": how.dtype_name,
        "noise": args.noise,
        "seed": args.seed,
        "tile": args.tile,
    }
    part = None if args.json is None else args.json.with_name(f"{args.json.name}.part")
    planned = [(scale, i) for scale in args.scale for i in blur]
    if part is not None and part.exists() and not args.resume:
        raise UserError(f"--json: expected no unfinished evaluation, got {part}: add --resume, or remove it")
    rows = _known_rows(part, settings, names, planned) if args.resume else []
    with progress.bar(len(paths) * len(planned), "evaluating") as bar:
        bar.update(len(paths) * len(rows))
        for n, (scale, i) in enumerate(planned[len(rows) :]):
            rows.append(_one_kernel(args, how, net, pixels, names, scale, i, blur[i], bar, n == 0))
            if part is not None:
                reports.write(part, {**settings, "kernels": rows})
    report = {
        **settings,
        **reports.machine(how),
        "mean": [_mean(rows, scale) for scale in args.scale],
        "kernels": rows,
    }
    if part is not None:
        reports.write(args.json, report)
        part.unlink()
    if args.figure is not None:
        heatmap.save(args.figure, report, blur)
    print(_table(report))
    print(
        f"{args.model}: {len(paths)} images, protocol {args.protocol}, noise {args.noise:g}; "
        f"PSNR in dB, the start x_0 (bicubic) beside it; {how.describe()}"
    )
    return 0


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _known_rows(part: Path, settings: dict, names: list[str], planned: list[tuple[int, int]]) -> list[dict]:
    """The rows of an evaluation that was stopped: those of the first planned scales and kernels, or none yet.

    Raises UserError for a file that is not the beginning of this evaluation.
    """
    if not part.exists():
        return []
    try:
        before = json.loads(part.read_bytes())
        rows = before.pop("kernels")
        done = [(row["scale"], row["kernel"]) for row in rows]
        scored = {tuple(image["name"] for image in row["images"]) for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: expected the rows of an evaluation, got {part}: {first_line(error)}") from error
    missing = settings.keys() - before.keys()
    if missing:
        raise UserError(f"--resume: expected the rows of this version, got {part} without {', '.join(sorted(missing))}")
    changed = [key for key in settings if before[key] != settings[key]]
    if scored - {tuple(names)}:
        changed.append("images")
    if done != planned[: len(done)]:
        changed.append("scales or kernels")
    if changed:
        raise UserError(f"--resume: expected the settings of {part}, got another {', another '.join(changed)}")
    return rows


def _one_kernel(args, how, net, pixels, names, scale, index, kernel, bar, warm_up) -> dict:
    """The scores of all images for one kernel and scale."""
    op = BlurDownsample(torch.from_numpy(kernel), scale).to(how.device)
    originals = [protocol.original(image, scale) for image in pixels]
    scores: list[dict] = [{} for _ in pixels]
    seconds = []
    for members in restoring.batches([x.shape for x in originals], how.batch):
        y = np.stack(
            [
                protocol.measure(
                    originals[i], kernel, scale, args.noise, restoring.noise_source(args.seed, i), args.protocol
                )
                for i in members
            ]
        )
        if warm_up:
            warm_up = False
            pictures.restore(net, y[:1], None, how, op=op, sigma=args.noise, tile=args.tile)
        x, elapsed = pictures.restore(net, y, None, how, op=op, sigma=args.noise, tile=args.tile)
        with torch.inference_mode():
            start = op.initial(torch.from_numpy(y).to(how.device)).cpu().numpy()
        seconds += [elapsed / len(members)] * len(members)
        for n, i in enumerate(members):
            scores[i] = {
                "name": names[i],
                "psnr": protocol.psnr(x[n], originals[i], scale, args.protocol),
                "start_psnr": protocol.psnr(start[n], originals[i], scale, args.protocol),
            }
            if args.save is not None:
                images.save(args.save / f"{names[i]}_x{scale}_k{index}.png", x[n])
        bar.update(len(members))
    return {
        "scale": scale,
        "kernel": index,
        "psnr": metrics.mean([s["psnr"] for s in scores]),
        "start_psnr": metrics.mean([s["start_psnr"] for s in scores]),
        "seconds": metrics.mean(seconds),
        "images": scores,
    }


def _mean(rows: list[dict], scale: int) -> dict:
    own = [row for row in rows if row["scale"] == scale]
    return {
        "scale": scale,
        **{key: metrics.mean([row[key] for row in own]) for key in ("psnr", "start_psnr", "seconds")},
    }


def _table(report: dict) -> str:
    scales = [mean["scale"] for mean in report["mean"]]

    def cells(rows: list[dict]) -> list[str]:
        found = {row["scale"]: row for row in rows}
        return [
            tables.fixed(found[scale][key], digits)
            for scale in scales
            for key, digits in (("psnr", 2), ("start_psnr", 2), ("seconds", 2))
        ]

    order = dict.fromkeys(row["kernel"] for row in report["kernels"])
    body = [[str(i), *cells([r for r in report["kernels"] if r["kernel"] == i])] for i in order]
    header = ["kernel", *(f"x{scale} {what}" for scale in scales for what in ("dB", "start", "s"))]
    return tables.table(header, body, footer=["mean", *cells(report["mean"])])
