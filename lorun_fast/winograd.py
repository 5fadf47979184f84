"""Convolutions of a network for inference, by minimal filtering (ops/winograd_conv2d.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorun_fast.ops.winograd_conv2d import CHANNELS, winograd_conv2d, winograd_weight


def unfit(conv: nn.Module) -> str | None:
    """Why :class:`WinogradConv2d` cannot stand for this module; None if it can."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}"
    if conv.kernel_size != (3, 3):
        return "its kernel is not 3 x 3"
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding not in ((1, 1), "same"):
        return "its stride or dilation is not 1, or its result not of the image's size"
    if conv.groups != 1 or conv.padding_mode != "zeros":
        return "it is grouped or does not pad with zeros"
    if conv.in_channels % CHANNELS or conv.out_channels % CHANNELS:
        return f"its channels are not multiples of {CHANNELS}"
    return None if conv.weight.dtype == torch.float32 else f"its weight is {conv.weight.dtype}"


class WinogradConv2d(nn.Module):
    """An nn.Conv2d of 3 x 3 with stride and padding 1, for inference: a quarter of its multiplications.

    Its state is that of the layer it stands for. ``points``, (36, in, out): its weight transformed, 4 times as large.
    Raises ValueError for a layer that this does not fit.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        reason = unfit(conv)
        if reason is not None:
            raise ValueError(f"conv: expected a 3 x 3 convolution with stride and padding 1, got {reason}")
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.weight = nn.Parameter(conv.weight.detach(), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.register_buffer("points", winograd_weight(self.weight), persistent=False)
        self.register_load_state_dict_post_hook(WinogradConv2d._transform_again)

    def _transform_again(self, *_) -> None:
        self.points = winograd_weight(self.weight)

    def forward(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """act(conv(x) + bias) + residual. activation: None or "relu"."""
        return winograd_conv2d(x, self.points, self.bias, activation=activation, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"


def convolve(conv: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """act(conv(x)) + residual, in one pass where the layer can. activation: None or "relu"."""
    if isinstance(conv, WinogradConv2d):
        return conv(x, activation, residual)
    y = conv(x)
    if activation == "relu":
        y = F.relu(y)
    return y if residual is None else residual + y


def replace_convolutions(networks: list[nn.Module]) -> tuple[int, int]:
    """In place, every convolution that fits, one for all that share a weight; (replaced, all convolutions) of one."""
    made: dict[tuple[int, int | None], WinogradConv2d] = {}
    counts = (0, 0)
    for network in dict.fromkeys(networks):
        slots = [
            (parent, name, child)
            for parent in network.modules()
            for name, child in parent._modules.items()
            if isinstance(child, nn.Conv2d)
        ]
        fitting = [slot for slot in slots if unfit(slot[2]) is None]
        counts = (len(fitting), len(slots))
        for parent, name, conv in fitting:
            key = (id(conv.weight), None if conv.bias is None else id(conv.bias))
            if key not in made:
                made[key] = WinogradConv2d(conv)
            setattr(parent, name, made[key])
    return counts
