"""How a restored cube is scored: PSNR of each band and their mean, SSIM, spectral angle."""

from __future__ import annotations

import math

import numpy as np

from lorun_fast.apps import metrics

DESCRIPTION = {
    "psnr": "dB, 10 log10(1 / MSE) of each band of the cube clipped to [0, 1], then the mean over the bands",
    "psnr_mst": "dB, both cubes times 256 and rounded, not clipped, 10 log10(255^2 / MSE) of each band, then the mean: "
    "the convention of MST and the papers that share its test code",
    "ssim": metrics.DESCRIPTION["ssim"].replace("channels", "bands"),
    "sam": "degrees, the angle between the restored and the true spectrum of a pixel, mean over the pixels whose true "
    "spectrum is not zero",
}


def psnr_bands(cube: np.ndarray, truth: np.ndarray) -> list[float]:
    """dB per band; inf for an equal band. Both (L, H, W), clipped to [0, 1] here."""
    return [metrics.psnr(band, true) for band, true in zip(np.clip(cube, 0, 1), truth, strict=True)]


def psnr_mst(cube: np.ndarray, truth: np.ndarray) -> float:
    """dB, as :data:`DESCRIPTION` says."""
    error = np.mean((np.rint(cube.astype(np.float64) * 256) - np.rint(truth.astype(np.float64) * 256)) ** 2, (1, 2))
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(255**2 / error)))


def spectral_angle(cube: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean angle in degrees; None where every true spectrum is zero. A restored spectrum of zeros counts as 90."""
    a, b = (c.reshape(len(c), -1).astype(np.float64) for c in (cube, truth))
    lengths = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0)
    told = lengths[1] > 0
    if not told.any():
        return None
    product = lengths[0] * lengths[1]
    cosine = np.divide((a * b).sum(0), product, out=np.zeros_like(product), where=product > 0)
    return math.degrees(np.arccos(np.clip(cosine[told], -1, 1)).mean())


def score(cube: np.ndarray, truth: np.ndarray) -> dict:
    """All of them: psnr, psnr_mst, ssim, sam, psnr_bands."""
    bands = psnr_bands(cube, truth)
    return {
        "psnr": float(np.mean(bands)),
        "psnr_mst": psnr_mst(cube, truth),
        "ssim": metrics.ssim(np.clip(cube, 0, 1), truth),
        "sam": spectral_angle(np.clip(cube, 0, 1), truth),
        "psnr_bands": bands,
    }
