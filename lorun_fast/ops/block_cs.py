"""Block compressive sensing: forward, adjoint and gradient step as ops. Definition: reference/block_cs.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.ops._checks import (
    WIDE,
    as_dtype,
    check_image,
    check_same_device,
    check_tensor,
    holds,
    pair,
    parameter_dtype,
    shape_of,
    step_size,
    sum_to_step,
    whole,
)
from lorun_fast.ops._library import define
from lorun_fast.reference import block_cs as reference
from lorun_fast.reference._step_size import per_channel


def _grid(height: int, width: int, block_size: int) -> tuple[int, int]:
    return -(-height // block_size), -(-width // block_size)


def _check_phi(phi: Tensor, block_size: int, dtype: torch.dtype) -> None:
    whole("block_size", block_size, 1)
    check_tensor("phi", phi)
    if phi.ndim != 2 or phi.shape[1] != block_size * block_size:
        raise ValueError(
            f"phi: expected (m, {block_size * block_size}) for {block_size}x{block_size} blocks, "
            f"got shape {shape_of(phi)}"
        )
    if phi.dtype != parameter_dtype(dtype):
        raise TypeError(f"phi: expected {parameter_dtype(dtype)} beside {dtype}, got {phi.dtype}")


def _check_forward(x: Tensor, phi: Tensor, block_size: int) -> None:
    check_image("x", x, 4, "(N, 1, H, W)")
    if x.shape[1] != 1:
        raise ValueError(f"x: expected one channel, (N, 1, H, W), got shape {shape_of(x)}")
    _check_phi(phi, block_size, x.dtype)
    check_same_device(("x", x), ("phi", phi))


def _check_adjoint(y: Tensor, phi: Tensor, block_size: int, height: int, width: int) -> None:
    check_image("y", y, 4, "(N, m, ceil(H/B), ceil(W/B))")
    _check_phi(phi, block_size, y.dtype)
    check_same_device(("y", y), ("phi", phi))
    want = (phi.shape[0], *_grid(height, width, block_size))
    if tuple(y.shape[1:]) != want:
        raise ValueError(
            f"y: expected (N, {want[0]}, {want[1]}, {want[2]}) for a {height}x{width} image, got {shape_of(y)}"
        )


# Whether all is as it must be, in as few calls as possible: most of what the checks of a small call cost.


def _fits_forward(x: Tensor, phi: Tensor, block_size: int) -> bool:
    shape = x.shape
    return (
        len(shape) == 4
        and shape[1] == 1
        and type(block_size) is int
        and block_size > 0
        and phi.ndim == 2
        and phi.shape[1] == block_size * block_size
        and phi.dtype is WIDE.get(x.dtype)
        and x.device == phi.device
    )


def _fits_adjoint(y: Tensor, phi: Tensor, block_size: int, height: int, width: int) -> bool:
    if type(block_size) is not int or block_size < 1 or phi.ndim != 2:
        return False
    m, pixels = phi.shape
    return (
        pixels == block_size * block_size
        and y.ndim == 4
        and y.shape[1:] == (m, -(-height // block_size), -(-width // block_size))
        and phi.dtype is WIDE.get(y.dtype)
        and y.device == phi.device
    )


def _fits_step(x: Tensor, y: Tensor, phi: Tensor, block_size: int) -> bool:
    if type(block_size) is not int or block_size < 1 or x.ndim != 4 or phi.ndim != 2:
        return False
    n, channels, height, width = x.shape
    m, pixels = phi.shape
    return (
        channels == 1
        and pixels == block_size * block_size
        and y.shape == (n, m, -(-height // block_size), -(-width // block_size))
        and phi.dtype is WIDE.get(x.dtype)
        and y.dtype in WIDE
        and x.device == phi.device == y.device
    )


def _check_step(x: Tensor, y: Tensor, phi: Tensor, block_size: int) -> None:
    if holds(_fits_step, x, y, phi, block_size):
        return
    _check_forward(x, phi, block_size)
    _check_adjoint(y, phi, block_size, x.shape[2], x.shape[3])
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y: expected {x.shape[0]} samples like x, got {y.shape[0]}")


def _fake_forward(x, phi, block_size):
    _check_forward(x, phi, block_size)
    rows, cols = _grid(x.shape[2], x.shape[3], block_size)
    return x.new_empty((x.shape[0], phi.shape[0], rows, cols))


def _fake_adjoint(y, phi, block_size, height, width):
    _check_adjoint(y, phi, block_size, height, width)
    return y.new_empty((y.shape[0], 1, height, width))


def _fake_step(x, y, phi, rho, block_size):
    return x.new_empty(x.shape)


def _fake_step_residual(x, y, phi, rho, block_size):
    return x.new_empty(x.shape), phi.new_empty(y.shape)


def _fake_grad_phi(x, y, block_size):
    return y.new_empty((y.shape[1], block_size * block_size))


def _setup_forward(ctx, inputs, output):
    x, phi, ctx.block_size = inputs
    ctx.save_for_backward(x, phi)


def _backward_forward(ctx, grad):
    x, phi = ctx.saved_tensors
    grad = grad.to(phi.dtype)
    grad_x = grad_phi = None
    if ctx.needs_input_grad[0]:
        grad_x = _adjoint(grad, phi, ctx.block_size, x.shape[2], x.shape[3]).to(x.dtype)
    if ctx.needs_input_grad[1]:
        grad_phi = _grad_phi(x, grad, ctx.block_size)
    return grad_x, grad_phi, None


def _setup_adjoint(ctx, inputs, output):
    y, phi, ctx.block_size, _, _ = inputs
    ctx.save_for_backward(y, phi)


def _backward_adjoint(ctx, grad):
    y, phi = ctx.saved_tensors
    grad = grad.to(phi.dtype)
    grad_y = grad_phi = None
    if ctx.needs_input_grad[0]:
        grad_y = _forward(grad, phi, ctx.block_size).to(y.dtype)
    if ctx.needs_input_grad[1]:
        grad_phi = _grad_phi(grad, y.to(phi.dtype), ctx.block_size)
    return grad_y, grad_phi, None, None, None


def _setup_step(ctx, inputs, output):
    x, y, phi, rho, ctx.block_size = inputs
    ctx.save_for_backward(x, y, phi, rho)


def _backward_step(ctx, grad):
    # Where phi or rho learns, block_cs_step keeps the residual; here it is computed once more.
    x, y, phi, rho, b = *ctx.saved_tensors, ctx.block_size
    _, _, need_phi, need_rho, _ = ctx.needs_input_grad
    residual = _forward(x.to(phi.dtype), phi, b) - y if need_phi or need_rho else None
    return _gradients(ctx, grad, x, phi, rho, residual)


def _setup_step_residual(ctx, inputs, output):
    x, _, phi, rho, ctx.block_size = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, phi, rho, output[1])
    ctx.size, ctx.x_dtype = x.shape[2:], x.dtype
    ctx.set_materialize_grads(False)


def _backward_step_residual(ctx, grad, grad_residual):
    x, phi, rho, residual = ctx.saved_tensors
    need_x, need_y, need_phi = ctx.needs_input_grad[:3]
    found = [None] * 5
    if grad is not None:
        found = list(_gradients(ctx, grad, x, phi, rho, residual))
    if grad_residual is not None:
        b, size = ctx.block_size, ctx.size
        parts = (
            _adjoint(grad_residual, phi, b, *size).to(ctx.x_dtype) if need_x else None,
            -grad_residual if need_y else None,
            _grad_phi(x, grad_residual, b) if need_phi else None,
        )
        for i, part in enumerate(parts):
            if part is not None:
                found[i] = part if found[i] is None else found[i] + part
    return tuple(found)


def _gradients(ctx, grad, x, phi, rho, residual):
    # z = x - rho Phi^T (Phi x - y). With q = Phi g and r = Phi x - y:
    #   dx = g - rho Phi^T q,  dy = rho q,  drho = -<q, r>,  dPhi = -(rho q) x^T - (rho r) g^T.
    # dx is the step again, with y = 0, and q the residual of that step.
    need_x, need_y, need_phi, need_rho, _ = ctx.needs_input_grad
    b, per_sample = ctx.block_size, per_channel(rho)
    grad_x = grad_y = grad_phi = grad_rho = None
    zero = phi.new_zeros((grad.shape[0], phi.shape[0], *_grid(grad.shape[2], grad.shape[3], b)))
    if need_y or need_phi or need_rho:
        if need_x:
            grad_x, q = _step_residual(grad, zero, phi, rho, b)
        else:
            q = _forward(grad.to(phi.dtype), phi, b)
        if need_y:
            grad_y = per_sample * q
        if need_rho:
            grad_rho = sum_to_step(-(q * residual).sum((1, 2, 3)).reshape(-1, 1), rho)
        if need_phi:
            wide = grad.to(phi.dtype)
            grad_phi = -_grad_phi(x, per_sample * q, b) - _grad_phi(wide, per_sample * residual, b)
    elif need_x:
        grad_x = _step(grad, zero, phi, rho, b)
    return grad_x, grad_y, grad_phi, grad_rho, None


def _setup_grad_phi(ctx, inputs, output):
    x, y, ctx.block_size = inputs
    ctx.save_for_backward(x, y)


def _backward_grad_phi(ctx, grad):
    x, y = ctx.saved_tensors
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        grad_x = _adjoint(y, grad, ctx.block_size, x.shape[2], x.shape[3]).to(x.dtype)
    if ctx.needs_input_grad[1]:
        grad_y = _forward(x.to(grad.dtype), grad, ctx.block_size)
    return grad_x, grad_y, None


_forward = define(
    "block_cs(Tensor x, Tensor phi, int block_size) -> Tensor",
    reference=reference.block_cs,
    fake=_fake_forward,
    backward=_backward_forward,
    setup_context=_setup_forward,
    direct=True,
)
_adjoint = define(
    "block_cs_adjoint(Tensor y, Tensor phi, int block_size, SymInt height, SymInt width) -> Tensor",
    reference=reference.block_cs_adjoint,
    fake=_fake_adjoint,
    backward=_backward_adjoint,
    setup_context=_setup_adjoint,
    direct=True,
)
_step = define(
    "block_cs_step(Tensor x, Tensor y, Tensor phi, Tensor rho, int block_size) -> Tensor",
    reference=reference.block_cs_step,
    fake=_fake_step,
    backward=_backward_step,
    setup_context=_setup_step,
    direct=True,
)
_step_residual = define(
    "block_cs_step_residual(Tensor x, Tensor y, Tensor phi, Tensor rho, int block_size) -> (Tensor, Tensor)",
    reference=reference.block_cs_step_residual,
    fake=_fake_step_residual,
    backward=_backward_step_residual,
    setup_context=_setup_step_residual,
    direct=True,
)
_grad_phi = define(
    "block_cs_grad_phi(Tensor x, Tensor y, int block_size) -> Tensor",
    reference=reference.block_cs_grad_phi,
    fake=_fake_grad_phi,
    backward=_backward_grad_phi,
    setup_context=_setup_grad_phi,
    direct=True,
)


def block_cs(x: Tensor, phi: Tensor, *, block_size: int) -> Tensor:
    """Measures an image block by block: y = Phi x.

    x: (N, 1, H, W), any H and W; zero-padded at the right and bottom to whole blocks.
    phi: (m, B*B), fp32 (fp64 beside fp64 images); rows act on row-major B x B blocks.
    Returns (N, m, ceil(H/B), ceil(W/B)) in x's dtype, accumulated in phi's. Differentiable in x and phi.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype.
    """
    if not holds(_fits_forward, x, phi, block_size):
        _check_forward(x, phi, block_size)
    return _forward(x, phi, block_size)


def block_cs_adjoint(y: Tensor, phi: Tensor, *, block_size: int, size: tuple[int, int]) -> Tensor:
    """x = Phi^T y, cropped to ``size`` = (H, W): the exact adjoint of :func:`block_cs` on images of that size.

    y: (N, m, ceil(H/B), ceil(W/B)). Returns (N, 1, H, W) in y's dtype. Differentiable in y and phi.
    """
    height, width = pair(size)
    if not holds(_fits_adjoint, y, phi, block_size, height, width):
        _check_adjoint(y, phi, block_size, height, width)
    return _adjoint(y, phi, block_size, height, width)


def block_cs_step(x: Tensor, y: Tensor, phi: Tensor, rho: float | Tensor, *, block_size: int) -> Tensor:
    """z = x - rho * Phi^T (Phi x - y), one op.

    y: (N, m, ceil(H/B), ceil(W/B)), used in phi's dtype.
    rho: a number, a 0-d tensor, or broadcastable to (N, 1, 1, 1). Returns x's shape and dtype.
    Differentiable in x, y, phi and rho.
    """
    _check_step(x, y, phi, block_size)
    y, rho = as_dtype(y, phi.dtype), step_size(rho, x)
    if (phi.requires_grad or rho.requires_grad) and torch.is_grad_enabled():
        return _step_residual(x, y, phi, rho, block_size)[0]
    return _step(x, y, phi, rho, block_size)


def block_cs_prox(x: Tensor, y: Tensor, phi: Tensor, mu: Tensor, *, block_size: int) -> Tensor:
    """argmin_v ||Phi v - y||^2 / 2 + mu ||v - x||^2 / 2 = x + Phi^T (Phi Phi^T + mu)^-1 (y - Phi x), for any Phi.

    mu: positive, (1,) or (N, 1), as step sizes. The rest as :func:`block_cs_step`; differentiable in mu too. The small
    systems of m unknowns are solved in fp64, one matrix for each mu and, where H or W are no whole blocks, for each
    kind of block at the edges.
    """
    _check_step(x, y, phi, block_size)
    wide, (height, width) = as_dtype(x, phi.dtype), x.shape[2:]
    missing = as_dtype(y, phi.dtype) - _forward(wide, phi, block_size)
    rows = []
    for high, across in _runs(height, block_size):
        row = []
        for broad, along in _runs(width, block_size):
            part = missing[:, :, across, along]
            inside = phi.unflatten(1, (block_size, block_size))[:, :high, :broad].flatten(1).double()
            inverse = _inverse(inside @ inside.mT, mu.double())
            row.append((inverse @ part.flatten(2).double()).reshape(part.shape).to(phi.dtype))
        rows.append(torch.cat(row, 3))
    weighted = torch.cat(rows, 2)
    return as_dtype(wide + _adjoint(weighted, phi, block_size, height, width), x.dtype)


def _runs(size: int, b: int) -> list[tuple[int, slice]]:
    """Of the blocks along a side: what of each lies in the image, and which those are."""
    whole = size // b
    runs = [(b, slice(0, whole))] if size >= b else []
    return runs + ([(size % b, slice(whole, whole + 1))] if size % b else [])


def _inverse(gram: Tensor, mu: Tensor) -> Tensor:
    """(gram + mu)^-1, (1, m, m) or (N, m, m)."""
    shifted = gram + mu.reshape(-1, 1, 1) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)  # the other one waits for the device
    return torch.cholesky_inverse(torch.where(failed[:, None, None] > 0, torch.nan, factor))
