"""The dtype that definitions compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return t if t.element_size() > 4 else t.float()


def without_autocast(t: Tensor) -> AbstractContextManager:
    """Autocast off on t's device. The meta device has none, and torch.autocast does not take it."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)
