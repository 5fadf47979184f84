"""Attention across the channels of an image and the ReLU beside it: the middle of a block of SpectralTransformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import OURS, WARM, Problem, Work, case, size
from lorun_fast.reference import spectral_attention as definition

_CHANNELS = 28  # of a head


def _sizes() -> list:
    cpu = {"devices": ("cpu",), "regimes": (WARM,), "dtypes": ("fp32", "bf16")}
    sizes = [
        size(f"{heads} x 28 of 1x{px}x{px}", heads=heads, px=px, compiled=heads == 2, **cpu)
        for heads, px in ((1, 256), (2, 128), (4, 64))
    ]
    return [*sizes, size("1 x 28 of 1x9x9", quick=True, heads=1, px=9, **cpu)]


def _reference(qkv: Tensor, temperature: Tensor) -> Tensor:
    return definition.spectral_attention(qkv, temperature, 2 * _CHANNELS * temperature.shape[0])


@case("spectral_attention.mix", suite="layers", sizes=_sizes())
def mix(dtype, device, *, heads, px) -> Problem:
    """Twice as many hidden values as channels: what the shipped cassi network has at its two lower scales."""
    channels, pixels, draw = heads * _CHANNELS, px * px, {"dtype": torch.float32, "device": device}
    inputs = {
        "qkv": torch.randn(1, pixels, 5 * channels, **draw).to(dtype),
        "temperature": torch.full((heads,), 4.0, **draw).to(torch.float64 if dtype == torch.float64 else torch.float32),
    }
    values, product = pixels * channels, 2 * pixels * channels * _CHANNELS
    return Problem(
        inputs,
        _reference,
        forward=Work((5 + 3) * values * dtype.itemsize, 2 * product),
        train=Work((5 + 3 + 5 + 3 + 5) * values * dtype.itemsize, 6 * product),
        wrt=("qkv", "temperature"),
        items=1,
        tolerance=None if dtype != torch.bfloat16 else 0.04,  # rivals round between their steps
    )


@mix.contender("lorun_fast", kind=OURS, ops=("spectral_attention",))
def _(p: Problem):
    """One op, and one for its gradient."""
    hidden = 2 * _CHANNELS * p.args["heads"]
    return lambda: lf.functional.spectral_attention(p.qkv, p.temperature, hidden=hidden)


@mix.contender("norms after the product", compiled=True)
def _(p: Problem):
    """The definition: the product's entries are divided by norms, q and k are not."""
    return lambda: _reference(p.qkv, p.temperature)


@mix.contender("normalised q and k", compiled=True)
def _(p: Problem):
    """As MST and Restormer write it: q and k with unit norms, pixels innermost."""
    heads, channels = p.args["heads"], p.args["heads"] * _CHANNELS

    def run() -> Tensor:
        q, k, v, h = p.qkv.split([channels] * 3 + [2 * channels], dim=-1)
        q, k, v = (t.mT.unflatten(1, (heads, _CHANNELS)) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (k @ q.mT * p.temperature.to(q.dtype).view(-1, 1, 1)).mT.softmax(-1)
        return torch.cat([(weights @ v).flatten(1, 2).mT, F.relu(h)], -1)

    return run
