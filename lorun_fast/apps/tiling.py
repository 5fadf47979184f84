"""Large images in pieces, so that memory does not grow with the image: of measurements that see only their
neighbourhood, or, where they mix distant pixels, of what the denoiser sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lorun_fast.apps import runtime
from lorun_fast.apps.errors import UserError
from lorun_fast.network import LoRun
from lorun_fast.operators import SensingOperator

# The denoisers' coarsest cell: pieces begin where its grid does, or they would see other cells than the whole image's.
CELL = 8
_PADDING = {"wrap": "wrap", "reflect": "symmetric"}


def apply(
    f: Callable[[np.ndarray], np.ndarray], y: np.ndarray, tile: int, margin: int, *, scale: int = 1, edges: str = "wrap"
) -> np.ndarray:
    """f(y), piece by piece.

    f: maps (..., h, w) to (..., h*scale, w*scale). y: (..., H, W). tile: side of what is kept of a piece, in y's
    pixels; f sees ``margin`` more at every side, beyond the image what ``edges`` says: "wrap", it goes on
    periodically, or "reflect", mirrored. All pieces are of one size and begin at multiples of ``tile``, less the
    margin: a network that reduces its input wants both to be multiples of its cell.
    Equals f(y) where f looks no further than the margin.
    """
    height, width = y.shape[-2:]
    beyond = [(margin, margin + -side % tile) for side in (height, width)]
    padded = np.pad(y, [(0, 0)] * (y.ndim - 2) + beyond, _PADDING[edges])
    out = None
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            piece = f(padded[..., top : top + tile + 2 * margin, left : left + tile + 2 * margin])
            if out is None:
                out = np.empty((*piece.shape[:-2], height * scale, width * scale), piece.dtype)
            target = out[..., top * scale : (top + tile) * scale, left * scale : (left + tile) * scale]
            inner = piece[..., margin * scale :, margin * scale :]
            target[...] = inner[..., : target.shape[-2], : target.shape[-1]]
    return out


def add_argument(parser: argparse.ArgumentParser) -> None:
    """--tile, of every command that restores measurements of any size."""
    parser.add_argument(
        "--tile",
        type=runtime.at_least_one,
        metavar="PIXELS",
        help="work in overlapping pieces of this side, less 16 at its edges (super-resolution: that "
        "contribute squares of this side): less memory (default: whole images)",
    )


class Tiled:
    """Called as the network; data steps run on the whole image, the denoiser on overlapping tiles.

    A measurement mixes pixels further apart than a tile is wide (54 columns in snapshot spectral imaging with 28 bands
    at step 2), so cutting it up would change the problem. The data step needs no activations: it stays whole.
    tile: side in pixels, cut to whole cells. overlap: pixels that a tile sees beyond what it keeps, on either side;
    whole cells.
    """

    def __init__(self, net: LoRun, tile: int, overlap: int = 16):
        if tile < 2 * overlap + CELL:
            raise UserError(f"--tile: expected at least {2 * overlap + CELL} pixels, got {tile}")
        self.net, self.tile, self.overlap = net, tile // CELL * CELL, overlap
        self.op = net.op

    def __call__(
        self,
        y: Tensor,
        *,
        op: SensingOperator | None = None,
        size: tuple[int, int] | None = None,
        sigma: float | Tensor | None = None,
    ) -> Tensor:
        op = self.net.op if op is None else op
        x = op.initial(y, size)
        for k in range(self.net.stages):
            z = self.net.data_update(k, x, y, op, sigma)
            x = torch.empty_like(z)
            for (row, rows), (column, columns) in self._places(z.shape[2:]):
                part = self.net.denoise(k, z[:, :, row[0] : row[1], column[0] : column[1]], sigma)
                own = part[:, :, rows[0] - row[0] : rows[1] - row[0], columns[0] - column[0] : columns[1] - column[0]]
                x[:, :, rows[0] : rows[1], columns[0] : columns[1]] = own
        return x

    def _places(self, shape):
        rows, columns = (cuts(side, self.tile, self.overlap) for side in shape)
        return [(row, column) for row in rows for column in columns]


def tiled(net: LoRun, tile: int | None) -> LoRun | Tiled:
    """The network with its denoiser on tiles of this side; itself without one. Raises as :class:`Tiled`."""
    return net if tile is None else Tiled(net, tile)


def cuts(length: int, tile: int, overlap: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((first, end) that a tile sees, (first, end) that it keeps) along one axis; what is kept covers it once.

    All begin at multiples of CELL, as tile and overlap are, and are ``tile`` long, or the whole axis where that is
    shorter; the last one is moved back to end with the axis, and up to a cell longer.
    """
    if length <= tile:
        return [((0, length), (0, length))]
    inner = tile - 2 * overlap
    count = -(-(length - 2 * overlap) // inner)
    starts = [min(i * inner, (length - tile) // CELL * CELL) for i in range(count)]
    ends = [*(start + tile for start in starts[:-1]), length]
    edges = [0, *(start + overlap for start in starts[1:]), length]
    return [((starts[i], ends[i]), (edges[i], edges[i + 1])) for i in range(count)]
