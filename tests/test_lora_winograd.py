"""The winograd backend of lora_conv2d: what it serves, and that it computes what the others do."""

from __future__ import annotations

import lora_help
import pytest
import torch
from lora_help import call_of, channels_last, why_not
from torch import nn

import lorun_fast as lf
from lorun_fast import _native, adapters
from lorun_fast.functional import lora_conv2d
from lorun_fast.ops import _backends, fused_conv2d, winograd_conv2d

K = 3
backend = _backends.BACKENDS["lora_conv2d"]["winograd"]


@pytest.fixture
def asked_for(monkeypatch):
    monkeypatch.setattr(_native, "WISH", "winograd")


def problem(form="loralib", **sizes) -> dict:
    return channels_last(lora_help.problem(form, **sizes))


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("stage", [None, torch.tensor([2, 0, 0, 1])], ids=["one", "per sample"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("channels", "out"), [(8, 16), (28, 9), (8, 1), (16, 3), (3, 8)])
def test_results_and_gradients_are_those_of_the_definition(monkeypatch, activation, form, stage, added, channels, out):
    p = problem(form, stages=None if stage is None else K, in_=channels, out=out)
    if added:
        p["residual"] = torch.randn(4, out, 7, 6, dtype=torch.float64)
    calls, found = [], {}
    thin = min(channels, out) <= 4

    def counted(convolution):
        def call(*args, **settings):
            calls.append(1)
            return convolution(*args, **settings)

        return call

    for name, kernel in (
        ("winograd_conv2d", not thin and winograd_conv2d.winograd_conv2d),
        ("fused_conv2d", thin and fused_conv2d.fused_conv2d),
    ):
        monkeypatch.setattr(f"lorun_fast.ops._lora_winograd.{name}", counted(kernel) if kernel else None)
    weights = torch.randn(4, out, 7, 6, dtype=torch.float64)
    for wish in ("winograd", "reference"):
        monkeypatch.setattr(_native, "WISH", wish)
        leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
        y = lora_conv2d(**leaves, stage=stage, scale=0.7, padding=1, activation=activation)
        found[wish] = [y, *torch.autograd.grad((y * weights).sum(), leaves.values())]
        assert y.is_contiguous(memory_format=torch.channels_last)
    distinct = 1 if stage is None else 3
    repeated = activation == "gelu" or (added and activation is not None)
    assert len(calls) == distinct * (3 if repeated else 2)
    for name, a, b in zip(["y", *p], found["winograd"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"weight": (16, 8, 5, 5)}, "3 x 3"),
        ({"groups": 2}, "3 x 3"),
        ({"transposed": True}, "3 x 3"),
        ({"stride": [2, 1]}, "stride, padding and dilation are 1"),
        ({"padding": [0, 0]}, "stride, padding and dilation are 1"),
        ({"weight": (12, 9, 3, 3)}, None),
        ({"weight": (12, 7, 3, 3)}, "8 channels or more"),
        ({"weight": (16, 5, 3, 3)}, "8 channels or more"),
        ({"weight": (12, 3, 3, 3)}, "1 to 4 and a multiple of 8"),
        ({"weight": (1, 16, 3, 3)}, None),
        ({"weight": (1, 16, 3, 3), "layout": torch.contiguous_format}, "channels_last"),
        ({"weight": (16, 3, 3, 3), "layout": torch.contiguous_format}, None),
        ({"layout": torch.contiguous_format}, "channels_last"),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.int32}, "floating-point image in channels_last"),
    ],
)
def test_what_it_serves(change, reason):
    layout, dtype = change.pop("layout", torch.channels_last), change.pop("dtype", torch.float32)
    x = torch.zeros(1, 8, 5, 5, dtype=dtype).contiguous(memory_format=layout)
    found = why_not(backend, x, torch.zeros(change.pop("weight", (16, 8, 3, 3))), **change)
    assert found is None if reason is None else reason in found


@pytest.fixture
def loops_are_asked_for_again():
    _native.has_fast_loops.cache_clear()
    yield
    _native.has_fast_loops.cache_clear()


@pytest.mark.parametrize("loops", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
def test_it_serves_16_bits_where_matrix_tiles_do_not(monkeypatch, loops_are_asked_for_again, amx, loops):
    monkeypatch.setattr(_native, "build_info", lambda: {"cpu_active": loops})
    monkeypatch.setattr(_native, "has_tiles", lambda: amx)
    measured = "aten" if loops == "baseline" else "winograd"
    for dtype, expected in (
        (torch.bfloat16, "packed" if amx else measured),
        (torch.float16, measured),
        (torch.float32, "aten"),
        (torch.float64, "aten"),
    ):
        args = call_of(problem(dtype=dtype))
        assert _backends.choose("lora_conv2d", "cpu", args).name == expected
        layer = [args[1], None, *args[3:5]]
        back = [args[1].mT.contiguous().new_zeros(args[1].transpose(0, 1).shape), None, None, None]
        block = (args[0], *layer, *back, None, None, 1.0, 1.0)
        usual = "layers" if expected == "aten" else expected
        assert _backends.choose("lora_residual_block", "cpu", block).name == usual
    for name in ("lora_conv2d", "lora_residual_block"):
        served = lf.show_config(quiet=True)["ops"][name]["cpu"]
        assert served["backend"] != "winograd" and "winograd: 16 bits" in served["reason"]


def test_in_fp32_it_serves_only_when_asked_for(monkeypatch):
    args = call_of(problem(dtype=torch.float32))
    assert _backends.choose("lora_conv2d", "cpu", args).name == "aten"
    served = lf.show_config(quiet=True)["ops"]["lora_conv2d"]["cpu"]
    assert "a fresh network would equal the tied one to rounding only" in served["reason"]
    monkeypatch.setattr(_native, "WISH", "winograd")
    if _native.available():
        assert _backends.choose("lora_conv2d", "cpu", args).name == "winograd"


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
def test_a_backend_for_a_while():
    args = call_of(problem(dtype=torch.float32))
    with pytest.raises(RuntimeError, match="inside"), lf.use_backend("winograd"):
        assert _backends.choose("lora_conv2d", "cpu", args).name == "winograd"
        with lf.use_backend("auto"):
            assert _backends.choose("lora_conv2d", "cpu", args).name == "aten"
        assert _backends.choose("lora_conv2d", "cpu", args).name == "winograd"
        raise RuntimeError("inside")
    assert _backends.choose("lora_conv2d", "cpu", args).name == "aten"
    with pytest.raises(ValueError, match="name: expected one of auto, reference"), lf.use_backend("fastest"):
        pass


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "out"), [(8, 16), (9, 12), (8, 1), (3, 8)])
def test_images_in_16_bits_beside_parameters_in_fp32(asked_for, form, dtype, channels, out):
    p = problem(form, stages=None, dtype=torch.float32, in_=channels, out=out)
    p["x"] = p["x"].to(dtype)
    grad = torch.randn(4, out, 7, 6).to(dtype)

    def call(wide):
        leaves = {name: (t.double() if wide else t.clone()).requires_grad_() for name, t in p.items()}
        y = lora_conv2d(**leaves, scale=0.7, padding=1)
        return y, *torch.autograd.grad(y, leaves.values(), grad.to(y.dtype))

    found, exact = call(wide=False), call(wide=True)
    assert _backends.choose("lora_conv2d", "cpu", call_of(p)).name == "winograd"
    for name, a, b in zip(["y", *p], found, exact, strict=True):
        assert a.dtype == (dtype if name in ("x", "y") else torch.float32)
        assert (a.double() - b).norm() < 2**-6 * b.norm(), name


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize(("channels", "out"), [(8, 16), (8, 1), (2, 16)])
def test_no_gradient_goes_by_a_direct_convolution(asked_for, monkeypatch, form, channels, out):
    p = problem(form, stages=None, dtype=torch.float32, in_=channels, out=out)
    p = {name: t.requires_grad_() for name, t in p.items()}
    y = lora_conv2d(**p, padding=1)

    def refused(*_):
        raise AssertionError("a direct convolution")

    monkeypatch.setattr("lorun_fast.ops._lora_aten.aten", refused)
    torch.autograd.grad(y.sum(), [p[name] for name in ("x", "down", "up")])


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
def test_a_first_layer_keeps_the_layout_that_torch_gives_it(asked_for):
    """From one channel, which is in no layout, torch's forward pass and this backward pass."""
    p = {name: t.requires_grad_() for name, t in lora_help.problem(in_=1, out=8, dtype=torch.float32).items()}
    y = lora_conv2d(**p, padding=1)
    assert y.is_contiguous() and _backends.choose("lora_conv2d", "cpu", call_of(p)).name == "winograd"
    grad = torch.randn_like(y).contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(y, list(p.values()), grad)
    with lf.use_backend("aten"):
        y = lora_conv2d(**p, padding=1)
    for name, a, b in zip(p, found, torch.autograd.grad(y, list(p.values()), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


def test_a_network_trains_to_the_same_gradients(asked_for):
    torch.manual_seed(0)
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), lf.ResUNet(channels=(8, 16), blocks=1), stages=2)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    x = torch.rand(2, 1, 16, 24)
    found = {}
    for wish in ("winograd", "aten"):
        _native.WISH = wish  # the fixture puts it back
        net.zero_grad()
        (net(net.op(x), size=(16, 24)) - x).square().mean().backward()
        found[wish] = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert len(found["aten"]) > 10
    for name, expected in found["aten"].items():
        torch.testing.assert_close(
            found["winograd"][name], expected, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )
