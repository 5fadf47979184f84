"""A 3 x 3 convolution and what follows it, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.reference._wide import wide
from lorun_fast.reference.lora import epilogue


def fused_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """act(conv(x, weight) + bias) + residual, padded with zeros to x's size; 16 bits are summed in fp32, rounded once.

    x: (N, in, H, W). weight: (out, in, 3, 3). bias: (out,). residual: (N, out, H, W). All of one dtype.
    """
    if not (x.shape[2] and x.shape[3]):  # torch asks for one pixel where the kernel fits
        return (x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:])) if residual is None else residual).clone()
    x_, weight_, bias_, residual_ = (None if t is None else wide(t) for t in (x, weight, bias, residual))
    y = epilogue(F.conv2d(x_, weight_, bias_, padding=1), "relu" if relu else None, residual_)
    return y.to(x.dtype)


def thin_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight, (out, in, 3, 3), of a convolution of x whose result has this gradient."""
    return torch.nn.grad.conv2d_weight(wide(x), (grad.shape[1], x.shape[1], 3, 3), wide(grad), padding=1)
