"""LoRA convolution and linear layers in plain PyTorch: merge, then one convolution or product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.adapters import merged_weight

ACTIVATIONS = {
    None: lambda t: t,
    "relu": F.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.01),
    "gelu": F.gelu,
    "silu": F.silu,
}


def stage_weight(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, stage: int | Tensor | None, transposed: bool = False
) -> Tensor:
    """W0 + scale * dW of one stage, or (N, *weight.shape) for a stage per sample."""
    if stage is not None:
        down, up = down[stage], up[stage]
    return merged_weight(weight, down, up, scale, transposed=transposed)


def epilogue(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def conv2d_per_sample(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    """A convolution whose weight differs per sample: x (N, C, H, W), weight (N, out, C/groups, kh, kw)."""
    n, out = weight.shape[:2]
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, stride, padding, dilation, groups * n)
    y = y.reshape(n, out, *y.shape[2:])
    return y if bias is None else y + bias[:, None, None].to(y.dtype)


def conv_transpose2d_per_sample(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, output_padding, groups: int, dilation
) -> Tensor:
    """A transposed convolution whose weight differs per sample: weight (N, C, out/groups, kh, kw)."""
    n = weight.shape[0]
    y = F.conv_transpose2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(0, 1),
        None,
        stride,
        padding,
        output_padding,
        groups * n,
        dilation,
    )
    y = y.reshape(n, -1, *y.shape[2:])
    return y if bias is None else y + bias[:, None, None].to(y.dtype)


def linear_per_sample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight differs per sample: x (N, ..., in), weight (N, out, in)."""
    n = x.shape[0]
    y = torch.bmm(x.reshape(n, -1, x.shape[-1]), weight.mT.to(x.dtype))
    y = y.reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + bias.to(y.dtype)


def lora_conv2d(
    x, weight, bias, down, up, *, scale=1.0, stage=None, stride=1, padding=0, dilation=1, groups=1,
    activation=None, residual=None,
):  # fmt: skip
    """act(conv(x, W0 + scale * dW) + bias) + residual."""
    w = stage_weight(weight, down, up, scale, stage)
    conv = conv2d_per_sample if w.ndim == 5 else F.conv2d
    return epilogue(conv(x, w, bias, stride, padding, dilation, groups), activation, residual)


def lora_linear(x, weight, bias, down, up, *, scale=1.0, stage=None, activation=None, residual=None):
    """act(x (W0 + scale * dW)^T + bias) + residual."""
    w = stage_weight(weight, down, up, scale, stage)
    linear = linear_per_sample if w.ndim == 3 else F.linear
    return epilogue(linear(x, w, bias), activation, residual)
