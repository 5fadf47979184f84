"""Public LoRA layers as functions: argument checks, then the fastest way to compute them here."""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.adapters import factor_shapes
from lorun_fast.ops._checks import shape_of
from lorun_fast.reference import lora as reference


def check_stage(stage: int | Tensor | None, stages: int, batch: int) -> None:
    """Raises unless ``stage`` is an int in [0, stages) or an int tensor (N,) for this batch."""
    if isinstance(stage, Tensor):
        if stage.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"stage: expected an int or an int64 tensor, got {stage.dtype}")
        if stage.ndim != 1 or stage.shape[0] != batch:
            raise ValueError(
                f"stage: expected one stage per sample, shape ({batch},) for an input that leads with {batch}, "
                f"got {shape_of(stage)}: a layer that folds other axes into the batch takes one stage per call"
            )
    elif not 0 <= stage < stages:
        raise IndexError(f"stage: expected 0 to {stages - 1}, got {stage}")


def _check_factors(
    weight: Tensor, down: Tensor, up: Tensor, stage: int | Tensor | None, groups: int, batch: int
) -> None:
    lead = 0 if stage is None else 1
    if up.ndim != 2 + lead or down.ndim not in (2 + lead, 4 + lead):
        axis = "no stage axis (stage is None)" if stage is None else "a leading stage axis (stage is given)"
        raise ValueError(f"down, up: expected {axis}, got shapes {shape_of(down)} and {shape_of(up)}")
    if lead:
        if down.shape[0] != up.shape[0]:
            raise ValueError(f"down, up: expected one number of stages, got {down.shape[0]} and {up.shape[0]}")
        check_stage(stage, down.shape[0], batch)
    form = "peft" if down.ndim - lead == 4 else "loralib"
    cells = weight.shape[2] if weight.ndim == 4 and form == "loralib" else 1
    r = up.shape[-1] // cells
    want_down, want_up = factor_shapes(weight.shape, max(r, 1), form, groups=groups)
    if tuple(down.shape[lead:]) != want_down or tuple(up.shape[lead:]) != want_up:
        raise ValueError(
            f"down, up: expected {want_down} and {want_up} for weight {shape_of(weight)} at rank {r}, "
            f"got {tuple(down.shape[lead:])} and {tuple(up.shape[lead:])}"
        )


def _check_activation(activation: str | None) -> None:
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(repr(a) for a in reference.ACTIVATIONS)
        raise ValueError(f"activation: expected one of {known}, got {activation!r}")


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float = 1.0,
    stage: int | Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(conv2d(x, W0 + scale * dW) + bias) + residual.

    x: (N, in, H, W). weight: (out, in//groups, kh, kw). bias: (out,) or None.
    down, up: one form of :mod:`lorun_fast.adapters`; with a leading axis K exactly when ``stage`` is given.
    stage: an int, or an int64 tensor (N,), one stage per sample.
    activation: None, "relu", "leaky_relu" (slope 0.01), "gelu" (exact) or "silu". residual: the output's shape.
    The update is formed in fp32 and cast once to the weight's dtype.
    Raises ValueError, TypeError or IndexError naming the argument that does not fit.
    """
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x: expected (N, {weight.shape[1] * groups if weight.ndim == 4 else 'in'}, H, W) for weight "
            f"{shape_of(weight)} and groups={groups}, got {shape_of(x)}"
        )
    _check_factors(weight, down, up, stage, groups, x.shape[0])
    _check_activation(activation)
    return reference.lora_conv2d(
        x, weight, bias, down, up, scale=scale, stage=stage, stride=stride, padding=padding, dilation=dilation,
        groups=groups, activation=activation, residual=residual,
    )  # fmt: skip


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
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected (..., in) for weight (out, in) = {shape_of(weight)}, got {shape_of(x)}")
    _check_factors(weight, down, up, stage, 1, x.shape[0])
    _check_activation(activation)
    return reference.lora_linear(
        x, weight, bias, down, up, scale=scale, stage=stage, activation=activation, residual=residual
    )
