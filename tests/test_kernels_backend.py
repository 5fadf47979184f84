"""The "triton" backend of the LoRA ops: what it serves, why it does not, and that it gives what the others give."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from kernels_help import channels_last, needs_triton

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.ops import _backends, _lora_triton

OPS = ("lora_conv2d", "lora_linear", "lora_merge")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets the backend serve CPU tensors, which the interpreter can, and puts it before the tables."""
    needs_triton()
    monkeypatch.setattr(_native, "WISH", "triton")
    for op in OPS:
        backend = _backends.BACKENDS[op]["triton"]
        monkeypatch.setitem(_backends.BACKENDS[op], "triton", dataclasses.replace(backend, devices=("cpu", "cuda")))


@pytest.mark.parametrize("form", ["peft", "loralib"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["one stage", "stage per sample"])
def test_a_layer_trains_on_it(form, per_sample, on_the_cpu, monkeypatch):
    layer = lf.LoRAConv2d(3, 4, 1, stages=3, rank=2, form=form)
    torch.nn.init.normal_(layer.up)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = channels_last(torch.randn(2, 3, 4, 5)).requires_grad_()
    stage = torch.tensor([2, 0]) if per_sample else 1

    def step():
        y = layer(x, stage)
        return y, *torch.autograd.grad(y.square().sum(), (x, layer.down, layer.up))

    served = []
    forward = _lora_triton.conv2d
    backend = _backends.BACKENDS["lora_conv2d"]["triton"]
    spied = dataclasses.replace(backend, forward=lambda *args: (served.append(args), forward(*args))[1])
    monkeypatch.setitem(_backends.BACKENDS["lora_conv2d"], "triton", spied)
    got = step()
    assert len(served) == 1
    monkeypatch.setattr(_native, "WISH", "reference")
    for mine, theirs in zip(got, step(), strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("op", ["lora_conv2d", "lora_linear"])
def test_the_saved_output_reaches_the_kernels_where_its_sign_tells(op, activation, residual, on_the_cpu, monkeypatch):
    from lorun_fast.kernels import lora_conv2d_backward

    given = []
    backward = lora_conv2d_backward.backward
    monkeypatch.setattr(
        lora_conv2d_backward, "backward", lambda *a, **more: (given.append(more["output"]), backward(*a, **more))[1]
    )
    image = op == "lora_conv2d"
    x = channels_last(torch.randn(2, 3, 4, 5)) if image else torch.randn(2, 6, 3)
    shapes = ((4, 3, 1, 1), (2, 3, 1, 1), (4, 2)) if image else ((4, 3), (2, 3), (4, 2))
    weight, *factors = (torch.randn(shape) for shape in shapes)
    leaves = [t.requires_grad_() for t in (x, *factors)]
    beside = channels_last(torch.randn(2, 4, 4, 5)) if image else torch.randn(2, 6, 4)

    def gradients():
        y = getattr(lf.functional, op)(
            x, weight, None, *factors, activation=activation, residual=beside if residual else None
        )
        return y.detach(), torch.autograd.grad(y.square().sum(), leaves)

    y, got = gradients()
    if activation == "silu" or residual:
        assert given == [None]
    else:
        (saved,) = given
        assert torch.equal(saved if image else saved.permute(0, 2, 3, 1).reshape(y.shape), y)
    monkeypatch.setattr(_native, "WISH", "reference")
    for mine, theirs in zip(got, gradients()[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_trainable_base_gets_its_gradient(on_the_cpu, monkeypatch):
    layer = lf.LoRALinear(3, 4, stages=2, rank=2)
    x = torch.randn(2, 3)
    (grad,) = torch.autograd.grad(layer(x, 1).sum(), (layer.weight,))
    torch.testing.assert_close(grad, x.sum(0).expand(4, 3))


def _conv(**changes) -> str | None:
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3)
    arguments = {
        "x": x, "weight": weight, "bias": None, "down": torch.zeros(2, 4, 3, 3), "up": torch.zeros(4, 2), "stage": None,
        "residual": None, "scale": 1.0, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
        "activation": None, "transposed": False, "output_padding": [0, 0],
    }  # fmt: skip
    return _backends.BACKENDS["lora_conv2d"]["triton"].supports(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"groups": 2}, "groups=2"),
        ({"transposed": True}, "transposed"),
        ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(0, 4, 5, 5)}, "empty"),
        ({"x": torch.empty(1, 4, 2**15, 2**14, device="meta")}, r"2\^31"),
    ],
)
def test_what_it_does_not_serve_it_says(changes, reason):
    said = _conv(**changes)
    assert said is None if reason is None else said is not None and re.search(reason, said)


def test_show_config_names_the_reason():
    reasons = [_backends.served(op, "cuda")[1] for op in OPS]
    assert all("triton: " in reason for reason in reasons), reasons


def test_without_triton_the_library_imports_and_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import lorun_fast as lf, torch\n"
        "from lorun_fast.ops import _backends\n"
        "lf.LoRAConv2d(3, 4, 3, stages=2)(torch.zeros(1, 3, 5, 5), 1)\n"
        "print(_backends.served('lora_conv2d', 'cuda'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Triton cannot be imported" in done.stdout, done.stdout + done.stderr
