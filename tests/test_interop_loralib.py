"""Adapter weights from and to loralib, against its own layers."""

from __future__ import annotations

import copy

import pytest
import torch
from optional_packages import interop_module
from torch import nn

import lorun_fast as lf

interop, loralib = interop_module("loralib")

CASES = {
    "conv": (lambda **kw: loralib.Conv2d(6, 10, 3, padding=1, **kw), (2, 6, 9, 8)),
    "conv_no_bias": (lambda **kw: loralib.Conv2d(6, 10, 3, stride=2, bias=False, **kw), (2, 6, 9, 8)),
    "conv_grouped": (lambda **kw: loralib.Conv2d(6, 10, 3, groups=2, **kw), (2, 6, 9, 8)),
    "conv_dilated": (lambda **kw: loralib.Conv2d(6, 10, 3, dilation=2, padding="same", **kw), (2, 6, 9, 8)),
    "conv_circular": (lambda **kw: loralib.Conv2d(6, 10, 3, padding=1, padding_mode="circular", **kw), (2, 6, 9, 8)),
    "conv_1x1": (lambda **kw: loralib.Conv2d(6, 10, 1, **kw), (2, 6, 5, 4)),
    "linear": (lambda **kw: loralib.Linear(6, 10, **kw), (2, 5, 6)),
    "linear_no_bias": (lambda **kw: loralib.Linear(6, 10, bias=False, **kw), (7, 6)),
    # Stores its weight (in, out).
    "linear_transposed": (lambda **kw: loralib.Linear(6, 10, fan_in_fan_out=True, **kw), (7, 6)),
}


def loralib_layer(name: str, **kwargs) -> nn.Module:
    layer = CASES[name][0](**{"r": 3, "lora_alpha": 2, **kwargs})
    for p in (layer.lora_A, layer.lora_B):
        nn.init.normal_(p, std=0.3)
    return layer


def with_base_of(layer: nn.Module, name: str, **kwargs) -> nn.Module:
    """Another loralib layer on the same base weights."""
    other = loralib_layer(name, **kwargs)
    base = {n: t for n, t in layer.state_dict().items() if "lora_" not in n}
    assert base
    other.load_state_dict(base, strict=False)
    return other


def merged(layer: nn.Module) -> nn.Module:
    layer.eval()  # loralib's returns nothing
    return layer


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_one_layer_becomes_a_layer_with_one_stage(name):
    theirs = loralib_layer(name)
    x = torch.randn(CASES[name][1])
    ours = interop.from_loralib(theirs)
    assert (ours.stages, ours.rank, ours.form, ours.scale) == (1, 3, "loralib", 2 / 3)
    same(ours(x), theirs(x))
    # eval() merges on both sides: nothing may be shared.
    expected = theirs(x)
    same(merged(theirs)(x), expected)
    same(ours(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_layers_on_one_base_become_stages(name):
    first = loralib_layer(name)
    layers = [first, with_base_of(first, name, r=5), with_base_of(first, name, r=1, lora_alpha=7)]
    ours = interop.from_loralib(layers)
    assert (ours.stages, ours.rank) == (3, 5)
    x = torch.randn(CASES[name][1])
    outputs = [layer(x) for layer in layers]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    for k, expected in enumerate(outputs):
        same(ours(x, k), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear_transposed"])
def test_stages_become_layers_and_come_back(name):
    first = loralib_layer(name)
    ours = interop.from_loralib([first, with_base_of(first, name)])
    x = torch.randn(CASES[name][1])
    theirs = interop.to_loralib(ours)
    for k, layer in enumerate(theirs):
        assert type(layer) is type(first)
        same(layer(x), ours(x, k))
        assert torch.equal(interop.to_loralib(ours, k).lora_B, layer.lora_B)
        assert {n for n, p in layer.named_parameters() if "weight" in n and p.requires_grad} == set()
        expected = layer(x)
        same(merged(copy.deepcopy(layer))(x), expected)
    back = interop.from_loralib(interop.to_loralib(ours))
    assert torch.equal(back.down, ours.down)
    assert torch.equal(back.up, ours.up)
    assert torch.equal(back.weight, ours.weight)
    assert back.scale == pytest.approx(ours.scale)


def test_the_peft_form_of_a_1x1_kernel_is_the_same_adapter():
    ours = lf.LoRAConv2d(6, 10, 1, stages=2, form="peft", scale=0.3)
    nn.init.normal_(ours.up, std=0.3)
    x = torch.randn(1, 6, 4, 4)
    for k, layer in enumerate(interop.to_loralib(ours)):
        same(layer(x), ours(x, k))


def test_an_adapter_file_of_loralib(tmp_path):
    """lora_state_dict, loralib's own way to save, through a network of its layers and back."""
    model = nn.Sequential(loralib_layer("conv"), nn.ReLU(), loralib.Conv2d(10, 2, 3, padding=1, r=2))
    torch.save(loralib.lora_state_dict(model), tmp_path / "adapter.pt")
    other = copy.deepcopy(model)
    for p in (other[0].lora_A, other[2].lora_A):
        nn.init.normal_(p)
    other.load_state_dict(torch.load(tmp_path / "adapter.pt"), strict=False)
    ours = nn.Sequential(interop.from_loralib(other[0]), nn.ReLU(), interop.from_loralib(other[2]))
    x = torch.randn(1, 6, 8, 8)
    same(ours(x), model(x))


def test_dropout_is_left_out_with_a_warning():
    layer = loralib_layer("linear", lora_dropout=0.5)
    with pytest.warns(UserWarning, match=r"the adapter's dropout of 0\.5 is left out"):
        ours = interop.from_loralib(layer)
    x = torch.randn(3, 6)
    same(ours(x), merged(layer)(x))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda: loralib.Linear(4, 4), ValueError, "with an adapter, got r=0"),
        (
            lambda: merged(loralib_layer("conv")),
            ValueError,
            r"merged into the base weight: train\(\) the loralib layer",
        ),
        (
            lambda: loralib.MergedLinear(4, 8, r=2, enable_lora=[True, False]),
            TypeError,
            "got loralib.layers.MergedLinear",
        ),
        (lambda: loralib.Conv1d(4, 4, 3, r=2), TypeError, "expected loralib.Conv2d or loralib.Linear, got loralib"),
        (lambda: nn.Linear(4, 4), TypeError, "expected loralib.Conv2d or loralib.Linear, got torch"),
        (lambda: [], ValueError, "expected at least one loralib layer"),
        (
            lambda: [loralib_layer("linear"), loralib_layer("linear")],
            ValueError,
            r"source\[1\]: expected the same base layer as in source\[0\]",
        ),
        (
            lambda: [loralib_layer("conv"), loralib_layer("conv_grouped")],
            ValueError,
            r"source\[1\]: expected the same base layer",
        ),
    ],
)
def test_what_our_forms_cannot_express_raises(source, error, message):
    with pytest.raises(error, match=message):
        interop.from_loralib(source())


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (lf.LoRAConv2d(4, 4, 3, form="peft"), ValueError, "form 'peft' has no counterpart in loralib"),
        (lf.LoRAConvTranspose2d(4, 4, 3), ValueError, "no layer for transposed convolutions"),
        (lf.LoRAMultiheadAttention(4, 2), ValueError, "no layer for MultiheadAttention"),
        (nn.Conv2d(4, 4, 3), TypeError, "expected one of our adapted layers, got Conv2d"),
    ],
)
def test_what_loralib_cannot_express_raises(layer, error, message):
    with pytest.raises(error, match=message):
        interop.to_loralib(layer)


def test_a_stage_out_of_range_raises():
    with pytest.raises(IndexError, match="stage: expected 0 to 1, got 2"):
        interop.to_loralib(lf.LoRALinear(4, 4, stages=2), 2)


def test_adapt_does_not_take_what_loralib_never_calls():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), loralib.Conv2d(6, 10, 3, r=2))
    with pytest.raises(ValueError, match=r"got 1.conv inside loralib's 1: lorun_fast.interop.loralib converts"):
        lf.adapt(net, stages=2)
    assert set(lf.adapt(net, stages=2, exclude="1.*").adapted) == {"0"}


def test_convolutions_of_other_axes_are_not_carried_over():
    with pytest.raises(ValueError, match="of one and of three axes do not work"):
        interop.to_loralib(lf.LoRAConv1d(2, 3, 3, stages=2))
