"""The demo's picture: original, start and restored side by side, with enlarged details."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lorun_fast.apps.files import replacing

_MARK = "#ffcc00"
_WIDTH = 11.0  # inches
_TITLE = 0.3  # inches above a row


@dataclass
class Comparison:
    """One row: panels of (title, image (C, H, W) in [0, 1]), and the detail (top, left, side) to enlarge."""

    panels: Sequence[tuple[str, np.ndarray]]
    detail: tuple[int, int, int]


def _show(axes, image: np.ndarray) -> None:
    pixels = np.clip(image, 0, 1)
    pixels = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def save(path: Path, rows: Sequence[Comparison], title: str) -> None:
    """Writes the rows as one PNG, complete or not at all."""
    columns = len(rows[0].panels)
    heights = [row.panels[0][1].shape[1] / row.panels[0][1].shape[2] * _WIDTH / columns + _TITLE for row in rows]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 2 * _TITLE), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes_row, row in zip(grid, rows, strict=True):
        top, left, side = row.detail
        for axes, (text, image) in zip(axes_row, row.panels, strict=True):
            _show(axes, image)
            axes.set_title(text, fontsize=9)
            axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=_MARK, linewidth=1))
            # Square, in the corner that hides least: 45 % of the shorter side.
            height, width = image.shape[1:]
            share = 0.45 * min(height, width)
            corner = 1 - share / width if left + side / 2 < width / 2 else 0
            inset = axes.inset_axes([corner, 0, share / width, share / height])
            _show(inset, image[:, top : top + side, left : left + side])
            for spine in inset.spines.values():
                spine.set(edgecolor=_MARK, linewidth=1.2)
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=110)
