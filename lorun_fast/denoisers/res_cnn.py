"""A plain residual CNN base denoiser: convolutions at full resolution, no scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorun_fast.convolutions import convolve
from lorun_fast.denoisers import _inputs
from lorun_fast.denoisers.res_unet import ResidualBlock
from lorun_fast.ops._checks import whole


class ResCNN(nn.Module):
    """forward(z, sigma=None): (N, in, H, W) -> (N, out, H, W), any H and W.

    A convolution to ``channels``, ``blocks`` residual blocks (convolution, ReLU, convolution, skip), a convolution to
    the image; 3 x 3, no biases. With the defaults and one channel 166,752 parameters, and a view of 21 x 21 pixels.

    in_channels, out_channels: image channels. noise_level: append one constant channel that holds sigma
        (a number, a 0-d tensor or (N,); on the images' own scale), and require it in forward.
    residual: predict the correction to the first ``out_channels`` input channels instead of the image.
    Raises ValueError for another channel count, or for a missing or unexpected sigma.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: int = 48,
        blocks: int = 4,
        noise_level: bool = False,
        residual: bool = True,
    ):
        super().__init__()
        in_channels, out_channels = _inputs.check_channels(in_channels, out_channels, residual)
        channels, blocks = whole("channels", channels, 1), whole("blocks", blocks, 0)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.channels, self.noise_level, self.residual = channels, noise_level, residual
        self.head = nn.Conv2d(in_channels + noise_level, channels, 3, padding=1, bias=False)
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.tail = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        if residual:
            # Starting near the identity keeps nine untrained stages from amplifying one another.
            with torch.no_grad():
                self.tail.weight.mul_(0.1)

    def config(self) -> dict:
        """The constructor's arguments: what a saved file needs to rebuild this module."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "channels": self.channels,
            "blocks": len(self.body),
            "noise_level": self.noise_level,
            "residual": self.residual,
        }

    def forward(self, z: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        _inputs.check_images(z, self.in_channels)
        x = _inputs.for_convolution(_inputs.with_noise_map(z, sigma, self.noise_level, "ResCNN"))
        own = _inputs.to_correct(z, x, self.out_channels)
        x = self.body(_inputs.channels_last(self.head(x)))
        return convolve(self.tail, x, residual=own if self.residual else None)
