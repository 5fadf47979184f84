"""Shapes of one convolution, and the memory layouts the kernels read: NHWC images, tap-major weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = (None, "relu", "leaky_relu", "gelu", "silu")


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclass(frozen=True)
class Geometry:
    """x (n, c, h, w) -> y (n, o, p, q) through kh x kw taps."""

    n: int
    c: int
    h: int
    w: int
    o: int
    p: int
    q: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of(x_shape, weight_shape, stride=1, padding=0, dilation=1) -> Geometry:
        """padding: as for nn.functional.conv2d, "same" and "valid" too. weight_shape ends in (out, in, kh, kw)."""
        n, c, h, w = x_shape
        o, c_weight, *kernel = weight_shape[-4:]
        if c_weight != c:
            raise ValueError(f"x: expected {c_weight} channels for weight {tuple(weight_shape)}, got {c}")
        stride, dilation = _pair(stride), _pair(dilation)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same":
            if stride != (1, 1):
                raise ValueError(f"padding: expected numbers with stride {stride}, got 'same'")
            before, total = tuple(a // 2 for a in reach), reach
        else:
            before = (0, 0) if padding == "valid" else _pair(padding)
            total = [2 * a for a in before]
        p, q = ((s + t - a - 1) // step + 1 for s, t, a, step in zip((h, w), total, reach, stride, strict=True))
        if p < 1 or q < 1:
            raise ValueError(f"x: expected at least {tuple(a + 1 for a in reach)} pixels with padding, got {(h, w)}")
        return Geometry(n, c, h, w, o, p, q, tuple(kernel), stride, tuple(before), dilation)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def plain(self) -> bool:
        """Whether pixels do not interact: the convolution is a matrix product over all pixels."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def flat(self) -> Geometry:
        """A plain convolution's images as one row of pixels each, so that no tile is cut at a row's end."""
        h, w = 1, self.h * self.w
        return Geometry(self.n, self.c, h, w, self.o, h, w, (1, 1), (1, 1), (0, 0), (1, 1))


def nhwc(t: Tensor) -> Tensor:
    """(N, H, W, C) view of an (N, C, H, W) image whose channels lie together; copied to channels_last if they do not.

    The pixel stride may exceed the channels: storage padded to whole 16 bytes lets 28 or 31 channels use descriptors.
    """
    view = t.permute(0, 2, 3, 1)
    if view.stride(3) != 1 and view.shape[3] != 1:
        view = t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return view


def padded_like(t: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """An empty (N, C, H, W) image in t's dtype whose pixels start at multiples of 16 bytes."""
    n, c, h, w = shape
    unit = 16 // t.element_size()
    return t.new_empty(n, h, w, -(-c // unit) * unit)[..., :c].permute(0, 3, 1, 2)


def base_layout(weight: Tensor) -> Tensor:
    """(..., out, in, kh, kw) -> (..., out, taps, in), contiguous: free for channels_last and for 1 x 1 weights."""
    return weight.movedim(-3, -1).contiguous().flatten(-3, -2)


def factor_layout(down: Tensor) -> Tensor:
    """(..., r, in, kh, kw) -> (..., r, taps, in), contiguous."""
    return base_layout(down)


def stage_arguments(stage, *tensors: Tensor | None):
    """(stage tensor or None, number of stages, the tensors): an int picks its slice, a tensor leaves the stack."""
    if isinstance(stage, Tensor):
        count = next(t.shape[0] for t in tensors if t is not None)
        return stage.contiguous(), count, tensors
    if stage is None:
        return None, 1, tensors
    return None, 1, tuple(None if t is None else t[stage] for t in tensors)
