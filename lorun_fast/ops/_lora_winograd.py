"""The "winograd" backend of lora_conv2d and lora_residual_block: 3x3 convolutions of training on CPUs.

By minimal filtering: forward pass and gradients take a quarter of their multiplications. From or to few channels, a
network's first layer and its last, by the kernels of thin_conv2d, which torch takes some ten times as long for. In the
table it is for 16 bits: in fp32 a fresh network is to equal the tied one to the last bit, with it to rounding only.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops import _lora_aten, lora_residual_block
from lorun_fast.ops._backends import Backend, register
from lorun_fast.ops._checks import STORAGE_DTYPES, as_dtype, parameter_dtype
from lorun_fast.ops.fused_conv2d import FEW, MANY, are_thin, fused_conv2d, thin_weight_gradient
from lorun_fast.ops.fused_conv2d import adjoint as adjoint_weight
from lorun_fast.ops.lora import is_channels_last, layout_of
from lorun_fast.ops.winograd_conv2d import (
    LEAST_CHANNELS,
    has_enough,
    winograd_block,
    winograd_conv2d,
    winograd_weight,
    winograd_weight_gradient,
)


def supports(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
) -> str | None:  # fmt: skip
    if transposed or groups != 1 or weight.shape[2:] != (3, 3):
        return "its convolution is 3 x 3, not transposed, of one group"
    if [*stride, *padding, *dilation] != [1] * 6:
        return "its stride, padding and dilation are 1"
    thin = are_thin(*weight.shape[:2])
    if not thin and not has_enough(*weight.shape[:2]):
        return f"it has {LEAST_CHANNELS} channels or more on both sides, or 1 to {FEW} and a multiple of {MANY}"
    # A few channels are soon in any layout.
    if x.dtype not in STORAGE_DTYPES or not (is_channels_last(x) or (thin and weight.shape[1] <= FEW)):
        return "x is a floating-point image in channels_last"
    return None


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    adjoint: bool = False,
    gate: Tensor | None = None,
    **finishing,
) -> Tensor:
    if gate is not None:
        y = _convolve(x, weight, bias, adjoint=adjoint, **finishing)
        return torch.ops.aten.threshold_backward.grad_input(y, gate, 0, grad_input=y)
    if are_thin(*weight.shape[:2]):
        bias = None if bias is None else as_dtype(bias, x.dtype)
        return fused_conv2d(x, adjoint_weight(weight) if adjoint else weight, bias, **finishing)
    return winograd_conv2d(x, winograd_weight(weight, adjoint=adjoint), _beside(x, bias), **finishing)


def _beside(x: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else as_dtype(bias, parameter_dtype(x.dtype))


def conv2d(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    def convolve(samples: Tensor, layer: tuple, **finishing) -> Tensor:
        return _convolve(samples, _lora_aten.merge(*layer, False, x.dtype), bias, **finishing)

    if layout_of(x, weight) != torch.channels_last:  # from one channel, or few: what these kernels give would be copied
        return _lora_aten.conv2d(
            x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation,
            transposed, output_padding,
        )  # fmt: skip
    return _lora_aten.conv2d_by(convolve, x, weight, down, up, stage, residual, scale, activation)


def _image_gradient(grad: Tensor, x: Tensor, layer: tuple, geometry: tuple) -> Tensor:
    return _convolve(grad, _lora_aten.merge(*layer, False, x.dtype), adjoint=True)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    out, channels = weight.shape[:2]
    if are_thin(out, channels):
        return thin_weight_gradient(grad, x)
    if not has_enough(out, channels):  # of factors, whose channels are the rank
        return _lora_aten.weight_gradient(grad, x, weight, geometry)
    return winograd_weight_gradient(grad, x)


def _factor_gradients(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, geometry: tuple) -> tuple[Tensor, Tensor]:
    """From the whole weight's, which costs less than three convolutions with r channels on one side."""
    rank, channels = down.shape[:2]
    thin = are_thin(grad.shape[1], channels)
    whole = thin_weight_gradient(grad, x) if thin else winograd_weight_gradient(grad, x)
    whole = whole.permute(2, 3, 1, 0).flatten(0, 2)
    by_tap = down.permute(2, 3, 1, 0).reshape(-1, rank)
    up, by_tap = (as_dtype(t, whole.dtype) for t in (up, by_tap))
    return (whole @ up).view(3, 3, channels, rank).permute(3, 2, 0, 1), whole.mT @ by_tap


_WAY = _lora_aten.Way(
    image_gradient=_image_gradient, weight_gradient=_weight_gradient, factor_gradients=_factor_gradients
)


def block_supports(*args) -> str | None:
    x, first, second, (stage, residual, *scales) = lora_residual_block.parts(args)
    if stage is not None:
        return "its batch is of one stage"
    one, other = lora_residual_block.calls(x, first, second, stage, residual, scales)
    return supports(*one) or supports(x, *other)  # the middle image has x's dtype and layout


def block(*args) -> Tensor:
    x, first, second, (_, residual, *scales) = lora_residual_block.parts(args)
    layers = zip((first, second), scales, strict=True)
    weights = (lora_residual_block.merged(x, w, *factors, scale) for (w, _, *factors), scale in layers)
    one, other = (winograd_weight(weight) for weight in weights)
    bias, other_bias = (_beside(x, layer[1]) for layer in (first, second))
    return winograd_block(x, one, other, first_bias=bias, second_bias=other_bias, residual=residual)


def missing() -> str | None:
    return None if _native.available() else _native.reason()


_BACKWARD = partial(_lora_aten.conv2d_backward, forward=conv2d, way=_WAY)
_BLOCK_BACKWARD = lora_residual_block.backward_by(_convolve, _WAY)
for _op, _backend in {
    "lora_conv2d": Backend("winograd", ("cpu",), conv2d, _BACKWARD, missing, supports),
    "lora_residual_block": Backend("winograd", ("cpu",), block, _BLOCK_BACKWARD, missing, block_supports),
}.items():
    register(_op, _backend)
