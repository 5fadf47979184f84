"""The weight gradient of a convolution of stride 1, in bf16 by matrix tiles on CPUs with AMX.

Definition: reference/packed_weight_gradient.py.
"""

from __future__ import annotations

from torch import Tensor

from lorun_fast.ops._checks import check_image, check_same_device, parameter_dtype, shape_of, whole
from lorun_fast.ops._library import define
from lorun_fast.reference import packed_weight_gradient as reference
from lorun_fast.reference._convolution import weight_gradient_backward


def _check(grad: Tensor, x: Tensor, kernel: int, padding: int) -> None:
    check_image("grad", grad, 4, "(N, out, H', W')")
    check_image("x", x, 4, "(N, in, H, W)")
    if kernel < 1 or padding < 0:
        raise ValueError(f"kernel, padding: expected 1 or more and 0 or more, got {kernel} and {padding}")
    height, width = (length + 2 * padding - kernel + 1 for length in x.shape[2:])
    if grad.shape != (x.shape[0], grad.shape[1], height, width):
        raise ValueError(f"grad: expected shape ({x.shape[0]}, out, {height}, {width}), got {shape_of(grad)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype} as x has, got {grad.dtype}")
    check_same_device(("x", x), ("grad", grad))


def _fake(grad, x, kernel, padding):
    _check(grad, x, kernel, padding)
    return x.new_empty((grad.shape[1], x.shape[1], kernel, kernel), dtype=parameter_dtype(x.dtype))


def _setup(ctx, inputs, output):
    grad, x, _, ctx.padding = inputs
    ctx.save_for_backward(grad, x)


def _backward(ctx, grad_weight):
    found = weight_gradient_backward(grad_weight, *ctx.saved_tensors, ctx.padding)
    return (*[g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:2], strict=True)], None, None)


gradient_op = define(
    "packed_weight_gradient(Tensor grad, Tensor x, int kernel, int padding) -> Tensor",
    reference=reference.packed_weight_gradient,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
)


def packed_weight_gradient(grad: Tensor, x: Tensor, *, kernel: int, padding: int = 0) -> Tensor:
    """The gradient of a convolution's weight, (out, in, k, k), from that of its result.

    grad: (N, out, H', W'); x: (N, in, H, W) in its dtype; both channels_last without a copy. The convolution has
        stride 1 and square kernels, padded by ``padding`` on all sides.
    Sums in fp32 (fp64 beside fp64), which is the result's dtype; in bf16 by AMX's matrix tiles where the CPU has them,
    in an order that does not depend on the number of threads. Raises ValueError or TypeError naming the argument that
    does not fit.
    """
    kernel, padding = whole("kernel", kernel, 1), whole("padding", padding, 0)
    _check(grad, x, kernel, padding)
    return gradient_op(grad, x, kernel, padding)
