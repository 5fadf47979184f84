"""A depthwise 3 x 3 convolution with channels innermost: between the linear layers of a Transformer for images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import OURS, WARM, Problem, Run, Work, case, size

# Channels and pixels a side: a cassi denoiser's two scales at 256 px, and in training on crops of 192 px; narrow and
# wide images, and one that is no multiple of anything
_LAYERS = ((280, 128), (560, 64), (280, 96), (560, 48), (28, 256), (64, 256))


def _sizes() -> list:
    cpu = {"devices": ("cpu",), "regimes": (WARM,), "dtypes": ("fp32", "bf16")}
    sizes = [size(f"1x{c}x{px}x{px}", channels=c, px=px, compiled=(c, px) == (280, 128), **cpu) for c, px in _LAYERS]
    return [*sizes, size("1x64x33x33", quick=True, channels=64, px=33, **cpu)]


def _layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1, groups=weight.shape[0])


@case("depthwise_conv2d.layer", suite="layers", sizes=_sizes())
def layer(dtype, device, *, channels, px) -> Problem:
    """Without a bias, as SpectralTransformer has it."""
    x = torch.randn(1, channels, px, px, device=device).to(dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(channels, 1, 3, 3, device=device) / 3).to(dtype)
    image, flops = x.element_size() * x.numel(), 2 * 9 * x.numel()
    # backward: the gradient and x in, the gradient for x out
    train = Work(5 * image, 3 * flops)
    return Problem({"x": x, "weight": weight}, _layer, Work(2 * image, flops), train, wrt=("x", "weight"))


@layer.contender("lorun_fast", kind=OURS, ops=("depthwise_conv2d",))
def _(p: Problem):
    """depthwise_conv2d."""
    return lambda: lf.functional.depthwise_conv2d(p.x, p.weight)


@layer.contender("conv2d, nhwc", compiled=True)
def _(p: Problem):
    """On channels_last images."""
    return lambda: _layer(p.x, p.weight)


@layer.contender("conv2d, nchw", compiled=True)
def _(p: Problem):
    """On contiguous ones."""
    x = p.x.detach().contiguous().requires_grad_(p.x.requires_grad)
    return Run(lambda: _layer(x, p.weight), parameters=(x, p.weight))
