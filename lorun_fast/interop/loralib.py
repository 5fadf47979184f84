"""Adapter weights from and to loralib: its Conv2d and Linear layers, one layer per stage.

loralib's convolution adapters are the form "loralib" of :mod:`lorun_fast.adapters`. A loralib layer holds one
adapter, so a layer with K stages corresponds to K of them on equal base weights. Scales map: ours is alpha / r.

Everything is copied: nothing that is returned shares memory with the argument. Dropout on an adapter's input
(loralib applies it in linear layers only) is left out, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from lorun_fast.interop._layers import Adapter, copied, stacked, stage_of
from lorun_fast.interop._packages import require
from lorun_fast.layers import AdaptedLayer

loralib = require("loralib")


def from_loralib(source: nn.Module | Sequence[nn.Module]) -> AdaptedLayer:
    """Our LoRAConv2d or LoRALinear, of form "loralib", from loralib's Conv2d or Linear.

    source: one layer, or a sequence of K layers with equal base weights and geometry, which become K stages.
    Raises TypeError for other layers, and ValueError for layers that are merged, have no adapter (r = 0), or differ
    in more than their adapters.
    """
    layers = [source] if isinstance(source, nn.Module) else list(source)
    if not layers:
        raise ValueError("source: expected at least one loralib layer, got an empty sequence")
    bases = [_base(layer) for layer in layers]
    for k, base in enumerate(bases[1:], 1):
        if repr(base) != repr(bases[0]) or not _same_tensors(base, bases[0]):
            raise ValueError(
                f"source[{k}]: expected the same base layer as in source[0], got another geometry or weight"
            )
    return stacked(bases[0], [_adapter(layer) for layer in layers], "loralib")


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def _base(layer: nn.Module) -> nn.Module:
    """The plain layer under a loralib layer, copied."""
    if type(layer) not in (loralib.Conv2d, loralib.Linear):
        raise TypeError(
            f"expected loralib.Conv2d or loralib.Linear, got {type(layer).__module__}.{type(layer).__name__}"
        )
    if layer.r == 0:
        raise ValueError("expected a loralib layer with an adapter, got r=0")
    if layer.merged:
        raise ValueError(
            "the adapter is merged into the base weight: train() the loralib layer first, which takes it out"
        )
    if isinstance(layer, loralib.Conv2d):
        base = layer.conv
        weight = base.weight
    else:
        base = layer
        weight = base.weight.mT if base.fan_in_fan_out else base.weight
    return copied(base, weight).train(layer.training)


def _adapter(layer: nn.Module) -> Adapter:
    dropout = layer.lora_dropout
    if isinstance(layer, loralib.Linear) and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        warnings.warn(f"the adapter's dropout of {dropout.p:g} is left out", stacklevel=4)
    return Adapter(layer.lora_A.detach(), layer.lora_B.detach(), float(layer.scaling))


def to_loralib(layer: AdaptedLayer, stage: int | None = None) -> nn.Module | list[nn.Module]:
    """loralib's layer for one stage of ours, or a list of them for all stages.

    stage: the one to take over; None for all (a layer with one stage gives its one layer, not a list).
    The result is in train mode, where loralib keeps its adapter unmerged; its eval() merges.
    Raises ValueError for what loralib cannot express: form "peft" on kernels larger than 1 x 1, transposed
    convolutions, those of one and of three axes, and attention.
    """
    if not isinstance(layer, AdaptedLayer):
        raise TypeError(f"layer: expected one of our adapted layers, got {type(layer).__name__}")
    if isinstance(layer, nn.ConvTranspose2d):
        raise ValueError("loralib has no layer for transposed convolutions")
    if isinstance(layer, nn.MultiheadAttention):
        raise ValueError("loralib has no layer for MultiheadAttention")
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        raise ValueError("loralib's layers for convolutions of one and of three axes do not work")
    if layer.form != "loralib" and layer.weight.ndim == 4 and layer.weight[0, 0].numel() != 1:
        raise ValueError(f"form {layer.form!r} has no counterpart in loralib for a kernel larger than 1 x 1")
    if stage is None and layer.stages > 1:
        return [_one_stage(layer, k) for k in range(layer.stages)]
    return _one_stage(layer, stage_of(layer, stage))


def _one_stage(layer: AdaptedLayer, stage: int) -> nn.Module:
    base = copied(layer)
    adapter = {"r": layer.rank, "lora_alpha": layer.scale * layer.rank}
    like = {"bias": base.bias is not None, "device": base.weight.device, "dtype": base.weight.dtype}
    if isinstance(base, nn.Linear):
        result = loralib.Linear(base.in_features, base.out_features, **adapter, **like)
        result.weight, result.bias = base.weight, base.bias
    else:
        geometry = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        shape = (base.in_channels, base.out_channels, base.kernel_size[0])
        result = loralib.Conv2d(*shape, **adapter, **geometry, **like)
        result.conv = base
    with torch.no_grad():
        for theirs, ours in ((result.lora_A, layer.down[stage]), (result.lora_B, layer.up[stage])):
            # Where both forms are the same, ours may be 4-D.
            theirs.copy_(ours.reshape(theirs.shape))
    # loralib trains the adapter only.
    (result.conv if isinstance(base, nn.Conv2d) else result).weight.requires_grad_(False)
    result.train()  # loralib's returns nothing
    return result
