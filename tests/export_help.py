"""What the tests of exported networks share."""

from __future__ import annotations

import torch
from torch import nn

import lorun_fast as lf

KERNEL = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
KERNEL /= KERNEL.sum()


def tiny(
    op, channels: int, denoiser: nn.Module | None = None, *, stages: int = 2, noise: bool = False, **settings
) -> lf.LoRun:
    """Stages that differ, as after training."""
    torch.manual_seed(0)
    if denoiser is None:
        denoiser = lf.ResUNet(channels, channels, channels=(4, 8), blocks=0, noise_level=noise)
    net = lf.LoRun(op, denoiser, stages=stages, **settings)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.05)
    return net.eval()


def block_cs(**settings) -> lf.LoRun:
    return tiny(lf.BlockCS.gaussian(0.25, 8), 1, **settings)


def sr(**settings) -> lf.LoRun:
    return tiny(lf.BlurDownsample(KERNEL, 3), 3, noise=True, data_step="prox", noise_map="stage", **settings)


def cassi(**settings) -> lf.LoRun:
    torch.manual_seed(1)
    mask = torch.rand(12, 10)
    denoiser = lf.SpectralTransformer(4, 4, channels=(4,), blocks=(1,), head_channels=2)
    return tiny(lf.CASSI(mask, bands=4, step=2), 4, denoiser, **settings)


def restored(net: lf.LoRun, *args, **settings) -> torch.Tensor:
    with torch.no_grad():
        return net(*args, **settings)
