"""The picture of an evaluation: kernels across, scales down, every cell a PSNR and its gain over the start."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lorun_fast.apps.files import replacing


def save(path: Path, report: dict, kernels: dict[int, np.ndarray]) -> None:
    """Writes the heat map of an evaluation's report as a PNG, complete or not at all.

    kernels: by their place in the file, drawn above their columns.
    """
    scales = [mean["scale"] for mean in report["mean"]]
    order = list(kernels)
    found = {(row["scale"], row["kernel"]): row for row in report["kernels"]}
    found |= {(mean["scale"], None): mean for mean in report["mean"]}
    columns = [*order, None]
    psnr = np.array([[_number(found[s, k]["psnr"]) for k in columns] for s in scales])
    gain = psnr - np.array([[_number(found[s, k]["start_psnr"]) for k in columns] for s in scales])
    width = max(5.0, 0.85 * len(columns) + 1.6)
    figure = Figure(figsize=(width, 0.62 * len(scales) + 2.0), layout="constrained")
    top, cells = figure.subfigures(2, 1, height_ratios=(0.9, 0.62 * len(scales) + 1.1))
    for axes, k in zip(top.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes.axis("off")
        if k is not None:
            axes.imshow(kernels[k], cmap="gray_r", interpolation="nearest")
    axes = cells.subplots()
    most = float(np.nanmax(np.abs(gain))) if np.isfinite(gain).any() else 1.0
    shown = axes.imshow(gain, cmap="RdYlGn", vmin=-most, vmax=most, aspect="auto")
    for row, column in np.ndindex(gain.shape):
        text = "-" if math.isnan(psnr[row, column]) else f"{psnr[row, column]:.2f}\n{gain[row, column]:+.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [str(k) if k is not None else "mean" for k in columns], fontsize=8)
    axes.set_yticks(range(len(scales)), [f"x{s}" for s in scales], fontsize=9)
    axes.set_xlabel("kernel")
    cells.colorbar(shown, ax=axes, label="gain over bicubic, dB", pad=0.01)
    count = len(report["kernels"][0]["images"])
    figure.suptitle(
        f"{Path(report['model']).name}: PSNR in dB, {count} images, protocol {report['protocol']}", fontsize=10
    )
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=130)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
