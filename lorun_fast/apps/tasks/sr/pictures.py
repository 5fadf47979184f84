"""Pictures on their way through the super-resolution network: size, colour, edges, tiles."""

from __future__ import annotations

import math
import time

import numpy as np

from lorun_fast.apps import restoring, tiling
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import Runtime
from lorun_fast.network import LoRun
from lorun_fast.operators import BlurDownsample

SIZES = ("crop", "reflect")
EDGES = ("wrap", "reflect")
# Deconvolution reaches further than the kernel does; beyond this many pixels its echo of an edge is not seen.
_LEAST_MARGIN = 48


def fitted(image: np.ndarray, cell: int, how: str) -> np.ndarray:
    """(C, H, W) at a size that ``cell`` divides: cropped, or reflected, at the bottom and at the right.

    Raises UserError for an image with less than one cell, or too few pixels to reflect.
    """
    height, width = image.shape[1:]
    if how == "crop":
        if min(height, width) < cell:
            raise UserError(f"expected an image of at least {cell} x {cell} pixels, got {height} x {width}")
        return image[:, : height // cell * cell, : width // cell * cell]
    more = (-height % cell, -width % cell)
    if more[0] > height or more[1] > width:
        raise UserError(f"expected an image of at least half of {cell} x {cell} pixels, got {height} x {width}")
    return np.pad(image, ((0, 0), (0, more[0]), (0, more[1])), "symmetric")


def margin(op: BlurDownsample) -> int:
    """Pixels of y that a tile or a reflected edge takes beside what is kept."""
    pixels = max(_LEAST_MARGIN, 2 * max(op.kernel.shape[-2:]))
    return _whole_cells(pixels / op.scale)


def _whole_cells(pixels: float) -> int:
    return max(1, math.ceil(pixels / tiling.CELL)) * tiling.CELL


def restore(
    net: LoRun,
    y: np.ndarray,
    size: tuple[int, int] | None,
    how: Runtime,
    *,
    op: BlurDownsample,
    sigma: float,
    edges: str = "wrap",
    tile: int | None = None,
) -> tuple[np.ndarray, float]:
    """Restores y (N, C, h, w), C = 1 (as gray: three equal channels, then their mean) or 3. See restoring.restore.

    The network knows noise that differs from channel to channel, a gray part of which is sigma / sqrt(3). Three equal
    channels have a gray part of sigma, that of sqrt(3) sigma on different ones: this is what it is told of a gray y.

    size: (H, W) to crop to. edges: "wrap", the image goes on periodically, as simulated measurements do; "reflect",
    it goes on mirrored, as is better for a photograph. tile: side in pixels of the restored image of the pieces that
    it is restored in, with overlaps; None: whole.
    """
    began = time.perf_counter()
    gray = y.shape[1] == 1
    if gray:
        y, sigma = np.repeat(y, 3, 1), math.sqrt(3) * sigma
    whole = y.shape[-2] * op.scale, y.shape[-1] * op.scale
    pieces = tile is not None and tile < max(whole)
    if not pieces and edges == "wrap":
        x, _ = restoring.restore(net, y, None, how, op=op, sigma=sigma)
    else:

        def piece(part: np.ndarray) -> np.ndarray:
            return restoring.restore(net, part, None, how, op=op, sigma=sigma)[0]

        side = _whole_cells(tile / op.scale if pieces else max(y.shape[-2:]))
        x = tiling.apply(piece, y, side, margin(op), scale=op.scale, edges=edges)
    if size is not None:
        x = x[..., : size[0], : size[1]]
    return x.mean(1, keepdims=True) if gray else x, time.perf_counter() - began
