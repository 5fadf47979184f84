"""A depthwise 3 x 3 convolution with channels innermost, on CPUs, and its gradients.

Definition: reference/depthwise_conv2d.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops import _flops
from lorun_fast.ops._checks import check_finishing, check_image, check_tensor, empty_channels_last, shape_of
from lorun_fast.ops._direct import transforms_active
from lorun_fast.ops._library import define
from lorun_fast.reference import depthwise_conv2d as reference


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_image("x", x, 4, "(N, C, H, W)")
    check_tensor("weight", weight)
    channels = x.shape[1]
    if channels < 1:
        raise ValueError(f"x: expected one channel or more, got shape {shape_of(x)}")
    if weight.shape != (channels, 1, 3, 3):
        raise ValueError(f"weight: expected ({channels}, 1, 3, 3), got {shape_of(weight)}")
    check_finishing(x, channels, weight, bias, None)


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor) -> None:
    _check(x, weight, None)
    check_tensor("grad", grad)
    if grad.shape != x.shape:
        raise ValueError(f"grad: expected shape {shape_of(x)} as x has, got {shape_of(grad)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype} as x has, got {grad.dtype}")


def _fake(x, weight, bias):
    _check(x, weight, bias)
    return empty_channels_last(x, x.shape)


def _fake_backward(grad, x, weight, of_x):
    _check_backward(grad, x, weight)
    grad_x = empty_channels_last(x, x.shape) if of_x else x.new_empty(0)
    return grad_x, x.new_empty((x.shape[1], 1, 3, 3)), x.new_empty(x.shape[1])


def _definition(x, weight, bias):
    return reference.depthwise_conv2d(x, weight, bias).contiguous(memory_format=torch.channels_last)


def _definition_backward(grad, x, weight, of_x):
    grad_x, *others = reference.depthwise_conv2d_backward(grad, x, weight, of_x)
    if of_x:
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    return grad_x, *(t.contiguous() for t in others)


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    # A weight that does not learn leaves x out of its gradient: it need not be kept.
    learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if learns else None, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    if x is None:
        return _op(grad, weight.flip(2, 3), None), None, None
    found = _backward_op(grad, x, weight, ctx.needs_input_grad[0])
    return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


def _setup_backward(ctx, inputs, output):
    grad, x, weight, ctx.of_x = inputs
    ctx.save_for_backward(grad, x, weight)


def _backward_of_backward(ctx, for_x, for_weight, for_bias):
    """All are bilinear: gradients are convolutions again, and gradients for weights."""
    grad, x, weight = ctx.saved_tensors
    needs_grad, needs_x, needs_weight, _ = ctx.needs_input_grad
    found = [None, None, None, None]
    if needs_grad:
        found[0] = _op(x, for_weight, for_bias)
        if ctx.of_x:
            found[0] = found[0] + _op(for_x, weight, None)
    if needs_x:
        found[1] = _op(grad, for_weight.flip(2, 3), None)
    if needs_weight and ctx.of_x:
        found[2] = _backward_op(grad, for_x, weight, False)[1]
    return tuple(found)


_op = define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=_definition,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
    flops=lambda x, weight, *_, out_shape, **__: _flops.convolution(x, weight, out_shape),
)


_backward_op = define(
    "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, bool of_x) -> (Tensor, Tensor, Tensor)",
    reference=_definition_backward,
    fake=_fake_backward,
    backward=_backward_of_backward,
    setup_context=_setup_backward,
    direct=True,
    flops=lambda grad, x, weight, of_x, **_: (1 + of_x) * _flops.convolution(x, weight, grad),
)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of 3 x 3 with stride and padding 1, each channel with a kernel of its own: groups = C.

    x: (N, C, H, W), channels_last without a copy, any number of channels. weight: (C, 1, 3, 3). bias: (C,). All of one
        dtype; under autocast, of its dtype, as torch's convolution has it.
    In C++ on CPUs, with sums in fp32 (fp64 for fp64) and one rounding, in channels_last; elsewhere torch's convolution.
    Differentiable any number of times; gradients for weight and bias are summed in an order that does not depend on the
    number of threads. Raises ValueError or TypeError naming the argument that does not fit.
    """
    check_tensor("x", x)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (
            t.to(dtype) if isinstance(t, Tensor) and t.dtype in (torch.float32, torch.bfloat16, torch.float16) else t
            for t in (x, weight, bias)
        )
    _check(x, weight, bias)
    served = x.device.type == "cpu" and _native.available()
    if not served or (not torch.compiler.is_compiling() and transforms_active()):
        return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    return _op(x, weight, bias)
