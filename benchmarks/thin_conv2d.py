"""A 3 x 3 convolution from or to few channels, and the gradient of its weight: first layers and last ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import FORWARD, OURS, WARM, Problem, Work, case, size
from benchmarks.winograd_conv2d import gradient_of, gradient_problem, plain_contenders, tolerance

# in, out: gray and colour images, networks of 16, 48 and 64 channels
_LAYERS = ((1, 16), (16, 1), (3, 48), (48, 3), (64, 1))


_CPU = {"devices": ("cpu",), "modes": (FORWARD,), "regimes": (WARM,), "dtypes": ("fp32", "bf16")}
_SMALL = size("8 to 1, 1x13x13", quick=True, channels=8, out=1, px=13, **_CPU)


def _sizes() -> list:
    sizes = [
        size(f"{i} to {o}, 1x256x256", channels=i, out=o, px=256, compiled=(i, o) == (16, 1), **_CPU)
        for i, o in _LAYERS
    ]
    return [*sizes, _SMALL]


def _layer(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1) + residual


@case("thin_conv2d.layer", suite="layers", sizes=_sizes())
def layer(dtype, device, *, channels, out, px) -> Problem:
    """With a residual, as a denoiser's last layer has it."""
    draw = {"dtype": dtype, "device": device}
    x, residual = (torch.randn(1, c, px, px, **draw).to(memory_format=torch.channels_last) for c in (channels, out))
    inputs = {"x": x, "weight": torch.randn(out, channels, 3, 3, **draw) / 3, "residual": residual}
    moved = x.element_size() * (x.numel() + 2 * residual.numel())
    flops = 2 * 9 * channels * residual.numel()
    return Problem(inputs, _layer, forward=Work(moved, flops), tolerance=tolerance(dtype))


@layer.contender("lorun_fast", kind=OURS, ops=("thin_conv2d",))
def _(p: Problem):
    """fused_conv2d, which finds the kernel; the weight in channels_last."""
    weight = p.weight.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.no_grad():
            return lf.functional.fused_conv2d(p.x, weight, residual=p.residual)

    return run


plain_contenders(layer, _layer)


@case(
    "thin_conv2d.weight_gradient",
    suite="layers",
    sizes=[*(size(f"{i} to {o}, 1x256x256", channels=i, out=o, px=256, **_CPU) for i, o in _LAYERS), _SMALL],
)
def weight_gradient(dtype, device, *, channels, out, px) -> Problem:
    """In training."""
    return gradient_problem(dtype, device, 1, channels, out, px)


@weight_gradient.contender("lorun_fast", kind=OURS, ops=("thin_weight_gradient",))
def _(p: Problem):
    """In one pass over both images."""
    return lambda: lf.functional.thin_weight_gradient(p.grad, p.x)


plain_contenders(weight_gradient, gradient_of)
