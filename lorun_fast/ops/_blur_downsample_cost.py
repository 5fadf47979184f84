"""Which method of the blur ops is expected to be faster: a cost model; nothing is tuned at run time.

The unit is one multiply-add of the direct method for one measurement at scale 1. The constants are fitted to measured
times (docs/operators.md), on CUDA to those of eight steps on an H200.
"""

from __future__ import annotations

import torch

# One pixel of one plane or kernel through the FFTs, forward and back, in direct multiply-adds.
FFT_PER_PIXEL = {"cpu": 330, "cuda": 200}
# What the FFT method costs whatever the size: some fifteen calls of PyTorch's operators.
FFT_PER_CALL = {"cpu": 8_000_000, "cuda": 280_000_000}
# Where the direct method is not compiled, PyTorch's convolutions of planes take about so much longer.
UNCOMPILED = 100
# Measurements that the direct method computes at once.
LANES = 16

_COMPILED: dict[str, bool] = {}


def note_compiled(op: str) -> None:
    """Records, once, for which devices ``op`` has a compiled implementation."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    _COMPILED.update(cpu=has(op, "CPU"), cuda=has(op, "CUDA"))


def prefer_fft(planes: int, kernels: int, height: int, width: int, kh: int, kw: int, scale: int, device: str) -> bool:
    """Whether the FFT method is expected to be faster for (planes, height, width) images and that many kernels."""
    columns = (width // scale + LANES - 1) // LANES * LANES
    direct = planes * (height // scale) * columns * kh * kw
    if not _COMPILED.get(device, False):
        direct *= UNCOMPILED
    elif device == "cuda":
        direct *= scale  # the taps of a phase are few: a GPU loads them longer than it sums
    constants = device if device in FFT_PER_CALL else "cpu"
    return direct > FFT_PER_PIXEL[constants] * (planes + kernels) * height * width + FFT_PER_CALL[constants]
