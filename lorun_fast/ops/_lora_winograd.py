"""The "winograd" backend of lora_conv2d: 3x3 convolutions of training by minimal filtering, on CPUs.

Forward pass and x's gradient take a quarter of their multiplications; the factors' gradients are those of the "aten"
backend. It does not stand in the table: with it a fresh network equals the tied one to rounding, not to the last bit.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops import _lora_aten
from lorun_fast.ops._backends import Backend, register
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.ops.winograd_conv2d import CHANNELS, DTYPES, winograd_conv2d, winograd_weight


def supports(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
) -> str | None:  # fmt: skip
    if transposed or groups != 1 or weight.shape[2:] != (3, 3):
        return "its convolution is 3 x 3, not transposed, of one group"
    if [*stride, *padding, *dilation] != [1] * 6:
        return "its stride, padding and dilation are 1"
    if weight.shape[0] % CHANNELS or weight.shape[1] % CHANNELS:
        return f"its channels are multiples of {CHANNELS}"
    if x.dtype not in DTYPES or not is_channels_last(x):
        return "x is float32 or float64 in channels_last"
    return None


def conv2d(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    bias = None if bias is None else bias.to(x.dtype)

    def convolve(samples: Tensor, merged: Tensor, **finishing) -> Tensor:
        return winograd_conv2d(samples, winograd_weight(merged), bias, **finishing)

    return _lora_aten.conv2d_by(convolve, x, weight, down, up, stage, residual, scale, activation)


def _image_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    return winograd_conv2d(grad, winograd_weight(weight, adjoint=True))


register(
    "lora_conv2d",
    Backend(
        "winograd",
        ("cpu",),
        conv2d,
        partial(_lora_aten.conv2d_backward, forward=conv2d, way=_lora_aten.Way(image_gradient=_image_gradient)),
        unranked="a fresh network would equal the tied one to rounding only",
        missing=lambda: None if _native.available() else _native.reason(),
        supports=supports,
    ),
)
