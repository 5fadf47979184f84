"""The autograd of ops that give the gradient of a 3 x 3 weight, functions of (grad, x): define()'s arguments for it."""

from __future__ import annotations

from lorun_fast.reference._convolution import weight_gradient_backward


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_weight):
    found = weight_gradient_backward(grad_weight, *ctx.saved_tensors)
    return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


AUTOGRAD = {"setup_context": _setup, "backward": _backward}
