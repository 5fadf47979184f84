"""A residual block, x + conv(relu(conv(x))), both convolutions 3 x 3: what inference on a CPU consists of.

And the gradient of such a convolution's weight, of which training takes one for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import FORWARD, LIMIT, OURS, WARM, Case, Problem, Run, Work, case, size

_CPU = {"devices": ("cpu",), "modes": (FORWARD,), "regimes": (WARM,), "dtypes": ("fp32", "bf16")}

SIZES = ((16, 256), (28, 256), (32, 128), (64, 64), (64, 32), (64, 256))


def block_sizes(*dtypes: str) -> list:
    """Of a residual block: channels and pixels a side."""
    cpu = _CPU | {"dtypes": dtypes, "n": 1}
    sizes = [
        size(f"1x{channels}x{px}x{px}", channels=channels, px=px, compiled=channels == 16, **cpu)
        for channels, px in SIZES
    ]
    return [*sizes, size("1x8x13x13", quick=True, channels=8, px=13, **cpu)]


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 2e-2


def block_of(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x + F.conv2d(F.relu(F.conv2d(x, first, padding=1)), second, padding=1)


def block_inputs(dtype, device, n: int, channels: int, px: int) -> dict[str, Tensor]:
    scale = 1 / (3 * channels**0.5)
    inputs = {
        "x": torch.randn(n, channels, px, px, device=device).to(memory_format=torch.channels_last),
        "first": scale * torch.randn(channels, channels, 3, 3, device=device),
        "second": scale * torch.randn(channels, channels, 3, 3, device=device),
    }
    return {name: t.to(dtype) for name, t in inputs.items()}


@case("winograd_conv2d.block", suite="layers", sizes=block_sizes("fp32", "bf16"))
def block(dtype, device, *, n, channels, px) -> Problem:
    """The sizes of the network behind cs-25 at 256 px, ISTA-Net+'s, and a spectral image's."""
    inputs = block_inputs(dtype, device, n, channels, px)
    x = inputs["x"]
    # 36 products of a tile of 16 pixels in place of 144; its transforms apart.
    flops = 2 * 2 * 36 / 16 * x.numel() * channels
    moved = x.element_size() * (3 * x.numel() + 2 * 36 * channels * channels)
    return Problem(inputs, block_of, forward=Work(moved, flops), tolerance=tolerance(dtype))


@block.contender("lorun_fast", kind=OURS, ops=("winograd_block",))
def _(p: Problem):
    """One op, as network.optimize() calls it."""
    first, second = (lf.functional.winograd_weight(w) for w in (p.first, p.second))

    def run() -> Tensor:
        with torch.no_grad():
            return lf.functional.winograd_block(p.x, first, second)

    return run


@block.contender("lorun_fast, two calls", kind=OURS, ops=("winograd_conv2d",))
def _(p: Problem):
    """A convolution each, activation and residual inside."""
    conv = lf.functional.winograd_conv2d
    first, second = (lf.functional.winograd_weight(w) for w in (p.first, p.second))

    def run() -> Tensor:
        with torch.no_grad():
            return conv(conv(p.x, first, activation="relu"), second, residual=p.x)

    return run


def plain_contenders(problem: Case, definition: Callable[..., Tensor]) -> None:
    """torch's own convolutions. definition: of the problem's inputs, in their order."""

    @problem.contender("conv2d, nhwc", compiled=True)
    def _(p: Problem):
        """On channels_last images and weights."""
        return _direct(p, definition, torch.channels_last)

    @problem.contender("conv2d, nchw", compiled=True)
    def _(p: Problem):
        """On contiguous ones."""
        return _direct(p, definition, torch.contiguous_format)


def _direct(p: Problem, definition: Callable[..., Tensor], layout: torch.memory_format) -> Callable[[], Tensor]:
    inputs = [t.contiguous(memory_format=layout) for t in p.inputs.values()]

    def run() -> Tensor:
        with torch.no_grad():
            return definition(*inputs)

    return run


def bare_convolutions(p: Problem) -> Run:
    """Without activation and residual: what torch's convolutions cannot go below."""
    x, first, second = (t.contiguous(memory_format=torch.channels_last) for t in (p.x, p.first, p.second))

    def reference(x, first, second) -> Tensor:
        return F.conv2d(F.conv2d(x, first, padding=1), second, padding=1)

    def run() -> Tensor:
        with torch.no_grad():
            return reference(x, first, second)

    return Run(run, reference=reference)


plain_contenders(block, block_of)
block.contender("two bare convolutions", kind=LIMIT)(bare_convolutions)


# Of the residual blocks of cs-25's network in training, and of one image.
_GRADIENTS = ((8, 16, 96), (8, 32, 48), (8, 64, 24), (1, 64, 256))


def gradient_of(grad: Tensor, x: Tensor) -> Tensor:
    return torch.nn.grad.conv2d_weight(x, (grad.shape[1], x.shape[1], 3, 3), grad, padding=1)


def gradient_problem(dtype, device, n: int, channels: int, out: int, px: int) -> Problem:
    """Of a result's gradient and an image, both in channels_last."""
    grad, x = (
        torch.randn(n, c, px, px, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        for c in (out, channels)
    )
    moved = x.element_size() * (grad.numel() + x.numel())
    flops = 2 * 9 * x.numel() * out * (1 / 4 if min(out, channels) >= 8 else 1)
    return Problem({"grad": grad, "x": x}, gradient_of, forward=Work(moved, flops), tolerance=tolerance(dtype))


@case(
    "winograd_conv2d.weight_gradient",
    suite="layers",
    sizes=[
        *(size(f"{n}x{c}x{px}x{px}", n=n, channels=c, px=px, **_CPU) for n, c, px in _GRADIENTS),
        size("1x8x13x13", quick=True, n=1, channels=8, px=13, **_CPU),
    ],
)
def weight_gradient(dtype, device, *, n, channels, px) -> Problem:
    """As many channels in as out."""
    return gradient_problem(dtype, device, n, channels, channels, px)


@weight_gradient.contender("lorun_fast", kind=OURS, ops=("winograd_weight_gradient",))
def _(p: Problem):
    """By minimal filtering."""
    return lambda: lf.functional.winograd_weight_gradient(p.grad, p.x)


plain_contenders(weight_gradient, gradient_of)
