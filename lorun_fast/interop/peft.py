"""Adapter weights from and to PEFT: single layers and whole models, adapters as stages.

PEFT's convolution adapters are the form "peft" of :mod:`lorun_fast.adapters`: a convolution like the layer's own to
r channels, then a 1 x 1. Scales map: ours is PEFT's alpha / r (alpha / sqrt(r) where the adapter uses rslora).

Everything is copied: nothing that is returned shares memory with the argument. Factors take the dtype of the base
weight. Dropout on an adapter's input is left out, with a warning; so are PEFT's active adapter and disabled state,
since every adapter becomes a stage.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lorun_fast.interop._layers import Adapter, copied, stacked, stage_of
from lorun_fast.interop._packages import require
from lorun_fast.layers import AdaptedLayer
from lorun_fast.stages import StagedDenoiser, adapt_layers, copy_of

peft = require("peft")

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402


def from_peft(source: nn.Module, adapters: Sequence[str] | str | None = None) -> AdaptedLayer | StagedDenoiser:
    """Our layer from a PEFT LoRA layer, or a staged denoiser from a model that holds some.

    source: a LoRA layer of PEFT on an nn.Conv2d or nn.Linear, a PeftModel, or any module with such layers inside.
    adapters: their names, in the order of the stages; None for all, in the order in which they were added. In a
        model, a layer that lacks one of them keeps its base weight at that stage.

    Returns a LoRAConv2d or LoRALinear of form "peft", or a StagedDenoiser with a frozen base.
    Raises ValueError for what our forms cannot express: DoRA and other variants, adapters with a bias, grouped
    convolutions, a dilation or padding mode that PEFT's adapter ignores, quantised layers, merged adapters, fully
    trained modules.
    """
    names = (adapters,) if isinstance(adapters, str) else adapters
    if isinstance(source, LoraLayer):
        return _layer_from_peft(source, _names([source], names))
    if isinstance(source, PeftModel):
        source = source.get_base_model()
    if not isinstance(source, nn.Module):
        raise TypeError(f"source: expected a module, got {type(source).__name__}")
    return _model_from_peft(source, names)


def _names(layers: Sequence[LoraLayer], names: Sequence[str] | None) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(name for layer in layers for name in layer.lora_A))
    unknown = [name for name in names or () if name not in known]
    if unknown or not known or (names is not None and not names):
        raise ValueError(
            f"adapters: expected some of {', '.join(known) or '(none)'}, got {', '.join(unknown) or 'none'}"
        )
    return known if names is None else tuple(names)


def _layer_from_peft(layer: LoraLayer, names: Sequence[str]) -> AdaptedLayer:
    base = layer.get_base_layer()
    _check_base(base)
    if layer.merged:
        raise ValueError(
            f"adapters {', '.join(layer.merged_adapters)} are merged into the base weight: unmerge() first"
        )
    adapters = [_adapter(layer, name) for name in names]
    present = [adapter for adapter in adapters if adapter is not None]
    # A stage without an adapter is one of rank 1 that adds nothing.
    zeros = Adapter(torch.zeros_like(present[0].down[:1]), torch.zeros_like(present[0].up[:, :1]), present[0].scale)
    return stacked(copied(base), [adapter or zeros for adapter in adapters], "peft")


def _adapter(layer: LoraLayer, name: str) -> Adapter | None:
    if name not in layer.lora_A:
        return None
    if getattr(layer, "lora_variant", {}).get(name) is not None or layer.use_dora.get(name):
        variant = getattr(layer, "lora_variant", {}).get(name)
        kind = "DoRA" if variant is None else type(variant).__name__
        raise ValueError(f"adapter {name!r}: expected a plain low-rank update, got the variant {kind}")
    down, up = layer.lora_A[name], layer.lora_B[name]
    if up.bias is not None:
        raise ValueError(f"adapter {name!r}: it has a bias (lora_bias=True), but stages share the base's bias")
    if getattr(layer, "fan_in_fan_out", False):
        raise ValueError(f"adapter {name!r}: expected a weight (out, in), got a transposed one (fan_in_fan_out=True)")
    dropout = layer.lora_dropout[name]
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        warnings.warn(f"adapter {name!r}: its dropout of {dropout.p:g} is left out", stacklevel=4)
    return Adapter(down.weight.detach(), up.weight.detach().flatten(1), float(layer.scaling[name]))


def _check_base(base: nn.Module) -> None:
    """Raises unless PEFT's adapter on this layer is an update of the layer's weight."""
    if type(base) not in (nn.Conv2d, nn.Linear):
        raise ValueError(f"expected a LoRA layer on an nn.Conv2d or nn.Linear, got one on {type(base).__name__}")
    if isinstance(base, nn.Linear):
        return
    if base.groups != 1:
        raise ValueError(f"groups={base.groups}: PEFT's adapter mixes all input channels, which no grouped weight can")
    if any(d != 1 and k != 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)):
        raise ValueError(f"dilation={tuple(base.dilation)}: PEFT's adapter has none, so it is no update of the weight")
    if base.padding_mode != "zeros" and base.padding not in ((0, 0), "valid"):
        raise ValueError(
            f"padding_mode={base.padding_mode!r}: PEFT's adapter pads with zeros, so it is no update of the weight"
        )


def _model_from_peft(model: nn.Module, names: Sequence[str] | None) -> StagedDenoiser:
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            raise ValueError(f"{name}: fully trained (modules_to_save); stages share everything but their adapters")
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            raise ValueError(f"{name}: expected LoRA layers, got {type(module).__module__}.{type(module).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(
            f"source: expected a module with LoRA layers of PEFT, got a {type(model).__name__} without any"
        )
    bases = {id(layer.get_base_layer()): name for name, layer in layers.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in bases and not name.endswith(".base_layer"):
            raise ValueError(
                f"{name}: the base of the adapted layer {bases[id(module)]}, used here without its adapters"
            )
    names = _names(list(layers.values()), names)
    converted = {}
    for name, layer in layers.items():
        if not any(adapter in layer.lora_A for adapter in names):
            continue
        try:
            converted[name] = _layer_from_peft(layer, names)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    base = copy_of(model)
    for name, module in list(base.named_modules(remove_duplicate=False)):
        if isinstance(module, LoraLayer):
            base.set_submodule(name, module.get_base_layer())
    plan = {name: {"rank": new.rank, "form": "peft", "scale": new.scale} for name, new in converted.items()}
    staged = adapt_layers(base, len(names), plan)
    with torch.no_grad():
        for name, new in converted.items():
            staged.adapted[name].down.copy_(new.down)
            staged.adapted[name].up.copy_(new.up)
    return staged


def to_peft(source: AdaptedLayer | StagedDenoiser, stage: int | None = None) -> LoraLayer | PeftModel:
    """A LoRA layer of PEFT from one of our layers, or a PeftModel from a staged denoiser.

    stage: the one to take over, as the adapter "default"; None for all, as the adapters "stage_0", "stage_1", ...,
        of which the first is active (a single stage is always "default").

    The PeftModel's save_pretrained writes PEFT's own files; PeftModel.from_pretrained on the base reads them.
    Raises ValueError for what PEFT cannot express: form "loralib" on kernels larger than 1 x 1, transposed
    convolutions, and convolutions with a dilation or a padding mode of their own. Those of one and of three axes, and
    attention, are not carried over either.
    """
    if isinstance(source, StagedDenoiser):
        return _model_to_peft(source, stage)
    if not isinstance(source, AdaptedLayer):
        raise TypeError(f"source: expected one of our adapted layers or a StagedDenoiser, got {type(source).__name__}")
    _check_expressible(source)
    holder = nn.ModuleDict({"layer": copied(source)})
    config = LoraConfig(r=source.rank, lora_alpha=source.scale * source.rank, target_modules=["layer"])
    with _more_than_one_adapter():
        for name in _stage_names(source, stage):
            holder = inject_adapter_in_model(config, holder, name)
    _fill(holder["layer"], source, stage)
    return holder["layer"]


@contextmanager
def _more_than_one_adapter() -> Iterator[None]:
    """PEFT warns when a model has an adapter already; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


def _stage_names(source: AdaptedLayer | StagedDenoiser, stage: int | None) -> list[str]:
    if stage is None and source.stages > 1:
        return [f"stage_{k}" for k in range(source.stages)]
    stage_of(source, stage)
    return ["default"]


def _check_expressible(layer: AdaptedLayer) -> None:
    if isinstance(layer, nn.ConvTranspose2d):
        raise ValueError("PEFT has no adapters for transposed convolutions: exclude them in adapt()")
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        raise ValueError(
            "expected a layer on an nn.Conv2d or nn.Linear: exclude convolutions of other axes and MultiheadAttention "
            "in adapt()"
        )
    _check_base(copied(layer))
    if layer.form != "peft" and layer.weight[0, 0].numel() != 1:
        raise ValueError(
            f"form {layer.form!r} has no counterpart in PEFT for a kernel larger than 1 x 1: use form='peft'"
        )


def _fill(target: LoraLayer, source: AdaptedLayer, stage: int | None) -> None:
    names = _stage_names(source, stage)
    stages = range(source.stages) if len(names) > 1 else [stage_of(source, stage)]
    target.set_adapter(names[0])
    with torch.no_grad():
        for name, k in zip(names, stages, strict=True):
            for part, factor in ((target.lora_A[name], source.down[k]), (target.lora_B[name], source.up[k])):
                # Where both forms are the same, ours may be 2-D and theirs 4-D.
                part.weight.copy_(factor.reshape(part.weight.shape))


def _model_to_peft(staged: StagedDenoiser, stage: int | None) -> PeftModel:
    if not staged.adapted:
        raise ValueError("source: expected a staged denoiser with adapted layers, got one without any")
    if "" in staged.adapted:
        raise ValueError("source: expected layers inside a denoiser, got one that is a layer: convert staged.base")
    for name, layer in staged.adapted.items():
        try:
            _check_expressible(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    model = copy_of(staged.base)
    if callable(getattr(model, "config", None)):  # a denoiser's method, where PEFT looks for a dict
        vars(model)["config"] = {"model_type": "custom"}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdaptedLayer):
            if name not in staged.adapted:
                raise ValueError(f"{name}: another name of an adapted layer; PEFT would leave it without adapters")
            model.set_submodule(name, copied(module))
    # Anchored: PEFT matches a pattern against the ends of names too, and "conv1" would also mean "encoder.conv1".
    patterns = {name: f"^{re.escape(name)}" for name in staged.adapted}
    names = _stage_names(staged, stage)
    for adapter in names:
        config = LoraConfig(
            target_modules="|".join(map(re.escape, staged.adapted)),
            rank_pattern={patterns[name]: layer.rank for name, layer in staged.adapted.items()},
            alpha_pattern={patterns[name]: layer.scale * layer.rank for name, layer in staged.adapted.items()},
        )
        with _more_than_one_adapter():
            if adapter == names[0]:
                model = get_peft_model(model, config, adapter_name=adapter)
            else:
                model.add_adapter(adapter, config)
    modules = dict(model.get_base_model().named_modules())
    for name, layer in staged.adapted.items():
        _fill(modules[name], layer, stage)
    model.set_adapter(names[0])
    return model
