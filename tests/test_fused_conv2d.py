"""A 3 x 3 convolution with what follows it, against torch's in float64; its kernel is in test_cuda_kernels.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lorun_fast as lf
from lorun_fast.ops import fused_conv2d as ops

fused_conv2d = lf.functional.fused_conv2d
OP = torch.ops.lorun_fast.fused_conv2d.default


def arguments(dtype=torch.float64, n=2, channels=3, out=5, height=4, width=6):
    draw = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (
        (n, channels, height, width), (out, channels, 3, 3), (out,), (n, out, height, width)
    )]  # fmt: skip
    return draw


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_a_convolution_and_what_follows(dtype, activation):
    x, weight, bias, residual = arguments(dtype)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    exact = (exact.relu() if activation else exact) + residual.double()
    got = fused_conv2d(x, weight, bias, activation=activation, residual=residual)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    # 16 bits: rounded once, which three passes do not reach.
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)
    bare = F.conv2d(x.double(), weight.double(), padding=1)
    torch.testing.assert_close(fused_conv2d(x, weight).double(), bare, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("given", [(True, True), (False, False), (True, False)], ids=str)
def test_opcheck_and_gradients(relu, given):
    x, weight, bias, residual = arguments(n=1, channels=2, out=3, height=3, width=4)
    bias, residual = bias if given[0] else None, residual if given[1] else None
    for t in (x, weight, bias, residual):
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(OP, (x, weight, bias, residual, relu))
    activation = "relu" if relu else None

    def call(x, weight, bias, residual):
        return fused_conv2d(x, weight, bias, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))


def test_compiles_without_a_break():
    x, weight, bias, residual = arguments(torch.float32)

    def call(*args):
        return fused_conv2d(*args[:3], activation="relu", residual=args[3])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, residual), call(x, weight, bias, residual))


def test_what_the_kernel_does_not_serve():
    def reason(dtype=torch.bfloat16, channels=16, out=32, device="cuda", n=1):
        class There:  # where a tensor lies decides first; no GPU is asked
            pass

        x = There()
        x.device, x.dtype, x.shape = torch.device(device), dtype, torch.Size((n, channels, 1024, 1024))
        return ops.unfit(x, torch.empty(out, channels, 3, 3, device="meta"))

    assert "cpu device" in reason(device="cpu")
    assert "float32" in reason(dtype=torch.float32)
    assert "channels of 24 to 32" in reason(channels=24)
    assert "channels of 16 to 8" in reason(out=8)
    assert "channels of 144 to 32" in reason(channels=144)
    assert "2^29" in reason(n=1000)


@pytest.mark.parametrize(
    ("built", "capability", "expected"),
    [
        ({"cuda_archs": "8.0;9.0a"}, (9, 0), None),
        ({"cuda_archs": "8.0"}, (9, 0), "compiled for 8.0, not for 9.0a"),
        ({"cuda_archs": ""}, (9, 0), "compiled for nothing"),
        ({"cuda_archs": "8.0;9.0a"}, (8, 0), "compute capability 8.0, it needs 9.0"),
    ],
)
def test_which_gpus_it_runs_on(monkeypatch, built, capability, expected):
    monkeypatch.setattr(ops._native, "available", lambda: True)
    monkeypatch.setattr(ops._native, "build_info", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = ops.unavailable.__wrapped__(0)
    assert found is expected if expected is None else expected in found


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 4, 6)}, ValueError, r"x: expected \(N, C, H, W\)"),
        ({"x": torch.ones(1, 3, 4, 6, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"weight": torch.randn(5, 3, 3)}, ValueError, r"weight: expected \(out, 3, 3, 3\)"),
        ({"weight": torch.randn(5, 4, 3, 3)}, ValueError, r"weight: expected \(out, 3, 3, 3\)"),
        ({"weight": torch.randn(5, 3, 3, 3).double()}, TypeError, "weight: expected torch.float32"),
        ({"bias": torch.randn(4)}, ValueError, r"bias: expected shape \(5\)"),
        ({"residual": torch.randn(2, 5, 4, 5)}, ValueError, r"residual: expected shape \(2, 5, 4, 6\)"),
        ({"bias": torch.empty(5, device="meta")}, ValueError, "bias is on meta"),
        ({"activation": "gelu"}, ValueError, "activation: expected None or 'relu'"),
        ({"x": None}, TypeError, "x"),
        ({"bias": "a"}, TypeError, "bias: expected a tensor, got str"),
        ({"residual": 1.0}, TypeError, "residual: expected a tensor, got float"),
    ],
)
def test_bad_arguments(change, error, message):
    x, weight, bias, residual = arguments(torch.float32)
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual, **change}
    with pytest.raises(error, match=message):
        fused_conv2d(**given)


@pytest.mark.parametrize("shape", [(2, 3, 0, 6), (2, 3, 4, 0), (0, 3, 4, 6)])
@pytest.mark.parametrize("out", [1, 5])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_images_without_rows_or_columns(shape, out, activation):
    x, weight, bias, residual = arguments(torch.float32, shape[0], 3, out, *shape[2:])
    given = (x, weight, bias, residual)
    for t in given:
        t.requires_grad_()
    for more in ({}, {"residual": residual}):
        y = fused_conv2d(x, weight, bias, activation=activation, **more)
        assert y.shape == residual.shape
        grads = torch.autograd.grad(y.sum(), given, allow_unused=True)
        assert [g.shape for g in grads if g is not None] == [t.shape for t in given[: 3 + len(more)]]
        assert not grads[1].any() and not grads[2].any()
