"""A residual U-Net base denoiser.

Four scales by default, two residual blocks (convolution, ReLU, convolution, skip) a level and side, 2 x 2
strided and transposed convolutions between scales, no biases. With channels 16-32-64-64, four channels in
and three out it has 588,784 parameters; with 32-64-96-128 and one channel 1,786,432.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorun_fast.convolutions import convolve, residual_block
from lorun_fast.denoisers import _inputs
from lorun_fast.ops._checks import whole


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))) + residual, which may be left out."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return residual_block(self.conv1, self.conv2, x, residual)


class ResUNet(nn.Module):
    """forward(z, sigma=None): (N, in, H, W) -> (N, out, H, W), any H and W (replicated up to whole cells inside).

    in_channels, out_channels: image channels. noise_level: append one constant channel that holds sigma
        (a number, a 0-d tensor or (N,); on the images' own scale), and require it in forward.
    channels: width per scale. blocks: residual blocks per level.
    residual: predict the correction to the first ``out_channels`` input channels instead of the image.
    Raises ValueError for another channel count, or for a missing or unexpected sigma.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: tuple[int, ...] = (16, 32, 64, 64),
        blocks: int = 2,
        noise_level: bool = False,
        residual: bool = True,
    ):
        super().__init__()
        in_channels, out_channels = _inputs.check_channels(in_channels, out_channels, residual)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.channels, self.blocks = _inputs.sizes("channels", channels, 1), whole("blocks", blocks, 0)
        self.noise_level, self.residual = noise_level, residual
        pairs = list(zip(self.channels, self.channels[1:], strict=False))

        def level(width: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))

        self.head = nn.Conv2d(in_channels + noise_level, self.channels[0], 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(level(narrow) for narrow, _ in pairs)
        self.down = nn.ModuleList(nn.Conv2d(narrow, wide, 2, stride=2, bias=False) for narrow, wide in pairs)
        self.body = level(self.channels[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2, bias=False) for narrow, wide in pairs)
        self.decoder = nn.ModuleList(level(narrow) for narrow, _ in pairs)
        self.tail = nn.Conv2d(self.channels[0], out_channels, 3, padding=1, bias=False)
        if residual:
            # Starting near the identity keeps nine untrained stages from amplifying one another.
            with torch.no_grad():
                self.tail.weight.mul_(0.1)

    def config(self) -> dict:
        """The constructor's arguments: what a saved file needs to rebuild this module."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "channels": list(self.channels),
            "blocks": self.blocks,
            "noise_level": self.noise_level,
            "residual": self.residual,
        }

    def forward(self, z: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        _inputs.check_images(z, self.in_channels)
        x = _inputs.with_noise_map(z, sigma, self.noise_level, "ResUNet")
        cells = _inputs.whole_cells(x, 2 ** len(self.down))
        whole = cells is x
        x = _inputs.for_convolution(cells)
        own = _inputs.to_correct(z, x, self.out_channels)
        # One-channel inputs cannot say which layout they are in; without this, CPU convolutions train 2x slower.
        x = _inputs.channels_last(self.head(x))
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            skips.append(x)
            x = down(blocks(x))
        x = self.body(x)
        for up, blocks, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips), strict=True):
            *blocks, last = [up, *blocks]
            for module in blocks:
                x = module(x)
            x = last(x, skip) if isinstance(last, ResidualBlock) else last(x) + skip
        if self.residual and whole:
            return convolve(self.tail, x, residual=own)
        x = _inputs.cropped(self.tail(x), z.shape[2:])
        return own + x if self.residual else x
