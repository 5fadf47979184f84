"""A U-shaped spectral Transformer: attention across bands, cost linear in the number of pixels.

One block is attention and a feed-forward layer side by side, so that each pixel passes one linear layer in, one
depthwise convolution and one linear layer out:

    q, k, v, h = local(expand(x))
    x + merge([A v, relu(h)]),   A = softmax(t * cos(q_i, k_j)) over the channels i, j of one head

The cosine is taken over all pixels, so A (one d x d matrix per head) keeps its scale from a crop to a whole image.
There are no biases and no norms: D(c z) = c D(z) for c > 0, the exposure of a measurement does not matter.
Attention across bands is that of MST (Cai et al., 2022) and Restormer (Zamir et al., 2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorun_fast.convolutions import depthwise
from lorun_fast.denoisers import _inputs
from lorun_fast.ops._checks import whole
from lorun_fast.ops.spectral_attention import spectral_attention


class SpectralBlock(nn.Module):
    """x + merge([attention across the channels, feed-forward]); (N, C, H, W), channels-last inside."""

    def __init__(self, channels: int, heads: int, expansion: int):
        super().__init__()
        self.heads, self.hidden = heads, expansion * channels
        inside = 3 * channels + self.hidden
        self.expand = nn.Linear(channels, inside, bias=False)
        self.local = nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 4.0))
        self.merge = nn.Linear(channels + self.hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        t = self.expand(x.permute(0, 2, 3, 1))
        t = depthwise(self.local, t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        t = self.merge(spectral_attention(t, self.temperature, hidden=self.hidden))
        return x + t.reshape(n, height, width, channels).permute(0, 3, 1, 2)


class SpectralTransformer(nn.Module):
    """forward(z, sigma=None): (N, in, H, W) -> (N, out, H, W), any H and W (replicated up to whole cells inside).

    in_channels, out_channels: bands of the image. noise_level: append one constant channel that holds sigma
        (a number, a 0-d tensor or (N,); on the images' own scale), and require it in forward.
    channels: width per scale. blocks: blocks per scale, on either side of the U (the last scale has one side).
    head_channels: channels per attention head, at most; a scale's width is split into equal heads.
    expansion: hidden width of the feed-forward part in units of the scale's width.
    residual: predict the correction to the first ``out_channels`` input channels instead of the image.
    Raises ValueError for another channel count, or for a missing or unexpected sigma.
    """

    def __init__(
        self,
        in_channels: int = 28,
        out_channels: int = 28,
        channels: tuple[int, ...] = (28, 56, 112),
        blocks: tuple[int, ...] = (1, 1, 1),
        head_channels: int = 28,
        expansion: int = 2,
        noise_level: bool = False,
        residual: bool = True,
    ):
        super().__init__()
        in_channels, out_channels = _inputs.check_channels(in_channels, out_channels, residual)
        self.channels, self.blocks = _inputs.sizes("channels", channels, 1), _inputs.sizes("blocks", blocks, 0)
        head_channels, expansion = whole("head_channels", head_channels, 1), whole("expansion", expansion, 1)
        if len(blocks) != len(channels):
            raise ValueError(f"blocks: expected one number for each of {len(channels)} scales, got {len(blocks)}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.head_channels, self.expansion = head_channels, expansion
        self.noise_level, self.residual = noise_level, residual
        pairs = list(zip(self.channels, self.channels[1:], strict=False))

        def level(scale: int) -> nn.Sequential:
            width = self.channels[scale]
            heads = next(n for n in range(math.ceil(width / head_channels), width + 1) if width % n == 0)
            return nn.Sequential(*(SpectralBlock(width, heads, expansion) for _ in range(self.blocks[scale])))

        self.head = nn.Conv2d(in_channels + noise_level, self.channels[0], 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(level(i) for i in range(len(pairs)))
        self.down = nn.ModuleList(nn.Conv2d(narrow, wide, 2, stride=2, bias=False) for narrow, wide in pairs)
        self.body = level(len(pairs))
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2, bias=False) for narrow, wide in pairs)
        self.decoder = nn.ModuleList(level(i) for i in range(len(pairs)))
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
            "blocks": list(self.blocks),
            "head_channels": self.head_channels,
            "expansion": self.expansion,
            "noise_level": self.noise_level,
            "residual": self.residual,
        }

    def forward(self, z: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        _inputs.check_images(z, self.in_channels)
        x = _inputs.with_noise_map(z, sigma, self.noise_level, "SpectralTransformer")
        x = _inputs.channels_last(_inputs.whole_cells(x, 2 ** len(self.down)))
        own = _inputs.to_correct(z, x, self.out_channels)
        x = self.head(x)
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            x = blocks(x)
            skips.append(x)
            x = down(x)
        x = self.body(x)
        for up, blocks, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips), strict=True):
            x = blocks(up(x) + skip)
        x = _inputs.cropped(self.tail(x), z.shape[2:])
        return own + x if self.residual else x
