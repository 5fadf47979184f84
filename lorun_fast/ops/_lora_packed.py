"""The "packed" backend of lora_conv2d: bf16 convolutions of training by matrix tiles (AMX), on CPUs.

Forward pass and both gradients, as the "aten" backend arranges them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops import _lora_aten
from lorun_fast.ops._backends import Backend, register
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.ops.packed_conv2d import MAX_KERNEL, packed_conv2d, packed_weight
from lorun_fast.ops.packed_factor_gradients import MAX_RANK, packed_factor_gradients
from lorun_fast.ops.packed_weight_gradient import packed_weight_gradient

_WIDE = 16


def supports(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
) -> str | None:  # fmt: skip
    height, width = weight.shape[2:]
    if transposed or groups != 1 or height != width or height > MAX_KERNEL:
        return f"its kernel is square, at most {MAX_KERNEL} x {MAX_KERNEL}, not transposed, of one group"
    if list(dilation) != [1, 1] or stride[0] != stride[1] or padding[0] != padding[1]:
        return "its dilation is 1, its strides and paddings are the same"
    if x.dtype != torch.bfloat16 or not is_channels_last(x):
        return "x is bfloat16 in channels_last"
    if min(x.shape[2:]) + 2 * padding[0] < height:
        return "the kernel fits the image"
    return None


def conv2d(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    # The op adds in fp32: the bias stays as it is.
    bias = None if bias is None else bias.float()
    geometry = {"out": weight.shape[0], "kernel": weight.shape[2], "stride": stride[0], "padding": padding[0]}

    def convolve(samples: Tensor, merged: Tensor, **finishing) -> Tensor:
        return packed_conv2d(samples, packed_weight(merged), bias, **geometry, **finishing)

    return _lora_aten.conv2d_by(convolve, x, weight, down, up, stage, residual, scale, activation)


def _convolution(x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    (stride, _), (padding, _) = geometry[:2]
    out, _, kernel, _ = weight.shape
    return packed_conv2d(x, packed_weight(weight), out=out, kernel=kernel, stride=stride, padding=padding)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    stride, padding = geometry[0][0], geometry[1][0]
    # With 16 channels and more on both sides oneDNN's takes 0.89 to 1.13 of the time, with fewer 1.1 to 2.2 times it.
    if stride != 1 or min(grad.shape[1], x.shape[1]) >= _WIDE:
        return _lora_aten.weight_gradient(grad, x, weight, geometry)
    return packed_weight_gradient(grad, x, kernel=weight.shape[2], padding=padding)


def _factor_gradients(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, geometry: tuple):
    stride, padding = geometry[0][0], geometry[1][0]
    if stride != 1 or down.shape[0] > MAX_RANK:
        return None
    return packed_factor_gradients(grad, x, down, up, padding=padding)


def _image_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    stride, padding = geometry[0][0], geometry[1][0]
    around = weight.shape[2] - 1 - padding
    if stride != 1 or around < 0:
        return _lora_aten.image_gradient(grad, x, weight, geometry)
    tiles = packed_weight(weight, adjoint=True)
    return packed_conv2d(grad, tiles, out=weight.shape[1], kernel=weight.shape[2], padding=around)


def missing() -> str | None:
    if not _native.available():
        return _native.reason()
    return None if _native.build_info()["amx"] else "this CPU has no AMX, or LORUN_CPU turns it off"


register(
    "lora_conv2d",
    Backend(
        "packed",
        ("cpu",),
        conv2d,
        partial(
            _lora_aten.conv2d_backward,
            forward=conv2d,
            way=_lora_aten.Way(_convolution, _image_gradient, _weight_gradient, _factor_gradients),
        ),
        missing=missing,
        supports=supports,
    ),
)
