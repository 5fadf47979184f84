"""Coded apertures drawn at random."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_mask(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """(H, W) float32 of zeros and ones, each with probability 1/2."""
    return torch.from_numpy(rng.integers(0, 2, (height, width)).astype(np.float32))
