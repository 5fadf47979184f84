"""A network whose denoiser sees an image in tiles, so that memory does not grow with the image."""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.apps.errors import UserError
from lorun_fast.network import LoRun
from lorun_fast.operators import SensingOperator


class Tiled:
    """Called as the network; gradient steps run on the whole image, the denoiser on overlapping tiles.

    A measurement mixes pixels further apart than a tile is wide (54 columns in snapshot spectral imaging with 28 bands
    at step 2), so cutting it up would change the problem. The gradient step needs no activations: it stays whole.
    tile: side in pixels. overlap: pixels that a tile sees beyond what it keeps, on either side.
    """

    def __init__(self, net: LoRun, tile: int, overlap: int = 16):
        if tile <= 2 * overlap:
            raise UserError(f"--tile: expected more than twice the overlap of {overlap} pixels, got {tile}")
        self.net, self.tile, self.overlap = net, tile, overlap
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
            z = op.gradient_step(x, y, self.net.step_size[k].float())
            x = torch.empty_like(z[:, : self._denoise(z[:, :, :1, :1], k, sigma).shape[1]])
            for (row, rows), (column, columns) in self._places(z.shape[2:]):
                part = self._denoise(z[:, :, row[0] : row[1], column[0] : column[1]], k, sigma)
                own = part[:, :, rows[0] - row[0] : rows[1] - row[0], columns[0] - column[0] : columns[1] - column[0]]
                x[:, :, rows[0] : rows[1], columns[0] : columns[1]] = own
        return x

    def _denoise(self, z: Tensor, k: int, sigma: float | Tensor | None) -> Tensor:
        dtype = next(self.net.denoiser.parameters()).dtype
        return self.net.denoiser(z.to(dtype), stage=k, sigma=sigma).to(z.dtype)

    def _places(self, shape):
        rows, columns = (cuts(side, self.tile, self.overlap) for side in shape)
        return [(row, column) for row in rows for column in columns]


def cuts(length: int, tile: int, overlap: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((first, end) that a tile sees, (first, end) that it keeps) along one axis; what is kept covers it once.

    Every tile is ``tile`` long, or the whole axis where that is shorter; the last one is moved back to end with it.
    """
    if length <= tile:
        return [((0, length), (0, length))]
    inner = tile - 2 * overlap
    count = -(-(length - 2 * overlap) // inner)
    starts = [min(i * inner, length - tile) for i in range(count)]
    edges = [0, *(start + overlap for start in starts[1:]), length]
    return [((start, start + tile), (edges[i], edges[i + 1])) for i, start in enumerate(starts)]
