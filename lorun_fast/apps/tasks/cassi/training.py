"""Snapshot spectral imaging: what is trained, on what, and how it is scored while training."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import at_least_one, not_negative
from lorun_fast.apps.sampling import held_out
from lorun_fast.apps.tasks.cassi import scenes, sensor
from lorun_fast.apps.tasks.cassi.colour import default_wavelengths
from lorun_fast.apps.tasks.cassi.cubes import AXES, find_cubes, load_cube, load_mask
from lorun_fast.denoisers import ResCNN, ResUNet, SpectralTransformer
from lorun_fast.network import LoRun
from lorun_fast.operators import CASSI

_VALIDATION_SCENES = 2
_VALIDATION_SIZE = (128, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mask", type=Path, required=True, metavar="FILE", help="coded aperture (H, W) or (L, H, W): .mat, .npy, .npz")
    add("--mask-key", metavar="NAME", help="variable in the mask's file (default: mask, or the only one that fits)")
    add("--bands", type=at_least_one, default=28, help="L (default 28)")
    add("--step", type=int, default=2, help="columns between neighbouring bands (default 2)")
    add("--key", metavar="NAME", help="variable in the cubes' files (default: the only one that fits)")
    add("--axes", choices=AXES, default="auto", help="order of the cubes' axes (default: told by the band count)")
    add(
        "--peak",
        type=not_negative,
        help="value in the cubes that stands for 1 (default: 1; 255 and 65535 for integers)",
    )
    add("--base", choices=("transformer", "resunet", "cnn"), default="transformer", help="base denoiser")
    add("--channels", type=at_least_one, nargs="+", help="its widths (default: 28 56 112; 32 64 64; 48)")
    add("--blocks", type=int, nargs="+", help="its blocks, per scale for the transformer (default: 1 1 1; 1; 4)")
    add(
        "--patch",
        type=at_least_one,
        nargs="+",
        default=[256],
        metavar="SIDE",
        help="training crop: side, or height and width (default 256). The image crop; a measurement is wider",
    )
    add("--mosaic", type=not_negative, default=0.25, help="share of crops put together from four (default 0.25)")
    add("--sensor-noise", action="store_true", help="shot noise: quantum efficiency 0.4, 2048 levels for 0 to L/step")
    add("--noise", type=not_negative, default=0.0, help="standard deviation of Gaussian noise on y (default 0)")
    add("--memory-gib", type=not_negative, default=4.0, help="for decoded scenes; others are read again (default 4)")


def _base(args: argparse.Namespace) -> nn.Module:
    if args.base == "transformer":
        channels = tuple(args.channels or (28, 56, 112))
        blocks = tuple(args.blocks or (1,) * len(channels))
        if len(blocks) != len(channels):
            raise UserError(f"--blocks: expected {len(channels)} numbers for --channels, got {len(blocks)}")
        return SpectralTransformer(args.bands, args.bands, channels, blocks)
    if args.blocks is not None and len(args.blocks) != 1:
        raise UserError(f"--blocks: expected one number for --base {args.base}, got {len(args.blocks)}")
    if args.base == "resunet":
        return ResUNet(args.bands, args.bands, tuple(args.channels or (32, 64, 64)), *(args.blocks or (1,)))
    channels = args.channels or (48,)
    if len(channels) != 1:
        raise UserError(f"--channels: expected one number for --base cnn, got {len(channels)}")
    return ResCNN(args.bands, args.bands, channels[0], *(args.blocks or (4,)))


class Recipe:
    """Crops of spectral scenes, their measurements through a crop of the mask, and the root mean squared error."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if len(args.patch) > 2:
            raise UserError(f"--patch: expected a side, or height and width, got {len(args.patch)} numbers")
        self.size = (args.patch[0], args.patch[-1])
        self.mask = torch.from_numpy(load_mask(args.mask, args.mask_key, bands=args.bands))
        self.full = CASSI(self.mask, args.bands if self.mask.ndim == 2 else None, args.step)
        if self.full.bands != args.bands:
            raise UserError(f"--mask: expected {args.bands} bands, got {self.full.bands} in {args.mask}")
        if self.size[0] > self.mask.shape[-2] or self.size[1] > self.mask.shape[-1]:
            raise UserError(f"--patch: expected at most the mask's {tuple(self.mask.shape[-2:])}, got {self.size}")
        paths = find_cubes(args.data)
        if len(paths) < 2:
            raise UserError(f"--data: expected at least two scenes, got {len(paths)}")
        validation, training = held_out(paths, _VALIDATION_SCENES)
        self.validation = [self._middle(self._read(path)) for path in validation]
        library = scenes.Library(training, self._read, int(args.memory_gib * 2**30))
        self.sampler = scenes.CropSampler(library, self.size, args.batch, args.seed, args.mosaic)

    def _read(self, path: Path) -> scenes.Scene:
        if path.name.endswith(".npy.xz"):
            return scenes.companded(path, default_wavelengths(self.args.bands))
        args = self.args
        return scenes.quantised(load_cube(path, bands=args.bands, key=args.key, axes=args.axes, peak=args.peak).values)

    def _middle(self, scene: scenes.Scene) -> Tensor:
        height = min(_VALIDATION_SIZE[0], scene.height, self.mask.shape[-2])
        width = min(_VALIDATION_SIZE[1], scene.width, self.mask.shape[-1])
        crop = scene.crop((scene.height - height) // 2, (scene.width - width) // 2, height, width)
        return torch.from_numpy(np.ascontiguousarray(crop))[None]

    def _window(self, top: int, left: int, height: int, width: int) -> CASSI:
        mask = self.mask[..., top : top + height, left : left + width]
        return CASSI(mask, self.args.bands, self.args.step)

    def base(self) -> LoRun:
        """Phase 1: a single block. Step sizes start at 1 / ||Phi||^2, where the gradient step still converges."""
        return LoRun(
            self.full, _base(self.args), stages=1, sharing="tied", step_size=1 / self.full.norm().square().item()
        )

    def _measure(self, op: CASSI, x: Tensor, step: int) -> Tensor:
        y = op(x)
        if self.args.sensor_noise or self.args.noise:
            source = torch.Generator().manual_seed(
                int(np.random.default_rng((self.args.seed, step, 3)).integers(2**62))
            )
            y = y.cpu()
            if self.args.sensor_noise:
                y = sensor.expose(y, self.args.bands / max(1, self.args.step), generator=source)
            if self.args.noise:
                y = y + self.args.noise * torch.randn(y.shape, generator=source)
        return y.to(x.device)

    def loss(self, net: LoRun, step: int, device: torch.device) -> Tensor:
        """Root mean squared error per cube, averaged: between MSE, which dark scenes hardly move, and PSNR.

        In phase 1 the block first runs 0 to ``--pretrain-unroll`` times without gradients, and learns from what it
        then meets: a block that has only ever seen the start does harm when it is applied nine times.
        """
        x = torch.from_numpy(self.sampler(step)).to(device)
        rng = np.random.default_rng((self.args.seed, step, 1))
        corner = [int(rng.integers(full - own + 1)) for full, own in zip(self.mask.shape[-2:], self.size, strict=True)]
        op = self._window(*corner, *self.size).to(device)
        y = self._measure(op, x, step)
        if net.stages > 1:
            restored = net(y, op=op)
        else:
            passes = int(rng.integers(self.args.pretrain_unroll + 1))
            restored = op.initial(y)
            with torch.no_grad():
                for _ in range(passes):
                    restored = net.stage_step(0, restored, y, op)
            restored = net.stage_step(0, restored.detach(), y, op)
        return ((restored - x).square().mean((1, 2, 3)) + 1e-10).sqrt().mean()

    @torch.no_grad()
    def score(self, net: LoRun, device: torch.device) -> float:
        """PSNR in dB per band, then the mean, over crops of held-out training scenes; without noise."""
        total = 0.0
        for x in self.validation:
            x = x.to(device)
            op = self._window(0, 0, *x.shape[-2:]).to(device)
            y = op(x)
            restored = net(y, op=op)
            if net.stages == 1:
                for _ in range(self.args.pretrain_unroll):
                    restored = net.stage_step(0, restored, y, op)
            error = (restored.clamp(0, 1) - x).square().mean((-2, -1))
            total += (-10 * torch.log10(error.clamp(min=1e-12))).mean().item()
        return total / len(self.validation)
