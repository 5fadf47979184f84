"""Measurement files: one .npz of plain arrays with the measurements of one or more images.

Keys (docs/cli.md has the same list for users):

    y            the measurements of one image, or with a leading axis those of N images of one shape
    y_0, y_1..   instead of y: one array per image, where their shapes differ
    size         (2,) or (N, 2), height and width of each image; without it images come in whole blocks
    name         one string or (N,), the names of the restored files
    channel      one string or (N,): "R", "G", "B" for the channels of a colour image (same name), "" for a gray one
    task         "cs" (default), "sr" or "cassi"
    noise        standard deviation of the noise that was added
    ...          the operator, by task: phi and block_size for "cs"

Only y is required. Nothing is pickled.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lorun_fast.apps import files, images, matlab, tasks
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.apps.progress import note

SUFFIXES = (".npz", ".npy", ".mat")
CHANNELS = ("R", "G", "B")
_WANTED = f"measurements ({', '.join(SUFFIXES)})"
_FROM_IMAGES = "; `lorun-fast measure` makes them from photographs, `lorun-fast evaluate` measures and restores"
KEYS = ("y", "size", "name", "channel", "task", "noise")


@dataclass
class Measurement:
    """y of one channel of one image, float32, without a batch axis; size (H, W) if known."""

    name: str
    y: np.ndarray
    size: tuple[int, int] | None
    channel: str = ""


@dataclass
class MeasurementFile:
    """What one file holds.

    operator: the arrays that describe Phi, by key; possibly none. factor: on y, before it is restored.
    unknown: keys that nothing asks for.
    """

    items: list[Measurement]
    operator: dict[str, np.ndarray] = field(default_factory=dict)
    task: str | None = None
    noise: float = 0.0
    factor: float = 1.0
    unknown: tuple[str, ...] = ()

    def pictures(self, path: Path) -> list[list[int]]:
        """Indices of the items that make up one picture each: one of a gray image, R, G and B of a colour image.

        Raises UserError, which names ``path``, where channels are missing or differ in size.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        seen: dict[tuple[str, str], int] = {}
        for i, item in enumerate(self.items):
            # Two images of one name stay two images.
            copy = seen[item.name, item.channel] = seen.get((item.name, item.channel), -1) + 1
            groups.setdefault((item.name, copy) if item.channel else (item.name, -1 - i), []).append(i)
        for (name, _), group in groups.items():
            channels = [self.items[i].channel for i in group]
            if channels != [""] and sorted(channels) != sorted(CHANNELS):
                raise UserError(f"{path}: expected channels R, G and B of image {name!r}, got {', '.join(channels)}")
            if len({(self.items[i].size, self.items[i].y.shape) for i in group}) > 1:
                raise UserError(f"{path}: expected one size for the channels of image {name!r}, got different ones")
            group.sort(key=lambda i: ("", *CHANNELS).index(self.items[i].channel))
        return list(groups.values())


def find(arguments: Sequence[Path]) -> list[Path]:
    """The measurement files that these files and folders name. Raises as :func:`files.find`, and for images."""
    found = files.find(arguments, SUFFIXES, _WANTED, "a measurement file", _FROM_IMAGES)
    for path in found:
        if path.suffix.lower() in images.SUFFIXES:
            raise UserError(f"expected {_WANTED}, got the image {path}{_FROM_IMAGES}")
    return found


def check_names(paths: Sequence[Path], names: Sequence[str]) -> None:
    """Raises UserError, with the path, for what not every system takes as the name of a restored file."""
    for path, name in zip(paths, names, strict=True):
        if name.strip() in ("", ".", "..") or any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
            raise UserError(f"{path}: name: expected a plain file name, got {name!r}")


def write(path: Path, file: MeasurementFile) -> None:
    """Writes the file, complete or not at all."""
    shapes = {item.y.shape for item in file.items}
    if len(shapes) == 1:
        arrays = {"y": np.stack([item.y for item in file.items])}
    else:
        arrays = {f"y_{i}": item.y for i, item in enumerate(file.items)}
    arrays["size"] = np.array([item.size for item in file.items], dtype=np.int64)
    arrays["name"] = np.array([item.name for item in file.items], dtype=np.str_)
    if any(item.channel for item in file.items):
        arrays["channel"] = np.array([item.channel for item in file.items], dtype=np.str_)
    arrays["noise"] = np.float64(file.noise)
    arrays["task"] = np.str_(file.task)
    with files.replacing(path) as f:
        np.savez(f, **arrays, **file.operator)


def load_arrays(path: Path, what: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz, or {"": array} of an .npy. Raises UserError for anything else, pickles included."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError:
        raise UserError(f"expected {what}, got {path}: no such file") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        text = first_line(error)
        if "pickle" in text.lower():
            text = "it is damaged, of another format, or holds Python objects"
        raise UserError(f"expected {what} of plain arrays, got {path}: {text}") from error


class Raw:
    """A file as it was read, whose task is known before its y can be checked. Raises UserError for anything else.

    A .mat file brings y alone: its variable ``key``, or the only one that is more than a number.
    """

    def __init__(self, path: Path, key: str | None = None):
        self.path = path
        if path.suffix.lower() == ".mat" and path.is_file():
            arrays = {"": _only_variable(path, matlab.load(path), key)}
        else:
            arrays = load_arrays(path, "a measurement file (.npz)")
        self.arrays = {"y": arrays[""]} if "" in arrays else arrays
        task = _read_strings(path, self.arrays, "task", 1)
        self.task: str | None = task[0] if task else None
        if self.task is not None and self.task not in tasks.NAMES:
            raise UserError(f"{path}: task: expected one of {', '.join(tasks.NAMES)}, got {self.task!r}")

    def checked(self, layout: Sequence[str], operator_keys: Sequence[str]) -> MeasurementFile:
        """As :func:`read`."""
        return _check(self.path, self.arrays, self.task, layout, operator_keys)


def _only_variable(path: Path, arrays: dict[str, np.ndarray], key: str | None) -> np.ndarray:
    fitting = [k for k, v in arrays.items() if v.size > 1] if key is None else [k for k in (key,) if k in arrays]
    if len(fitting) != 1:
        want = "one variable (or --key)" if key is None else f"a variable {key!r} (--key)"
        raise UserError(f"{path}: expected {want}, got {', '.join(sorted(arrays)) or 'none'}")
    return arrays[fitting[0]]


def read(path: Path, layout: Sequence[str], operator_keys: Sequence[str]) -> MeasurementFile:
    """Reads and checks a file. Keys as in the module's text.

    layout: names of the axes of one image's y, for example ("m", "rows", "columns").
    operator_keys: the keys that describe the operator of the task.
    Raises UserError for missing keys, other shapes or types, and NaN or infinite values.
    """
    return Raw(path).checked(layout, operator_keys)


def _check(
    path: Path, arrays: dict[str, np.ndarray], task: str | None, layout: Sequence[str], operator_keys: Sequence[str]
) -> MeasurementFile:
    ys = _read_y(path, arrays, layout)
    count = len(ys)
    sizes = _read_sizes(path, arrays, count)
    names = _read_strings(path, arrays, "name", count)
    channels = _read_strings(path, arrays, "channel", count) or [""] * count
    for channel in channels:
        if channel not in ("", *CHANNELS):
            raise UserError(f"{path}: channel: expected R, G, B or an empty string, got {channel!r}")
    if names is None:
        names = [path.stem] if count == 1 else [f"{path.stem}_{i:0{len(str(count - 1))}}" for i in range(count)]
    check_names([path] * len(names), names)
    known = {*KEYS, *operator_keys}
    noise = _read_noise(path, arrays)
    if not 0 <= noise <= float(np.finfo(np.float32).max):
        raise UserError(f"{path}: noise: expected a number of at least 0 that fp32 holds, got {noise:g}")
    return MeasurementFile(
        items=[Measurement(*parts) for parts in zip(names, ys, sizes, channels, strict=True)],
        operator={key: arrays[key] for key in operator_keys if key in arrays},
        task=task,
        noise=noise,
        unknown=tuple(sorted(key for key in arrays if key not in known and not _is_numbered(key))),
    )


def _is_numbered(key: str) -> bool:
    return key.startswith("y_") and key[2:].isdecimal()


def numbers(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """The array as finite float32. Raises UserError otherwise."""
    if values.dtype.kind not in "fiu":
        raise UserError(f"{path}: {key}: expected real numbers, got {values.dtype}")
    with np.errstate(over="ignore"):  # what overflows float32 is reported as infinite
        wide = values.astype(np.float32)
    bad = int(wide.size - np.isfinite(wide).sum())
    if bad:
        raise UserError(f"{path}: {key}: expected finite values, got {bad} NaN or infinite of {wide.size}")
    return wide


def _read_y(path: Path, arrays: dict[str, np.ndarray], layout: Sequence[str]) -> list[np.ndarray]:
    numbered = sorted((key for key in arrays if _is_numbered(key)), key=lambda key: int(key[2:]))
    if ("y" in arrays) == bool(numbered):
        got = "both" if numbered else f"keys {', '.join(arrays) or '(none)'}"
        raise UserError(f"{path}: expected the measurements as y, or as y_0, y_1, ..., got {got}")
    if numbered and [int(key[2:]) for key in numbered] != list(range(len(numbered))):
        raise UserError(f"{path}: expected y_0 to y_{len(numbered) - 1} without a gap, got {', '.join(numbered)}")
    one, many = ", ".join(layout), ", ".join(["N", *layout])
    images = []
    for key in numbered or ["y"]:
        y = arrays[key]
        stacked = key == "y" and y.ndim == len(layout) + 1
        if not (stacked or y.ndim == len(layout)) or y.size == 0:
            want = f"({one})" + (f" or ({many})" if key == "y" else "")
            raise UserError(f"{path}: {key}: expected shape {want}, got {y.shape}")
        y = numbers(path, key, y)
        images += list(y) if stacked else [y]
    return images


def _read_sizes(path: Path, arrays: dict[str, np.ndarray], count: int) -> list[tuple[int, int] | None]:
    if "size" not in arrays:
        return [None] * count
    sizes = arrays["size"]
    ok = sizes.dtype.kind in "iu" and sizes.shape in ((2,), (count, 2)) and (sizes > 0).all()
    if not ok:
        raise UserError(
            f"{path}: size: expected positive integers (height, width), shape (2,) or ({count}, 2), "
            f"got shape {sizes.shape} of {sizes.dtype}: {sizes.ravel()[:4].tolist()}"
        )
    return [(int(h), int(w)) for h, w in np.broadcast_to(sizes, (count, 2))]


def _read_noise(path: Path, arrays: dict[str, np.ndarray]) -> float:
    """The noise level; 0, with a note, where another program has something else under this name."""
    values = arrays.get("noise", np.zeros(()))
    if values.size == 1 and values.dtype.kind in "fiu":
        return float(values.item())
    note(f"{path}: noise: expected one number, got shape {values.shape} of {values.dtype}; taken as 0")
    return 0.0


def _read_strings(path: Path, arrays: dict[str, np.ndarray], key: str, count: int) -> list[str] | None:
    if key not in arrays:
        return None
    values = arrays[key]
    if values.dtype.kind != "U" or values.shape not in ((count,), *([()] if count == 1 else [])):
        raise UserError(
            f"{path}: {key}: expected {count} string{'s' if count > 1 else ''}, "
            f"got shape {values.shape} of {values.dtype}"
        )
    return [str(v) for v in np.atleast_1d(values)]
