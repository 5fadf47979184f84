"""The packed backend of lora_conv2d: what it serves, and that it computes what the others do."""

from __future__ import annotations

import lora_help
import pytest
import torch
from lora_help import call_of, channels_last, why_not
from torch import nn

import lorun_fast as lf
from lorun_fast import _native, adapters
from lorun_fast.functional import lora_conv2d
from lorun_fast.ops import _backends, _lora_packed

K = 3
backend = _backends.BACKENDS["lora_conv2d"]["packed"]


@pytest.fixture
def anywhere(monkeypatch):
    lora_help.packed_anywhere(monkeypatch)


def problem(form="loralib", **sizes) -> dict:
    return channels_last(lora_help.problem(form, dtype=torch.float32, **sizes), torch.bfloat16)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("stage", [None, torch.tensor([2, 0, 0, 1])], ids=["one", "per sample"])
@pytest.mark.parametrize("added", [False, True])
def test_results_and_gradients_are_those_of_the_definition(monkeypatch, anywhere, activation, form, stage, added):
    p = problem(form, stages=None if stage is None else K)
    generator = torch.Generator().manual_seed(1)
    if added:
        p["residual"] = torch.randn(4, 16, 7, 6, generator=generator).bfloat16()
    weights = torch.randn(4, 16, 7, 6, generator=generator)
    calls, found = [], {}
    convolution = _lora_packed.conv_op
    monkeypatch.setattr(_lora_packed, "conv_op", lambda *a: calls.append(1) or convolution(*a))
    for wish, dtype in (("packed", torch.bfloat16), ("aten", torch.bfloat16), ("reference", torch.float64)):
        monkeypatch.setattr(_native, "WISH", wish)
        leaves = {
            name: t.to(dtype if t.dtype == torch.bfloat16 or wish == "reference" else t.dtype) for name, t in p.items()
        }
        leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        y = lora_conv2d(**leaves, stage=stage, scale=0.7, padding=1, activation=activation)
        found[wish] = [y, *torch.autograd.grad((y * weights).sum(), leaves.values())]
        if wish == "packed":
            assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16
            assert len(calls) >= (2 if stage is None else 6)
    for name, ours, atens, exact in zip(["y", *p], found["packed"], found["aten"], found["reference"], strict=True):
        largest = exact.abs().max()
        error, other = ((t.double() - exact).abs().max() / largest for t in (ours, atens))
        assert error <= 2 * other + 0.005, f"{name}: {error} of the largest value, aten {other}"


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize(
    ("kernel", "settings"),
    [(1, {}), (5, {"padding": 2}), (3, {"padding": 1, "stride": 2}), (3, {}), (3, {"padding": 4}), (2, {"stride": 2})],
)
def test_other_kernels_and_strides(monkeypatch, anywhere, form, kernel, settings):
    found = {}
    for wish in ("packed", "reference"):
        monkeypatch.setattr(_native, "WISH", wish)
        p = problem(form, kernel=kernel, size=(8, 10))
        leaves = {name: (t.double() if wish == "reference" else t).clone().requires_grad_() for name, t in p.items()}
        y = lora_conv2d(**leaves, **settings)
        found[wish] = [y, *torch.autograd.grad(y.sum(), [leaves[name] for name in ("x", "down", "up")])]
    for name, ours, exact in zip(("y", "x", "down", "up"), found["packed"], found["reference"], strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 0.02, f"{name}: {error} of the largest value"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("stage", [None, torch.tensor([2, 0, 0, 1])], ids=["one", "per sample"])
@pytest.mark.parametrize(
    ("size", "image", "by_tiles"), [(2, (8, 10), True), (3, (6, 9), True), (2, (7, 10), False), (2, (8, 11), False)]
)
def test_kernels_as_large_as_their_stride(monkeypatch, anywhere, transposed, form, stage, size, image, by_tiles):
    """Convolutions and transposed ones in cells: both images' gradients and the weight's by the ops for tiles."""
    calls = []
    for name in ("conv_op", "gradient_op"):
        op = getattr(_lora_packed, name)
        counted = lambda *a, _op=op, _name=name, **s: calls.append(_name) or _op(*a, **s)  # noqa: E731
        monkeypatch.setattr(_lora_packed, name, counted)
    p = channels_last(
        lora_help.problem(
            form, in_=16, out=16, kernel=size, size=image, dtype=torch.float32, transposed=transposed,
            stages=None if stage is None else K,
        ),
        torch.bfloat16,
    )  # fmt: skip
    settings = (stage, None, 0.7, [size, size], [0, 0], [1, 1], 1, None, transposed, [0, 0])
    found = {}
    for wish in ("packed", "reference"):
        monkeypatch.setattr(_native, "WISH", wish)
        leaves = {name: (t.double() if wish == "reference" else t).clone().requires_grad_() for name, t in p.items()}
        y = torch.ops.lorun_fast.lora_conv2d(*leaves.values(), *settings)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        found[wish] = [y, *torch.autograd.grad((y * weights).sum(), leaves.values())]
        if wish == "packed":
            each = 1 if stage is None else 3
            assert calls.count("conv_op") == each * (2 if by_tiles or transposed else 1)
            assert calls.count("gradient_op") == each * size * (by_tiles or transposed)
            assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16
    for name, ours, exact in zip(("y", *p), found["packed"], found["reference"], strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 0.02, f"{name}: {error} of the largest value"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"weight": (16, 8, 5, 5)}, None),
        ({"stride": [2, 2]}, None),
        ({"weight": (16, 8, 3, 5)}, "its kernel is square"),
        ({"weight": (16, 8, 9, 9)}, "at most 7 x 7"),
        ({"groups": 2}, "of one group"),
        ({"transposed": True}, "a transposed kernel is its stride"),
        ({"transposed": True, "stride": [3, 3], "padding": [0, 0]}, "rows in multiples of 16 channels"),
        ({"transposed": True, "weight": (8, 16, 2, 2), "stride": [2, 2], "padding": [0, 0]}, None),
        ({"transposed": True, "weight": (8, 16, 2, 2), "stride": [2, 2], "padding": [1, 1]}, "without padding"),
        ({"stride": [2, 1]}, "its strides and paddings are the same"),
        ({"padding": [0, 1]}, "its strides and paddings are the same"),
        ({"dilation": [2, 2]}, "its dilation is 1"),
        ({"weight": (16, 8, 7, 7), "padding": [0, 0]}, "the kernel fits the image"),
        ({"layout": torch.contiguous_format}, "channels_last"),
        ({"layout": torch.contiguous_format, "weight": (16, 1, 3, 3)}, None),
        ({"dtype": torch.float32}, "bfloat16"),
    ],
)
def test_what_it_serves(change, reason):
    layout, dtype = change.pop("layout", torch.channels_last), change.pop("dtype", torch.bfloat16)
    weight = torch.zeros(change.pop("weight", (16, 8, 3, 3)))
    channels = 8 if change.get("transposed") else weight.shape[1]
    x = torch.zeros(1, channels, 5, 5, dtype=dtype).contiguous(memory_format=layout)
    found = why_not(backend, x, weight, **change)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("amx", [False, True])
def test_it_serves_where_there_are_tiles(monkeypatch, amx):
    monkeypatch.setattr(_native, "available", lambda: True)
    monkeypatch.setattr(_native, "has_tiles", lambda: amx)
    p = problem()
    args = call_of(p)
    assert _backends.choose("lora_conv2d", "cpu", args).name == ("packed" if amx else "winograd")
    args = (p["x"].float(), *args[1:])
    assert _backends.choose("lora_conv2d", "cpu", args).name == "aten"
    if not amx:
        monkeypatch.setattr(_native, "WISH", "packed")
        with pytest.raises(
            RuntimeError, match="LORUN_BACKEND=packed: expected a backend that runs here, got none: this"
        ):
            _backends.choose("lora_conv2d", "cpu", args)
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "not built")
    assert _lora_packed.missing() == "not built"


def test_a_network_trains_to_the_same_gradients(monkeypatch, anywhere):
    torch.manual_seed(0)
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), lf.ResUNet(channels=(8, 16), blocks=1), stages=2)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    x, found = torch.rand(2, 1, 16, 24), {}
    for wish in ("packed", "aten", "exact"):
        monkeypatch.setattr(_native, "WISH", "aten" if wish == "exact" else wish)
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=wish != "exact"):
            loss = (net(net.op(x), size=(16, 24)) - x).square().mean()
        loss.backward()
        found[wish] = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert len(found["exact"]) > 10

    def error(wish: str) -> float:
        return max(((found[wish][name] - g).norm() / g.norm()).item() for name, g in found["exact"].items())

    assert error("packed") < 1.5 * error("aten") + 0.01
