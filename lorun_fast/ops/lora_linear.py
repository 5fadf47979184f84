"""A linear layer with a low-rank update of its weight, as one op. Definition: reference/lora.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.ops import _backends, _flops, _lora_aten, _lora_autograd
from lorun_fast.ops._backends import Backend, Row
from lorun_fast.ops._checks import batch_of, finite, shape_of
from lorun_fast.ops._library import define, once
from lorun_fast.ops.lora import (
    at_stage,
    check_epilogue,
    check_factors,
    check_floating,
    check_given_stages,
    check_stage,
    check_stage_per_sample,
    check_tensors,
    in_place,
    laid_out,
    per_sample,
    under_autocast,
    wanted,
)
from lorun_fast.reference import lora as reference


def _check(x, weight, bias, down, up, stage, residual, scale, activation) -> None:
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected (..., in) for weight (out, in) = {shape_of(weight)}, got {shape_of(x)}")
    check_tensors(x, weight=weight, bias=bias, down=down, up=up, residual=residual)
    check_factors(weight, down, up, stacked=stage is not None)
    if stage is not None:
        check_stage_per_sample(stage, x.shape[0] if x.ndim > 1 else 0)
    check_epilogue(activation, bias, residual, (*x.shape[:-1], weight.shape[0]), weight.shape[0])


def _fake(x, weight, *args):
    _check(x, weight, *args)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _forward(x, weight, bias, down, up, stage, *args):
    if stage is not None and not x.shape[0]:
        stage, down, up = None, down[0], up[0]  # any will do
    check_given_stages(stage, up.shape[0])
    args = (x, weight, bias, down, up, stage, *args)
    return _backends.choose("lora_linear", x.device.type, args).forward(*args).contiguous()


def _fake_backward(grad, x, weight, bias, down, up, stage, output, scale, activation, mask):
    return [torch.empty_like(t) for t in wanted(mask, (x, weight, bias, down, up))]


def _backward_op(grad, x, weight, bias, down, up, stage, output, scale, activation, mask):
    like = wanted(mask, (x, weight, bias, down, up))
    if not x.numel():
        return [torch.zeros_like(t) for t in like]
    backend = _backends.choose(
        "lora_linear", x.device.type, (x, weight, bias, down, up, stage, None, scale, activation)
    )
    return laid_out(backend.backward(grad, x, weight, bias, down, up, stage, output, scale, activation, mask), like)


def _setup(ctx, inputs, output):
    x, weight, bias, down, up, stage, residual, ctx.scale, ctx.activation = inputs
    keep = output if ctx.activation in reference.SIGN_TELLS and residual is None else None
    ctx.save_for_backward(x, weight, bias, down, up, stage, keep)


def _backward(ctx, grad):
    mask = list(ctx.needs_input_grad[:5])
    found = [None] * 5
    if any(mask):
        found = in_place(mask, _linear_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.activation, mask))
    return (*found, None, grad if ctx.needs_input_grad[6] else None, None, None)


def _forward_flops(x, weight, *_, **__) -> int:
    return _flops.linear(x, weight)


def _backward_flops(grad, x, weight, bias, down, up, stage, output, scale, activation, mask, **_) -> int:
    """One product for x, one for the weight; for each factor two that are narrow, unless the weight's serves."""
    whole, lead = _flops.linear(x, weight), stage is not None
    low = _flops.linear(x, down[lead:]) + _flops.linear(grad, up[lead:])
    return whole * (mask[0] + mask[1]) + low * (0 if mask[1] else mask[3] + mask[4])


_linear = define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor? stage, Tensor? residual, "
    "float scale, str? activation) -> Tensor",
    reference=_forward,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    autocast=under_autocast,
    direct=True,
    python=True,
    flops=_forward_flops,
)
_linear_backward = define(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor? stage, "
    "Tensor? output, float scale, str? activation, bool[] mask) -> Tensor[]",
    reference=_backward_op,
    fake=_fake_backward,
    **once("lora_linear"),
    direct=True,
    python=True,
    flops=_backward_flops,
)


def _reference(x, weight, bias, down, up, stage, residual, scale, activation):
    return reference.lora_linear(
        x, weight, bias, down, up, scale=scale, stage=stage, activation=activation, residual=residual
    )


_backends.register("lora_linear", Backend("reference", ("cpu", "cuda"), _reference, reference.lora_linear_backward))
_backends.register("lora_linear", Backend("aten", ("cpu", "cuda"), _lora_aten.linear, _lora_aten.linear_backward))
_backends.TABLE["lora_linear", "cpu"] = (Row("aten", "at least as fast as the definition on every size"),)
_backends.TABLE["lora_linear", "cuda"] = (Row("aten", "no other is measured"),)
# Features up to which a layer is merged in training on a GPU: the whole weight has its gradient soon then, and the host
# has fewer ops to launch than with a low-rank branch.
_MERGED = 1024


def _call(*args) -> Tensor:
    """The op, or on a GPU torch's differentiable ops in its place."""
    if max(args[1].shape) <= _MERGED and _lora_autograd.serves("lora_linear", args):
        return _lora_autograd.linear(*args)
    return _linear(*args)


def check_features(x: Tensor, layer) -> None:
    """Raises unless x's last axis has a layer's features."""
    if x.shape[-1] != layer.in_features:
        raise ValueError(f"x: expected (..., {layer.in_features}), got {shape_of(x)}")


def of_layer(x: Tensor, layer, stage: int | Tensor) -> Tensor:
    """The op with the stacked factors of a layer."""
    check_floating("x", x)
    check_features(x, layer)
    weight, down, up, stage = layer.operands(stage, None)
    return _call(x, weight, layer.bias, down, up, stage, None, layer.scale, None)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float = 1.0,
    stage: int | Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x (W0 + scale * dW)^T + bias) + residual.

    x: (..., in), with N leading when ``stage`` is a tensor (N,). weight: (out, in). down (r, in) and up (out, r),
    with a leading axis K exactly when ``stage`` is given. The rest as for :func:`lora_conv2d`.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        check_floating("x", x)
        check_floating("weight", weight)
    scale = finite("scale", scale)
    if stage is not None and not per_sample(stage):
        check_factors(weight, down, up, stacked=True)
        check_stage(stage, up.shape[0], batch_of("x", x))
        down, up, stage = at_stage(down, stage), at_stage(up, stage), None
    args = (x, weight, bias, down, up, stage, residual, scale, activation)
    _check(*args)
    return _call(*args)
