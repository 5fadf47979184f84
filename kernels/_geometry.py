"""Shapes of one convolution, and the memory layouts the kernels read: NHWC images, tap-major weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = (None, "relu", "leaky_relu", "gelu", "silu")


def next_power(value: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``value`` and at least ``least`` (a tensor-core dimension)."""
    return max(least, 1 << (value - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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


class Layout(NamedTuple):
    """What a launch depends on of an image, seen as (N, H, W, C). aligned: its address is a multiple of 16 bytes."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    dtype: torch.dtype
    aligned: bool = True

    @staticmethod
    def of(t: Tensor) -> Layout:
        """t: (N, C, H, W)."""
        n, c, h, w = t.shape
        s_n, s_c, s_h, s_w = t.stride()
        return Layout((n, h, w, c), (s_n, s_h, s_w, s_c), t.dtype, t.data_ptr() % 16 == 0)

    @staticmethod
    def new(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Layout:
        """Of an (N, H, W, C) tensor that a launcher makes."""
        _, h, w, c = shape
        return Layout(shape, (h * w * c, w * c, c, 1), dtype)

    @property
    def in_a_row(self) -> bool:
        """Whether its pixels are equally spaced, across the ends of rows too."""
        return self.shape[1] == 1 or self.strides[1] == self.shape[2] * self.strides[2]

    def flat(self) -> Layout:
        """An image in_a_row, as one row of pixels."""
        (n, h, w, c), (s_n, _, s_w, s_c) = self.shape, self.strides
        return self._replace(shape=(n, 1, h * w, c), strides=(s_n, h * w * s_w, s_w, s_c))

    @property
    def describable(self) -> bool:
        """Whether a tensor descriptor can read it: channels lie together, the rest in units of 16 bytes."""
        *rest, channel = self.strides
        return self.aligned and channel == 1 and all(s > 0 and s * self.dtype.itemsize % 16 == 0 for s in rest)


def together(t: Tensor) -> Tensor:
    """An (N, C, H, W) image whose channels lie together; copied to channels_last if they do not.

    The pixel stride may exceed the channels: storage padded to whole 16 bytes lets 28 or 31 channels use descriptors.
    """
    if t.stride(1) != 1 and t.shape[1] != 1:
        return t.contiguous(memory_format=torch.channels_last)
    return t


def padded_like(t: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """An empty (N, C, H, W) image in t's dtype whose pixels start at multiples of 16 bytes."""
    n, c, h, w = shape
    unit = 16 // t.element_size()
    return t.new_empty(n, h, w, -(-c // unit) * unit)[..., :c].permute(0, 3, 1, 2)


def tap_major(weight: Tensor) -> Tensor:
    """The elements of a (..., out, in, kh, kw) weight in the order (..., out, kh, kw, in), whatever its shape says.

    Free for channels_last and for 1 x 1 weights.
    """
    if weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight.movedim(-3, -1).contiguous()
