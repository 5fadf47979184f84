"""Blur kernels: drawn at random for training, and read from users' files."""

from __future__ import annotations

import math

import numpy as np


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
    turn = rng.normal(0, rng.uniform(0.0, 0.12), steps) + (rng.random(steps) < 0.008) * rng.uniform(-np.pi, np.pi, steps)
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
