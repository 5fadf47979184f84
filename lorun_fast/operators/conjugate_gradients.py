"""The proximal step of an operator without a closed form: conjugate gradients on its normal equations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorun_fast.ops._checks import in_16_bits, parameter_dtype
from lorun_fast.ops._direct import _dispatch_modes, transforms_active
from lorun_fast.reference._step_size import per_channel
from lorun_fast.reference._wide import without_autocast

if TYPE_CHECKING:
    from lorun_fast.operators.base import SensingOperator

# Iterations from look to look at who has arrived. On the host a look costs nothing; elsewhere it waits for the device.
_LOOK = {"cpu": 1}
_LOOK_ELSEWHERE = 8


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def _may_look(t: Tensor) -> bool:
    """Whether the host may read a value of t: nobody makes a graph of what happens to it."""
    if torch.compiler.is_compiling() or t.is_meta or _dispatch_modes() or transforms_active():
        return False
    return t.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def conjugate_gradients(apply: Callable, b: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """d with apply(d) = b for a symmetric positive definite apply, and which samples (N, 1, 1, 1) have not arrived.

    Each sample of b (N, C, H, W) has its own step lengths. One whose residual is at most tolerance * |b| stays where
    it is, so neither batch mates nor the moment when all have arrived and the loop ends change its result.
    """
    # Gradients of a mean are small enough for their squares to vanish in fp32.
    scale = b.abs().amax((1, 2, 3), keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    r = b / scale
    size = _dot(r, r)
    least = size * tolerance**2
    look = _LOOK.get(b.device.type, _LOOK_ELSEWHERE) if tolerance > 0 and _may_look(b) else 0
    d, p = torch.zeros_like(r), r
    for k in range(iterations):
        if look and (k + 1) % look == 0 and not (size > least).any():
            break
        q = apply(p)
        curvature = _dot(p, q)
        # 0 / 0 of those that have arrived would be in the gradient of a transform, too.
        going = (size > least) & (curvature > 0)
        alpha = torch.where(going, size / torch.where(going, curvature, 1), 0)
        d, r = torch.addcmul(d, alpha, p), torch.addcmul(r, alpha, q, value=-1)
        left = _dot(r, r)
        beta = torch.where(going, left / torch.where(going, size, 1), 0)
        p, size = torch.addcmul(r, beta, p), left
    return d * scale, size > least


class _Normal:
    """p -> Phi^T Phi p + mu p, and the way back through it."""

    def __init__(self, op: SensingOperator, mu: Tensor, iterations: int, tolerance: float):
        self.op, self.mu, self.iterations, self.tolerance = op, mu, iterations, tolerance

    def __call__(self, p: Tensor) -> Tensor:
        return self.op.adjoint(self.op(p), tuple(p.shape[-2:])) + self.mu * p

    def solve(self, b: Tensor, what: str) -> Tensor:
        d, moving = conjugate_gradients(self, b, self.iterations, self.tolerance)
        if self.tolerance > 0 and _may_look(b) and moving.any():
            warnings.warn(
                f"{what}: {type(self.op).__name__}'s conjugate gradients have not come to tolerance "
                f"{self.tolerance:g} in {self.iterations} iterations: allow more (prox_iterations), or ask for so many "
                "and no tolerance (prox_tolerance = 0)",
                stacklevel=4,
            )
        return d


class _Solution(torch.autograd.Function):
    """v, whose gradient g reaches the residual of the condition that v meets as -(Phi^T Phi + mu)^-1 g."""

    @staticmethod
    def forward(ctx, residual: Tensor, v: Tensor, normal: _Normal) -> Tensor:
        ctx.normal = normal
        ctx.save_for_backward(residual)
        return v.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.no_grad(), without_autocast(grad):
            back = -ctx.normal.solve(grad, "prox, its gradient")
        if torch.is_grad_enabled():
            back = _Once.apply(back, grad, *ctx.saved_tensors)
        return back, None, None


class _Once(torch.autograd.Function):
    """What depends on the others in a way that has no derivative here."""

    @staticmethod
    def forward(ctx, t: Tensor, *others: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise NotImplementedError("prox: expected one derivative, got a second: conjugate gradients have none here")


def prox(op: SensingOperator, x: Tensor, y: Tensor, mu: Tensor, iterations: int, tolerance: float) -> Tensor:
    """argmin_v ||Phi v - y||^2 / 2 + mu ||v - x||^2 / 2, from v = x on.

    mu: as the ops take step sizes. Until a residual is at most tolerance times that of x, or so many iterations.
    """
    size, dtype, mu = tuple(x.shape[-2:]), parameter_dtype(x.dtype), per_channel(mu)
    with without_autocast(x):
        wide = x.to(dtype)
        y = y.to(dtype) if in_16_bits(y) else y
        if transforms_active():  # these differentiate what is computed
            missing = op.adjoint(y - op(wide), size)
            return (wide + _Normal(op, mu, iterations, tolerance).solve(missing, "prox")).to(x.dtype)
        with torch.no_grad():
            normal = _Normal(op, mu.detach(), iterations, tolerance)
            v = wide + normal.solve(op.adjoint(y - op(wide), size), "prox")
        if torch.is_grad_enabled():
            # The condition's derivatives, for x, y, mu and whatever Phi is made of: one solution more is the gradient.
            residual = op.adjoint(op(v) - y, size) + mu * (v - wide)
            if residual.requires_grad:
                v = _Solution.apply(residual, v, normal)
        return v.to(x.dtype)
