"""A 3 x 3 convolution from or to few channels in fp32: a network's first layer and its last, for inference on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import FORWARD, OURS, WARM, Problem, Work, case, size
from benchmarks.winograd_conv2d import plain_contenders

# in, out: gray and colour images, networks of 16, 48 and 64 channels
_LAYERS = ((1, 16), (16, 1), (3, 48), (48, 3), (64, 1))


def _sizes() -> list:
    cpu = {"devices": ("cpu",), "modes": (FORWARD,), "regimes": (WARM,), "dtypes": ("fp32",)}
    sizes = [
        size(f"{i} to {o}, 1x256x256", channels=i, out=o, px=256, compiled=(i, o) == (16, 1), **cpu) for i, o in _LAYERS
    ]
    return [*sizes, size("8 to 1, 1x13x13", quick=True, channels=8, out=1, px=13, **cpu)]


def _layer(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1) + residual


@case("thin_conv2d.layer", suite="layers", sizes=_sizes())
def layer(dtype, device, *, channels, out, px) -> Problem:
    """With a residual, as a denoiser's last layer has it."""
    draw = {"dtype": dtype, "device": device}
    x, residual = (torch.randn(1, c, px, px, **draw).to(memory_format=torch.channels_last) for c in (channels, out))
    inputs = {"x": x, "weight": torch.randn(out, channels, 3, 3, **draw) / 3, "residual": residual}
    moved = x.element_size() * (x.numel() + 2 * residual.numel())
    return Problem(inputs, _layer, forward=Work(moved, 2 * 9 * channels * residual.numel()), tolerance=2e-5)


@layer.contender("lorun_fast", kind=OURS, ops=("thin_conv2d",))
def _(p: Problem):
    """fused_conv2d, which finds the kernel; the weight in channels_last."""
    weight = p.weight.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.no_grad():
            return lf.functional.fused_conv2d(p.x, weight, residual=p.residual)

    return run


plain_contenders(layer, _layer)
