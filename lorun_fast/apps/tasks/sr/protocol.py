"""How super-resolution is scored: the protocol of USRNet's Table 1, and one without rounding.

"usrnet" (Zhang et al., "Deep unfolding network for image super-resolution", 2020, Table 1): the uint8 image is cropped
at the bottom and at the right to multiples of lcm(s, 8), blurred circularly, every value truncated to a whole gray
level (which takes half a level off on average), and reduced to its upper left pixels; noise is added unrounded. The
restored image is clipped and rounded to uint8. PSNR over R, G and B together, s^2 pixels left out at every border.

"float": the same image, blurred and reduced in floating point, nothing rounded; the same PSNR of the clipped image.

A gray image counts as a colour one with equal channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from lorun_fast.apps.errors import UserError
from lorun_fast.operators import BlurDownsample

NAMES = ("usrnet", "float")


def original(image: np.ndarray, scale: int) -> np.ndarray:
    """(1 or 3, H, W) in [0, 1], cropped; three channels. Raises UserError for an image with no pixel left to score."""
    cell = math.lcm(scale, 8)
    height, width = (side // cell * cell for side in image.shape[1:])
    if min(height, width) <= 2 * scale * scale:
        raise UserError(
            f"expected an image of more than {2 * scale * scale} pixels a side after its crop to multiples of {cell} "
            f"at scale {scale}, got {image.shape[1]} x {image.shape[2]} (height x width)"
        )
    return np.broadcast_to(image[:, :height, :width], (3, height, width))


def measure(
    x: np.ndarray, kernel: np.ndarray, scale: int, noise: float, rng: np.random.Generator, name: str
) -> np.ndarray:
    """y (3, H/s, W/s), float32, of :func:`original`'s x by the protocol ``name``."""
    if name == "usrnet":
        # In fp64 and by the direct sum: a value on the edge between two gray levels falls as scipy's does.
        op = BlurDownsample(torch.from_numpy(kernel).double(), scale, method="direct")
        levels = op(torch.from_numpy(np.rint(x.astype(np.float64) * 255))[None])[0].numpy()
        # A kernel with negative parts can leave 0..255; uint8 would go round, which no sensor does.
        y = np.trunc(levels.clip(0, 255)).astype(np.float32) / np.float32(255)
    else:
        op = BlurDownsample(torch.from_numpy(kernel), scale)
        y = op(torch.from_numpy(np.array(x))[None])[0].numpy()
    return y + np.float32(noise) * rng.standard_normal(y.shape, dtype=np.float32) if noise else y


def psnr(restored: np.ndarray, x: np.ndarray, scale: int, name: str) -> float:
    """dB of a restored image (3, H, W) against x by the protocol ``name``; inf where they are equal."""
    levels, truth = 255 * np.clip(restored.astype(np.float64), 0, 1), 255 * x.astype(np.float64)
    if name == "usrnet":
        levels, truth = np.rint(levels), np.rint(truth)
    border = scale * scale
    difference = levels - truth
    error = np.mean(difference[:, border:-border, border:-border] ** 2) / 255**2
    return math.inf if error == 0 else float(-10 * np.log10(error))
