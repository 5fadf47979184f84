"""The weight gradient of a convolution of stride 1, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.reference._wide import wide


def packed_weight_gradient(grad: Tensor, x: Tensor, kernel: int, padding: int) -> Tensor:
    """(out, in, k, k) of a convolution of x (N, in, H, W) whose result has this gradient (N, out, H', W').

    In fp32, or fp64 beside fp64.
    """
    grad, x = (wide(t) for t in (grad, x))
    weight = x.new_zeros((grad.shape[1], x.shape[1], kernel, kernel))
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1].contiguous()
