"""Compressive sensing: what is trained, on what, and how it is scored while training."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from lorun_fast.apps import unrolling
from lorun_fast.apps.batches import Batch
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.runtime import at_least_one, percentage
from lorun_fast.apps.sampling import PatchSampler, find_images, held_out, load_gray
from lorun_fast.denoisers import ResUNet
from lorun_fast.network import LoRun
from lorun_fast.operators import BlockCS

_VALIDATION_IMAGES = 12
# Enough blocks for the 256 leading components of 32 x 32; drawn from steps that no phase reaches.
_PCA_BLOCKS = 20_000
_PCA_FIRST_STEP = 100_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ratio", type=percentage, default=25.0, help="percent of measurements, 100 m / B^2 (default 25)")
    add("--block-size", type=at_least_one, default=32, help="B (default 32)")
    add("--fixed-phi", action="store_true", help="keep the first Phi instead of learning it")
    add(
        "--phi-start",
        choices=("gaussian", "pca"),
        default="gaussian",
        help="the first Phi: Gaussian with orthonormal rows (default), or the principal components of training blocks",
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
    """Patches of gray images, their measurements, and the mean squared error."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if args.patch % args.block_size:
            raise UserError(f"--patch: expected a multiple of --block-size {args.block_size}, got {args.patch}")
        self.paths = find_images(args.data)
        validation, training = held_out(load_gray(self.paths, args.patch), _VALIDATION_IMAGES)
        crop = 256
        self.validation = [image[:crop, :crop] for image in validation]
        self.sampler = PatchSampler(training, args.patch, args.batch, args.seed)

    def base(self) -> LoRun:
        """Phase 1: a single block and the sensing matrix."""
        args = self.args
        op = BlockCS.gaussian(args.ratio / 100, args.block_size, seed=args.seed, learn=not args.fixed_phi)
        if args.phi_start == "pca":
            with torch.no_grad():
                op.phi.copy_(self._principal_components(len(op.phi)))
        return LoRun(op, ResUNet(channels=tuple(args.channels)), stages=1, sharing="tied")

    def _principal_components(self, m: int) -> Tensor:
        """(m, B*B): the first eigenvectors of the blocks' second moments, the mean block among what they span."""
        b, side = self.args.block_size, self.args.patch
        moments = torch.zeros(b * b, b * b, dtype=torch.float64)
        for step in range(-(-_PCA_BLOCKS // (self.args.batch * (side // b) ** 2))):
            x = self.sampler(_PCA_FIRST_STEP + step).double()
            blocks = x.unfold(2, b, b).unfold(3, b, b).reshape(-1, b * b)
            moments += blocks.mT @ blocks
        return torch.linalg.eigh(moments).eigenvectors[:, -m:].flip(1).mT.float()

    def draw(self, net: LoRun, step: int) -> Batch:
        """Patches; in phase 1 also 0 to ``--pretrain-unroll`` passes of the block's own."""
        x = self.sampler(step)
        if net.stages > 1:
            return Batch(x)
        rng = np.random.default_rng((self.args.seed, step, 1))
        return Batch(x, passes=int(rng.integers(self.args.pretrain_unroll + 1)))

    def loss(self, net: LoRun, batch: Batch) -> Tensor:
        """Mean squared error."""
        y = net.op(batch.x)
        restored = net(y) if net.stages > 1 else unrolling.trained_pass(net, y, batch.passes)
        return nn.functional.mse_loss(restored, batch.x)

    @torch.no_grad()
    def score(self, net: LoRun, device: torch.device) -> float:
        """Mean PSNR in dB over crops of held-out training images."""
        total = 0.0
        for image in self.validation:
            x = torch.from_numpy(image.astype(np.float32) / 255)[None, None].to(device)
            y = net.op(x)
            restored = unrolling.more_passes(net, net(y, size=x.shape[-2:]), y, self.args.pretrain_unroll)
            total += -10 * torch.log10(torch.mean((restored.clamp(0, 1) - x) ** 2)).item()
        return total / len(self.validation)
