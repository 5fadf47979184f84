"""Tiles: how a launch is cut, and which cuts can compute which problem."""

from __future__ import annotations

from dataclasses import dataclass

from lorun_fast.kernels._geometry import Geometry


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
    registers: int | None = None  # a bound for ptxas, which otherwise may spill to raise occupancy

    def __str__(self) -> str:
        pixels = f"{self.bh}x{self.bw}" if self.rows is None else f"strip {self.bw}"
        words = [pixels, f"c{self.bc}", f"o{self.bo}", f"{self.warps} warps", f"{self.stages} stages"]
        words += ["bulk"] if self.descriptors else []
        words += [f"{self.rows} programs"] if self.rows is not None else []
        words += [f"{self.registers} registers at most"] if self.registers else []
        return " ".join(words)


@dataclass(frozen=True)
class FactorTile:
    """bh x bw pixels of x, blocks of bc channels, ``group`` taps at once; rows: block of g's channels for d W."""

    bh: int
    bw: int
    bc: int
    group: int
    rows: int = 64

    def __str__(self) -> str:
        return f"{self.bh}x{self.bw} c{self.bc} taps {self.group} rows {self.rows}"


@dataclass(frozen=True)
class BackwardTile:
    """output: of output_side. image: of dx (a strip where it has rows). factor: of d down. programs: how many programs
    share the patches in the two reductions, about what the GPU holds at once. strip: of output_rows, which takes
    output_side's place where no convolution is computed again; None for never."""

    output: Tile
    image: Tile
    factor: FactorTile
    programs: int
    strip: Tile | None = None

    def __str__(self) -> str:
        parts = [f"output [{self.output}]"] + [f"or [{self.strip}]"] * (self.strip is not None)
        return ", ".join([*parts, f"image [{self.image}]", f"factor [{self.factor}]", f"{self.programs} programs"])


def _power_of_two(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0


def _sizes(tile: Tile | FactorTile, *, least_pixels: int = 16) -> str:
    """Why no kernel takes these sizes; empty where they are fine. A bulk copy's box ends at 256 in each direction."""
    for name, value, least, most in (("bh", tile.bh, 1, 256), ("bw", tile.bw, 1, 256), ("bc", tile.bc, 16, 256)):
        if not _power_of_two(value, least, most):
            return f"{name}: expected a power of two from {least} to {most}, got {value}"
    if tile.bh * tile.bw < least_pixels:
        return f"bh x bw: expected at least {least_pixels} pixels, got {tile.bh} x {tile.bw}"
    return ""


def _launch_fault(tile: Tile) -> str:
    found = _sizes(tile)
    if found:
        return found
    for name, value, least, most in (("bo", tile.bo, 16, 256), ("warps", tile.warps, 1, 32)):
        if not _power_of_two(value, least, most):
            return f"{name}: expected a power of two from {least} to {most}, got {value}"
    if not 1 <= tile.stages <= 8:
        return f"stages: expected 1 to 8, got {tile.stages}"
    if tile.registers is not None and not 16 <= tile.registers <= 255:
        return f"registers: expected 16 to 255, got {tile.registers}"
    return ""


def _image_fault(tile: Tile, g: Geometry) -> str:
    found = _launch_fault(tile)
    if found or tile.rows is None:
        return found
    kh, kw = g.kernel
    if kh != kw or g.stride != (1, 1):
        return f"rows: expected a square kernel at stride 1 for a strip, got {kh} x {kw} at {g.stride}"
    if tile.rows < 1 or tile.bh != 1 or tile.bw < 16:
        return f"rows: expected bh 1, bw of at least 16 and one program or more for a strip, got {tile}"
    if tile.bc < g.c or tile.bo < g.o:
        return f"rows: expected blocks that hold all {g.c} -> {g.o} channels for a strip, got {tile.bc} -> {tile.bo}"
    return ""


def fault(tile: Tile | BackwardTile, g: Geometry) -> str:
    """Why this tile cannot compute this convolution (forward, or backward), else "".

    What is true of a kernel whatever the GPU; registers and shared memory are the compiler's to judge.
    """
    if isinstance(tile, Tile):
        return _image_fault(tile, g)
    if tile.output.rows is not None:
        return f"output: expected patches (rows null), got {tile.output}"
    if tile.strip is not None and tile.strip.rows is None:
        return f"strip: expected rows, got {tile.strip}"
    for name, found in (
        ("output", _launch_fault(tile.output)),
        ("strip", "" if tile.strip is None else _image_fault(tile.strip, g)),
        ("image", _image_fault(tile.image, g)),
        ("factor", _sizes(tile.factor)),
    ):
        if found:
            return f"{name}: {found}"
    for name, value, least, most in (("group", tile.factor.group, 1, 32), ("rows", tile.factor.rows, 16, 256)):
        if not _power_of_two(value, least, most):
            return f"factor: {name}: expected a power of two from {least} to {most}, got {value}"
    return "" if tile.programs >= 1 else f"programs: expected 1 or more, got {tile.programs}"
