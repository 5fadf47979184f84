"""Wavelengths, and what a spectral cube looks like: to CIE XYZ, then to sRGB."""

from __future__ import annotations

import numpy as np

# In nm, what the field's 28-band networks are trained for.
WAVELENGTHS_28 = (
    453.5, 457.5, 462.0, 466.0, 471.5, 476.5, 481.5, 487.0, 492.5, 498.0, 504.0, 510.0, 516.0, 522.5,
    529.5, 536.5, 544.0, 551.5, 558.5, 567.5, 575.5, 584.5, 594.5, 604.0, 614.5, 625.0, 636.5, 648.0,
)  # fmt: skip
_RANGE = (400.0, 700.0)


def default_wavelengths(bands: int) -> np.ndarray:
    """In nm: the field's own for 28 bands, else evenly spread over 400 to 700."""
    return np.array(WAVELENGTHS_28) if bands == 28 else np.linspace(*_RANGE, bands)


# The CIE 1931 colour matching functions as sums of Gaussians with one width on either side of the peak (Wyman, Sloan,
# Shirley, "Simple Analytic Approximations to the CIE XYZ Color Matching Functions", JCGT 2(2), 2013): within 1 % or so
# of the tables. (height, peak in nm, 1 / width below and above.)
_LOBES = {
    "x": ((1.056, 599.8, 0.0264, 0.0323), (0.362, 442.0, 0.0624, 0.0374), (-0.065, 501.1, 0.0490, 0.0382)),
    "y": ((0.821, 568.8, 0.0213, 0.0247), (0.286, 530.9, 0.0613, 0.0322)),
    "z": ((1.217, 437.0, 0.0845, 0.0278), (0.681, 459.0, 0.0385, 0.0725)),
}
# Linear sRGB from XYZ (IEC 61966-2-1, D65).
_SRGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])


def matching(wavelengths: np.ndarray) -> np.ndarray:
    """(3, L): the colour matching functions x, y and z at these wavelengths in nm."""
    rows = []
    for lobes in _LOBES.values():
        total = np.zeros(len(wavelengths))
        for height, peak, below, above in lobes:
            offset = wavelengths - peak
            total += height * np.exp(-0.5 * (offset * np.where(offset < 0, below, above)) ** 2)
        rows.append(total)
    return np.stack(rows)


def to_srgb(cube: np.ndarray, wavelengths: np.ndarray) -> np.ndarray:
    """(L, H, W) reflectances or radiances in [0, 1] -> (3, H, W) in [0, 1], gamma included; an all-one cube is white.

    The white point is that of the bands at hand, so the colour of the light is taken out: a spectrum that is flat over
    them is gray. What lies outside sRGB is clipped.
    """
    matrix = _SRGB @ (matching(np.asarray(wavelengths, float)) * np.gradient(np.asarray(wavelengths, float)))
    matrix /= matrix.sum(1, keepdims=True)
    linear = np.clip(np.tensordot(matrix.astype(np.float32), cube, 1), 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def of_wavelength(wavelength: float) -> tuple[float, float, float]:
    """The sRGB colour of light of one wavelength in nm, as bright as its hue allows: for labels."""
    linear = np.clip(_SRGB @ matching(np.array([wavelength]))[:, 0], 0, None)
    linear /= linear.max() or 1.0
    return tuple(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).tolist())
