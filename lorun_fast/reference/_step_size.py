"""How a step size broadcasts over an image."""

from __future__ import annotations

from torch import Tensor


def per_channel(rho: Tensor) -> Tensor:
    """An op's step size, (1,) or (N, C), in a shape that broadcasts over (N, C, H, W)."""
    return rho if rho.ndim == 1 else rho[:, :, None, None]
