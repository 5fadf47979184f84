"""Arrays from MATLAB's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorun_fast.apps.errors import UserError, first_line


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .mat file of any version, by name. Raises UserError for a file that cannot be read."""
    import h5py
    from scipy.io import loadmat

    try:
        if h5py.is_hdf5(path):  # MATLAB 7.3, and what h5py writes without MATLAB's header
            return _load_hdf5(path)
        found = loadmat(path)
    except Exception as error:  # readers of damaged files raise nearly anything
        raise UserError(f"expected a complete .mat file, got {path}: {first_line(error)}") from error
    return {k: v for k, v in found.items() if not k.startswith("__") and isinstance(v, np.ndarray)}


def _load_hdf5(path: Path) -> dict[str, np.ndarray]:
    import h5py

    with h5py.File(path, "r") as f:
        # MATLAB stores columns first: what h5py reads is transposed.
        return {k: np.asarray(v).T for k, v in f.items() if isinstance(v, h5py.Dataset)}
