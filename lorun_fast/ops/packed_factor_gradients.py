"""The gradients of a convolution's low-rank factors, stride 1, in bf16 by matrix tiles on CPUs with AMX.

Definition: reference/packed_factor_gradients.py.
"""

from __future__ import annotations

from torch import Tensor

from lorun_fast.ops._checks import check_image, check_same_device, check_tensor, parameter_dtype, shape_of, whole
from lorun_fast.ops._library import define
from lorun_fast.ops.packed_conv2d import MAX_KERNEL
from lorun_fast.reference import packed_factor_gradients as reference

# Ranks that the matrix tiles take; more are computed by plain loops.
MAX_RANK = 16


def _check(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, padding: int) -> None:
    check_image("grad", grad, 4, "(N, out, H', W')")
    check_image("x", x, 4, "(N, in, H, W)")
    if down.ndim != 4 or down.shape[1] != x.shape[1] or down.shape[2] != down.shape[3]:
        raise ValueError(f"down: expected (r, {x.shape[1]}, k, k) for x {shape_of(x)}, got {shape_of(down)}")
    if up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"up: expected (out, {down.shape[0]}) beside down {shape_of(down)}, got {shape_of(up)}")
    kernel = down.shape[2]
    if not 1 <= kernel <= MAX_KERNEL or padding < 0:
        raise ValueError(f"kernel, padding: expected 1 to {MAX_KERNEL} and 0 or more, got {kernel} and {padding}")
    height, width = (length + 2 * padding - kernel + 1 for length in x.shape[2:])
    if grad.shape != (x.shape[0], up.shape[0], height, width):
        raise ValueError(f"grad: expected shape ({x.shape[0]}, {up.shape[0]}, {height}, {width}), got {shape_of(grad)}")
    for name, t in (("grad", grad), ("down", down), ("up", up)):
        if t.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} as x has, got {t.dtype}")
    check_same_device(("x", x), ("grad", grad), ("down", down), ("up", up))


def _fake(grad, x, down, up, padding):
    _check(grad, x, down, up, padding)
    wide = parameter_dtype(x.dtype)
    return x.new_empty(down.shape, dtype=wide), x.new_empty(up.shape, dtype=wide)


def _setup(ctx, inputs, output):
    *tensors, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, of_down, of_up):
    tensors = ctx.saved_tensors
    found = reference.packed_factor_gradients_backward(of_down, of_up, *tensors, ctx.padding)
    needed = ctx.needs_input_grad
    return (*[g.to(t.dtype) if n else None for g, t, n in zip(found, tensors, needed, strict=False)], None)


_op = define(
    "packed_factor_gradients(Tensor grad, Tensor x, Tensor down, Tensor up, int padding) -> (Tensor, Tensor)",
    reference=reference.packed_factor_gradients,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
)


def packed_factor_gradients(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, *, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of the factors of y = conv(x, W + up . down), stride 1, from y's: (r, in, k, k) and (out, r).

    grad: (N, out, H', W'); x: (N, in, H, W); both channels_last without a copy. down: (r, in, k, k), k at most 7;
        up: (out, r); all of one dtype. ``padding``: of x, on all sides.
    Sums in fp32 (fp64 beside fp64), which is the results' dtype; in bf16, with ranks up to 16, by AMX's matrix tiles
    where the CPU has them: grad and x are read once, what r channels lie between is rounded to bf16, and the order of
    the sums does not depend on the number of threads. Raises ValueError or TypeError naming the argument that does not
    fit.
    """
    for name, t in (("down", down), ("up", up)):
        check_tensor(name, t)
    padding = whole("padding", padding, 0)
    _check(grad, x, down, up, padding)
    return _op(grad, x, down, up, padding)
