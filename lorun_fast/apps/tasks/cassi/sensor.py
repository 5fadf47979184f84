"""What a real sensor does to a measurement: it counts a share of the photons, in whole levels."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTUM_EFFICIENCY = 0.4
LEVELS = 2048


def expose(
    y: Tensor,
    full_scale: float,
    quantum_efficiency: float = QUANTUM_EFFICIENCY,
    levels: int = LEVELS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y with shot noise and quantised, as a sensor with ``levels`` levels for 0 to ``full_scale`` reads it.

    A level stands for one electron. y / full_scale * levels electrons on average come from 1 / quantum_efficiency
    times as many photons, each of which is counted with that probability: Binomial(photons, quantum_efficiency).
    Values are cut to [0, full_scale].
    """
    electrons = (y.double() / full_scale).clamp(0, 1) * levels
    photons = torch.round(electrons / quantum_efficiency)
    counted = torch.binomial(photons, torch.full_like(photons, quantum_efficiency), generator=generator)
    return (counted.clamp(max=levels) * (full_scale / levels)).to(y.dtype)
