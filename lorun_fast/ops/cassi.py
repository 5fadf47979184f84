"""Single-disperser CASSI: forward, adjoint, gradient step and proximal step. Definition: reference/cassi.py."""

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
    number,
    parameter_dtype,
    shape_of,
    step_size,
    sum_to_step,
    whole,
)
from lorun_fast.ops._library import define
from lorun_fast.reference import cassi as reference
from lorun_fast.reference._step_size import per_channel


def measured_width(width: int, bands: int, step: int) -> int:
    """Columns of a measurement: W + step*(L-1)."""
    return width + step * (bands - 1)


def _check_mask(mask: Tensor, samples: int, bands: int, step: int, dtype: torch.dtype) -> None:
    whole("step", step, 0)
    if not isinstance(bands, torch.SymInt):  # which would become a constant
        whole("bands", bands, 1)
    check_tensor("mask", mask)
    own = mask.ndim == 4
    if mask.ndim not in (2, 3, 4) or (mask.ndim > 2 and mask.shape[-3] != bands and not (own and mask.shape[1] == 1)):
        raise ValueError(
            f"mask: expected (H, W) or ({bands}, H, W) for {bands} bands, or one per sample, (N, 1 or {bands}, H, W), "
            f"got shape {shape_of(mask)}"
        )
    if own and mask.shape[0] != samples:
        raise ValueError(f"mask: expected one per sample, {samples} of them, got {mask.shape[0]}")
    if mask.dtype != parameter_dtype(dtype):
        raise TypeError(f"mask: expected {parameter_dtype(dtype)} beside {dtype}, got {mask.dtype}")


def _check_forward(x: Tensor, mask: Tensor, step: int) -> None:
    check_image("x", x, 4, "(N, L, H, W)")
    _check_mask(mask, x.shape[0], x.shape[1], step, x.dtype)
    if x.shape[2:] != mask.shape[-2:]:
        raise ValueError(
            f"x: expected (N, L, {mask.shape[-2]}, {mask.shape[-1]}) for a mask of shape {shape_of(mask)}, "
            f"got shape {shape_of(x)}"
        )
    check_same_device(("x", x), ("mask", mask))


def _check_measurement(y: Tensor, mask: Tensor, bands: int, step: int) -> None:
    check_image("y", y, 3, "(N, H, W + step*(L-1))")
    height, width = mask.shape[-2], measured_width(mask.shape[-1], bands, step)
    if y.shape[1] != height or y.shape[2] != width:
        raise ValueError(
            f"y: expected (N, {height}, {width}) for a mask of shape {shape_of(mask)}, {bands} bands and step {step}, "
            f"got shape {shape_of(y)}"
        )
    check_same_device(("y", y), ("mask", mask))


def _check_adjoint(y: Tensor, mask: Tensor, bands: int, step: int) -> None:
    check_image("y", y, 3, "(N, H, W + step*(L-1))")
    _check_mask(mask, y.shape[0], bands, step, y.dtype)
    _check_measurement(y, mask, bands, step)


# Whether all is as it must be, in as few calls as possible: most of what the checks of a small call cost.


def _fits_mask(mask: Tensor, image: tuple[int, ...]) -> bool:
    """Of an image (N, L, H, W)."""
    shape, rank = mask.shape, len(mask.shape)
    if rank < 4:  # tuples of other lengths are compared too, and a symbol in them would be told from a number
        return rank > 1 and shape == image[4 - rank :]
    return shape == image or shape == (image[0], 1, *image[2:])


def _fits_forward(x: Tensor, mask: Tensor, step: int) -> bool:
    shape = x.shape
    return (
        len(shape) == 4
        and type(step) is int
        and step >= 0
        and _fits_mask(mask, shape)
        and shape[1] > 0
        and mask.dtype is WIDE.get(x.dtype)
        and x.device == mask.device
    )


def _fits_adjoint(y: Tensor, mask: Tensor, bands: int, step: int) -> bool:
    shape = mask.shape
    return (
        y.ndim == 3
        and type(step) is int
        and step >= 0
        and type(bands) is int
        and bands > 0
        and (len(shape) == 2 or (len(shape) > 2 and _fits_mask(mask, (y.shape[0], bands, *shape[-2:]))))
        and y.shape[1:] == (shape[-2], shape[-1] + step * (bands - 1))
        and mask.dtype is WIDE.get(y.dtype)
        and y.device == mask.device
    )


def _fits_step(x: Tensor, y: Tensor, mask: Tensor, step: int) -> bool:
    n, bands, height, width = x.shape if x.ndim == 4 else (0, 0, 0, 0)
    return (
        bands > 0
        and type(step) is int
        and step >= 0
        and _fits_mask(mask, x.shape)
        and y.shape == (n, height, width + step * (bands - 1))
        and mask.dtype is WIDE.get(x.dtype)
        and y.dtype in WIDE
        and x.device == mask.device == y.device
    )


def _check_step(x: Tensor, y: Tensor, mask: Tensor, step: int) -> None:
    if holds(_fits_step, x, y, mask, step):
        return
    _check_forward(x, mask, step)
    _check_measurement(y, mask, x.shape[1], step)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y: expected {x.shape[0]} samples like x, got {y.shape[0]}")


def _fake_forward(x, mask, step):
    _check_forward(x, mask, step)
    return x.new_empty((x.shape[0], x.shape[2], measured_width(x.shape[3], x.shape[1], step)))


def _fake_adjoint(y, mask, bands, step):
    _check_adjoint(y, mask, bands, step)
    return y.new_empty((y.shape[0], bands, mask.shape[-2], mask.shape[-1]))


def _fake_step(x, y, mask, rho, weight, step, keep_residual):
    _check_forward(x, mask, step)
    n, bands, height, width = x.shape
    shape = (n, height, measured_width(width, bands, step)) if keep_residual else (0,)
    return x.new_empty(x.shape), mask.new_empty(shape)


def _fake_grad_mask(x, y, step, per_band, per_sample=False):
    n, bands, height, width = x.shape
    own = (n, bands if per_band else 1) if per_sample else (bands,) if per_band else ()
    return y.new_empty((*own, height, width))


def _fake_prox_weight(mask, mu, bands, step):
    if mu.ndim != 1 or mu.dtype != mask.dtype:
        raise ValueError(f"mu: expected shape (N) and {mask.dtype}, got {shape_of(mu)} and {mu.dtype}")
    _check_mask(mask, mu.shape[0], bands, step, mask.dtype)
    return mask.new_empty((mu.shape[0], mask.shape[-2], measured_width(mask.shape[-1], bands, step)))


def _gradient_of_mask(x: Tensor, y: Tensor, step: int, mask: Tensor) -> Tensor:
    """The gradient of <Phi x, y> for the mask, in its shape."""
    per_sample = mask.ndim == 4
    return _grad_mask(x, y, step, mask.ndim == 3 or (per_sample and mask.shape[1] != 1), per_sample)


def _setup_forward(ctx, inputs, output):
    x, mask, ctx.step = inputs
    ctx.bands = x.shape[1]
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, mask)


def _backward_forward(ctx, grad):
    x, mask = ctx.saved_tensors
    grad_x = _adjoint(grad, mask, ctx.bands, ctx.step) if ctx.needs_input_grad[0] else None
    grad_mask = None
    if ctx.needs_input_grad[1]:
        grad_mask = _gradient_of_mask(x, grad.to(mask.dtype), ctx.step, mask)
    return grad_x, grad_mask, None


def _setup_adjoint(ctx, inputs, output):
    y, mask, _, ctx.step = inputs
    ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, mask)


def _backward_adjoint(ctx, grad):
    y, mask = ctx.saved_tensors
    grad_y = _forward(grad, mask, ctx.step) if ctx.needs_input_grad[0] else None
    grad_mask = None
    if ctx.needs_input_grad[1]:
        grad_mask = _gradient_of_mask(grad, y.to(mask.dtype), ctx.step, mask)
    return grad_y, grad_mask, None, None


def _setup_step(ctx, inputs, output):
    x, y, mask, rho, weight, ctx.step, kept = inputs
    _, residual = output
    ctx.kept = kept
    need_mask, need_rho, need_weight = ctx.needs_input_grad[2:5]
    again = not kept and (need_mask or need_rho or need_weight)
    ctx.save_for_backward(
        x if need_mask or again else None, y if again else None, mask, rho, weight, residual if kept else None
    )
    ctx.x_dtype, ctx.bands = x.dtype, x.shape[1]
    ctx.set_materialize_grads(False)


def _backward_step(ctx, grad, grad_residual):
    # z = x - rho Phi^T (w r), r = Phi x - y. With s = Phi (rho g):
    #   dx = g - Phi^T (w s),  dy = w s,  dw = -s r,  drho = -<g, Phi^T (w r)>,
    #   dmask: that of -<Phi (rho g), w r> - <Phi x, w s>, each product with the factor beside it held fixed.
    # A step size that is the same for all bands commutes with Phi: then dx is the step again, with y = 0, and the
    # residual of that step is Phi g.
    x, y, mask, rho, weight, residual = ctx.saved_tensors
    step, bands = ctx.step, ctx.bands
    need_x, need_y, need_mask, need_rho, need_weight = ctx.needs_input_grad[:5]
    grad_x = grad_y = grad_mask = grad_rho = grad_weight = None

    def weighted(t: Tensor) -> Tensor:
        return t if weight is None else weight * t

    if grad is not None:
        common = rho.ndim == 1 or rho.shape[1] == 1
        per_sample = rho.reshape(-1, 1, 1) if common else None
        if common:
            aside = need_y or need_mask or need_rho or need_weight
            grad_x, q = _step(grad, None, mask, rho, weight, step, aside)
            s = per_sample * q if aside else None
        else:
            wide = grad.to(mask.dtype)
            scaled = per_channel(rho) * wide
            s = _forward(scaled, mask, step)
            if need_x:
                grad_x = (wide - _adjoint(weighted(s), mask, bands, step)).to(ctx.x_dtype)
        if need_y:
            grad_y = weighted(s)
        if need_mask or need_rho or need_weight:
            if not ctx.kept:
                residual = _forward(x.to(mask.dtype), mask, step)
                residual = residual if y is None else residual - y
            pulled = weighted(residual)
        if need_rho and common:
            grad_rho = sum_to_step(-(q * pulled).sum((1, 2)).reshape(-1, 1), rho)
        elif need_rho:
            grad_rho = -(wide * _adjoint(pulled, mask, bands, step)).sum((2, 3))
        if need_weight:
            grad_weight = -(s * residual)
            if weight.shape[0] != grad_weight.shape[0]:
                grad_weight = grad_weight.sum(0, keepdim=True)
        if need_mask:
            image, measurement = (grad, per_sample * pulled) if common else (scaled, pulled)
            grad_mask = -_gradient_of_mask(image, measurement, step, mask) - _gradient_of_mask(
                x, weighted(s), step, mask
            )
    if grad_residual is not None and ctx.kept:
        if need_x:
            through = _adjoint(grad_residual, mask, bands, step).to(ctx.x_dtype)
            grad_x = through if grad_x is None else grad_x + through
        if need_y:
            grad_y = -grad_residual if grad_y is None else grad_y - grad_residual
        if need_mask:
            through = _gradient_of_mask(x, grad_residual, step, mask)
            grad_mask = through if grad_mask is None else grad_mask + through
    return grad_x, grad_y, grad_mask, grad_rho, grad_weight, None, None


def _setup_grad_mask(ctx, inputs, output):
    x, y, ctx.step = inputs[:3]
    ctx.save_for_backward(x, y)


def _backward_grad_mask(ctx, grad):
    x, y = ctx.saved_tensors
    grad_x = _adjoint(y, grad, x.shape[1], ctx.step).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_y = _forward(x.to(grad.dtype), grad, ctx.step) if ctx.needs_input_grad[1] else None
    return grad_x, grad_y, None, None, None


def _setup_prox_weight(ctx, inputs, output):
    mask, _, ctx.bands, ctx.step = inputs
    ctx.save_for_backward(mask, output)


def _backward_prox_weight(ctx, grad):
    # Of 1 / (mu + Phi_s): -w^2 for mu and Phi_s; of Phi_s for mask_c: 2 mask_c, in the window of the band.
    mask, weight = ctx.saved_tensors
    inner = -grad * weight.square()
    grad_mask = grad_mu = None
    if ctx.needs_input_grad[0]:
        each = inner if mask.ndim == 4 else inner.sum(0, keepdim=True)
        grad_mask = (2 * _adjoint(each, mask, ctx.bands, ctx.step)).sum_to_size(mask.shape)
    if ctx.needs_input_grad[1]:
        grad_mu = inner.sum((1, 2))
    return grad_mask, grad_mu, None, None


_forward = define(
    "cassi(Tensor x, Tensor mask, int step) -> Tensor",
    reference=reference.cassi,
    fake=_fake_forward,
    backward=_backward_forward,
    setup_context=_setup_forward,
    direct=True,
)
_adjoint = define(
    "cassi_adjoint(Tensor y, Tensor mask, SymInt bands, int step) -> Tensor",
    reference=reference.cassi_adjoint,
    fake=_fake_adjoint,
    backward=_backward_adjoint,
    setup_context=_setup_adjoint,
    direct=True,
)
_step = define(
    "cassi_step(Tensor x, Tensor? y, Tensor mask, Tensor rho, Tensor? weight, int step, bool keep_residual)"
    " -> (Tensor, Tensor)",
    reference=reference.cassi_step,
    fake=_fake_step,
    backward=_backward_step,
    setup_context=_setup_step,
    direct=True,
)
_grad_mask = define(
    "cassi_grad_mask(Tensor x, Tensor y, int step, bool per_band, bool per_sample=False) -> Tensor",
    reference=reference.cassi_grad_mask,
    fake=_fake_grad_mask,
    backward=_backward_grad_mask,
    setup_context=_setup_grad_mask,
    direct=True,
)
_prox_weight = define(
    "cassi_prox_weight(Tensor mask, Tensor mu, SymInt bands, int step) -> Tensor",
    reference=reference.cassi_prox_weight,
    fake=_fake_prox_weight,
    backward=_backward_prox_weight,
    setup_context=_setup_prox_weight,
    direct=True,
)


def cassi(x: Tensor, mask: Tensor, *, step: int) -> Tensor:
    """Codes, disperses and adds up the bands: y = Phi x.

    x: (N, L, H, W). mask: (H, W), (L, H, W), or one per sample, (N, 1, H, W) or (N, L, H, W); fp32 (fp64 beside fp64
    images). step: columns between bands, >= 0.
    Returns (N, H, W + step*(L-1)) in x's dtype, accumulated in the mask's. Differentiable in x and mask.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype.
    """
    if not holds(_fits_forward, x, mask, step):
        _check_forward(x, mask, step)
    return _forward(x, mask, step)


def cassi_adjoint(y: Tensor, mask: Tensor, *, bands: int, step: int) -> Tensor:
    """x = Phi^T y: the exact adjoint of :func:`cassi`.

    y: (N, H, W + step*(L-1)). Returns (N, L, H, W) in y's dtype, L = ``bands``. Differentiable in y and mask.
    """
    if not holds(_fits_adjoint, y, mask, bands, step):
        _check_adjoint(y, mask, bands, step)
    return _adjoint(y, mask, bands, step)


def _run_step(x: Tensor, y: Tensor, mask: Tensor, rho: Tensor, weight: Tensor | None, step: int) -> Tensor:
    # The backward pass needs the residual for these three only; x itself is then not saved unless the mask learns.
    asked = mask.requires_grad or rho.requires_grad or (weight is not None and weight.requires_grad)
    return _step(x, as_dtype(y, mask.dtype), mask, rho, weight, step, asked and torch.is_grad_enabled())[0]


def cassi_step(x: Tensor, y: Tensor, mask: Tensor, rho: float | Tensor, *, step: int) -> Tensor:
    """z = x - rho * Phi^T (Phi x - y), one op.

    x: (N, L, H, W). y: (N, H, W + step*(L-1)), used in the mask's dtype.
    rho: a number, a 0-d tensor, or broadcastable to (N, L, 1, 1); one value per band costs more in the backward pass.
    Returns x's shape and dtype. Differentiable in x, y, mask and rho.
    """
    _check_step(x, y, mask, step)
    table = step_size(rho, x)
    if table.ndim == 2 and (rho.ndim < 3 or rho.shape[-3] == 1):
        table = table[:, :1].contiguous()
    return _run_step(x, y, mask, table, None, step)


def energy(mask: Tensor, *, bands: int, step: int) -> Tensor:
    """The diagonal of Phi Phi^T (which has no other entries), (H, W + step*(L-1)): sum over bands of Phi_c^2.

    (N, H, W + step*(L-1)) for one mask per sample.
    """
    if mask.ndim == 4:
        return cassi(mask.expand(-1, bands, -1, -1), mask, step=step)
    return cassi(mask.expand(bands, *mask.shape[-2:]).unsqueeze(0), mask, step=step)[0]


def cassi_prox(x: Tensor, y: Tensor, mask: Tensor, mu: float | Tensor, *, step: int) -> Tensor:
    """argmin_v ||Phi v - y||^2 / 2 + mu ||v - x||^2 / 2 = x + Phi^T ((y - Phi x) / (mu + Phi_s)).

    Exact, because Phi Phi^T is diagonal: Phi_s, with zeros set to 1 (no band reaches such a pixel).
    mu: a number >= 0 (0: the projection onto Phi v = y), a 0-d tensor, or broadcastable to (N, 1, 1, 1).
    The rest as :func:`cassi_step`. Differentiable in x, y, mask and mu.
    """
    _check_step(x, y, mask, step)
    if not isinstance(mu, Tensor) and not number("mu", mu) >= 0:
        raise ValueError(f"mu: expected at least 0, got {mu}")
    if isinstance(mu, Tensor) and mu.ndim > 2 and mu.shape[-3] != 1:
        raise ValueError(f"mu: expected a number or broadcastable to ({x.shape[0]}, 1, 1, 1), got shape {shape_of(mu)}")
    per_sample = step_size(mu, x[:, :1], name="mu").reshape(-1)
    if mask.ndim == 4:
        per_sample = per_sample.expand(x.shape[0])
    weight = _prox_weight(mask, per_sample, x.shape[1], step)
    return _run_step(x, y, mask, step_size(1.0, x), weight, step)
