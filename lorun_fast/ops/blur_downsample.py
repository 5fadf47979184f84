"""Blur and downsample: forward, adjoint and gradient step as ops. Definition: reference/blur_downsample.py.

Two families of ops with the same meaning: ``blur_downsample*``, the direct sum (C++ and CUDA where built), and
``blur_downsample_fft*`` (reference/blur_downsample_fft.py on every device). ``method`` chooses, "auto" by cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lorun_fast.ops._blur_downsample_cost import note_compiled, prefer_fft
from lorun_fast.ops._checks import (
    WIDE,
    as_dtype,
    check_image,
    check_same_device,
    check_tensor,
    holds,
    number,
    parameter_dtype,
    shape_of,
    step_size,
    sum_to_step,
)
from lorun_fast.ops._library import define
from lorun_fast.reference import blur_downsample as direct_reference
from lorun_fast.reference import blur_downsample_fft as fft_reference
from lorun_fast.reference._step_size import per_channel

METHODS = ("auto", "direct", "fft")


def check_scale(scale: int) -> None:
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale: expected an integer of at least 1, got {scale!r}")


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")


def check_kernel(kernel: Tensor, batch: int, dtype: torch.dtype) -> None:
    """Raises unless a kernel, or one per sample, fits a batch of so many images or measurements of this dtype."""
    check_tensor("kernel", kernel)
    if kernel.ndim not in (2, 3) or 0 in kernel.shape[-2:]:
        raise ValueError(f"kernel: expected (kh, kw) or (N, kh, kw), got shape {shape_of(kernel)}")
    if kernel.ndim == 3 and kernel.shape[0] != batch:
        raise ValueError(f"kernel: expected one per sample, {batch} of them, got {kernel.shape[0]}")
    if kernel.dtype != parameter_dtype(dtype):
        raise TypeError(f"kernel: expected {parameter_dtype(dtype)} beside {dtype}, got {kernel.dtype}")


def _check_forward(x: Tensor, kernel: Tensor, scale: int) -> None:
    check_scale(scale)
    check_image("x", x, 4, "(N, C, H, W)")
    h, w = x.shape[2], x.shape[3]
    if h == 0 or w == 0 or h % scale or w % scale:
        raise ValueError(f"x: expected height and width divisible by scale={scale} and not 0, got {h}x{w}: crop or pad")
    check_kernel(kernel, x.shape[0], x.dtype)
    check_same_device(("x", x), ("kernel", kernel))


def _check_adjoint(y: Tensor, kernel: Tensor, scale: int) -> None:
    check_scale(scale)
    check_image("y", y, 4, "(N, C, H/s, W/s)")
    if y.shape[2] == 0 or y.shape[3] == 0:
        raise ValueError(f"y: expected at least one row and one column, got shape {shape_of(y)}")
    check_kernel(kernel, y.shape[0], y.dtype)
    check_same_device(("y", y), ("kernel", kernel))


def _check_measurement(x: Tensor, y: Tensor, scale: int) -> None:
    check_same_device(("x", x), ("y", y))
    want = (x.shape[0], x.shape[1], x.shape[2] // scale, x.shape[3] // scale)
    if tuple(y.shape) != want:
        raise ValueError(f"y: expected {want} for x of shape {shape_of(x)} at scale={scale}, got {shape_of(y)}")
    if not y.is_floating_point():
        raise TypeError(f"y: expected a floating-point tensor, got {y.dtype}")


# Whether all is as it must be, in as few calls as possible: most of what the checks of a small call cost.


def _fits_forward(x: Tensor, kernel: Tensor, scale: int) -> bool:
    if x.ndim != 4 or not isinstance(scale, int) or scale < 1:
        return False
    n, _, height, width = x.shape
    return (
        height > 0
        and width > 0
        and height % scale == 0
        and width % scale == 0
        and _fits_kernel(kernel, n)
        and kernel.dtype is WIDE.get(x.dtype)
        and x.device == kernel.device
    )


def _fits_adjoint(y: Tensor, kernel: Tensor, scale: int) -> bool:
    if y.ndim != 4 or not isinstance(scale, int) or scale < 1:
        return False
    n, _, height, width = y.shape
    return (
        height > 0
        and width > 0
        and _fits_kernel(kernel, n)
        and kernel.dtype is WIDE.get(y.dtype)
        and y.device == kernel.device
    )


def _fits_kernel(kernel: Tensor, samples: int) -> bool:
    shape = kernel.shape
    return (len(shape) == 2 or (len(shape) == 3 and shape[0] == samples)) and shape[-1] > 0 and shape[-2] > 0


def _fits_measurement(x: Tensor, y: Tensor, scale: int) -> bool:
    n, channels, height, width = x.shape
    return y.shape == (n, channels, height // scale, width // scale) and y.dtype in WIDE and x.device == y.device


def _check_step(x: Tensor, y: Tensor, kernel: Tensor, scale: int) -> None:
    if not holds(_fits_forward, x, kernel, scale):
        _check_forward(x, kernel, scale)
    if not holds(_fits_measurement, x, y, scale):
        _check_measurement(x, y, scale)


def _fake_forward(x, kernel, scale):
    _check_forward(x, kernel, scale)
    return x.new_empty((x.shape[0], x.shape[1], x.shape[2] // scale, x.shape[3] // scale))


def _fake_adjoint(y, kernel, scale):
    _check_adjoint(y, kernel, scale)
    return y.new_empty((y.shape[0], y.shape[1], y.shape[2] * scale, y.shape[3] * scale))


def _fake_like_x(x, *_):
    return x.new_empty(x.shape)


def _fake_grad_kernel(x, y, kh, kw, scale, per_sample):
    return y.new_empty((y.shape[0], kh, kw) if per_sample else (kh, kw))


@dataclass
class _Family:
    """The ops of one method."""

    forward: Callable = None
    adjoint: Callable = None
    descend: Callable = None
    step: Callable = None
    grad_kernel: Callable = None

    def kernel_gradient(self, x: Tensor, y: Tensor, kernel: Tensor, scale: int) -> Tensor:
        """The gradient of <A x, y> for ``kernel``; y in the kernel's dtype."""
        return self.grad_kernel(x, y, kernel.shape[-2], kernel.shape[-1], scale, kernel.ndim == 3)


def _define_family(name: str, reference: ModuleType) -> _Family:
    ops = _Family()

    def setup_linear(ctx, inputs, output):
        t, kernel, ctx.scale = inputs
        ctx.save_for_backward(t, kernel)

    def backward_forward(ctx, grad):
        x, kernel = ctx.saved_tensors
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.adjoint(grad, kernel, ctx.scale)
        if ctx.needs_input_grad[1]:
            grad_kernel = ops.kernel_gradient(x, grad.to(kernel.dtype), kernel, ctx.scale)
        return grad_x, grad_kernel, None

    def backward_adjoint(ctx, grad):
        y, kernel = ctx.saved_tensors
        grad_y = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_y = ops.forward(grad, kernel, ctx.scale)
        if ctx.needs_input_grad[1]:
            grad_kernel = ops.kernel_gradient(grad, y.to(kernel.dtype), kernel, ctx.scale)
        return grad_y, grad_kernel, None

    def setup_descend(ctx, inputs, output):
        _, residual, kernel, rho, ctx.scale = inputs
        ctx.save_for_backward(residual, kernel, rho)

    def backward_descend(ctx, grad):
        # z = x - rho A^T r. With q = A g:  dx = g,  dr = -rho q,  drho = -<q, r>,  dk = -(gradient of <A g, rho r>).
        residual, kernel, rho = ctx.saved_tensors
        need_x, need_r, need_kernel, need_rho, _ = ctx.needs_input_grad
        grad_r = grad_kernel = grad_rho = None
        if need_r or need_rho:
            q = ops.forward(grad.to(kernel.dtype), kernel, ctx.scale)
            if need_r:
                grad_r = -per_channel(rho) * q
            if need_rho:
                grad_rho = sum_to_step(-(q * residual).sum((2, 3)), rho)
        if need_kernel:
            grad_kernel = -ops.kernel_gradient(grad, per_channel(rho) * residual, kernel, ctx.scale)
        return grad if need_x else None, grad_r, grad_kernel, grad_rho, None

    def setup_step(ctx, inputs, output):
        x, y, kernel, rho, ctx.scale = inputs
        ctx.save_for_backward(x, y, kernel, rho)

    def backward_step(ctx, grad):
        # z = x - rho A^T (A x - y). With q = A g and r = A x - y:  dx = g - rho A^T q,  dy = rho q,  drho = -<q, r>,
        # dk = -(gradient of <A x, rho q> + <A g, rho r>).
        x, y, kernel, rho = ctx.saved_tensors
        need_x, need_y, need_kernel, need_rho, _ = ctx.needs_input_grad
        grad_x = grad_y = grad_kernel = grad_rho = None
        q = ops.forward(grad.to(kernel.dtype), kernel, ctx.scale)
        if need_x:
            grad_x = ops.descend(grad, q, kernel, rho, ctx.scale)
        if need_y:
            grad_y = per_channel(rho) * q
        if need_kernel or need_rho:
            r = ops.forward(x.to(kernel.dtype), kernel, ctx.scale) - y
        if need_rho:
            grad_rho = sum_to_step(-(q * r).sum((2, 3)), rho)
        if need_kernel:
            grad_kernel = -ops.kernel_gradient(x, per_channel(rho) * q, kernel, ctx.scale)
            grad_kernel = grad_kernel - ops.kernel_gradient(grad, per_channel(rho) * r, kernel, ctx.scale)
        return grad_x, grad_y, grad_kernel, grad_rho, None

    def setup_grad_kernel(ctx, inputs, output):
        x, y, _, _, ctx.scale, _ = inputs
        ctx.save_for_backward(x, y)

    def backward_grad_kernel(ctx, grad):
        x, y = ctx.saved_tensors
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.adjoint(y, grad, ctx.scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_y = ops.forward(x.to(grad.dtype), grad, ctx.scale)
        return grad_x, grad_y, None, None, None, None

    ops.forward = define(
        f"{name}(Tensor x, Tensor kernel, int scale) -> Tensor",
        reference=getattr(reference, name),
        fake=_fake_forward,
        backward=backward_forward,
        setup_context=setup_linear,
        direct=True,
    )
    ops.adjoint = define(
        f"{name}_adjoint(Tensor y, Tensor kernel, int scale) -> Tensor",
        reference=getattr(reference, f"{name}_adjoint"),
        fake=_fake_adjoint,
        backward=backward_adjoint,
        setup_context=setup_linear,
        direct=True,
    )
    ops.descend = define(
        f"{name}_descend(Tensor x, Tensor residual, Tensor kernel, Tensor rho, int scale) -> Tensor",
        reference=getattr(reference, f"{name}_descend"),
        fake=_fake_like_x,
        backward=backward_descend,
        setup_context=setup_descend,
        direct=True,
    )
    ops.step = define(
        f"{name}_step(Tensor x, Tensor y, Tensor kernel, Tensor rho, int scale) -> Tensor",
        reference=getattr(reference, f"{name}_step"),
        fake=_fake_like_x,
        backward=backward_step,
        setup_context=setup_step,
        direct=True,
    )
    ops.grad_kernel = define(
        f"{name}_grad_kernel(Tensor x, Tensor y, SymInt kh, SymInt kw, int scale, bool per_sample) -> Tensor",
        reference=getattr(reference, f"{name}_grad_kernel"),
        fake=_fake_grad_kernel,
        backward=backward_grad_kernel,
        setup_context=setup_grad_kernel,
        direct=True,
    )
    return ops


_DIRECT = _define_family("blur_downsample", direct_reference)
_FFT = _define_family("blur_downsample_fft", fft_reference)
note_compiled("lorun_fast::blur_downsample")


def _family(method: str, image: tuple[int, ...], kernel: Tensor, scale: int) -> _Family:
    check_method(method)
    if method == "auto":
        n, c, h, w = image
        kernels = n if kernel.ndim == 3 else 1
        fft = prefer_fft(n * c, kernels, h, w, kernel.shape[-2], kernel.shape[-1], scale, kernel.device.type)
    else:
        fft = method == "fft"
    return _FFT if fft else _DIRECT


def blur_downsample(x: Tensor, kernel: Tensor, *, scale: int, method: str = "auto") -> Tensor:
    """y = A x: circular convolution with the kernel, then every ``scale``-th row and column from the upper left.

    x: (N, C, H, W), H and W divisible by scale. kernel: (kh, kw) or (N, kh, kw), fp32 (fp64 beside fp64 images); it
    may exceed the image. method: "direct", "fft" or "auto", the one expected to be faster.
    Returns (N, C, H/s, W/s) in x's dtype, accumulated in the kernel's. Differentiable in x and kernel.
    Raises ValueError for a shape, scale, method or device that does not fit, TypeError for a dtype.
    """
    if not holds(_fits_forward, x, kernel, scale):
        _check_forward(x, kernel, scale)
    return _family(method, x.shape, kernel, scale).forward(x, kernel, scale)


def blur_downsample_adjoint(y: Tensor, kernel: Tensor, *, scale: int, method: str = "auto") -> Tensor:
    """x = A^T y, the exact adjoint of :func:`blur_downsample`.

    y: (N, C, h, w). Returns (N, C, h*s, w*s) in y's dtype. Differentiable in y and kernel.
    """
    if not holds(_fits_adjoint, y, kernel, scale):
        _check_adjoint(y, kernel, scale)
    n, c, h, w = y.shape
    return _family(method, (n, c, h * scale, w * scale), kernel, scale).adjoint(y, kernel, scale)


def blur_downsample_step(
    x: Tensor, y: Tensor, kernel: Tensor, rho: float | Tensor, *, scale: int, method: str = "auto"
) -> Tensor:
    """z = x - rho * A^T (A x - y), one op.

    y: (N, C, H/s, W/s), used in the kernel's dtype. rho: a number, a 0-d tensor, or broadcastable to (N, C, 1, 1).
    Returns x's shape and dtype. Differentiable in x, y, kernel and rho.
    """
    _check_step(x, y, kernel, scale)
    family = _family(method, x.shape, kernel, scale)
    return family.step(x, as_dtype(y, kernel.dtype), kernel, step_size(rho, x), scale)


def blur_downsample_prox(x: Tensor, y: Tensor, kernel: Tensor, mu: float | Tensor, *, scale: int) -> Tensor:
    """argmin_v ||A v - y||^2 / 2 + mu ||v - x||^2 / 2, exact, through the FFT.

    mu: a positive number, a 0-d tensor, or broadcastable to (N, C, 1, 1); a tensor's sign is not read. Otherwise as
    :func:`blur_downsample_step`; differentiable in x, y, kernel and mu.
    """
    _check_step(x, y, kernel, scale)
    if not isinstance(mu, Tensor) and not number("mu", mu) > 0:
        raise ValueError(f"mu: expected a positive number, got {mu}")
    return fft_reference.blur_downsample_prox(x, y.to(kernel.dtype), kernel, step_size(mu, x, "mu"), scale)
