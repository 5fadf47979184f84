"""What torch's FLOP counter says of our ops: the operations of the definition, by whatever means they are computed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lorun_fast as lf
from lorun_fast import adapters
from lorun_fast.functional import lora_conv2d, lora_linear, lora_residual_block
from lorun_fast.stages import TiedDenoiser

N, IN, OUT, R, H, W = 2, 6, 4, 2, 7, 9


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_network_in_training_counts_as_the_tied_one(form):
    base, z = lf.ResUNet(2, 2, channels=(4, 8), blocks=1), torch.rand(2, 2, 12, 10)
    staged, tied = lf.adapt(base, stages=3, form=form), TiedDenoiser(base, 3)
    for stage in (1, torch.tensor([2, 0])):
        assert counted(lambda s=stage: staged(z, stage=s)) == counted(lambda s=stage: tied(z, stage=s)) > 0
    staged.merge()
    assert counted(lambda: staged(z, stage=1)) == counted(lambda: tied(z, stage=1))


def factors(form: str, stages: int | None, weight: torch.Size) -> list[torch.Tensor]:
    lead = () if stages is None else (stages,)
    return [torch.randn(*lead, *shape) for shape in adapters.factor_shapes(weight, R, form)]


def backward(call, learning) -> int:
    for t in learning:
        t.requires_grad_()
    y = call().sum()
    return counted(lambda: torch.autograd.grad(y, learning))


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("stage", [None, 1, torch.tensor([1, 0])], ids=["none", "one", "each"])
def test_a_convolution(form, stage):
    x, weight = torch.randn(N, IN, H, W), torch.randn(OUT, IN, 3, 3)
    down, up = factors(form, None if stage is None else 2, weight.shape)

    def call():
        return lora_conv2d(x, weight, None, down, up, stage=stage, stride=2, padding=1)

    pixels = N * 4 * 5
    whole, narrow = 2 * pixels * OUT * IN * 9, 2 * pixels * R * (IN * 9 + OUT)
    assert counted(call) == whole
    assert counted(call) == counted(lambda: nn.functional.conv2d(x, weight, stride=2, padding=1))
    low = form == "peft"
    assert backward(call, [down, up]) == (2 * narrow if low else whole)
    assert backward(call, [x, down, up]) == whole + (2 * narrow if low else whole)
    assert backward(call, [x, weight, down, up]) == 2 * whole


def test_a_transposed_convolution():
    layer, x = lf.LoRAConvTranspose2d(IN, OUT, 2, stride=2, stages=2, rank=R, form="peft"), torch.randn(N, IN, H, W)
    whole = counted(lambda: nn.functional.conv_transpose2d(x, layer.weight, stride=2))
    assert counted(lambda: layer(x, 1)) == whole
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    y = layer(x, 1).sum()
    narrow = 2 * N * H * W * R * (IN * 4 + 4 * OUT)
    gradients = counted(lambda: torch.autograd.grad(y, [layer.down, layer.up]))
    assert gradients == 2 * narrow


@pytest.mark.parametrize("stage", [None, 1, torch.tensor([1, 0])], ids=["none", "one", "each"])
def test_a_linear_layer(stage):
    x, weight = torch.randn(N, 5, IN), torch.randn(OUT, IN)
    down, up = factors("loralib", None if stage is None else 2, weight.shape)

    def call():
        return lora_linear(x, weight, None, down, up, stage=stage)

    whole, narrow = 2 * N * 5 * OUT * IN, 2 * N * 5 * R * (IN + OUT)
    assert counted(call) == whole
    assert backward(call, [x, down, up]) == whole + 2 * narrow
    assert backward(call, [x, weight, down, up]) == 2 * whole


@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_residual_block(form):
    x = torch.randn(N, IN, H, W)
    first, second = torch.randn(OUT, IN, 3, 3), torch.randn(IN, OUT, 3, 3)
    layers = [(weight, None, *factors(form, None, weight.shape)) for weight in (first, second)]

    def call():
        return lora_residual_block(x, *layers)

    whole = 2 * N * H * W * OUT * IN * 9
    assert counted(call) == 2 * whole
    narrow = [2 * 2 * N * H * W * R * (a * 9 + b) for a, b in ((IN, OUT), (OUT, IN))]
    weights = narrow if form == "peft" else [whole, whole]
    assert backward(call, layers[1][2:]) == weights[1]
    assert backward(call, [*layers[0][2:], *layers[1][2:]]) == sum(weights) + whole
    assert backward(call, [x, *layers[0][2:], *layers[1][2:]]) == sum(weights) + 2 * whole


@pytest.mark.parametrize(("kind", "dtype"), [("winograd", torch.float32), ("packed", torch.bfloat16)])
def test_an_optimized_network_counts_as_itself(kind, dtype):
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), lf.ResUNet(channels=(8, 16), blocks=1), stages=2)
    z = torch.rand(2, 1, 12, 10, dtype=dtype)
    fast, direct = (net.optimize(dtype=dtype, convolutions=c).denoiser for c in (kind, "direct"))
    with torch.no_grad():
        assert counted(lambda: fast(z, stage=1)) == counted(lambda: direct(z, stage=1)) > 0


def test_a_mapping_of_ones_own_comes_first():
    x, weight = torch.randn(N, IN, H, W), torch.randn(OUT, IN, 3, 3)
    down, up = factors("peft", None, weight.shape)
    mapping = {torch.ops.lorun_fast.lora_conv2d: lambda *shapes, **more: 5}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        lora_conv2d(x, weight, None, down, up)
    assert counter.get_total_flops() == 5 < counted(lambda: lora_conv2d(x, weight, None, down, up))


def test_the_counter_is_not_imported_for_it():
    code = """
import sys, torch, lorun_fast as lf
print("torch.utils.flop_counter" in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    lf.LoRAConv2d(2, 2, 3, stages=1)(torch.rand(1, 2, 3, 3))
print(counter.get_total_flops())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "72"]
