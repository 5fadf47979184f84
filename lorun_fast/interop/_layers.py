"""Between our layers, which stack the factors of all stages, and libraries that keep one adapter at a time."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorun_fast.layers import LAYERS, AdaptedLayer


@dataclass(frozen=True)
class Adapter:
    """One adapter of one layer: dW = scale * (up applied to down), in one of the forms of lorun_fast.adapters."""

    down: Tensor
    up: Tensor
    scale: float


def copied(layer: nn.Module, weight: Tensor | None = None) -> nn.Module:
    """The plain nn layer with this layer's geometry and copies of its weight and bias.

    layer: an nn.Conv2d, nn.Linear or one of ours on them. weight: instead of the layer's own.
    """
    weight = layer.weight if weight is None else weight
    like = {"bias": layer.bias is not None, "device": "meta"}
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, **like)
    else:
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        like |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        plain = nn.Conv2d(*shape, **like)
    # Copies: both PEFT and loralib add their updates to the base weight in place.
    plain.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return plain.train(layer.training)


def stacked(base: nn.Module, adapters: Sequence[Adapter], form: str) -> AdaptedLayer:
    """Our layer on this plain one, with one stage per adapter; smaller ranks are filled up with zeros.

    Adapters of one common scale keep it; of different ones, they carry theirs in ``up`` and the layer's is 1.
    """
    cells = base.kernel_size[0] if form == "loralib" and not isinstance(base, nn.Linear) else 1
    scales = {adapter.scale for adapter in adapters}
    scale = scales.pop() if len(scales) == 1 else 1.0
    layer = LAYERS[type(base)].from_base(
        base,
        stages=len(adapters),
        rank=max(adapter.up.shape[1] for adapter in adapters) // cells,
        form=form,
        scale=scale,
    )
    with torch.no_grad():
        layer.down.zero_()
        layer.up.zero_()
        for k, adapter in enumerate(adapters):
            layer.down[k, : adapter.down.shape[0]] = adapter.down
            layer.up[k, :, : adapter.up.shape[1]] = adapter.up * (adapter.scale / scale)
    return layer


def stage_of(layer: AdaptedLayer, stage: int | None) -> int:
    """``stage`` checked against the layer's; None is allowed for a layer with one."""
    if stage is None and layer.stages == 1:
        return 0
    if isinstance(stage, bool) or not hasattr(stage, "__index__"):
        raise TypeError(f"stage: expected a whole number, got {stage!r}")
    if not 0 <= operator.index(stage) < layer.stages:
        raise IndexError(f"stage: expected 0 to {layer.stages - 1}, got {stage}")
    return operator.index(stage)
