"""Blur kernels: drawn at random for training, and read from users' files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lorun_fast.apps import images
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.apps.measurements import load_arrays, numbers
from lorun_fast.apps.progress import note

KEY_HELP = "variable in the .mat or .npz file (default: the only one, or kernels, kernel or k)"
_SUFFIXES = (".mat", ".npy", ".npz", ".png")
_USUAL_KEYS = ("kernels", "kernel", "k")
_SUM_TOLERANCE = 1e-3


def gaussian(width: float, size: int = 25, *, ratio: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """A Gaussian (size, size), float32, that sums to one.

    width: standard deviation in pixels of the long axis; ratio: short axis over long axis; angle: of the long axis,
    in radians from the rows' direction. The centre is (size//2, size//2), where BlurDownsample's is.
    """
    rows, columns = np.mgrid[:size, :size] - size // 2
    along = math.cos(angle) * columns + math.sin(angle) * rows
    across = -math.sin(angle) * columns + math.cos(angle) * rows
    kernel = np.exp(-0.5 * ((along / width) ** 2 + (across / (ratio * width)) ** 2))
    return (kernel / kernel.sum()).astype(np.float32)


def motion(rng: np.random.Generator, size: int = 25) -> np.ndarray:
    """The blur of a random hand movement (size, size), float32, that sums to one.

    A point moves at unit speed in a direction that drifts and now and then turns sharply; its path is scaled to a
    random extent, centred at its mean, and drawn with a pen of about half a pixel.
    """
    steps = 256
    turn = rng.normal(0, rng.uniform(0.0, 0.12), steps) + (rng.random(steps) < 0.008) * rng.uniform(
        -np.pi, np.pi, steps
    )
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(turn)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)]), axis=1)
    path -= path.mean(1, keepdims=True)
    reach = np.abs(path).max()
    path *= rng.uniform(0.12, 0.46) * size / reach
    pen = rng.uniform(0.35, 0.8)
    axis = np.arange(size) - size // 2
    rows, columns = (np.exp(-0.5 * ((axis[:, None] - p[None]) / pen) ** 2) for p in path)
    kernel = rows @ columns.T  # the sum over the path of separable dots
    return (kernel / kernel.sum()).astype(np.float32)


def draw(rng: np.random.Generator, size: int = 25) -> np.ndarray:
    """A random kernel for training: isotropic Gaussian, anisotropic Gaussian or motion, in equal shares.

    Widths 0.5 to 3 pixels, of the long axis of anisotropic ones up to 5.
    """
    kind = rng.integers(3)
    if kind == 0:
        return gaussian(rng.uniform(0.5, 3.0), size)
    if kind == 1:
        return gaussian(rng.uniform(1.0, 5.0), size, ratio=rng.uniform(0.2, 1.0), angle=rng.uniform(0, np.pi))
    return motion(rng, size)


def load(path: Path, key: str | None = None) -> list[np.ndarray]:
    """The blur kernels (kh, kw) in a file, float32: any number of them, of any sizes.

    .mat (any version): a matrix, a stack (kh, kw, N) or a cell array of matrices; .npy and .npz: (kh, kw) or
    (N, kh, kw); .png: one kernel, its gray levels divided by their sum. key: the variable in .mat and .npz, which may
    be left out where there is only one, or one named kernel, kernels or k.
    Raises UserError for a file that cannot be read, another shape, NaN or infinite values, and a kernel of zeros.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"expected a file of kernels ({', '.join(_SUFFIXES)}), got {path}")
    if not path.is_file():
        raise UserError(f"expected a file of kernels ({', '.join(_SUFFIXES)}), got {path}: no such file")
    if suffix == ".png":
        found = [images.load(path, "y")[0]]
    elif suffix == ".mat":
        found = _parts(path, _choose(path, _load_mat(path), key), stacked_last=True)
    else:
        found = _parts(path, _choose(path, load_arrays(path, "a file of kernels"), key), stacked_last=False)
    checked = []
    for i, values in enumerate(found):
        name = f"kernel {i + 1}" if len(found) > 1 else "kernel"
        if values.ndim != 2 or values.size == 0:
            raise UserError(f"{path}: {name}: expected a matrix, got shape {values.shape}")
        values = numbers(path, name, values)
        if not values.any():
            raise UserError(f"{path}: {name}: expected some values other than zero, got none")
        checked.append(values / values.sum(dtype=np.float64).astype(np.float32) if suffix == ".png" else values)
    return checked


def normalised(kernel: np.ndarray) -> np.ndarray:
    """The kernel divided by its sum. Raises UserError where the sum is zero."""
    total = kernel.sum(dtype=np.float64)
    if abs(total) < 1e-6 * np.abs(kernel).sum():
        raise UserError("--normalise: expected a kernel whose sum is not zero, got one of positive and negative parts")
    return (kernel / total).astype(np.float32)


def warn_of_sum(source: str, kernel: np.ndarray) -> None:
    """A note where a kernel does not sum to one: it changes the brightness."""
    total = float(kernel.sum(dtype=np.float64))
    if abs(total - 1) > _SUM_TOLERANCE:
        note(f"{source}: sums to {total:.4g}, not 1: it is used as it is and changes the brightness (see --normalise)")


def check_size(source: str, kernel: np.ndarray, height: int, width: int, image: str) -> None:
    """Raises UserError for a kernel larger than the image it is for."""
    if kernel.shape[0] > height or kernel.shape[1] > width:
        raise UserError(
            f"{source}: expected a kernel of at most {height} x {width} as the image {image} (height x width), "
            f"got {kernel.shape[0]} x {kernel.shape[1]}"
        )


def _choose(path: Path, arrays: dict[str, object], key: str | None) -> object:
    if "" in arrays:
        return arrays[""]
    names = [key] if key is not None else [name for name in _USUAL_KEYS if name in arrays][:1] or list(arrays)
    if len(names) != 1 or names[0] not in arrays:
        want = f"a variable {key!r}" if key is not None else f"one variable, or one named {', '.join(_USUAL_KEYS)}"
        raise UserError(f"{path}: expected {want} (see --key), got {', '.join(sorted(arrays)) or 'none'}")
    return arrays[names[0]]


def _parts(path: Path, values: object, *, stacked_last: bool) -> list[np.ndarray]:
    """The single kernels of a cell array (a list, or an array of objects), a stack or a matrix."""
    if isinstance(values, np.ndarray) and values.dtype == object:
        values = list(values.ravel())
    if isinstance(values, list):
        return [np.asarray(v) for v in values]
    if values.ndim == 3:
        return list(np.moveaxis(values, -1, 0) if stacked_last else values)
    return [values]


def _load_mat(path: Path) -> dict[str, object]:
    """Variables of a .mat file: arrays; cell arrays as arrays of objects or lists."""
    import h5py
    from scipy.io import loadmat

    try:
        if h5py.is_hdf5(path):  # MATLAB 7.3
            return _load_hdf5(path)
        found = loadmat(path)
    except Exception as error:  # readers of damaged files raise nearly anything
        raise UserError(f"expected a complete .mat file, got {path}: {first_line(error)}") from error
    return {k: v for k, v in found.items() if not k.startswith("__") and isinstance(v, np.ndarray)}


def _load_hdf5(path: Path) -> dict[str, object]:
    import h5py

    # MATLAB stores columns first: what h5py reads is transposed.
    found: dict[str, object] = {}
    with h5py.File(path, "r") as f:
        for name, item in f.items():
            if not isinstance(item, h5py.Dataset):
                continue
            if h5py.check_ref_dtype(item.dtype) is h5py.Reference:
                found[name] = [np.asarray(f[reference]).T for reference in np.asarray(item).T.ravel()]
            else:
                found[name] = np.asarray(item).T
    return found
