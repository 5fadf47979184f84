"""``lorun-fast restore``: measurement files to images."""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np

from lorun_fast.apps import background, files, measurements, models, progress, restoring, runtime, tables, tasks, tiling
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.progress import note
from lorun_fast.operators import SensingOperator

EPILOG = """\
The measurement file needs only y; docs/cli.md describes its shape, for each task, and the optional keys. For block
compressive sensing: (m, rows, columns), or (N, m, rows, columns) for N images, with y = Phi x for images in [0, 1] cut
into row-major B x B blocks. One network restores all files; one whose Phi, ratio or block size is not the network's is
refused before the work.

examples:
  lorun-fast restore y.npz -o restored/
  lorun-fast restore shots/ more.npz -o restored/
  lorun-fast restore y.npz -o restored/ --model runs/cs/model.safetensors --dtype bf16 --batch 8 --bits 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast restore``."""
    parser.add_argument(
        "measurements",
        nargs="+",
        type=Path,
        metavar="Y.NPZ",
        help="measurement files and folders of them (.npz, .npy, .mat; the last two bring y alone)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the PNGs")
    files.add_overwrite(parser)
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


@dataclass(frozen=True)
class _Setting:
    """How measurements of one operator and noise level are restored. args: as the task left them."""

    op: SensingOperator | None
    sigma: float | None
    args: argparse.Namespace


@dataclass(frozen=True)
class _Picture:
    """One image to restore.

    members: the places of its channels in the file ``path``. factor: on y. batch: equal where a batch may be shared.
    """

    path: Path
    members: list[int]
    name: str
    size: tuple[int, int] | None
    factor: float
    setting: _Setting
    batch: Hashable


def _run(args: argparse.Namespace, how: runtime.Runtime) -> int:
    paths = measurements.find(args.measurements)
    if args.key is not None and not any(path.suffix.lower() == ".mat" for path in paths):
        raise UserError(f"--key: expected a .mat file beside it, got {paths[0]}")

    @lru_cache(maxsize=1)
    def raw(path: Path) -> measurements.Raw:
        return measurements.Raw(path, args.key)

    if args.model is None:
        task = tasks.get(raw(paths[0]).task or tasks.NAMES[0])
    else:
        model = models.load(args.model, how.device)
        task = model.task
    _refuse_options_of_others(task, args)

    # Files are read once to check them all before the work, and again when their turn comes: memory does not grow with
    # their number. The last one stays, for its pictures come one after another, and it may be the only one.
    @lru_cache(maxsize=1)
    def read(path: Path) -> measurements.MeasurementFile:
        return raw(path).checked(task.LAYOUT, task.OPERATOR_KEYS)

    if args.model is None:
        args.model = task.default_model(read(paths[0]))
        model = models.load(args.model, how.device)
    pictures = _checked(paths, read, task, model, args, how)
    net = restoring.prepared(model.net, how)
    own_tiles = hasattr(task, "restore")
    if not own_tiles:
        net = tiling.tiled(net, args.tile)
    restored = task.restore if own_tiles else restoring.restore
    names = _names(pictures)
    inputs = [Path(args.model), *([args.mask] if args.mask else []), *paths]
    outputs = [f"{name}{suffix}" for name in names for suffix in task.suffixes(args)]
    files.make_outputs(args.output, outputs, args.overwrite, inputs)

    seconds = 0.0
    began = time.perf_counter()

    def stacked(batch: list[int]) -> np.ndarray:
        chosen = [pictures[i] for i in batch]
        return np.stack([read(p.path).items[i].y * np.float32(p.factor) for p in chosen for i in p.members])

    batches = restoring.batches([picture.batch for picture in pictures], how.batch)
    with progress.bar(len(pictures), "restoring") as bar, background.Workers(2, most=2 * how.batch) as savers:
        for batch, y in background.ahead(batches, stacked):
            first = pictures[batch[0]]
            more = {"args": first.setting.args} if own_tiles else {}
            x, elapsed = restored(net, y, first.size, how, op=first.setting.op, sigma=first.setting.sigma, **more)
            seconds += elapsed
            for i, image in zip(batch, x.reshape(len(batch), -1, *x.shape[-2:]), strict=True):
                savers.submit(task.save, args.output / names[i], image, args)
            bar.update(len(batch))
    total = time.perf_counter() - began
    operators = {id(p.setting.op): p.setting.op or model.net.op for p in pictures}
    others = f", and {len(operators) - 1} more" if len(operators) > 1 else ""
    of_files = f" of {len(paths)} files" if len(paths) > 1 else ""
    rows = [
        ("network", f"{args.model}: {task.describe(next(iter(operators.values())))}{others}"),
        ("on", how.describe()),
        ("restored", f"{len(pictures)} images{of_files} into {args.output}"),
        ("time", f"{seconds:.2f} s in the network, {total:.2f} s in all"),
        ("speed", f"{len(pictures) / seconds:.2f} images/s, {1000 * seconds / len(pictures):.0f} ms per image"),
        ("peak memory", tables.megabytes(how.peak_memory())),
    ]
    print(tables.pairs(rows))
    return 0


def _checked(
    paths: Sequence[Path],
    read: Callable[[Path], measurements.MeasurementFile],
    task: ModuleType,
    model: models.Model,
    args: argparse.Namespace,
    how: runtime.Runtime,
) -> list[_Picture]:
    """The pictures of all files. Raises UserError for the first file that the network does not fit."""
    settings: dict[Hashable, _Setting] = {}
    pictures = []
    for path in progress.over(paths, "reading"):
        file = read(path)
        if file.task not in (None, task.NAME):
            raise UserError(f"{path}: expected task {task.NAME!r} as {args.model}, got {file.task!r}")
        if file.unknown:
            known = ", ".join((*measurements.KEYS, *task.OPERATOR_KEYS))
            note(f"{path}: ignored keys {', '.join(file.unknown)}; known ones are {known}")
        own = copy.copy(args)
        op = task.operator_for(file, model.net.op, path, args.model, own)
        # The network's own operator, or one of the same arrays: files of one sensor share it, and their batches.
        key = (None if op is None else _digest(file.operator), file.noise)
        if key not in settings:
            settings[key] = _Setting(op if op is None else op.to(how.device), task.sigma(file, own), own)
        groups = file.pictures(path)
        # A file of several pictures makes batches of its own: it is then read no more often than one of a single one.
        shared = None if len(groups) == 1 else path
        for group in groups:
            item = file.items[group[0]]
            batch = (key, shared, len(group), item.y.shape, item.size)
            pictures.append(_Picture(path, group, item.name, item.size, file.factor, settings[key], batch))
    return pictures


def _digest(arrays: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for key, values in sorted(arrays.items()):
        found.update(f"{key} {values.shape} {values.dtype.str};".encode())
        found.update(values.tobytes())
    return found.hexdigest()


def _names(pictures: Sequence[_Picture]) -> list[str]:
    """File names without suffix: those in the measurement files, behind the file's own where several use one."""
    by_file: dict[Path, list[Path]] = {}
    for picture in pictures:
        # unique_names takes what follows the last dot for a suffix: keep it, unless it is what will be added anyway.
        by_file.setdefault(picture.path, []).append(Path(f"{picture.name.removesuffix('.png')}.png"))
    names = {path: files.unique_names(own) for path, own in by_file.items()}
    users = Counter(name for own in names.values() for name in {name.lower() for name in own})
    for (path, own), prefix in zip(names.items(), files.unique_names(list(names)), strict=True):
        for i, name in enumerate(own):
            if users[name.lower()] > 1:
                # A picture without a name of its own is called as its file already.
                rest = name.removeprefix(path.stem)
                called = name.startswith(path.stem) and rest[:1] in ("", "_")
                own[i] = prefix + (rest if called else f"_{name}")
    return files.unique_names([Path(f"{name}.png") for own in names.values() for name in own])


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
