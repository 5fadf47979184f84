"""Snapshot spectral imaging: what is trained, on what, and how it is scored while training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lorun_fast.apps import losses, unrolling
from lorun_fast.apps.batches import Batch
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import at_least_one, none_or_more, not_negative, share
from lorun_fast.apps.sampling import held_out
from lorun_fast.apps.tasks.cassi import options, scenes, sensor
from lorun_fast.apps.tasks.cassi.colour import default_wavelengths
from lorun_fast.apps.tasks.cassi.cubes import find_cubes, load_cube
from lorun_fast.apps.tasks.cassi.masks import random_mask
from lorun_fast.denoisers import ResCNN, ResUNet, SpectralTransformer
from lorun_fast.network import LoRun
from lorun_fast.operators import CASSI

_OWN_MASK = 256
_VALIDATION_SCENES = 2
_VALIDATION_SIZE = (128, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_mask(parser, step=2)
    add(
        "--random-masks",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="share of the crops measured through a new random mask, half of it open, instead of a window of --mask, "
        "so that the network serves other masks as well (default 0.5; 1 without --mask)",
    )
    add("--bands", type=at_least_one, default=28, help="L (default 28)")
    options.add_cubes(parser)
    add(
        "--data-step",
        choices=("gradient", "prox"),
        default="gradient",
        help="of a stage: a gradient step (default), or the exact minimiser, which divides by what reaches a pixel "
        "of the detector",
    )
    add("--base", choices=("transformer", "resunet", "cnn"), default="transformer", help="base denoiser")
    add("--channels", type=at_least_one, nargs="+", help="its widths (default: 28 56 112; 32 64 64; 48)")
    add(
        "--blocks",
        type=none_or_more,
        nargs="+",
        help="its blocks, per scale for the transformer (default: 1 1 1; 1; 4)",
    )
    add(
        "--patch",
        type=at_least_one,
        nargs="+",
        default=[256],
        metavar="SIDE",
        help="training crop: side, or height and width (default 256). The image crop; a measurement is wider",
    )
    add(
        "--mosaic",
        type=share,
        default=0.25,
        metavar="SHARE",
        help="share of crops put together from four (default 0.25)",
    )
    add("--sensor-noise", action="store_true", help="shot noise: quantum efficiency 0.4, 2048 levels for 0 to L/step")
    add("--noise", type=not_negative, default=0.0, help="standard deviation of Gaussian noise on y (default 0)")
    add("--memory-gib", type=not_negative, default=4.0, help="for decoded scenes; others are read again (default 4)")


def _base(args: argparse.Namespace) -> Callable[[], nn.Module]:
    """What builds the base denoiser that the options describe. Raises UserError where they do not fit together."""
    bands, blocks = args.bands, args.blocks
    if args.base == "transformer":
        channels = args.channels or (28, 56, 112)
        blocks = blocks or (1,) * len(channels)
        if len(blocks) != len(channels):
            raise UserError(f"--blocks: expected {len(channels)} numbers for --channels, got {len(blocks)}")
        return partial(SpectralTransformer, bands, bands, tuple(channels), tuple(blocks))
    if blocks is not None and len(blocks) != 1:
        raise UserError(f"--blocks: expected one number for --base {args.base}, got {len(blocks)}")
    if args.base == "resunet":
        return partial(ResUNet, bands, bands, tuple(args.channels or (32, 64, 64)), *(blocks or (1,)))
    channels = args.channels or (48,)
    if len(channels) != 1:
        raise UserError(f"--channels: expected one number for --base cnn, got {len(channels)}")
    return partial(ResCNN, bands, bands, channels[0], *(blocks or (4,)))


class Recipe:
    """Crops of spectral scenes, their measurements through windows of a mask or random masks, and the RMSE."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._base = _base(args)
        if len(args.patch) > 2:
            raise UserError(f"--patch: expected a side, or height and width, got {len(args.patch)} numbers")
        self.size = (args.patch[0], args.patch[-1])
        self.mask = None
        if args.mask is not None:
            self.mask = options.operator(args, args.bands, args.step).mask
            if any(own > full for own, full in zip(self.size, self.mask.shape[-2:], strict=True)):
                raise UserError(f"--patch: expected at most the mask's {tuple(self.mask.shape[-2:])}, got {self.size}")
        self.paths = find_cubes(args.data)
        if len(self.paths) < 2:
            raise UserError(f"--data: expected at least two scenes, got {len(self.paths)}")
        validation, training = held_out(self.paths, _VALIDATION_SCENES)
        self.validation = [self._middle(self._read(path)) for path in validation]
        source = scenes.Library(training, self._read, int(args.memory_gib * 2**30))
        self.sampler = scenes.CropSampler(source, self.size, args.batch, args.seed, args.mosaic)

    def _read(self, path: Path) -> scenes.Scene:
        if path.name.endswith(".npy.xz"):
            return scenes.companded(path, default_wavelengths(self.args.bands))
        args = self.args
        return scenes.quantised(load_cube(path, bands=args.bands, key=args.key, axes=args.axes, peak=args.peak).values)

    def _middle(self, scene: scenes.Scene) -> Tensor:
        limits = (scene.height, scene.width) if self.mask is None else self.mask.shape[-2:]
        height, width = (
            min(sides) for sides in zip(_VALIDATION_SIZE, (scene.height, scene.width), limits, strict=True)
        )
        crop = scene.crop((scene.height - height) // 2, (scene.width - width) // 2, height, width)
        return torch.from_numpy(np.ascontiguousarray(crop))[None]

    def _mask(self, height: int, width: int, rng: np.random.Generator | None) -> Tensor:
        """Of a crop: a window of the mask, or a random one; without rng the window for validation."""
        if self.mask is None or (rng is not None and rng.random() < self.args.random_masks):
            return torch.as_tensor(random_mask(height, width, rng or np.random.default_rng(0)))
        corner = [0, 0]
        if rng is not None:
            limits = zip(self.mask.shape[-2:], (height, width), strict=True)
            corner = [int(rng.integers(full - own + 1)) for full, own in limits]
        mask = self.mask[..., corner[0] : corner[0] + height, corner[1] : corner[1] + width]
        return mask if rng is None else mask.flip([axis for axis in (-2, -1) if rng.integers(2)])

    def _operator(self, height: int, width: int, rng: np.random.Generator | None = None, crops: int = 1) -> CASSI:
        """Of a batch: each crop has a mask of its own."""
        masks = [self._mask(height, width, rng) for _ in range(crops)]
        if crops == 1:
            return CASSI(masks[0], self.args.bands, self.args.step)
        # Of one kind, whatever was drawn: a GPU's recorded steps are for one each.
        planes = self.args.bands if self.mask is not None and self.mask.ndim == 3 else 1
        masks = [mask.expand(planes, height, width) for mask in masks]
        return CASSI(torch.stack(masks), self.args.bands, self.args.step)

    def base(self) -> LoRun:
        """Phase 1: a single block. Gradient steps start at 1 / ||Phi||^2, where they still converge.

        The operator that is saved with the network holds a random mask of its own: it only stands in where neither
        the measurements nor the command line bring one.
        """
        op = CASSI(random_mask(_OWN_MASK, _OWN_MASK, np.random.default_rng(0)), self.args.bands, self.args.step)
        data_step = self.args.data_step
        step_size = 1.0 if data_step == "prox" else 1 / op.norm().square().item()
        return LoRun(op, self._base(), stages=1, sharing="tied", step_size=step_size, data_step=data_step)

    def _measure(self, op: CASSI, x: Tensor, step: int) -> Tensor:
        y = op(x)
        if self.args.sensor_noise or self.args.noise:
            source = torch.Generator().manual_seed(
                int(np.random.default_rng((self.args.seed, step, 3)).integers(2**62))
            )
            if self.args.sensor_noise:
                y = sensor.expose(y, self.args.bands / max(1, self.args.step), generator=source)
            if self.args.noise:
                y = y + self.args.noise * torch.randn(y.shape, generator=source)
        return y

    def draw(self, net: LoRun, step: int) -> Batch:
        """Cubes, their masks and measurements; in phase 1 also 0 to ``--pretrain-unroll`` passes of the block's own."""
        x = torch.from_numpy(self.sampler(step))
        rng = np.random.default_rng((self.args.seed, step, 1))
        op = self._operator(*self.size, rng, len(x))
        passes = 0 if net.stages > 1 else int(rng.integers(self.args.pretrain_unroll + 1))
        return Batch(x, {"y": self._measure(op, x, step)}, op, passes)

    def loss(self, net: LoRun, batch: Batch) -> Tensor:
        """Root mean squared error per cube, averaged: between MSE, which dark scenes hardly move, and PSNR."""
        y, op = batch.others["y"], batch.op
        restored = net(y, op=op) if net.stages > 1 else unrolling.trained_pass(net, y, batch.passes, op)
        return losses.root_mean_squared_error(restored, batch.x)

    @torch.no_grad()
    def score(self, net: LoRun, device: torch.device) -> float:
        """PSNR in dB per band, then the mean, over crops of held-out training scenes; without noise."""
        total = 0.0
        for x in self.validation:
            x = x.to(device)
            op = self._operator(*x.shape[-2:]).to(device)
            y = op(x)
            restored = unrolling.more_passes(net, net(y, op=op), y, self.args.pretrain_unroll, op)
            error = (restored.clamp(0, 1) - x).square().mean((-2, -1))
            total += (-10 * torch.log10(error.clamp(min=1e-12))).mean().item()
        return total / len(self.validation)
