"""Which tile each kernel uses: fixed, per architecture, so that a result never depends on when it was computed.

The numbers come from the compiler (registers, shared memory, no spills: ``make kernels-check``) and the model in
:mod:`lorun_fast.kernels.model`; no GPU has confirmed them yet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lorun_fast.kernels._geometry import Geometry

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Tile:
    """bh x bw pixels, blocks of bc input and bo output channels. rows: None for the taps kernel; else the programs that
    the rows kernel aims at, about what the GPU holds at once. descriptors: bulk-tensor copies where strides allow."""

    bh: int
    bw: int
    bc: int
    bo: int
    warps: int
    stages: int
    descriptors: bool = False
    rows: int | None = None


def architecture(device: torch.device) -> int:
    """The shipped architecture for a device: the newest that is not newer; 80 in the interpreter on a CPU."""
    if device.type != "cuda":
        return int(os.environ.get("LORUN_KERNELS_ARCH", "80"))
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


def _power(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


def forward(g: Geometry, dtype: torch.dtype, arch: int, rank: int, mixed: bool) -> Tile:
    """The tile of lora_conv2d's forward for this problem."""
    return rows_tile(g, dtype, arch) or taps_tile(g, dtype, arch)


def rows_tile(g: Geometry, dtype: torch.dtype, arch: int) -> Tile | None:
    """The strip tile, or None where the weights of all taps do not fit shared memory or rows are too short."""
    wide = _power(max(g.c, g.o))
    k = g.kernel[0]
    if g.kernel not in ((3, 3), (5, 5)) or g.stride != (1, 1) or dtype == torch.float32 or g.q < 32:
        return None
    if wide > (64 if k == 3 else 32):
        return None
    bc, bo = _power(g.c), _power(g.o)
    bw = 128 if g.q > 64 else 64
    if arch == 90:
        big = wide == 64 or k == 5
        return Tile(1, bw, bc, bo, 8 if big and bw == 128 else 4, 2, True, 132 if big else 264)
    return None


def taps_tile(g: Geometry, dtype: torch.dtype, arch: int) -> Tile:
    """The patch tile: any kernel size, stride, dilation and width."""
    bh, bw = (1, 128) if g.p == 1 else (8, 16)
    if dtype == torch.float32:
        return Tile(*((1, 64) if g.p == 1 else (8, 8)), min(32, _power(g.c)), min(32, _power(g.o)), 4, 2)
    bc, bo = min(64, _power(g.c)), min(128, _power(g.o))
    return Tile(bh, bw, bc, bo, 8 if bo == 128 else 4, 3 if arch == 80 else 4, arch >= 90)


@dataclass(frozen=True)
class FactorTile:
    """bh x bw pixels of x, blocks of bc channels, ``group`` taps at once; rows: block of g's channels for d W."""

    bh: int
    bw: int
    bc: int
    group: int
    rows: int = 64


@dataclass(frozen=True)
class BackwardTile:
    """output: of output_side. image: of dx (a strip where it has rows). factor: of d down. programs: how many programs
    share the patches in the two reductions, about what the GPU holds at once."""

    output: Tile
    image: Tile
    factor: FactorTile
    programs: int = 264


def backward(g: Geometry, dtype: torch.dtype, arch: int, rank: int) -> BackwardTile:
    """The tiles of lora_conv2d's backward for this problem."""
    patch = taps_tile(g, dtype, arch)
    return BackwardTile(patch, patch, FactorTile(patch.bh, patch.bw, patch.bc, min(4, _power(g.taps, 1))))
