"""A 3 x 3 convolution, its bias, ReLU and a residual in one pass over the image.

By one kernel in 16 bits on Hopper GPUs, by another, thin_conv2d, on CPUs from or to few channels.
Elsewhere, and for what these do not fit, torch's convolution and a pass each. Definition: reference/fused_conv2d.py.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops._checks import (
    check_finishing,
    check_image,
    check_same_device,
    check_tensor,
    empty_channels_last,
    parameter_dtype,
    shape_of,
)
from lorun_fast.ops._library import define
from lorun_fast.ops._weight_gradient import AUTOGRAD
from lorun_fast.reference import fused_conv2d as reference

CHANNELS = 16
"""Both channel counts are multiples of it in the GPU's kernel."""
FEW, MANY = 4, 8
"""Of thin_conv2d: 1 to so many channels on one side, multiples of so many on the other."""

_ACTIVATIONS = (None, "relu")
_MOST_CHANNELS = 128
"""Of x; many more leave no room in shared memory."""
_MOST_PIXELS = 2**29
"""Half of what the kernel counts to, for the margins."""


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_image("x", x, 4, "(N, C, H, W)")
    check_tensor("weight", weight)
    channels = x.shape[1]
    if weight.ndim != 4 or weight.shape[1:] != (channels, 3, 3) or min(weight.shape) < 1:
        raise ValueError(f"weight: expected (out, {channels}, 3, 3), got {shape_of(weight)}")
    check_finishing(x, weight.shape[0], weight, bias, residual)


def _fake(x, weight, bias, residual, relu):
    _check(x, weight, bias, residual)
    return empty_channels_last(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


def _definition(x, weight, bias, residual, relu):
    return reference.fused_conv2d(x, weight, bias, residual, relu).contiguous(memory_format=torch.channels_last)


def _setup(ctx, inputs, output):
    x, weight, bias, residual, ctx.relu = inputs
    # The sign of what ReLU gave tells its gradient, unless something was added to it.
    ctx.save_for_backward(x, weight, bias, output if ctx.relu and residual is None else None)


def _before_relu(ctx, grad, op):
    x, weight, bias, y = ctx.saved_tensors
    if not ctx.relu:
        return grad
    return grad * ((op(x, weight, bias, None, True) if y is None else y) > 0)


def _backward(ctx, grad):
    x, weight, bias, _ = ctx.saved_tensors
    residual = grad if ctx.needs_input_grad[3] else None
    if not x.numel():  # torch's convolution has no gradient of images without rows or columns
        given = zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
        return (*[torch.zeros_like(t) if needed else None for t, needed in given], residual, None)
    before = _before_relu(ctx, grad, _op)
    sizes = None if bias is None else [bias.shape[0]]
    found = torch.ops.aten.convolution_backward(
        before, x, weight, sizes, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, ctx.needs_input_grad[:3]
    )
    return (*found, residual, None)


def _backward_thin(ctx, grad):
    x, weight, _, _ = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
    before = _before_relu(ctx, grad, _thin_op)
    return (
        _thin_op(before, adjoint(weight), None, None, False) if needs_x else None,
        _gradient_op(before, x).to(weight.dtype) if needs_weight else None,
        before.sum((0, 2, 3)) if needs_bias else None,
        grad if needs_residual else None,
        None,
    )


def _flops(x, *_, out_shape, **__) -> int:
    return 2 * math.prod(out_shape) * x[1] * 3**2


@functools.cache
def unavailable(device: int) -> str | None:
    """Why the kernel cannot run on a GPU; None if it can."""
    if not _native.available():
        return _native.reason()
    archs = _native.build_info()["cuda_archs"]
    if "9.0a" not in archs:
        return f"the CUDA sources were compiled for {archs or 'nothing'}, not for 9.0a"
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else f"compute capability {capability[0]}.{capability[1]}, it needs 9.0"


_op = define(
    "fused_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor",
    reference=_definition,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
    unavailable=unavailable,
    flops=_flops,
)


_thin_op = define(
    "thin_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor",
    reference=_definition,
    fake=_fake,
    backward=_backward_thin,
    setup_context=_setup,
    direct=True,
    flops=_flops,
)


def are_thin(out: int, channels: int) -> bool:
    few, many = sorted((out, channels))
    return 1 <= few <= FEW and many % MANY == 0


def is_thin(weight: Tensor) -> bool:
    """Whether thin_conv2d takes such a weight, (out, in, 3, 3)."""
    return are_thin(*weight.shape[:2])


def adjoint(weight: Tensor) -> Tensor:
    """The weight, (in, out, 3, 3), of the convolution that takes a gradient back to x."""
    return weight.flip(2, 3).transpose(0, 1)


def _check_images(grad: Tensor, x: Tensor) -> None:
    check_image("x", x, 4, "(N, in, H, W)")
    check_image("grad", grad, 4, "(N, out, H, W)")
    if grad.shape[0] != x.shape[0] or grad.shape[2:] != x.shape[2:]:
        raise ValueError(f"grad, x: expected (N, out, H, W) and (N, in, H, W), got {shape_of(grad)} and {shape_of(x)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype} as x has, got {grad.dtype}")
    if not are_thin(grad.shape[1], x.shape[1]):
        raise ValueError(
            f"grad, x: expected 1 to {FEW} channels on one side and multiples of {MANY} on the other, "
            f"got {grad.shape[1]} and {x.shape[1]}"
        )
    check_same_device(("x", x), ("grad", grad))


def _fake_gradient(grad, x):
    _check_images(grad, x)
    return x.new_empty((grad.shape[1], x.shape[1], 3, 3), dtype=parameter_dtype(x.dtype))


_gradient_op = define(
    "thin_weight_gradient(Tensor grad, Tensor x) -> Tensor",
    reference=reference.thin_weight_gradient,
    fake=_fake_gradient,
    direct=True,
    flops=lambda grad, x, **__: 2 * math.prod(grad) * x[1] * 3**2,
    **AUTOGRAD,
)


def thin_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a convolution's weight, (out, in, 3, 3), from that of its result: from or to few channels.

    grad: (N, out, H, W); x: (N, in, H, W) in its dtype, float32, float64, bfloat16 or float16; both channels_last
        without a copy. 1 to 4 channels on one side and a multiple of 8 on the other.
    Returns float32, or float64 for such images. C++ on a CPU, in an order that does not depend on the number of
    threads. Differentiable. Raises ValueError or TypeError naming the argument that does not fit.
    """
    _check_images(grad, x)
    return _gradient_op(grad, x)


def unfit(x: Tensor, weight: Tensor) -> str | None:
    """Why the GPU's kernel does not serve these; None if it does."""
    if x.device.type != "cuda":
        return f"{x.device.type} device"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bfloat16 and float16, this is {x.dtype}".replace("torch.", "")
    out, channels = weight.shape[:2]
    if channels % CHANNELS or out % CHANNELS or channels > _MOST_CHANNELS:
        return f"channels of {channels} to {out}, not multiples of {CHANNELS} up to {_MOST_CHANNELS}"
    if x.shape[0] * x.shape[2] * x.shape[3] > _MOST_PIXELS:
        return f"more than 2^29 pixels, {shape_of(x)}"
    return unavailable(x.get_device())


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel, where it serves these, takes less time than any other way, by an H200 in bf16.

    A residual block of 64 channels, 16 images: 398 us at 256 px and 119 at 128 px, where cuDNN and a pass each take 522
    and 146 and the Triton kernel 553 and 149. Fewer pixels and other channels are others' (docs/kernels.md).
    """
    n, channels, height, width = x.shape
    return weight.shape == (64, 64, 3, 3) and channels == 64 and n * height * width >= 2**18


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can and should."""
    return pays(x, weight) and unfit(x, weight) is None


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(conv(x, weight) + bias) + residual, 3 x 3, padded with zeros to x's size, in one pass where there is one.

    x: (N, in, H, W), channels_last without a copy. weight: (out, in, 3, 3), channels_last without a copy. bias: (out,).
    residual: as the result. All of one dtype. activation: None or "relu".
    In bf16 and fp16 sums are in fp32 and the result is rounded once; on a GPU of compute capability 9.0, with channels
    in multiples of 16 and up to 128 of x, by one kernel. On a CPU, with 1 to 4 channels on one side and a multiple of 8
    on the other, by another, in every dtype. Elsewhere by torch, 16 bits in fp32.
    Returns (N, out, H, W) in channels_last. Differentiable. Raises ValueError or TypeError naming the argument that
    does not fit.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    _check(x, weight, bias, residual)
    relu = activation == "relu"
    if x.device.type == "cpu" and is_thin(weight):
        return _thin_op(x, weight, bias, residual, relu)
    if x.device.type == "cuda" and unfit(x, weight) is not None:
        return _definition(x, weight, bias, residual, relu)
    return _op(x, weight, bias, residual, relu)
