"""A depthwise 3 x 3 convolution, each channel with a kernel of its own, and its gradients, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.reference._wide import wide


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv(x, weight) + bias, padded with zeros to x's size; 16 bits are summed in fp32, rounded once.

    x: (N, C, H, W). weight: (C, 1, 3, 3). bias: (C,). All of one dtype.
    """
    offset = None if bias is None else wide(bias)
    return F.conv2d(wide(x), wide(weight), offset, padding=1, groups=x.shape[1]).to(x.dtype)


def depthwise_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x (empty, (0,), without ``of_x``), weight and bias from that of the result, rounded likewise."""
    channels = x.shape[1]
    found = torch.ops.aten.convolution_backward(
        wide(grad), wide(x), wide(weight), [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], channels,
        [of_x, True, True],
    )  # fmt: skip
    grad_x, grad_weight, grad_bias = (None if g is None else g.to(x.dtype) for g in found)
    return x.new_empty(0) if grad_x is None else grad_x, grad_weight, grad_bias
