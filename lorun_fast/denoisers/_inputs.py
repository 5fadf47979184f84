"""What the base denoisers do with their input before the first layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.ops._checks import number_or_tensor


def check_images(z: Tensor, channels: int) -> None:
    """Raises ValueError unless z is (N, channels, H, W)."""
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"z: expected (N, {channels}, H, W), got shape {tuple(z.shape)}")


def with_noise_map(z: Tensor, sigma: float | Tensor | None, wanted: bool, name: str) -> Tensor:
    """z with one more, constant channel that holds sigma (a number, 0-d or (N,)); z itself where none is wanted."""
    if not wanted:
        if sigma is not None:
            raise ValueError(f"this {name} was built without noise_level=True and takes no sigma")
        return z
    if sigma is None:
        raise ValueError(f"this {name} was built with noise_level=True: pass sigma")
    n, _, h, w = z.shape
    sigma = number_or_tensor(sigma, z.dtype, z.device)
    return torch.cat([z, sigma.reshape(-1, 1, 1, 1).expand(n, 1, h, w)], 1)


def whole_cells(x: Tensor, cell: int) -> Tensor:
    """x, its last row and column repeated until height and width are multiples of ``cell``."""
    height, width = x.shape[2:]
    if height % cell or width % cell:
        # On a CPU autocast takes this for an operation that needs fp32.
        return F.pad(x, (0, -width % cell, 0, -height % cell), mode="replicate").to(x.dtype)
    return x
