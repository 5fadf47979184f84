"""A spectral cube that needs no download: a photograph that scikit-image carries, with smooth spectra."""

from __future__ import annotations

import numpy as np
from skimage import data
from skimage.transform import resize

from lorun_fast.apps.tasks.cassi import colour

# Reflectances that mix to a pixel's colour, each a sum of Gaussians in nm: (weight, centre, width).
_INKS = {
    "red": ((1.0, 640.0, 38.0), (0.25, 590.0, 22.0), (0.06, 455.0, 20.0)),
    "green": ((1.0, 540.0, 30.0), (0.18, 500.0, 25.0)),
    "blue": ((1.0, 460.0, 28.0), (0.15, 495.0, 20.0)),
}


def cube(height: int = 256, width: int = 256, wavelengths: np.ndarray | None = None) -> np.ndarray:
    """(L, height, width) float32 in [0, 1]: scikit-image's "coffee", each pixel's colour a mix of three smooth spectra.

    wavelengths: in nm; default the field's 28.
    """
    nm = colour.default_wavelengths(28) if wavelengths is None else wavelengths
    inks = np.stack(
        [sum(w * np.exp(-0.5 * ((nm - centre) / spread) ** 2) for w, centre, spread in ink) for ink in _INKS.values()]
    )
    photograph = data.coffee()[:, 60:460].astype(np.float64) / 255
    linear = resize(photograph, (height, width), order=1, anti_aliasing=True, mode="edge") ** 2.2
    spectra = np.tensordot(linear, inks, 1)
    return np.ascontiguousarray(np.moveaxis(spectra / spectra.max(), -1, 0), np.float32)
