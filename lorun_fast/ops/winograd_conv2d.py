"""3x3 convolution with a quarter of the multiplications, on CPUs, and its gradients.

Its results differ from a direct convolution's by rounding: the transforms cost about one digit of fp32's seven.
Definition: reference/winograd_conv2d.py.
"""

from __future__ import annotations

import math

from torch import Tensor

from lorun_fast.ops._checks import (
    STORAGE_DTYPES,
    check_finishing,
    check_flag,
    check_image,
    check_same_device,
    check_tensor,
    empty_channels_last,
    parameter_dtype,
    shape_of,
)
from lorun_fast.ops._library import define
from lorun_fast.ops._weight_gradient import AUTOGRAD
from lorun_fast.reference import winograd_conv2d as reference

LEAST_CHANNELS = 8
"""Of the image and of the result, unless there are none."""

_ACTIVATIONS = (None, "relu")


def _check_x(x: Tensor) -> None:
    check_image("x", x, 4, "(N, C, H, W)")


def has_enough(*channels: int) -> bool:
    return all(count == 0 or count >= LEAST_CHANNELS for count in channels)


def _channels_to(name: str, points: Tensor, channels: int) -> int:
    """Of a weight for so many channels, to how many it leads."""
    check_tensor(name, points)
    if points.ndim != 3 or points.shape[:2] != (reference.POINTS, channels):
        raise ValueError(
            f"{name}: expected (36, {channels}, out) of winograd_weight for {channels} channels, got {shape_of(points)}"
        )
    out = points.shape[2]
    if not has_enough(channels, out):
        raise ValueError(f"x, {name}: expected at least {LEAST_CHANNELS} channels, got {channels} and {out}")
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    _check_x(x)
    out = _channels_to("weight", weight, x.shape[1])
    check_finishing(x, out, weight, bias, residual, dtype=parameter_dtype(x.dtype))


def _check_block(x, first, first_bias, second, second_bias, residual):
    _check_x(x)
    channels, dtype = x.shape[1], parameter_dtype(x.dtype)
    middle = _channels_to("first", first, channels)
    check_finishing(x, middle, first, first_bias, None, ("first", "first_bias"), dtype)
    out = _channels_to("second", second, middle)
    if out != channels:
        raise ValueError(f"second: expected (36, {middle}, {channels}), back to x's channels, got {shape_of(second)}")
    check_finishing(x, channels, second, second_bias, residual, ("second", "second_bias"), dtype)


def _fake(x, weight, bias, relu, residual):
    _check(x, weight, bias, residual)
    return empty_channels_last(x, (x.shape[0], weight.shape[2], *x.shape[2:]))


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.relu, residual = inputs
    # The sign of what ReLU gave tells its gradient, unless something was added to it.
    ctx.save_for_backward(x, weight, bias, output if ctx.relu and residual is None else None)


def _backward(ctx, grad):
    x, weight, bias, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, needs_residual = ctx.needs_input_grad
    before = grad
    if ctx.relu:
        y = _op(x, weight, bias, True, None) if y is None else y
        before = grad * (y > 0)
    grad_x, grad_weight = (
        reference.winograd_conv2d_backward(before, x, weight) if needs_x or needs_weight else (None, None)
    )
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        before.sum((0, 2, 3), dtype=weight.dtype) if needs_bias else None,
        None,
        grad if needs_residual else None,
    )


_op = define(
    "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, bool relu, Tensor? residual) -> Tensor",
    reference=reference.winograd_conv2d,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
    flops=lambda x, *_, out_shape, **__: 2 * math.prod(out_shape) * x[1] * 3**2,  # of a direct convolution
)


def _fake_block(x, first, first_bias, second, second_bias, residual):
    _check_block(x, first, first_bias, second, second_bias, residual)
    return empty_channels_last(x, x.shape)


def _setup_block(ctx, inputs, output):
    x, first, first_bias, second, *_ = inputs
    ctx.save_for_backward(x, first, first_bias, second)


def _backward_block(ctx, grad):
    x, first, bias, second = ctx.saved_tensors
    between = _op(x, first, bias, True, None)
    inner, grad_second = reference.winograd_conv2d_backward(grad, between, second)
    inner = inner * (between > 0)
    outer, grad_first = reference.winograd_conv2d_backward(inner, x, first)
    first_bias, second_bias = (g.sum((0, 2, 3), dtype=first.dtype) for g in (inner, grad))
    found = (grad + outer, grad_first, first_bias, grad_second, second_bias, grad)
    return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


_block_op = define(
    "winograd_block(Tensor x, Tensor first, Tensor? first_bias, Tensor second, Tensor? second_bias, Tensor? residual)"
    " -> Tensor",
    reference=reference.winograd_block,
    fake=_fake_block,
    backward=_backward_block,
    setup_context=_setup_block,
    direct=True,
    flops=lambda x, first, *_, **__: 2 * 2 * math.prod(x) * first[2] * 3**2,  # of direct convolutions
)


def _check_weight(weight: Tensor) -> None:
    check_tensor("weight", weight)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight: expected (out, in, 3, 3), got shape {shape_of(weight)}")
    if weight.dtype not in STORAGE_DTYPES:
        raise TypeError(f"weight: expected float32, float64, bfloat16 or float16, got {weight.dtype}")


def _fake_weight(weight, adjoint):
    _check_weight(weight)
    out, channels = weight.shape[:2]
    shape = (reference.POINTS, *((out, channels) if adjoint else (channels, out)))
    return weight.new_empty(shape, dtype=parameter_dtype(weight.dtype))


def _setup_weight(ctx, inputs, output):
    weight, ctx.adjoint = inputs
    ctx.dtype = weight.dtype


def _backward_weight(ctx, grad):
    return reference.winograd_weight_backward(grad, ctx.adjoint).to(ctx.dtype), None


_weight_op = define(
    "winograd_weight(Tensor weight, bool adjoint) -> Tensor",
    reference=reference.winograd_weight,
    fake=_fake_weight,
    backward=_backward_weight,
    setup_context=_setup_weight,
    direct=True,
)


def _check_images(grad: Tensor, x: Tensor) -> None:
    check_image("x", x, 4, "(N, in, H, W)")
    check_image("grad", grad, 4, "(N, out, H, W)")
    if grad.shape != (x.shape[0], grad.shape[1], *x.shape[2:]):
        raise ValueError(f"grad, x: expected (N, out, H, W) and (N, in, H, W), got {shape_of(grad)} and {shape_of(x)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype} as x has, got {grad.dtype}")
    if not has_enough(x.shape[1], grad.shape[1]):
        raise ValueError(f"grad, x: expected at least {LEAST_CHANNELS} channels, got {grad.shape[1]} and {x.shape[1]}")
    check_same_device(("x", x), ("grad", grad))


def _fake_gradient(grad, x):
    _check_images(grad, x)
    dtype = parameter_dtype(x.dtype)
    return x.new_empty((3, 3, x.shape[1], grad.shape[1]), dtype=dtype).permute(3, 2, 0, 1)


_gradient_op = define(
    "winograd_weight_gradient(Tensor grad, Tensor x) -> Tensor",
    reference=reference.winograd_weight_gradient,
    fake=_fake_gradient,
    direct=True,
    **AUTOGRAD,
)


def winograd_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a convolution's weight, (out, in, 3, 3), from that of its result: 3x3, stride 1, padding 1.

    grad: (N, out, H, W); x: (N, in, H, W) in its dtype, float32, float64, bfloat16 or float16; both channels_last
        without a copy. 8 channels or more.
    Returns float32, or float64 for such images. By F(4x4, 3x3) as :func:`winograd_conv2d`, in an order that does not
    depend on the number of threads. Raises ValueError or TypeError naming the argument that does not fit.
    """
    _check_images(grad, x)
    return _gradient_op(grad, x)


def winograd_weight(weight: Tensor, *, adjoint: bool = False) -> Tensor:
    """The weight (out, in, 3, 3) as :func:`winograd_conv2d` takes it: (36, in, out), four times as large.

    Formed in float64 and rounded once, to float32 but for a weight in float64. adjoint: the weight of the convolution's
    transpose, which takes a gradient back to x, (36, out, in). Differentiable. Raises ValueError for another kernel
    size, TypeError for another dtype.
    """
    check_flag("adjoint", adjoint)
    _check_weight(weight)
    return _weight_op(weight, adjoint)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(conv(x) + bias) + residual: 3x3, stride 1, padding 1, by minimal filtering F(4x4, 3x3).

    x: (N, in, H, W), float32, float64, bfloat16 or float16, channels_last without a copy. weight: of
        :func:`winograd_weight`, (36, in, out), and bias: (out,): float32, for images in float64 float64. activation:
        None or "relu". residual: (N, out, H, W), as x. 8 channels or more on both sides.
    Returns (N, out, H, W) in x's dtype and channels_last: 16 bits are computed in float32 and rounded once. Compiled
    for CPUs; elsewhere plain PyTorch. Differentiable, without speed: the op is for inference. Raises ValueError or
    TypeError naming the argument that does not fit.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    _check(x, weight, bias, residual)
    return _op(x, weight, bias, activation == "relu", residual)


def winograd_block(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x + conv(relu(conv(x) + first_bias)) + second_bias + residual: a residual block of two :func:`winograd_conv2d`.

    x, residual: (N, C, H, W). first, second: of :func:`winograd_weight`, (36, C, middle) and (36, middle, C). With few
        channels (32 where the second-level cache has 1 MB) what lies between the convolutions stays in the cache; its
        values are those of two calls, rounded to x's dtype between them.
    Returns (N, C, H, W) in channels_last. Errors and gradients as :func:`winograd_conv2d`'s.
    """
    _check_block(x, first, first_bias, second, second_bias, residual)
    return _block_op(x, first, first_bias, second, second_bias, residual)
