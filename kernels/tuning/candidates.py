"""Candidates for tuning: the tiles around one tile, a step in one of its numbers each.

A part of a tile belongs to one launch: the forward tile is one part; the backward's are the tiles of output_side and of
its strips, of dx and of d down, and the number of programs. Parts are tuned one after another, because launches run one
after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lorun_fast.kernels import configs
from lorun_fast.kernels._geometry import Geometry, next_power
from lorun_fast.kernels.tiles import BackwardTile, FactorTile, Tile, fault

# The launch (by its place in the plan) that each part decides.
PARTS = {"forward": {"tile": 0}, "backward": {"output": 0, "strip": 0, "image": 1, "factor": 1, "programs": 0}}
WARPS = (4, 8)
STAGES = (1, 2, 3, 4, 5)


def _steps(tile, names: tuple[str, ...]) -> Iterator:
    """``tile`` with one of these numbers halved or doubled."""
    for name in names:
        value = getattr(tile, name)
        yield from (replace(tile, **{name: changed}) for changed in (value // 2, value * 2) if changed)


def _around(tile: Tile, arch: int) -> Iterator[Tile]:
    strip = tile.rows is not None
    yield from _steps(tile, ("bw", "rows") if strip else ("bh", "bw", "bc", "bo"))
    if not strip and tile.bh > 1:
        yield replace(tile, bh=tile.bh // 2, bw=tile.bw * 2)
        yield replace(tile, bh=tile.bh * 2, bw=tile.bw // 2)
        yield replace(tile, bh=tile.bh * 2, warps=tile.warps * 2)
    yield from (replace(tile, warps=w) for w in WARPS)
    yield from (replace(tile, stages=s) for s in STAGES if abs(s - tile.stages) == 1)
    if arch >= 90:
        yield replace(tile, descriptors=not tile.descriptors)


def _other_kind(tile: Tile, c: int, o: int, g: Geometry, dtype: torch.dtype, arch: int) -> Iterator[Tile]:
    """Patches for a strip; for patches a strip, where one can be. c -> o: the channels of this launch."""
    if tile.rows is not None:
        yield configs.taps_tile(g, dtype, arch)
    elif configs.strip_fits(c, o, g, dtype):
        yield Tile(1, 64, next_power(c), next_power(o), 8, 2, arch >= 90, 132)


def _fits(tile: Tile | FactorTile, old: Tile | FactorTile, g: Geometry) -> bool:
    """Whether no block grew to twice what it covers, and the warps not beyond those of other candidates."""
    most = {
        "bh": next_power(max(g.p, g.h), 1),
        "bw": next_power(max(g.q, g.w), 32),
        "bc": next_power(g.c),
        "bo": next_power(g.o),
        "warps": max(WARPS),
    }
    return all(getattr(tile, name, 0) <= max(limit, getattr(old, name, 0)) for name, limit in most.items())


def _one(tile, g: Geometry, dtype: torch.dtype, arch: int, swapped: bool = False) -> Iterator[Tile]:
    """Around a forward or an image tile, and its other kind; swapped: dx, whose strips lead from o to c channels."""
    yield from _around(tile, arch)
    c, o = (g.o, g.c) if swapped else (g.c, g.o)
    for other in _other_kind(tile, c, o, g, dtype, arch):
        yield replace(other, bc=other.bo, bo=other.bc) if swapped else other


def variations(
    tile: Tile | BackwardTile, part: str, g: Geometry, dtype: torch.dtype, arch: int, rank: int
) -> list[Tile | BackwardTile]:
    """The tiles one step from ``tile`` in ``part``, without itself: each computes the problem, if it fits the GPU."""
    if part == "tile":
        found = [t for t in _one(tile, g, dtype, arch) if _fits(t, tile, g)]
    elif part == "programs":
        found = list(_steps(tile, ("programs",)))
    else:
        old = getattr(tile, part)
        if old is None:
            return []
        if part in ("output", "strip"):
            ways = _around(old, arch)
        elif part == "image":
            ways = _one(old, g, dtype, arch, swapped=True)
        else:
            ways = _steps(old, ("bh", "bw", "bc", "group") + (() if rank else ("rows",)))
        found = [replace(tile, **{part: t}) for t in ways if _fits(t, old, g)]
    return [t for t in dict.fromkeys(found) if t != tile and not fault(t, g)]
