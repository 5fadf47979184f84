"""What the tests of super-resolution share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import lorun_fast as lf
from lorun_fast.apps.tasks.sr import kernels


def tiny_sr_network(path: Path) -> Path:
    """Two stages that differ; saved at ``path``."""
    torch.manual_seed(0)
    op = lf.BlurDownsample(torch.from_numpy(kernels.gaussian(1.0, 5)), 2)
    denoiser = lf.ResUNet(3, 3, channels=(4, 8), blocks=1, noise_level=True)
    net = lf.LoRun(op, denoiser, stages=2, data_step="prox")
    with torch.no_grad():
        for layer in net.denoiser.adapted.values():
            layer.up.normal_(0, 0.05)
        net.step_size.copy_(torch.tensor([1.0, 0.5]))
    lf.save(net, path)
    return path


def random_kernels(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Kernels without symmetry that sum to one, float32."""
    rng = np.random.default_rng(1)
    found = [rng.random(size).astype(np.float32) for size in sizes]
    return [k / k.sum() for k in found]
