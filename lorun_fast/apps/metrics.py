"""PSNR and SSIM as the field states them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from skimage.metrics import structural_similarity

DESCRIPTION = {
    "psnr": "dB, 10 log10(1 / MSE) of the image clipped to [0, 1], not rounded, against the original in [0, 1]; "
    "all pixels and channels",
    "ssim": "scikit-image structural_similarity on 0..255: data_range=255, win_size=7 (uniform window), K1=0.01, "
    "K2=0.03, sample covariance; mean over channels",
}
_WINDOW = 7


def psnr(image: np.ndarray, original: np.ndarray) -> float:
    """10 log10(1 / MSE) in dB; inf for equal images. Both (C, H, W) in [0, 1]."""
    error = np.mean((image.astype(np.float64) - original.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(-10 * np.log10(error))


def ssim(image: np.ndarray, original: np.ndarray) -> float | None:
    """scikit-image's SSIM on 0..255 with its default 7x7 window, mean over channels. Both (C, H, W) in [0, 1].

    None for images smaller than the window.
    """
    if min(image.shape[-2:]) < _WINDOW:
        return None
    return float(
        structural_similarity(
            original.astype(np.float64) * 255,
            image.astype(np.float64) * 255,
            win_size=_WINDOW,
            data_range=255,
            channel_axis=0,
        )
    )


def score(image: np.ndarray, original: np.ndarray) -> tuple[float, float | None]:
    """(PSNR, SSIM) of an image, clipped to [0, 1] first."""
    clipped = np.clip(image, 0, 1)
    return psnr(clipped, original), ssim(clipped, original)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the finite values; None if there is none."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None
