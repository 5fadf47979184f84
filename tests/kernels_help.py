"""What the kernel tests share: where they run, tiles small enough for the interpreter, poisoned memory, tolerance."""

from __future__ import annotations

import math
import os
import sys
from importlib import metadata

import pytest
import torch
from torch import Tensor

from lorun_fast import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


def needs_triton() -> None:
    """Skips a module on machines without Triton: macOS, and Linux where it is not installed, but not in CI."""
    if kernels.unavailable():
        if os.environ.get("CI") and sys.platform == "linux":
            raise ImportError(kernels.unavailable())
        pytest.skip(kernels.unavailable(), allow_module_level=True)
    if DEVICE == "cpu" and _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("Triton 3.6's interpreter needs NumPy below 2.4", allow_module_level=True)


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that a launcher allocates starts as NaN: an element that no program writes shows."""
    empty = torch.Tensor.new_empty

    def poisoned_empty(self, *args, **kwargs):
        t = empty(self, *args, **kwargs)
        return t.fill_(math.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_empty)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def assert_as_good_as_torch(got, torchs, truth) -> None:
    """Errors at most twice those of PyTorch in the same dtype, plus a few roundings of the largest value."""
    for mine, theirs, want in zip(got, torchs, truth, strict=True):
        assert mine.shape == want.shape and torch.isfinite(mine).all()
        assert mine.dtype == theirs.dtype
        largest = want.abs().max().item()
        own = (theirs.double() - want).abs().max().item()
        error = (mine.double() - want).abs().max().item()
        assert error <= 2 * own + 4 * torch.finfo(mine.dtype).eps * largest, (error, own, largest)
