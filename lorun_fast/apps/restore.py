"""``lorun-fast restore``: a measurement file to images."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np

from lorun_fast.apps import background, files, measurements, models, progress, restoring, runtime, tables, tasks, tiling
from lorun_fast.apps.errors import UserError

EPILOG = """\
The measurement file needs only y; docs/cli.md describes its shape, for each task, and the optional keys. For block
compressive sensing: (m, rows, columns), or (N, m, rows, columns) for N images, with y = Phi x for images in [0, 1] cut
into row-major B x B blocks. A file whose Phi, ratio or block size is not the network's is refused.

examples:
  lorun-fast restore y.npz -o restored/
  lorun-fast restore y.npz -o restored/ --model runs/cs/model.safetensors --dtype bf16 --batch 8 --bits 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast restore``."""
    parser.add_argument("measurements", type=Path, metavar="Y.NPZ", help="measurement file; a .mat file brings y alone")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the PNGs")
    parser.add_argument(
        "--model", metavar="NAME|FILE", help="the network (default: the shipped one that fits the measurements)"
    )
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8, help="of the PNGs (default: 8)")
    parser.add_argument("--key", metavar="NAME", help="variable of a .mat file that holds y (default: the only one)")
    tiling.add_argument(parser)
    for name in tasks.NAMES:
        tasks.get(name).add_restore_arguments(parser)
    runtime.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with runtime.chosen(args) as how:
        return _run(args, how)


def _run(args: argparse.Namespace, how: runtime.Runtime) -> int:
    raw = measurements.Raw(args.measurements, args.key)
    if args.key is not None and args.measurements.suffix.lower() != ".mat":
        raise UserError(f"--key: expected a .mat file beside it, got {args.measurements}")
    if args.model is None:
        task = tasks.get(raw.task or tasks.NAMES[0])
    else:
        model = models.load(args.model, how.device)
        task = model.task
    _refuse_options_of_others(task, args)
    file = raw.checked(task.LAYOUT, task.OPERATOR_KEYS)
    if file.task not in (None, task.NAME):
        raise UserError(f"{args.measurements}: expected task {task.NAME!r} as {args.model}, got {file.task!r}")
    if args.model is None:
        args.model = task.default_model(file)
        model = models.load(args.model, how.device)
    op = task.operator_for(file, model.net.op, args.measurements, args.model, args)
    op = op.to(how.device) if op is not None else None
    settings = {"op": op, "sigma": task.sigma(file, args)}
    net = restoring.prepared(model.net, how)
    if hasattr(task, "restore"):
        settings["args"] = args  # it sees to --tile itself
    else:
        net = tiling.tiled(net, args.tile)
    restored = partial(getattr(task, "restore", restoring.restore), **settings)
    pictures = file.pictures()
    names = files.unique_names([Path(_file_name(file.items[group[0]].name)) for group in pictures])
    files.make_folder(args.output)
    _spare_originals(args.output, args.measurements, names)

    seconds = 0.0
    began = time.perf_counter()
    keys = [(len(group), file.items[group[0]].y.shape, file.items[group[0]].size) for group in pictures]

    def stacked(members: list[int]) -> np.ndarray:
        return np.stack([file.items[i].y for member in members for i in pictures[member]])

    with progress.bar(len(pictures), "restoring") as bar, background.Workers(2, most=2 * how.batch) as savers:
        for members, y in background.ahead(restoring.batches(keys, how.batch), stacked):
            x, elapsed = restored(net, y, keys[members[0]][2], how)
            seconds += elapsed
            for member, image in zip(members, x.reshape(len(members), -1, *x.shape[-2:]), strict=True):
                savers.submit(task.save, args.output / names[member], image, args)
            bar.update(len(members))
    total = time.perf_counter() - began
    rows = [
        ("network", f"{args.model}: {task.describe(model.net.op if op is None else op)}"),
        ("on", how.describe()),
        ("restored", f"{len(pictures)} images into {args.output}"),
        ("time", f"{seconds:.2f} s in the network, {total:.2f} s in all"),
        ("speed", f"{len(pictures) / seconds:.2f} images/s, {1000 * seconds / len(pictures):.0f} ms per image"),
        ("peak memory", tables.megabytes(how.peak_memory())),
    ]
    print(tables.pairs(rows))
    return 0


def _spare_originals(output: Path, source: Path, names: list[str]) -> None:
    """Refuses to write over pictures beside the measurements and older: what was measured, not what came of it."""
    if output.resolve() != source.resolve().parent:
        return
    measured = source.stat().st_mtime_ns
    older = sorted(
        p.name for p in output.iterdir() if p.stem in names and p != source and p.stat().st_mtime_ns < measured
    )
    if older:
        raise UserError(
            f"-o: expected a folder without the pictures that were measured, got {output}, where the measurements lie, "
            f"with {', '.join(older[:3])}: choose another"
        )


def _options(task) -> dict:
    """The task's own options of ``restore`` and their defaults."""
    parser = argparse.ArgumentParser()
    task.add_restore_arguments(parser)
    return {a.dest: (a.option_strings[0], a.default) for a in parser._actions if a.dest != "help"}


def _refuse_options_of_others(task, args: argparse.Namespace) -> None:
    own = _options(task)
    for name in tasks.NAMES:
        for dest, (option, default) in _options(tasks.get(name)).items():
            if dest not in own and getattr(args, dest) != default:
                raise UserError(f"{option}: expected measurements of task {name!r} beside it, got {task.NAME!r}")


def _file_name(name: str) -> str:
    # unique_names takes what follows the last dot for a suffix: keep it, unless it is what will be added anyway.
    return f"{name.removesuffix('.png')}.png"
