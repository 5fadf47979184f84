"""A copy from one layout of an image to the other, as networks of channels_last convolutions begin and end with one."""

from __future__ import annotations

import torch
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import FORWARD, OURS, WARM, Problem, Work, case, size

# N, channels, pixels a side: spectral images, whole and in training; patches of features; a Transformer's features
_IMAGES = ((1, 28, 256), (1, 28, 192), (8, 16, 96), (1, 64, 128), (1, 280, 96))
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def _sizes() -> list:
    cpu = {"devices": ("cpu",), "modes": (FORWARD,), "regimes": (WARM,), "dtypes": ("fp32", "bf16")}
    sizes = [
        size(f"to {to}, {n}x{c}x{px}x{px}", n=n, channels=c, px=px, to=to, **cpu)
        for n, c, px in _IMAGES
        for to in _FORMATS
    ]
    return [*sizes, size("to channels_last, 1x8x72x72", quick=True, n=1, channels=8, px=72, to="channels_last", **cpu)]


@case("relayout.copy", suite="layers", sizes=_sizes())
def copy(dtype, device, *, n, channels, px, to) -> Problem:
    """In x's dtype."""
    other = _FORMATS["contiguous" if to == "channels_last" else "channels_last"]
    x = torch.randn(n, channels, px, px, device=device).to(dtype).contiguous(memory_format=other)
    moved = 2 * x.element_size() * x.numel()
    return Problem({"x": x}, lambda x: x.clone(), forward=Work(moved, 0), tolerance=0)


@copy.contender("lorun_fast", kind=OURS, ops=("relayout",))
def _(p: Problem):
    """relayout."""
    return lambda: lf.functional.relayout(p.x, _other(p.x))


@copy.contender("contiguous(memory_format=)")
def _(p: Problem):
    """torch's own."""
    return lambda: p.x.contiguous(memory_format=_other(p.x))


def _other(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous() else torch.contiguous_format
