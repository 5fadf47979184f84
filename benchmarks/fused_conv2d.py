"""A residual block, x + conv(relu(conv(x))), both convolutions 3 x 3 in 16 bits: inference on a GPU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.registry import FORWARD, LIMIT, OURS, WARM, Problem, Unavailable, Work, case, size
from benchmarks.winograd_conv2d import bare_convolutions, block_inputs, block_of
from lorun_fast import kernels
from lorun_fast.convolutions import FusedConv2d


def _sizes() -> list:
    """Channels and pixels a side of the networks in benchmarks/network.py at 256 px, one image and sixteen."""
    common = {"modes": (FORWARD,), "regimes": (WARM,), "dtypes": ("bf16",)}
    scales = ((16, 256), (32, 256), (32, 128), (64, 256), (64, 128), (64, 64), (64, 32), (96, 64), (128, 32))
    sizes = [
        size(
            f"{n}x{channels}x{px}x{px}", devices=("cuda",), compiled=(n, channels) == (16, 64),
            n=n, channels=channels, px=px, **common,
        )
        for n, (channels, px) in itertools.product((16, 1), scales)
    ]  # fmt: skip
    return [*sizes, size("1x8x13x13", quick=True, n=1, channels=8, px=13, **common)]


@case("fused_conv2d.block", suite="layers", sizes=_sizes())
def block(dtype, device, *, n, channels, px) -> Problem:
    """What decides where optimize() takes the kernel on a GPU. No biases, which torch adds in another slow pass."""
    inputs = block_inputs(dtype, device, n, channels, px)
    x = inputs["x"]
    moved = x.element_size() * (2 * x.numel() + 2 * 9 * channels * channels)
    return Problem(inputs, block_of, forward=Work(moved, 2 * 2 * 9 * x.numel() * channels), tolerance=2e-2)


@block.contender("lorun_fast", kind=OURS, devices=("cuda",), graphed=True)
@torch.no_grad()
def _(p: Problem):
    """A kernel at every size, that for Hopper where it gains, else Triton's: ReLU and residual in its last step."""
    if kernels.unavailable():
        raise Unavailable(kernels.unavailable())
    layers = []
    for weight in (p.first, p.second):
        conv = nn.Conv2d(*weight.shape[:2], 3, padding=1, bias=False, device=weight.device, dtype=weight.dtype)
        conv.weight.copy_(weight)
        layers.append(FusedConv2d(conv.to(memory_format=torch.channels_last)))
    for layer in layers:
        layer.everywhere = True

    def run() -> Tensor:
        with torch.no_grad():
            return layers[1](layers[0](p.x, "relu"), None, p.x)

    return run


def _last(p: Problem) -> list[Tensor]:
    return [t.contiguous(memory_format=torch.channels_last) for t in (p.x, p.first, p.second)]


@block.contender("cuDNN, a pass each", compiled=True, graphed=True)
def _(p: Problem):
    """torch's convolutions on channels_last images and weights, then ReLU and addition."""
    x, first, second = _last(p)

    def run() -> Tensor:
        with torch.no_grad():
            return block_of(x, first, second)

    return run


@block.contender("cuDNN with its own ReLU", devices=("cuda",), graphed=True)
def _(p: Problem):
    """torch.cudnn_convolution_relu, which has no gradient, then the second convolution and the addition."""
    x, first, second = _last(p)
    geometry = ([1, 1], [1, 1], [1, 1], 1)

    def run() -> Tensor:
        with torch.no_grad():
            return x + F.conv2d(torch.cudnn_convolution_relu(x, first, None, *geometry), second, padding=1)

    return run


block.contender("two bare convolutions", kind=LIMIT, graphed=True)(bare_convolutions)
