"""A layout and a dtype for an image, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def relayout(x: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """A copy of x (N, C, H, W) in that dtype, channels innermost or outermost, also in its strides."""
    if channels_last:
        return x.permute(0, 2, 3, 1).to(dtype).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
    return x.to(dtype).clone(memory_format=torch.contiguous_format)
