"""net.optimize(): what it returns computes the same, stands alone, and says truly what was done."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from kernels_help import needs_triton
from torch import nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import lorun_fast as lf
from lorun_fast import optimize
from lorun_fast.convolutions import (
    FusedConv2d,
    PackedConv2d,
    PackedConvTranspose2d,
    ThinConv2d,
    WinogradConv2d,
    convolve,
    replace_convolutions,
    residual_block,
)
from lorun_fast.ops import _backends, fused_conv2d

SIZE = (20, 13)


@pytest.fixture(autouse=True)
def no_matrix_units(monkeypatch):
    """What is chosen must not depend on the machine that runs the tests."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


class Base(nn.Module):
    """A denoiser with everything that has to come along: a norm's buffers, a depthwise layer, an alias, a linear."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(1, 8, 3, padding=1)
        self.alias = self.head
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Linear(8, 8)
        self.tail = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, z):
        x = self.depthwise(torch.relu(self.norm(self.head(z))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return z + 0.1 * self.tail(x) + 0.1 * self.alias(z)[:, :1]


def network(sharing="lora", denoiser=None, stages=3, form="loralib", **settings) -> lf.LoRun:
    denoiser = lf.ResUNet(channels=(4, 8), blocks=1) if denoiser is None else denoiser
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), denoiser, stages=stages, sharing=sharing, form=form, **settings)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        net.step_size.copy_(torch.linspace(0.5, 1.5, stages))
    return net.eval()


@pytest.fixture
def x():
    return torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_computes_what_the_network_computes(x, sharing, channels_last):
    net = network(sharing)
    fast = net.optimize(channels_last=channels_last)
    y = net.op(x)
    expected = net(y, size=SIZE, return_stages=True)
    for a, b in zip(fast(y, size=SIZE, return_stages=True), expected, strict=True):
        torch.testing.assert_close(a, b)
    other = lf.BlockCS.gaussian(0.25, 8, seed=7)
    torch.testing.assert_close(fast(y, op=other, size=SIZE), net(y, op=other, size=SIZE))
    weight = fast.denoiser.copies[1].encoder[0][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_stands_alone_and_stays(x):
    net = network()
    fast, y = net.optimize(), net.op(x)
    before = fast(y, size=SIZE)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    assert torch.equal(fast(y, size=SIZE), before)
    assert not before.requires_grad and not any(p.requires_grad for p in fast.parameters())
    assert fast.eval() is fast
    with pytest.raises(RuntimeError, match="train: expected a network with adapters"):
        fast.train()


@pytest.mark.parametrize(("convolutions", "kind"), [("direct", nn.Conv2d), ("winograd", ThinConv2d)])
def test_a_foreign_denoiser_keeps_its_other_parts_once(x, convolutions, kind):
    with pytest.warns(UserWarning, match="grouped"):
        net = network(denoiser=Base(), form="peft")
    net.denoiser.base.norm.running_var.fill_(2.0)
    fast, y = net.optimize(convolutions=convolutions), net.op(x)
    torch.testing.assert_close(fast(y, size=SIZE), net(y, size=SIZE))
    first, last = fast.denoiser.copies[0], fast.denoiser.copies[2]
    assert type(first.head) is kind and first.alias is first.head
    assert first.depthwise.weight is last.depthwise.weight and first.norm.running_var is last.norm.running_var
    assert first.head.bias.data_ptr() == last.head.bias.data_ptr()
    assert first.head.weight.untyped_storage().data_ptr() == last.head.weight.untyped_storage().data_ptr()
    assert not torch.equal(first.head.weight, last.head.weight)


def test_this_machine_decides_the_dtype(monkeypatch):
    net = network()
    monkeypatch.setattr(optimize, "fast_bf16", lambda device: (False, "no matrix units"))
    fast = net.optimize()
    assert fast.report["dtype"] == ("float32", "no matrix units")
    assert next(fast.denoiser.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("most", "chosen"), [(100.0, torch.bfloat16), (-1.0, torch.float32)])
def test_bf16_where_the_cpu_is_fast_and_the_score_allows_it(monkeypatch, x, most, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(optimize, "MOST_LOST", most)
    net = network()
    fast = net.optimize(images=x)
    assert {p.dtype for p in fast.denoiser.parameters()} == {chosen}
    done, why = fast.report["dtype"]
    assert done == str(chosen).removeprefix("torch.")
    assert "AMX" in why and ("not chosen" in why) == (chosen == torch.float32)
    restored = {}
    for name, one in (("net", net), ("bf16", net.optimize(dtype=torch.bfloat16))):
        error = (one(net.op(x), size=SIZE).detach().clamp(0, 1) - x).square().mean((1, 2, 3))
        restored[name] = float((-10 * error.log10()).mean())
    assert f"score moves by {restored['bf16'] - restored['net']:+.3f}"[:-1] in why
    assert fast.op.phi.dtype == torch.float32 and fast(net.op(x), size=SIZE).dtype == torch.float32


@pytest.mark.parametrize("moved", [0.019, 0.021, -0.021])
def test_a_score_that_moves_either_way_speaks_against_bf16(monkeypatch, x, moved):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    net = network()
    monkeypatch.setattr(optimize, "score", lambda other, *_: 30.0 + (0.0 if other is net else moved))
    fast = net.optimize(images=x)
    done, why = fast.report["dtype"]
    assert done == ("bfloat16" if moved == 0.019 else "float32") and f"{moved:+.4f} dB on 2 images" in why
    assert {p.dtype for p in fast.denoiser.parameters()} == {getattr(torch, done)}


def test_scoring_leaves_a_network_in_training_as_it_was(monkeypatch, x):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    net = network("tied", denoiser=Base()).train()
    before = net.denoiser.base.norm.running_mean.clone()
    assert "score moves" in net.optimize(images=x).report["dtype"][1]
    assert net.training and net.denoiser.base.norm.training
    assert torch.equal(net.denoiser.base.norm.running_mean, before)


def test_a_network_in_bf16_keeps_its_dtype():
    fast = network().bfloat16().optimize()
    assert fast.report["dtype"] == ("bfloat16", "the network's own")
    assert {p.dtype for p in fast.denoiser.parameters()} == {torch.bfloat16}


def test_the_capabilities_that_count(monkeypatch):
    for amx, avx512, expected in ((True, False, "AMX"), (False, True, "AVX512-bf16"), (False, False, "neither")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        fast, why = optimize.fast_bf16(torch.device("cpu"))
        assert fast == (amx or avx512) and expected in why


@pytest.mark.parametrize(
    ("amx", "loops", "convolutions", "expected"),
    [
        (False, "avx512", None, "F(4x4, 3x3)"),
        (False, "avx512", "direct", "direct"),
        (False, "baseline", None, "direct"),
        (True, "avx512", None, "matrix tiles"),
        (True, "avx512", "winograd", "F(4x4, 3x3)"),
    ],
)
def test_bf16_is_chosen_with_the_fastest_convolutions(monkeypatch, x, amx, loops, convolutions, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(optimize, "MOST_LOST", 100.0)
    monkeypatch.setattr(optimize._native, "build_info", lambda: {"cpu_active": loops, "amx": amx})
    fast = wide().optimize(convolutions=convolutions, images=x)
    assert fast.report["dtype"][0] == "bfloat16"
    assert fast.report["dtype"][1].startswith("AMX; score" if amx else "AVX512-bf16; score")
    assert {p.dtype for p in fast.denoiser.parameters()} == {torch.bfloat16}
    assert fast.report["convolutions"][0] == expected
    assert bool(stand_ins(fast, WinogradConv2d)) == (expected == "F(4x4, 3x3)")
    # What it reaches between layers of 16 bits.
    y = lf.LoRun.forward(fast, fast.op(x.float()), size=SIZE)
    assert y.isfinite().all()


def test_the_exact_data_step_and_a_noise_level_come_along(monkeypatch, x):
    whole = torch.rand(2, 1, 16, 24)
    net = network(denoiser=lf.ResUNet(channels=(4,), blocks=1, noise_level=True), data_step="prox")
    fast, y = net.optimize(), net.op(whole)
    torch.testing.assert_close(fast(y, sigma=0.1), net(y, sigma=0.1))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "score moves by" in net.optimize(images=whole).report["dtype"][1]


def test_merged_weights_are_rounded_once_from_fp32():
    net = network()
    weight = net.optimize(dtype=torch.bfloat16).denoiser.copies[2].encoder[0][0].conv1.weight
    layer = net.denoiser.adapted["encoder.0.0.conv1"]
    assert torch.equal(weight, layer.stage_weight(2).bfloat16())


def wide(**settings):
    return network(denoiser=lf.ResUNet(channels=(8, 16), blocks=1), **settings)


def stand_ins(net: nn.Module, kind: type[nn.Module]) -> int:
    """How many layers of a kind the network runs on."""
    kinds = (kind, PackedConvTranspose2d) if kind is PackedConv2d else (kind,)
    return sum(type(module) in kinds for module in net.modules())


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
def test_minimal_filtering_computes_the_same(x, sharing):
    net = wide(sharing=sharing)
    fast, y = net.optimize(convolutions="winograd"), net.op(x)
    torch.testing.assert_close(fast(y, size=SIZE), net(y, size=SIZE), rtol=0, atol=1e-5)
    done, why = fast.report["convolutions"]
    assert done == "F(4x4, 3x3)" and "8 of 10 layers a stage; asked for" in why
    block = fast.denoiser.copies[1].encoder[0][0]
    assert type(block.conv1) is WinogradConv2d and type(fast.denoiser.copies[1].head) is ThinConv2d
    assert (block.conv1 is fast.denoiser.copies[0].encoder[0][0].conv1) == (sharing == "tied")
    assert all(type(layer) is not WinogradConv2d for layer in net.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_minimal_filtering_of_images_in_16_bits(x, dtype):
    net = wide()
    fast, direct = (net.optimize(dtype=dtype, convolutions=c) for c in ("winograd", "direct"))
    assert fast.report["convolutions"][0] == "F(4x4, 3x3)"
    conv = fast.denoiser.copies[1].encoder[0][0].conv1
    assert conv.weight.dtype == dtype and conv.points.dtype == torch.float32
    y = net.op(x)
    exact = net(y, size=SIZE)
    ours, theirs = ((n(y, size=SIZE) - exact).square().mean().sqrt() for n in (fast, direct))
    assert 0 < ours < 1.5 * theirs < 0.02
    fast.load_state_dict(direct.state_dict())
    fast.to("cpu")  # moves what is computed in fp32, and converts nothing
    assert conv.points.dtype == torch.float32
    torch.testing.assert_close(fast(y, size=SIZE), exact, rtol=0, atol=0.1)
    with pytest.raises(TypeError, match="expected float32 or float64, in which this network's convolutions compute"):
        fast.to(torch.float16 if dtype == torch.bfloat16 else torch.bfloat16)
    torch.testing.assert_close(fast.float()(y, size=SIZE), exact, rtol=0, atol=0.1)


def test_minimal_filtering_saves_and_loads_as_the_layers_it_stands_for(x, tmp_path):
    net = wide()
    fast, direct, y = net.optimize(convolutions="winograd"), net.optimize(convolutions="direct"), net.op(x)
    assert list(fast.state_dict()) == list(direct.state_dict())
    lf.save(fast, tmp_path / "fast.safetensors")
    torch.testing.assert_close(lf.load(tmp_path / "fast.safetensors")(y, size=SIZE), direct(y, size=SIZE))
    other = wide()
    with torch.no_grad():
        for p in other.denoiser.parameters():
            p.mul_(1.5)
    fast.load_state_dict(other.optimize(convolutions="direct").state_dict())
    torch.testing.assert_close(fast(y, size=SIZE), other.eval()(y, size=SIZE), rtol=0, atol=1e-5)


def test_the_report_names_the_method_that_serves(x):
    class Deep(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 12, 1), *layers, nn.Conv2d(12, 1, 1))

        def forward(self, z):
            return z + self.layers(z)

    for layers, method, count in (
        ([nn.Conv2d(12, 12, 3, padding=1, groups=12)], "depthwise kernel", 1),
        ([nn.Conv2d(12, 8, 1), nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(3, 12, 1)], "thin kernel", 1),
        ([nn.Conv2d(12, 12, 3, padding=1, groups=2)], "direct", 0),
    ):
        net = network(denoiser=Deep(*layers), sharing="tied")
        fast, y = net.optimize(dtype=torch.float32, convolutions="winograd"), net.op(x)
        done, why = fast.report["convolutions"]
        assert done == method and why.startswith(f"{count} of " if count else "no layer of 3 x 3")
        torch.testing.assert_close(fast(y, size=SIZE), net(y, size=SIZE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("found", ["avx2", "avx512", "baseline", None])
def test_minimal_filtering_is_chosen_where_it_was_measured(monkeypatch, found):
    monkeypatch.setattr(optimize, "fast_bf16", lambda device: (False, "no matrix units"))
    monkeypatch.setattr(optimize._native, "build_info", lambda: {} if found is None else {"cpu_active": found})
    fast = wide().optimize()
    done, why = fast.report["convolutions"]
    assert done == ("F(4x4, 3x3)" if found in ("avx2", "avx512") else "direct")
    assert ("this CPU's loops are" in why) == (done == "direct")
    assert stand_ins(fast, WinogradConv2d) == (0 if done == "direct" else 3 * 6)
    assert stand_ins(fast, ThinConv2d) == (0 if done == "direct" else 3 * 2)
    direct = wide().optimize(convolutions="direct")
    assert direct.report["convolutions"] == ("direct", "asked for") and not stand_ins(direct, WinogradConv2d)
    narrow = network(denoiser=lf.ResUNet(channels=(4,), blocks=1)).optimize(convolutions="winograd")
    assert not stand_ins(narrow, WinogradConv2d)
    assert narrow.report["convolutions"][0] == "direct" and "8 channels or more" in narrow.report["convolutions"][1]


@pytest.mark.parametrize("amx", [False, True])
def test_matrix_tiles_are_chosen_for_bf16_where_there_are_any(monkeypatch, amx):
    monkeypatch.setattr(optimize._native, "build_info", lambda: {"cpu_active": "avx512", "amx": amx})
    fast = wide().optimize(dtype=torch.bfloat16)
    done, why = fast.report["convolutions"]
    assert stand_ins(fast, PackedConv2d) == (3 * 10 if amx else 0)
    filtered = ("F(4x4, 3x3)", "8 of 10 layers a stage; AVX512; a quarter of the multiplications")
    assert (done, why) == (("matrix tiles", "10 of 10 layers a stage; AMX") if amx else filtered)
    assert not stand_ins(wide().optimize(dtype=torch.float16), PackedConv2d)
    asked = wide().optimize(dtype=torch.float32, convolutions="packed")
    assert asked.report["convolutions"] == ("direct", "no bfloat16 convolution of square kernels")
    assert not stand_ins(asked, PackedConv2d)


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
@pytest.mark.parametrize("denoiser", ["unet", "cnn"])
def test_matrix_tiles_compute_the_same(x, sharing, denoiser):
    base = lf.ResUNet(channels=(8, 16), blocks=2) if denoiser == "unet" else lf.ResCNN(channels=20, blocks=2)
    net = network(sharing=sharing, denoiser=base)
    settings = {"dtype": torch.bfloat16, "channels_last": True}
    fast = net.optimize(**settings, convolutions="packed")
    direct = net.optimize(**settings, convolutions="direct")
    assert "layers a stage; asked for" in fast.report["convolutions"][1]
    assert sum(type(m) is PackedConv2d for m in fast.modules()) >= 6
    y = net.op(x)
    exact = net(y, size=SIZE)
    ours, theirs = ((n(y, size=SIZE) - exact).square().mean().sqrt() for n in (fast, direct))
    assert 0 < ours < 1.5 * theirs < 0.02


def test_matrix_tiles_save_and_load_as_the_layers_they_stand_for(x, tmp_path):
    net, other = network(), network()
    with torch.no_grad():
        for p in other.denoiser.parameters():
            p.mul_(1.5)
    fast, direct = (net.optimize(dtype=torch.bfloat16, convolutions=c) for c in ("packed", "direct"))
    assert list(fast.state_dict()) == list(direct.state_dict())
    y, loaded = net.op(x), []
    for n in (fast, direct):
        lf.save(n, tmp_path / "one.safetensors")
        loaded.append(lf.load(tmp_path / "one.safetensors")(y, size=SIZE))
    assert torch.equal(*loaded)
    changed = other.optimize(dtype=torch.bfloat16, convolutions="packed")
    fast.load_state_dict(other.optimize(dtype=torch.bfloat16, convolutions="direct").state_dict())
    assert torch.equal(fast(y, size=SIZE), changed(y, size=SIZE))


def test_what_matrix_tiles_stand_for():
    bf16 = {"dtype": torch.bfloat16}
    layers = {
        "conv": nn.Conv2d(3, 5, 3, padding=1, **bf16),
        "same": nn.Conv2d(3, 5, 5, padding="same", **bf16),
        "valid": nn.Conv2d(3, 5, 3, padding="valid", bias=False, **bf16),
        "strided": nn.Conv2d(3, 5, 2, stride=2, **bf16),
        "up": nn.ConvTranspose2d(3, 8, 2, stride=2, **bf16),
        "up 4": nn.ConvTranspose2d(3, 4, 4, stride=4, bias=False, **bf16),
    }
    x = torch.randn(2, 3, 10, 12, **bf16)
    for name, layer in layers.items():
        kind = PackedConvTranspose2d if name.startswith("up") else PackedConv2d
        assert kind.unfit(layer) is None, name
        expected = layer.double()(x.double())
        y = kind(layer.bfloat16())(x)
        limit = 0.008 * expected.abs().max().item()
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=limit, msg=lambda t, n=name: f"{n}: {t}")
    unfit = {
        "its kernel is not square": nn.Conv2d(3, 5, (3, 1), **bf16),
        "its strides differ|strides differ": nn.Conv2d(3, 5, 3, stride=(1, 2), **bf16),
        "at most 7": nn.Conv2d(3, 5, 9, **bf16),
        "dilated, grouped": nn.Conv2d(4, 4, 3, groups=2, **bf16),
        "zeros": nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect", **bf16),
        "not the same on all sides": nn.Conv2d(3, 5, 2, padding="same", **bf16),
        "whose stride is not its kernel's size": nn.ConvTranspose2d(3, 8, 3, stride=2, **bf16),
        "or with padding": nn.ConvTranspose2d(3, 8, 2, stride=2, output_padding=1, **bf16),
        "no multiple of 16": nn.ConvTranspose2d(3, 5, 2, stride=2, **bf16),
        "torch.float32": nn.Conv2d(3, 5, 3),
        "a Linear": nn.Linear(3, 5, **bf16),
    }
    for reason, layer in unfit.items():
        with pytest.raises(ValueError, match=f"conv: expected a bf16 convolution of square kernels, got .*({reason})"):
            (PackedConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else PackedConv2d)(layer)
    shared = nn.Conv2d(3, 3, 3, padding=1, **bf16)
    module = nn.Sequential(shared, shared, nn.Conv2d(3, 3, 3))
    assert replace_convolutions([module], "packed") == (2, 3) and module[0] is module[1]


def test_thin_layers_and_what_they_leave_alone():
    layers = {
        "channels": nn.Conv2d(5, 8, 3, padding=1),
        "multiple": nn.Conv2d(4, 12, 3, padding=1),
        "stride": nn.Conv2d(1, 8, 3, padding=1, stride=2),
        "size": nn.Conv2d(8, 1, 5, padding=2),
        "dtype": nn.Conv2d(8, 1, 3, padding=1, dtype=torch.float64),
        "kind": nn.ConvTranspose2d(8, 1, 3, padding=1),
    }
    for layer in layers.values():
        with pytest.raises(ValueError, match=r"conv: expected a 3 x 3 convolution .* from or to few channels, got"):
            ThinConv2d(layer)
    last = nn.Conv2d(8, 3, 3, padding="same")
    module = nn.Sequential(*layers.values(), nn.Conv2d(3, 8, 3, padding=1, bias=False), last)
    z, residual = torch.rand(2, 3, 6, 7), torch.rand(2, 3, 6, 7)
    expected = last(module[-2](z).relu()) + residual
    assert replace_convolutions([module], "winograd") == (2, 8)
    assert type(module[-1]) is type(module[-2]) is ThinConv2d
    torch.testing.assert_close(convolve(module[-1], convolve(module[-2], z, "relu"), residual=residual), expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 1, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)], ids=["thin", "wide"])
def test_a_residual_of_another_dtype_is_added_as_torch_adds_it(layer):
    x, residual = torch.rand(1, 8, 6, 7), torch.rand(1, layer.out_channels, 6, 7, dtype=torch.float64)
    module = nn.Sequential(layer)
    expected = layer(x).relu() + residual
    replace_convolutions([module], "winograd")
    y = convolve(module[0], x, "relu", residual)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


def test_a_block_by_minimal_filtering_adds_a_residual_of_another_dtype():
    module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    x, residual = torch.rand(1, 8, 6, 7), torch.rand(1, 8, 6, 7, dtype=torch.float64)
    expected = residual_block(*module, x, residual)
    assert replace_convolutions([module], "winograd") == (2, 2)
    y = residual_block(*module, x, residual)
    assert y.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


def test_layers_that_share_a_weight_alone_keep_their_biases():
    first, second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
    second.weight = first.weight
    module, z = nn.Sequential(first, second), torch.rand(1, 8, 6, 7)
    expected = module(z)
    assert replace_convolutions([module], "winograd") == (2, 2)
    torch.testing.assert_close(module(z), expected, rtol=0, atol=1e-5)


def test_layers_that_somebody_watches_are_left_alone():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        getattr(module[0], register)(lambda *arguments: None)
        assert replace_convolutions([module], "winograd") == (1, 2)
        assert type(module[0]) is nn.Conv2d and type(module[1]) is WinogradConv2d


class Asking(nn.Module):
    """Asks its layers for their kind and their stride, and for what it has put there."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.depth, self.up = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ConvTranspose2d(8, 8, 2, 2)
        self.tail = nn.Conv2d(8, 1, 3, 1, 1)
        self.body.gain = self.depth.gain = 0.7

    def forward(self, z):
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                z = layer(z) * getattr(layer, "gain", 1) / layer.stride[0] + layer.kernel_size[0]
            elif isinstance(layer, nn.ConvTranspose2d):
                z = layer(z) / layer.stride[0]
        return z


@pytest.mark.filterwarnings("ignore:adapt")
@pytest.mark.parametrize("kind", ["winograd", "packed"])
def test_a_stand_in_is_of_the_layer_s_kind_and_has_its_attributes(kind):
    dtype = torch.bfloat16 if kind == "packed" else torch.float32
    net = network(denoiser=Asking())
    fast, direct = (net.optimize(dtype=dtype, convolutions=c) for c in (kind, "direct"))
    assert fast.report["convolutions"][0] != "direct"
    y = torch.rand_like(net.op(torch.rand(1, 1, 12, 16)))
    limit = 0.02 if kind == "packed" else 1e-5
    torch.testing.assert_close(fast(y), direct(y), rtol=limit, atol=limit)
    layer = fast.denoiser.copies[0].body
    assert type(layer) is not nn.Conv2d and layer.gain == 0.7 and layer.padding == (1, 1)
    assert torch.equal(copy.deepcopy(fast)(y), fast(y))


def _own_forward(layer):
    call = layer.forward
    layer.forward = lambda z: 3 * call(z)


@pytest.mark.parametrize("change", [_own_forward, lambda layer: layer.register_buffer("gain", torch.tensor(3.0))])
def test_layers_that_are_more_than_a_plain_one_are_not_replaced(change):
    module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    change(module[1])
    x = torch.rand(1, 8, 6, 7)
    expected = module(x)
    assert replace_convolutions([module], "winograd") == (1, 2)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)
    assert type(module[1]) is nn.Conv2d


def test_a_stand_in_is_called_as_the_layer_is():
    """With images of another dtype, and with the size of a transposed convolution's result by name or in its place."""
    up = nn.ConvTranspose2d(3, 8, 2, stride=2, dtype=torch.bfloat16)
    x, stand_in = torch.rand(1, 3, 4, 5), PackedConvTranspose2d(up)
    close = dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(stand_in(x), up(x.bfloat16()), **close)
    for size in ((8, 10), (9, 11), (1, 8, 9, 10)):
        expected = up(x.bfloat16(), output_size=size)
        torch.testing.assert_close(stand_in(x.bfloat16(), output_size=size), expected, **close)
        torch.testing.assert_close(stand_in(x.bfloat16(), size), expected, **close)


def test_a_block_of_other_sizes_is_two_convolutions():
    """Where the middle has another size than the image, or a layer was left alone."""
    bf16 = {"dtype": torch.bfloat16}
    x = torch.randn(1, 4, 6, 5, **bf16)
    for first, second in (
        (nn.Conv2d(4, 6, 5, padding=2, **bf16), nn.Conv2d(6, 4, 3, padding=1, **bf16)),
        (nn.Conv2d(4, 6, 3, **bf16), nn.Conv2d(6, 4, 3, padding=2, **bf16)),
    ):
        expected = x + second(torch.relu(first(x)))
        for a, b in ((PackedConv2d(first), PackedConv2d(second)), (first, PackedConv2d(second)), (first, second)):
            y = residual_block(a, b, x, x)
            torch.testing.assert_close(y, expected + x, rtol=0.02, atol=0.03)


def test_what_minimal_filtering_leaves_alone():
    layers = {
        "size": nn.Conv2d(8, 8, 5, padding=2),
        "stride": nn.Conv2d(8, 8, 3, padding=1, stride=2),
        "dilation": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        "padding": nn.Conv2d(8, 8, 3),
        "mode": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        "groups": nn.Conv2d(8, 8, 3, padding=1, groups=2),
        "channels": nn.Conv2d(8, 7, 3, padding=1),
        "dtype": nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64),
        "kind": nn.ConvTranspose2d(8, 8, 3, padding=1),
    }
    for layer in layers.values():
        with pytest.raises(ValueError, match="conv: expected a 3 x 3 convolution with stride and padding 1, got"):
            WinogradConv2d(layer)
    shared = nn.Conv2d(8, 8, 3, padding="same")
    module = nn.Sequential(*layers.values(), shared, shared)
    assert replace_convolutions([module], "winograd") == (2, 11)
    assert type(module[-1]) is WinogradConv2d and module[-1] is module[-2]
    z = torch.rand(1, 8, 6, 7)
    torch.testing.assert_close(module[-1](z), shared(z), rtol=0, atol=1e-5)
    assert [type(a) for a in list(module)[:-2]] == [type(a) for a in layers.values()]


def test_without_images_bf16_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setitem(sys.modules, "skimage", None)
    fast = network().optimize()
    assert fast.report["dtype"][0] == "float32" and "score not checked" in fast.report["dtype"][1]
    assert {p.dtype for p in fast.denoiser.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("op", "channels", "size"),
    [
        (lambda: lf.BlockCS.gaussian(0.1, 33), 1, (240, 240)),
        (lambda: lf.CASSI(torch.ones(16, 20), bands=5), 5, (16, 20)),
        (lambda: lf.BlurDownsample(torch.ones(3, 3) / 9, scale=3), 3, (240, 240)),
    ],
)
def test_the_photographs_fit_every_operator(op, channels, size):
    net = lf.LoRun(op(), lf.ResUNet(channels, channels, channels=(4,), blocks=1), stages=1)
    with torch.device("meta"):  # as with a GPU for torch.set_default_device
        images = optimize.demo_images(net)
    assert images.shape == (2, channels, *size)
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.1
    net.op(images)


def test_the_photographs_in_gray_are_their_luma():
    gray, colour = (
        optimize.demo_images(lf.LoRun(op, lf.ResUNet(c, c, channels=(4,), blocks=1), stages=1))
        for op, c in ((lf.BlockCS.gaussian(0.1, 8), 1), (lf.BlurDownsample(torch.ones(3, 3) / 9, scale=3), 3))
    )
    red, green, blue = colour.unbind(1)
    torch.testing.assert_close(gray[:, 0], 0.299 * red + 0.587 * green + 0.114 * blue)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, z):
        return z + self.second(torch.relu(self.first(z)))


@pytest.mark.parametrize("denoiser", [Residual, lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU())])
def test_every_stage_is_compiled_with_its_weights_frozen(x, denoiser):
    stages = 10  # more graphs than torch keeps of one function
    net = network(denoiser=denoiser(), stages=stages)
    fast, y = net.optimize(compile=True, convolutions="direct", dtype=torch.float32), net.op(x)
    counters.clear()
    for _ in range(2):
        torch.testing.assert_close(fast(y, size=SIZE), net(y, size=SIZE))
    assert counters["stats"]["unique_graphs"] == stages
    convolutions = sum(isinstance(m, nn.Conv2d) for m in net.denoiser.base.modules())
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == convolutions * stages
    assert "frozen" in fast.report["torch.compile"][0]
    assert set(fast.state_dict()) == set(net.optimize().state_dict())


def test_compiled_stages_inside_of_a_graph_and_copies_of_them(graph_counter, x):
    fast = network(denoiser=Residual(), stages=2).optimize(compile=True)
    y = fast.op(x)
    expected = fast(y, size=SIZE)
    torch.testing.assert_close(copy.deepcopy(fast)(y, size=SIZE), expected)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend=graph_counter)(y, size=SIZE), expected)
    assert graph_counter.graphs == 1


def test_the_report_has_a_line_for_each_choice():
    fast = network().optimize()
    text = str(fast.report)
    for what in ("merged", "layout", "dtype", "convolutions", "torch.compile", "CUDA graph"):
        assert what in text and what in repr(fast)
    assert fast.report["merged"][0] == f"{len(network().denoiser.adapted)} layers, 3 stages"
    with pytest.raises(KeyError, match=r"expected one of merged, layout, .*, got 'mergd'"):
        fast.report["mergd"]


def test_a_denoiser_without_parameters(x):
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 8), nn.Identity(), stages=2, sharing="tied").eval()
    y = net.op(x)
    torch.testing.assert_close(net.optimize()(y), net(y))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.int8}, TypeError, "dtype: expected float32, bfloat16, float16 or None, got torch.int8"),
        ({"cuda_graph": True}, ValueError, "cuda_graph: expected a network on a CUDA device, got one on cpu"),
        ({"cuda_graph": "yes"}, TypeError, "cuda_graph: expected True, False or None, got 'yes'"),
        ({"channels_last": "yes"}, TypeError, "channels_last: expected True, False or None, got 'yes'"),
        ({"compile": "yes"}, TypeError, "compile: expected True or False, got 'yes'"),
        ({"sigma": torch.ones(2)}, TypeError, "sigma: expected a number"),
        ({"sigma": "a"}, TypeError, "sigma: expected a number, got 'a'"),
        ({"sigma": -1}, ValueError, "sigma: expected a noise level of at least 0, got -1"),
        ({"images": [1]}, TypeError, "images: expected a tensor, got list"),
        ({"images": torch.ones(1, 1, 8, 8).long()}, TypeError, "images: expected float32, .*, got torch.int64"),
        ({"images": torch.rand(8, 8)}, ValueError, r"images: expected \(N, C, H, W\), got shape \(8, 8\)"),
        ({"images": torch.rand(0, 1, 8, 8)}, ValueError, r"images: expected at least one, got shape \(0, 1, 8, 8\)"),
        (
            {"images": torch.full((1, 1, 8, 8), float("nan"))},
            ValueError,
            r"images: expected values in \[0, 1\], got nan",
        ),
        (
            {"images": torch.full((1, 1, 8, 8), 255.0)},
            ValueError,
            r"images: expected values in \[0, 1\], got 255 to 255",
        ),
        (
            {"images": torch.rand(1, 2, 8, 8)},
            ValueError,
            "images: expected what the network's operator measures, got .*x",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        network().optimize(**arguments)


def test_images_and_a_level_that_are_given_have_to_tell_a_score(monkeypatch, x):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)

    class Large(lf.ResUNet):
        def forward(self, z):
            if z.shape[-1] < 64:
                raise ValueError("expected 64 columns or more")
            return super().forward(z)

    large = network(denoiser=Large(channels=(4,), blocks=1))
    with pytest.raises(ValueError, match=r"images, sigma: expected what the network takes, got .* 64 columns or more"):
        large.train().optimize(images=x)
    assert large.training
    with pytest.raises(ValueError, match=r"images, sigma: expected what the network takes, got .* takes no sigma"):
        network().optimize(sigma=0.1, images=x)
    broken = network()
    broken.step_size.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="images, sigma: expected a score of the network in fp32, got NaN"):
        broken.optimize(images=x)


@pytest.mark.parametrize("move", [lambda net: net.double(), lambda net: net.to("meta")], ids=["dtype", "device"])
def test_a_moved_network_forgets_its_graphs(move):
    """They would read the memory that the parameters lay in."""
    fast = network().optimize()
    fast._graphs = optimize._Graphs()
    fast._graphs.captured["a size"] = "a recording"
    move(fast)
    assert fast._graphs.captured == {}


def test_convolutions_of_fp32_do_not_become_narrow():
    fast = network().optimize(convolutions="winograd")
    with pytest.raises(TypeError, match=r"expected float32 or float64, .* got torch.bfloat16: optimize\(dtype="):
        fast.bfloat16()
    assert {p.dtype for p in fast.parameters()} == {torch.float32}
    assert next(fast.double().denoiser.parameters()).dtype == torch.float64
    assert next(network().optimize(convolutions="direct").bfloat16().denoiser.parameters()).dtype == torch.bfloat16


def test_what_a_graph_can_replay(x):
    """Not a call with another operator, with a level in a tensor, or for every iterate."""
    net = network(denoiser=lf.ResUNet(channels=(4,), blocks=1, noise_level=True))
    fast, replayed = net.optimize(), []
    fast._graphs = lambda y, settings, call: replayed.append(settings) or call(y)
    y = net.op(x)
    fast(y, size=SIZE, sigma=0.1)
    assert replayed == [(SIZE, 0.1)]
    fast(y, size=list(SIZE), sigma=0.1)
    assert replayed.pop() == (SIZE, 0.1)  # what graphs are kept under, which takes no lists
    fast(y, op=copy.deepcopy(net.op), size=SIZE, sigma=0.1)
    fast(y, size=SIZE, sigma=torch.tensor(0.1))
    fast(y, size=SIZE, sigma=0.1, return_stages=True)
    assert len(replayed) == 1


class NoCopiesFromTheHost(TorchFunctionMode):
    """Fails where numbers become a tensor by way of the host's memory, which a CUDA graph cannot record."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            assert isinstance(args[0], torch.Tensor), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cs-25", "sr", "cassi"])
def test_a_call_copies_nothing_from_the_host(name):
    net = lf.load_pretrained(name).eval()
    sigma = 0.1 if net.denoiser.base.noise_level else None
    height, width = getattr(net.op, "mask", torch.empty(24, 36)).shape
    image = torch.rand(1, {"cs": 1, "sr": 3, "cassi": 28}[net.op.task], height, width)
    with torch.no_grad(), NoCopiesFromTheHost():
        y = net.op(image)
        net(y, size=(height, width), sigma=sigma)


def test_a_graph_serves_one_size_and_setting(monkeypatch):
    class Graph:
        def __init__(self, y, x, call):
            self.replay = lambda: x.copy_(call(y))

    def capture(y, call):
        y, x = y.clone(), call(y)
        return Graph(y, x, call), y, x

    graphs = optimize._Graphs()
    monkeypatch.setattr(graphs, "_capture", capture)
    ones, results = torch.ones(2), []
    for y, factor in ((ones, 2), (3 * ones, 2), (ones, 5), (torch.ones(3), 2), (ones.double(), 2)):
        results.append(graphs(y, (None, factor), lambda y, factor=factor: factor * y))
    assert [t.tolist() for t in results] == [[2, 2], [6, 6], [5, 5], [2, 2, 2], [2, 2]]
    assert len(graphs.captured) == 4


def test_what_is_recorded_in_inference_mode_serves_outside_of_it(monkeypatch):
    class Any:
        def __getattr__(self, name):
            return lambda *args: None

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: Any())
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **settings: contextlib.nullcontext())
    graphs, weight = optimize._Graphs(), torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        graphs(torch.ones(3), (), lambda y: y * weight)
    with torch.no_grad():
        got = graphs(torch.ones(3), (), lambda y: y * weight)
    assert len(graphs.captured) == 1 and not got.requires_grad


def test_a_size_is_recorded_when_it_comes_again(monkeypatch):
    recorded = []
    graphs = optimize._Graphs(after=1)
    monkeypatch.setattr(graphs, "_capture", lambda y, call: recorded.append(len(y)) or (Replay(), y.clone(), y.clone()))

    class Replay:
        def replay(self):
            pass

    for n in (1, 2, 1, 1):
        graphs(torch.ones(n), (), lambda y: y)
        recorded.append("called")
    assert recorded == ["called", "called", 1, "called", "called"]


class TestFusedConv2d:
    """The stand-in of a GPU, for which the kernels' interpreter stands here."""

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch):
        needs_triton()
        monkeypatch.setattr(FusedConv2d, "device", "cpu")

    @pytest.fixture
    def served(self, monkeypatch):
        """The calls that the kernel serves."""
        found = []
        kernel = _backends.BACKENDS["lora_conv2d"]["triton"]
        counted = replace(kernel, forward=lambda *args: (found.append(args), kernel.forward(*args))[1])
        monkeypatch.setitem(_backends.BACKENDS["lora_conv2d"], "triton", counted)
        return found

    @pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
    @pytest.mark.parametrize("settings", [{"padding": 1}, {"padding": "same", "dilation": 2}, {}], ids=str)
    @torch.no_grad()
    def test_is_the_layer_with_what_follows(self, settings, bias, served):
        conv = nn.Conv2d(3, 5, 3, bias=bias, **settings).half()
        x = torch.randn(2, 3, 6, 7).half().contiguous(memory_format=torch.channels_last)
        fused, expected = FusedConv2d(conv), conv.float()(x.float())
        beside = torch.randn_like(expected).half().contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(x).float(), expected, rtol=2e-3, atol=2e-3)
        got = fused(x, "relu", beside)
        assert got.dtype == torch.float16 and got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.float(), expected.relu() + beside.float(), rtol=2e-3, atol=4e-3)
        assert len(served) == 2

    def test_where_a_gradient_is_wanted_torch_convolves(self, served):
        fused = FusedConv2d(nn.Conv2d(3, 5, 3).half())
        x = torch.randn(2, 3, 6, 7).half().requires_grad_()
        (grad,) = torch.autograd.grad(fused(x, "relu").float().sum(), x)
        assert grad.abs().max() > 0 and not served
        torch.export.export(fused, (x.detach(),))
        assert not served

    @pytest.mark.parametrize(
        ("channels", "n", "size", "pays"),
        [
            ((16, 16), 16, 256, True),
            ((32, 32), 16, 256, True),
            ((64, 64), 1, 256, True),
            ((64, 64), 16, 128, False),
            ((96, 96), 1, 64, True),
            ((96, 96), 16, 64, False),
            ((1, 64), 16, 256, True),
        ],
    )
    def test_by_size(self, channels, n, size, pays):
        fused = FusedConv2d(nn.Conv2d(*channels, 3).half())
        assert fused._pays(torch.empty(n, channels[0], size, size, device="meta")) == pays

    @torch.no_grad()
    @pytest.mark.parametrize(("settings", "taken"), [({"padding": 1}, 1), ({"padding": 2, "dilation": 2}, 0)], ids=str)
    def test_the_kernel_for_hopper_goes_first_where_it_pays(self, settings, taken, monkeypatch):
        monkeypatch.setattr(FusedConv2d, "_pays", lambda self, x: False)  # the other kernel
        monkeypatch.setattr(fused_conv2d, "unfit", lambda x, weight: None)
        calls = []
        convolve = fused_conv2d.fused_conv2d
        counted = lambda *args, **given: (calls.append(given), convolve(*args, **given))[1]  # noqa: E731
        monkeypatch.setattr(fused_conv2d, "fused_conv2d", counted)
        fused = FusedConv2d(nn.Conv2d(64, 64, 3, **settings).bfloat16())
        for size, expected in ((512, taken), (8, 0)):
            x, calls[:] = torch.rand(1, 64, size, size).bfloat16(), []
            want = torch.relu(nn.functional.conv2d(x, fused.weight, fused.bias, **settings)) + x
            torch.testing.assert_close(fused(x, "relu", x), want, rtol=2e-2, atol=2e-2)
            assert len(calls) == expected

    @torch.no_grad()
    def test_where_it_does_not_pay_torch_convolves(self, served, monkeypatch):
        fused, x = FusedConv2d(nn.Conv2d(16, 16, 3).half()), torch.randn(1, 16, 4, 4).half()
        monkeypatch.setattr(FusedConv2d, "_pays", lambda self, x: False)
        want = fused(x, "relu")
        assert not served
        fused.everywhere = True
        torch.testing.assert_close(fused(x, "relu"), want, rtol=2e-3, atol=2e-3)
        assert len(served) == 1

    @pytest.mark.parametrize(
        ("conv", "reason"),
        [
            (nn.Conv2d(3, 5, 3), "float32"),
            (nn.Conv2d(4, 4, 3, groups=2).half(), "grouped"),
            (nn.Conv2d(4, 256, 3).half(), "128 channels"),
            (nn.Conv2d(4, 4, 2).half(), "3 x 3"),
            (nn.Conv2d(4, 4, 3, stride=2).half(), "stride"),
            (nn.ConvTranspose2d(4, 4, 2).half(), "ConvTranspose2d"),
        ],
    )
    def test_what_it_does_not_stand_for(self, conv, reason):
        with pytest.raises(ValueError, match=reason):
            FusedConv2d(conv)

    @torch.no_grad()
    def test_a_network(self, served):
        net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), lf.ResUNet(channels=(4, 8), blocks=1), stages=2)
        fast, direct = (net.optimize(dtype=torch.float16, convolutions=kind) for kind in ("fused", "direct"))
        assert fast.report["convolutions"] == ("fused kernel", "8 of 10 layers a stage; asked for")
        y = net.op(torch.rand(1, 1, 16, 16))
        torch.testing.assert_close(fast(y), direct(y), rtol=5e-3, atol=5e-3)
        assert len(served) == 16


def test_what_a_gpu_convolves_by():
    needs_triton()
    gpu = torch.device("cuda")
    assert optimize.fastest_convolutions(torch.bfloat16, gpu)[0] == "fused"
    assert optimize.fastest_convolutions(torch.bfloat16, gpu, launched=True)[0] == "direct"
    assert optimize.fastest_convolutions(torch.float32, gpu) == (
        "direct",
        "the kernel gains in 16 bits, this is float32",
    )
    with pytest.raises(ValueError, match="'fused' expects a network on a GPU"):
        network().optimize(convolutions="fused")


@pytest.mark.gpu
def test_a_cuda_graph_is_replayed_per_size(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default; rounds to 5e-4
    net = network().cuda()
    fast = net.optimize(dtype=torch.float32)
    assert fast.report["CUDA graph"][0] == "yes"
    for n in (1, 2, 1):
        y = net.op(torch.rand(n, 1, *SIZE, device="cuda"))
        torch.testing.assert_close(fast(y, size=SIZE), net(y, size=SIZE))
    assert len(fast._graphs.captured) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "channels"), [(1, (16, 32, 64)), (8, (16, 32, 64)), (4, (64, 64))], ids=str)
def test_fused_convolutions_on_a_gpu(n, channels):
    net = lf.LoRun(lf.BlockCS.gaussian(0.25), lf.ResUNet(channels=channels), stages=2).cuda()
    y = net.op(torch.rand(n, 1, 256, 256, device="cuda"))
    with torch.no_grad():
        expected = net.eval()(y)
    fast = net.optimize(dtype=torch.bfloat16)
    assert fast.report["convolutions"][0] == "fused kernel"
    for _ in range(2):
        assert (fast(y) - expected).norm() <= 0.02 * expected.norm()


def _small(denoiser: nn.Module, **settings) -> lf.LoRun:
    return lf.LoRun(lf.BlockCS.gaussian(0.25, 8), denoiser, stages=2, **settings)


class Views(nn.Module):
    """Reads memory in the order of its axes, which channels innermost do not have."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, z):
        t = self.a(z)
        return z + self.b(t.view(len(t), -1).view(t.shape))


def test_a_denoiser_that_does_not_run_on_channels_innermost(monkeypatch):
    monkeypatch.setattr(optimize, "fast_bf16", lambda device: (True, "asked by a test"))
    net, images = _small(Views()).eval(), torch.rand(1, 1, 16, 16)
    fast = net.optimize(images=images)
    layout, why = fast.report["layout"]
    assert layout == "contiguous" and why.startswith("the denoiser does not run on channels innermost")
    y = net.op(images)
    torch.testing.assert_close(fast(y), net(y), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="the denoiser does not run as asked for: view size"):
        net.optimize(images=images, channels_last=True)


class OneByOne(nn.Module):
    """Calls its layers with single images."""

    def __init__(self):
        super().__init__()
        self.thin, self.wide, self.back = (nn.Conv2d(*c, 3, padding=1) for c in ((1, 16), (16, 16), (16, 1)))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, z):
        return z + torch.stack([self.back(self.wide(self.depthwise(torch.relu(self.thin(i))))) for i in z])


@pytest.mark.filterwarnings("ignore:adapt. 1 grouped layers")
@pytest.mark.parametrize(("convolutions", "dtype"), [("winograd", torch.float32), ("packed", torch.bfloat16)])
def test_stand_ins_take_one_image(convolutions, dtype):
    net = _small(OneByOne()).eval()
    y = net.op(torch.rand(2, 1, 16, 16))
    fast = net.optimize(dtype=dtype, convolutions=convolutions)
    assert int(fast.report["convolutions"][1].split()[0]) >= 2
    torch.testing.assert_close(fast(y), net(y), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(("convolutions", "dtype"), [("winograd", torch.float32), ("packed", torch.bfloat16)])
def test_hooks_on_the_layers_of_an_optimized_block_run(convolutions, dtype):
    net = _small(lf.ResUNet(channels=(16, 16), blocks=1)).eval()
    fast = net.optimize(dtype=dtype, convolutions=convolutions)
    y, called = net.op(torch.rand(1, 1, 16, 16)), []
    layers = [m for m in fast.denoiser.copies[0].modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    before = fast(y)
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: called.append(module))
    torch.testing.assert_close(fast(y), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert set(called) == set(layers)


def test_optimizing_leaves_the_modes_of_the_network():
    class Dropping(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 8, 3, padding=1), nn.Dropout(0.5), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1))

    net, images = _small(Dropping(), sharing="tied"), torch.rand(1, 1, 16, 16)
    base = net.denoiser.base
    base[2].eval()
    net.optimize(images=images, dtype=torch.bfloat16)
    assert net.training and base[1].training and not base[2].training
    net.eval()
    base[1].train()
    net.optimize(images=images, dtype=torch.bfloat16)
    assert base[1].training and not base[2].training
    net = _small(Dropping())
    net.optimize(images=images, dtype=torch.bfloat16)
    assert net.training and not net.denoiser.merged


def test_a_copy_of_a_compiled_network_is_compiled():
    fast = _small(lf.ResCNN(channels=4, blocks=1)).eval().optimize(dtype=torch.float32, compile=True)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert all(stage._compiled_call_impl is not None for stage in other.denoiser.copies)


def test_a_conversion_to_the_dtype_it_has():
    net = _small(lf.ResUNet(channels=(16, 16), blocks=1)).eval()
    y = net.op(torch.rand(1, 1, 16, 16))
    fast = net.optimize(dtype=torch.bfloat16, convolutions="winograd")
    expected = fast(y)
    assert torch.equal(fast.to(torch.bfloat16)(y), expected)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        fast.half()
