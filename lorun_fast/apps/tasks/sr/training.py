"""Super-resolution: one network for every kernel and scale, trained on random ones, and how it is scored meanwhile."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorun_fast.apps import losses, unrolling
from lorun_fast.apps.batches import Batch
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import at_least_one, not_negative, share
from lorun_fast.apps.sampling import PatchSampler, find_images, held_out, load_colour
from lorun_fast.apps.tasks.sr import kernels
from lorun_fast.denoisers import ResUNet
from lorun_fast.network import LoRun
from lorun_fast.operators import BlurDownsample

_VALIDATION_IMAGES = 12
_VALIDATION_CROP = 144
# The operator that a saved network carries; restoring brings the one of the measurements.
_DEFAULT_WIDTH, _DEFAULT_SCALE = 1.6, 3

# Levels of the Gaussian noise of phase 1, from the last stage's to beyond the first one's.
_LEVELS = (0.5 / 255, 60 / 255)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--scales", type=at_least_one, nargs="+", default=[2, 3, 4], help="one is drawn per batch (default 2 3 4)")
    add("--kernel-size", type=at_least_one, default=25, help="of the random kernels, in pixels (default 25)")
    add(
        "--noise",
        type=not_negative,
        default=25 / 255,
        metavar="SIGMA",
        help="largest standard deviation of the noise on y, for images in [0, 1] (default 25/255)",
    )
    add(
        "--noiseless",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="share of measurements that are rounded to 8 bits instead (default 0.5)",
    )
    add("--data-step", choices=("prox", "gradient"), default="prox", help="of a stage (default prox, exact by FFT)")
    add(
        "--noise-map",
        choices=("stage", "measurement"),
        help="what the denoiser is told: the level of its stage, and phase 1 then trains it on Gaussian noise of every "
        "level, or the sigma of y (default: stage with the exact data step, else measurement)",
    )
    add(
        "--channels",
        type=at_least_one,
        nargs="+",
        default=[16, 32, 64, 64],
        help="ResUNet widths (default 16 32 64 64)",
    )
    add("--patch", type=at_least_one, default=96, help="training patch in pixels (default 96)")


class Recipe:
    """Colour patches, their blurred and reduced measurements, and the RMSE."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.noise_map = args.noise_map or ("stage" if args.data_step == "prox" else "measurement")
        if self.noise_map == "stage" and args.data_step != "prox":
            raise UserError(f"--noise-map stage: expected --data-step prox, got {args.data_step}")
        cell = int(np.lcm.reduce(args.scales))
        if args.patch % cell:
            raise UserError(f"--patch: expected a multiple of {cell} for the scales {args.scales}, got {args.patch}")
        self.paths = find_images(args.data)
        validation, training = held_out(load_colour(self.paths, args.patch), _VALIDATION_IMAGES)
        crops = [min(max(_VALIDATION_CROP, cell), *image.shape[:2]) // cell * cell for image in validation]
        self.validation = [image[:crop, :crop] for image, crop in zip(validation, crops, strict=True)]
        self.sampler = PatchSampler(training, args.patch, args.batch, args.seed)

    def base(self) -> LoRun:
        """Phase 1: a single block."""
        args = self.args
        op = BlurDownsample(kernels.gaussian(_DEFAULT_WIDTH, args.kernel_size), _DEFAULT_SCALE)
        denoiser = ResUNet(3, 3, tuple(args.channels), noise_level=True)
        return LoRun(op, denoiser, stages=1, sharing="tied", data_step=args.data_step, noise_map=self.noise_map)

    def draw(self, net: LoRun, step: int) -> Batch:
        """Patches with what blurs and disturbs them; in phase 1 with Gaussian noise of every level, or, without a noise
        map of the stage, 0 to ``--pretrain-unroll`` passes of the block's own.
        """
        x = self.sampler(step)
        rng = np.random.default_rng((self.args.seed, step, 1))
        if self._learns_noise(net):
            sigma = torch.from_numpy(_LEVELS[0] * (_LEVELS[1] / _LEVELS[0]) ** rng.random(len(x), dtype=np.float32))
            return Batch(x, {"sigma": sigma, "noise": self._normal(x.shape, rng)})
        batch = self.disturbed(x, rng)
        if net.stages > 1:
            return batch
        return dataclasses.replace(batch, passes=int(rng.integers(self.args.pretrain_unroll + 1)))

    def disturbed(self, x: Tensor, rng: np.random.Generator, scale: int | None = None) -> Batch:
        """Images (N, 3, H, W) with one random scale, a kernel and a noise level for each."""
        args = self.args
        scale = int(rng.choice(args.scales)) if scale is None else scale
        blur = np.stack([kernels.draw(rng, args.kernel_size) for _ in x])
        noisy = rng.random(len(x)) >= args.noiseless
        sigma = np.where(noisy, rng.uniform(0, args.noise, len(x)), 0).astype(np.float32)
        noise = self._normal((*x.shape[:2], x.shape[2] // scale, x.shape[3] // scale), rng)
        op = BlurDownsample(torch.from_numpy(blur), scale)
        return Batch(x, {"sigma": torch.from_numpy(sigma), "noise": noise}, op)

    @staticmethod
    def _normal(shape: Sequence[int], rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))

    @staticmethod
    def measure(batch: Batch) -> Tensor:
        """y: with the noise of its level, or rounded to 8 bits where that is zero."""
        y, column = batch.op(batch.x), batch.others["sigma"].reshape(-1, 1, 1, 1)
        return torch.where(column > 0, y + column * batch.others["noise"], (255 * y).round() / 255)

    def loss(self, net: LoRun, batch: Batch) -> Tensor:
        """Root mean squared error of each image, averaged: between MSE, which the blurred and noisy rule, and PSNR."""
        if self._learns_noise(net):
            restored = self._denoise(net, batch)
        else:
            y, op, sigma = self.measure(batch), batch.op, batch.others["sigma"]
            if net.stages > 1:
                restored = net(y, op=op, sigma=sigma)
            else:
                restored = unrolling.trained_pass(net, y, batch.passes, op, sigma)
        return losses.root_mean_squared_error(restored, batch.x)

    @staticmethod
    def _learns_noise(net: LoRun) -> bool:
        """Whether this is the block of a phase 1 on Gaussian noise."""
        return net.stages == 1 and net.noise_map == "stage"

    @staticmethod
    def _denoise(net: LoRun, batch: Batch) -> Tensor:
        sigma = batch.others["sigma"]
        noisy = batch.x + sigma.reshape(-1, 1, 1, 1) * batch.others["noise"]
        return net.denoiser(noisy, stage=0, sigma=sigma)

    @torch.no_grad()
    def score(self, net: LoRun, device: torch.device) -> float:
        """Mean PSNR in dB over crops of held-out training images, the scales in turn, the draws the same each time.

        Of a block that phase 1 trains on Gaussian noise: its PSNR on noise of 15/255.
        """
        total = 0.0
        for i, image in enumerate(self.validation):
            x = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)[None]
            scale = self.args.scales[i % len(self.args.scales)]
            rng = np.random.default_rng((self.args.seed, i, 2))
            if self._learns_noise(net):
                batch = Batch(x, {"sigma": torch.full((1,), 15 / 255), "noise": self._normal(x.shape, rng)}).to(device)
                restored = self._denoise(net, batch)
            else:
                batch = self.disturbed(x, rng, scale).to(device)
                y, op, sigma = self.measure(batch), batch.op, batch.others["sigma"]
                restored = net(y, op=op, sigma=sigma)
                restored = unrolling.more_passes(net, restored, y, self.args.pretrain_unroll, op, sigma)
            total += -10 * torch.log10(torch.mean((restored.clamp(0, 1) - batch.x) ** 2)).item()
        return total / len(self.validation)
