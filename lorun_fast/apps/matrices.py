"""Matrices from the files that users keep them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorun_fast.apps import matlab
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.measurements import load_arrays, numbers

ARRAYS = (".mat", ".npy", ".npz")


def load_variables(path: Path, what: str) -> dict[str, np.ndarray]:
    """The arrays of a .mat (any version), .npy or .npz file by name ("" for .npy)."""
    suffix = path.suffix.lower()
    if suffix not in ARRAYS:
        raise UserError(f"expected {what} (.mat, .npy or .npz), got {path}")
    if not path.is_file():
        raise UserError(f"expected {what} (.mat, .npy or .npz), got {path}: no such file")
    return matlab.load(path) if suffix == ".mat" else load_arrays(path, what)


def load(path: Path, key: str) -> np.ndarray:
    """A finite float32 matrix from .mat (any version), .npy or .npz.

    key: the variable in .mat and .npz. Raises UserError for a file that cannot be read, a missing variable, another
    number of dimensions, and NaN or infinite values.
    """
    arrays = load_variables(path, "a matrix file")
    values = arrays.get("" if "" in arrays else key)
    if values is None:
        raise UserError(f"{path}: expected a variable {key!r} (see --key), got {', '.join(sorted(arrays)) or 'none'}")
    if values.ndim != 2 or values.size == 0:
        raise UserError(f"{path}: expected a matrix, got shape {values.shape}")
    return numbers(path, key, values)
