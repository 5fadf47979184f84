"""Large images in pieces: tiles that overlap, of which the middles are kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
