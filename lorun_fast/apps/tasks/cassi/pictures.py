"""Pictures of spectral cubes: bands in their colours, and spectra at chosen points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lorun_fast.apps.files import replacing
from lorun_fast.apps.tasks.cassi import colour

_MARKS = "osD^v<>P"


def strip(cube: np.ndarray, wavelengths: np.ndarray, count: int = 8) -> np.ndarray:
    """(3, h, w): up to ``count`` bands side by side, from the first to the last, each in the colour of its light.

    Bands are reduced to about 256 pixels in width by taking every n-th. All share one brightness scale, the cube's
    99.5th percentile, and a gamma of 1/2.2.
    """
    picked = np.unique(np.linspace(0, len(cube) - 1, min(count, len(cube))).round().astype(int))
    every = -(-cube.shape[2] // 256)
    bands = np.clip(cube[picked][:, ::every, ::every], 0, None)
    bands = np.clip(bands / max(float(np.percentile(cube, 99.5)), 1e-6), 0, 1) ** (1 / 2.2)
    tinted = [
        band * np.array(colour.of_wavelength(float(nm)))[:, None, None]
        for band, nm in zip(bands, wavelengths[picked], strict=True)
    ]
    gap = np.zeros((3, bands.shape[1], 2))
    return np.concatenate([part for image in tinted for part in (image, gap)][:-1], 2).astype(np.float32)


def spread_points(cube: np.ndarray, count: int = 4) -> list[tuple[int, int]]:
    """(row, column) of pixels worth a spectrum: bright, and of colours unlike one another.

    The first is the brightest of the smoothed cube; each further one has the largest angle to those before it, among
    the pixels that are brighter than the median.
    """
    cell = max(1, min(cube.shape[1:]) // 32)
    height, width = (side // cell for side in cube.shape[1:])
    small = cube[:, : height * cell, : width * cell].reshape(len(cube), height, cell, width, cell).mean((2, 4))
    spectra = small.reshape(len(cube), -1).astype(np.float64)
    length = np.linalg.norm(spectra, axis=0)
    units = spectra / np.maximum(length, 1e-12)
    chosen = [int(length.argmax())]
    while len(chosen) < min(count, length.size):
        likeness = (units[:, chosen].T @ units).max(0)
        likeness[(length < np.median(length)) | (length <= 0)] = np.inf
        chosen.append(int(likeness.argmin()))
    return [(index // width * cell + cell // 2, index % width * cell + cell // 2) for index in chosen]


def overview(
    path: Path,
    panels: Sequence[tuple[str, np.ndarray]],
    wavelengths: np.ndarray,
    title: str,
    points: Sequence[tuple[int, int]],
    measurement: np.ndarray | None = None,
) -> None:
    """Writes one PNG: each cube as a colour image, the measurement, and every cube's spectra at the points.

    panels: (name, cube (L, H, W)); the first, the truth where there is one, is drawn with thick, pale lines.
    points: (row, column) each.
    """
    columns = len(panels) + (measurement is not None)
    figure = Figure(figsize=(3.1 * columns + 4.2, 3.7), layout="constrained")
    # A file's name may hold dollar signs, which are no formula, and bytes that are no UTF-8.
    figure.suptitle(title.encode(errors="backslashreplace").decode(), fontsize=11, parse_math=False)
    axes = figure.subplots(1, columns + 1, width_ratios=[1] * columns + [1.35])
    tones = [f"C{i}" for i in range(len(points))]
    for place, (name, cube) in zip(axes, panels, strict=False):
        place.imshow(np.clip(colour.to_srgb(cube, wavelengths), 0, 1).transpose(1, 2, 0), interpolation="nearest")
        place.set_title(name, fontsize=9)
        place.set(xticks=[], yticks=[])
        for number, ((row, column), tone) in enumerate(zip(points, tones, strict=True)):
            place.plot(column, row, _MARKS[number % len(_MARKS)], color=tone, markeredgecolor="white", markersize=6)
    if measurement is not None:
        axes[columns - 1].imshow(measurement, cmap="gray", interpolation="nearest")
        axes[columns - 1].set_title("measurement", fontsize=9)
        axes[columns - 1].set(xticks=[], yticks=[])
    spectra = axes[columns]
    for index, (name, cube) in enumerate(panels):
        for number, ((row, column), tone) in enumerate(zip(points, tones, strict=True)):
            first = index == 0 and len(panels) > 1
            spectra.plot(
                wavelengths,
                cube[:, row, column],
                color=tone,
                linewidth=4 if first else 1.3,
                alpha=0.35 if first else 1,
                linestyle="-" if index < 2 else ":",
                label=name if number == 0 else None,
            )
    spectra.set(xlabel="wavelength (nm)")
    spectra.set_title("spectra at the marked points", fontsize=9)
    spectra.tick_params(labelsize=8)
    spectra.legend(fontsize=8)
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=110)
