"""What the tests of spectral imaging's commands share: a tiny network, a smooth cube, a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import lorun_fast as lf

BANDS, STEP, HEIGHT, WIDTH = 4, 2, 12, 16


def tiny_network(path: Path, *, stages: int = 2, seed: int = 0) -> Path:
    """A ResUNet of two tied stages behind a random mask of HEIGHT x WIDTH, saved at ``path``."""
    torch.manual_seed(seed)
    op = lf.CASSI(torch.from_numpy(mask(seed=seed)), BANDS, STEP)
    lf.save(lf.LoRun(op, lf.ResUNet(BANDS, BANDS, (4, 8), 1), stages, sharing="tied", step_size=0.3), path)
    return path


def mask(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Zeros and ones."""
    return np.random.default_rng(seed).integers(0, 2, (height, width)).astype(np.float32)


def cube(height: int = HEIGHT, width: int = WIDTH, bands: int = BANDS, seed: int = 0) -> np.ndarray:
    """(bands, height, width) in [0, 1]."""
    return np.random.default_rng(seed).random((bands, height, width)).astype(np.float32)


def matrix(mask: np.ndarray, bands: int, step: int) -> np.ndarray:
    """Phi as a matrix, written out pixel by pixel: (H * (W + step*(L-1)), L*H*W) from a mask (L, H, W) or (H, W)."""
    height, width = mask.shape[-2:]
    wide = width + step * (bands - 1)
    phi = np.zeros((height, wide, bands, height, width))
    for c in range(bands):
        for i in range(height):
            for j in range(width):
                phi[i, j + c * step, c, i, j] = mask[i, j] if mask.ndim == 2 else mask[c, i, j]
    return phi.reshape(height * wide, -1)
