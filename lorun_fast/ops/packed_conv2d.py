"""Convolution with a weight packed once for matrix tiles (AMX), and a residual block of two in one pass.

For inference in bf16 on CPUs: bias, ReLU and residual are applied to the fp32 sums, and the result is rounded once.
Definition: reference/packed_conv2d.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorun_fast.ops._checks import (
    STORAGE_DTYPES,
    check_flag,
    check_image,
    check_same_device,
    check_tensor,
    empty_channels_last,
    finite,
    parameter_dtype,
    shape_of,
    whole,
)
from lorun_fast.ops._library import define
from lorun_fast.ops.lora import check_floating, check_update
from lorun_fast.reference import packed_conv2d as reference
from lorun_fast.reference.lora import to_factors

MAX_KERNEL = 7
_ACTIVATIONS = (None, "relu")


def _check_packed(name: str, packed: Tensor, x: Tensor, out: int, channels: int, kernel: int) -> None:
    shape = reference.packed_shape(out, channels, kernel)
    check_tensor(name, packed)
    if packed.shape != shape:
        raise ValueError(
            f"{name}: expected {shape} of packed_weight for ({out}, {channels}, {kernel}, {kernel}), "
            f"got {shape_of(packed)}"
        )
    if packed.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} as x has, got {packed.dtype}")


def _check_bias(name: str, bias: Tensor | None, x: Tensor, out: int) -> None:
    if bias is None:
        return
    check_tensor(name, bias)
    if bias.shape != (out,):
        raise ValueError(f"{name}: expected shape ({out}), got {shape_of(bias)}")
    if bias.dtype != parameter_dtype(x.dtype):
        raise TypeError(f"{name}: expected {parameter_dtype(x.dtype)} beside {x.dtype}, got {bias.dtype}")


def _check_beside(name: str, t: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    if t is None:
        return
    check_tensor(name, t)
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {shape_of(t)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} as x has, got {t.dtype}")


def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    check_same_device(("x", x), *((name, t) for name, t in others.items() if t is not None))


def _result_shape(x: Tensor, out: int, kernel: int, stride: int, padding: int, shuffle: int) -> tuple[int, ...]:
    n, _, height, width = x.shape
    rows, columns = ((length + 2 * padding - kernel) // stride + 1 for length in (height, width))
    return (n, out // shuffle**2, rows * shuffle, columns * shuffle)


def _check(x, weight, bias, residual, out, kernel, stride, padding, shuffle, relu, gate):
    check_image("x", x, 4, "(N, C, H, W)")
    if not (1 <= kernel <= MAX_KERNEL and stride >= 1 and padding >= 0):
        raise ValueError(
            f"kernel, stride, padding: expected 1 to {MAX_KERNEL}, 1 or more and 0 or more, "
            f"got {kernel}, {stride} and {padding}"
        )
    if shuffle < 1 or out < 1 or out % shuffle**2:
        raise ValueError(f"out: expected channels in whole cells of {shuffle} x {shuffle}, got {out}")
    if shuffle > 1 and out // shuffle % reference.CHANNELS:
        raise ValueError(f"out: expected rows of a cell in multiples of 16 channels, got {out} in {shuffle} rows")
    if min(x.shape[2:]) + 2 * padding < kernel or x.shape[1] < 1:
        raise ValueError(f"x: expected at least {kernel} pixels with the padding, got shape {shape_of(x)}")
    _check_packed("weight", weight, x, out, x.shape[1], kernel)
    _check_bias("bias", bias, x, out)
    shape = _result_shape(x, out, kernel, stride, padding, shuffle)
    _check_beside("residual", residual, x, shape)
    _check_beside("gate", gate, x, shape)
    if gate is not None and (relu or residual is not None):
        raise ValueError("gate: expected neither an activation nor a residual beside it")
    _check_devices(x, weight=weight, bias=bias, residual=residual, gate=gate)


def _fake(x, weight, bias, residual, out, kernel, stride, padding, shuffle, relu, gate=None):
    _check(x, weight, bias, residual, out, kernel, stride, padding, shuffle, relu, gate)
    return empty_channels_last(x, _result_shape(x, out, kernel, stride, padding, shuffle))


def _setup(ctx, inputs, output):
    x, weight, bias, residual, *ctx.geometry, ctx.relu, gate = inputs
    # The sign of what ReLU gave tells its gradient, unless something was added to it.
    ctx.save_for_backward(x, weight, bias, output if ctx.relu and residual is None else None, gate)


def _backward(ctx, grad):
    x, weight, bias, y, gate = ctx.saved_tensors
    before = grad if gate is None else torch.where(gate <= 0, 0, grad)
    if ctx.relu:
        before = grad * ((conv_op(x, weight, bias, None, *ctx.geometry, True, None) if y is None else y) > 0)
    found = reference.packed_conv2d_backward(before, x, weight, *ctx.geometry)
    grads = [g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:3], strict=True)]
    return (*grads, grad if ctx.needs_input_grad[3] else None, *[None] * 7)


conv_op = define(
    "packed_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int out, int kernel, int stride, "
    "int padding, int shuffle, bool relu, Tensor? gate=None) -> Tensor",
    reference=reference.packed_conv2d,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
    flops=lambda x, weight, bias, residual, out, kernel, *_, out_shape, **__: (
        2 * math.prod(out_shape) * x[1] * kernel**2
    ),
)


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or not 1 <= weight.shape[2] <= MAX_KERNEL:
        raise ValueError(f"weight: expected (out, in, k, k) with k from 1 to {MAX_KERNEL}, got {shape_of(weight)}")
    if min(weight.shape) < 1:
        raise ValueError(f"weight: expected one channel or more, got shape {shape_of(weight)}")


def _check_layer(weight: Tensor, down: Tensor | None, up: Tensor | None) -> None:
    check_floating("weight", weight)
    _check_weight(weight)
    check_update(weight, down, up, None, 1)
    given = [(name, t) for name, t in (("weight", weight), ("down", down), ("up", up)) if t is not None]
    for name, t in given:
        check_floating(name, t)
    check_same_device(*given)


def _fake_weight(weight, down, up, scale, dtype, adjoint):
    _check_layer(weight, down, up)
    out, channels = weight.shape[:2]
    shape = reference.packed_shape(*((channels, out) if adjoint else (out, channels)), weight.shape[2])
    return weight.new_empty(shape, dtype=dtype)


def _setup_weight(ctx, inputs, output):
    weight, down, up, ctx.scale, _, ctx.adjoint = inputs
    ctx.save_for_backward(weight, down, up)


def _backward_weight(ctx, grad):
    weight, down, up = ctx.saved_tensors
    out, channels, kernel, _ = weight.shape
    of = (channels, out) if ctx.adjoint else (out, channels)
    whole = reference.unpacked_weight(grad, *of, kernel, ctx.adjoint)
    factors = (None, None)
    if any(ctx.needs_input_grad[1:3]):
        factors = to_factors(whole, weight, down, up, ctx.scale)
    return (whole.to(weight.dtype), *factors, None, None, None)


weight_op = define(
    "packed_weight(Tensor weight, Tensor? down, Tensor? up, float scale, ScalarType? dtype, bool adjoint) -> Tensor",
    reference=reference.packed_weight,
    fake=_fake_weight,
    backward=_backward_weight,
    setup_context=_setup_weight,
    direct=True,
)


def _check_block(x, first, first_bias, second, second_bias, residual, middle):
    check_image("x", x, 4, "(N, C, H, W)")
    channels = x.shape[1]
    if middle < 1 or channels < 1:
        raise ValueError(f"middle, x: expected one channel or more, got {middle} and {channels}")
    _check_packed("first", first, x, middle, channels, 3)
    _check_packed("second", second, x, channels, middle, 3)
    _check_bias("first_bias", first_bias, x, middle)
    _check_bias("second_bias", second_bias, x, channels)
    _check_beside("residual", residual, x, x.shape)
    _check_devices(x, first=first, first_bias=first_bias, second=second, second_bias=second_bias, residual=residual)


def _fake_block(x, first, first_bias, second, second_bias, residual, middle):
    _check_block(x, first, first_bias, second, second_bias, residual, middle)
    return empty_channels_last(x, x.shape)


def _setup_block(ctx, inputs, output):
    x, first, first_bias, second, *_, ctx.middle = inputs
    ctx.save_for_backward(x, first, first_bias, second)


def _backward_block(ctx, grad):
    x, first, first_bias, second = ctx.saved_tensors
    between = conv_op(x, first, first_bias, None, ctx.middle, 3, 1, 1, 1, True, None)
    inner, grad_second, grad_second_bias = reference.packed_conv2d_backward(
        grad, between, second, x.shape[1], 3, 1, 1, 1
    )
    outer, grad_first, grad_first_bias = reference.packed_conv2d_backward(
        inner * (between > 0), x, first, ctx.middle, 3, 1, 1, 1
    )
    found = (grad + outer, grad_first, grad_first_bias, grad_second, grad_second_bias, grad)
    return (*[g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:6], strict=True)], None)


block_op = define(
    "packed_block(Tensor x, Tensor first, Tensor? first_bias, Tensor second, Tensor? second_bias, Tensor? residual, "
    "int middle) -> Tensor",
    reference=reference.packed_block,
    fake=_fake_block,
    backward=_backward_block,
    setup_context=_setup_block,
    direct=True,
    flops=lambda x, *args, **_: 2 * 2 * math.prod(x) * args[5] * 3**2,
)


def packed_weight(
    weight: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    adjoint: bool = False,
) -> Tensor:
    """The weight (out, in, k, k) as :func:`packed_conv2d` takes it: (ceil(out / 16), k * ceil(k * in / 32), 16, 32).

    k from 1 to 7, any floating-point dtype. down, up: the factors of one stage, in one form of
        :mod:`lorun_fast.adapters`; then it is that of W0 + scale * dW, formed in fp32 (fp64 for fp64 weights).
    dtype: of the result; None keeps the weight's. adjoint: the weight of the convolution's transpose (stride 1), which
        takes a gradient back to x.
    Differentiable. Raises ValueError or TypeError naming the argument that does not fit.
    """
    scale = finite("scale", scale)
    check_flag("adjoint", adjoint)
    if dtype not in (None, *STORAGE_DTYPES):
        raise TypeError(f"dtype: expected float32, float64, bfloat16, float16 or None, got {dtype}")
    _check_layer(weight, down, up)
    return weight_op(weight, down, up, scale, dtype, adjoint)


def as_cells(weight: Tensor) -> Tensor:
    """The weight (in, out, s, s) of a transposed convolution of stride s as that of a 1 x 1 convolution to the
    s * s * out channels, (row, column, channel), that packed_conv2d(shuffle=s) spreads over pixels.
    """
    return weight.permute(2, 3, 1, 0).flatten(0, 2)[:, :, None, None]


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    shuffle: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """act(conv(x) + bias) + residual with a packed weight; in bf16 by AMX's matrix tiles where the CPU has them.

    x: (N, in, H, W), channels_last without a copy; any number of channels. weight: of :func:`packed_weight`, in x's
        dtype, of ``out`` channels and kernels of ``kernel`` x ``kernel``. bias: (out,), fp32 (fp64 beside fp64).
    shuffle: s > 1 spreads the out = s * s * c channels, (row, column, channel), over s x s pixels of c channels: a
        transposed convolution of s x s with stride s is one of 1 x 1 so spread.
    activation: None or "relu". residual: as the result, x's dtype.
    gate: as the result, x's dtype, instead of both: zeros where its values are not positive. With the weight's adjoint
        that takes a gradient back through the ReLU which gave the gate.
    Sums in fp32, rounded once. Returns (N, out / s**2, s * H', s * W') in channels_last. Differentiable, without
        speed: the op is for inference. NaN and infinities reach up to 32 values further than the kernel, for what
        lies beside it is multiplied by zero. Raises ValueError or TypeError naming the argument that does not fit.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    out, kernel = whole("out", out, 1), whole("kernel", kernel, 1)
    stride, padding, shuffle = whole("stride", stride, 1), whole("padding", padding, 0), whole("shuffle", shuffle, 1)
    relu = activation == "relu"
    _check(x, weight, bias, residual, out, kernel, stride, padding, shuffle, relu, gate)
    return conv_op(x, weight, bias, residual, out, kernel, stride, padding, shuffle, relu, gate)


def packed_block(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    middle: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x + conv(relu(conv(x) + first_bias)) + second_bias + residual: a residual block in one pass over the image.

    x, residual: (N, C, H, W). first, second: of :func:`packed_weight`, of (middle, C, 3, 3) and (C, middle, 3, 3);
        ``middle`` is C where it is left out. Biases: fp32 (fp64 beside fp64). What lies between the convolutions is
        rounded to x's dtype and stays in the cache.
    Returns (N, C, H, W) in channels_last. Errors and gradients as :func:`packed_conv2d`'s.
    """
    check_image("x", x, 4, "(N, C, H, W)")
    middle = x.shape[1] if middle is None else whole("middle", middle, 1)
    _check_block(x, first, first_bias, second, second_bias, residual, middle)
    return block_op(x, first, first_bias, second, second_bias, residual, middle)
