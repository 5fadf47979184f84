"""Which tile each kernel uses: fixed, per architecture, so that a result never depends on when it was computed.

The forward tiles of sm_90 in 16 bits were searched for on an H200 (docs/kernels.md), without spills (``make
kernels-check``); the others come from the compiler and the model in :mod:`lorun_fast.kernels.model`. Nothing is ever
tuned by itself. Whoever asks for tuning (tune.py) gets a file, and LORUN_KERNELS_CONFIGS=FILE puts its tiles before the
shipped ones: read once, at the first launch, and as fixed from there on.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import torch

from lorun_fast.kernels import tables
from lorun_fast.kernels._geometry import Geometry, ceil_div, next_power
from lorun_fast.kernels.tiles import BackwardTile, FactorTile, Tile

ARCHITECTURES = (80, 90, 100)


def architecture(device: torch.device) -> int:
    """The shipped architecture for a device: the newest that is not newer; 80 in the interpreter on a CPU."""
    if device.type != "cuda":
        return int(os.environ.get("LORUN_KERNELS_ARCH", "80"))
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.cache
def table() -> tables.Table | None:
    """The tiles of the file that the environment names, or None. Read once: later changes of either are not seen."""
    path = os.environ.get("LORUN_KERNELS_CONFIGS")
    return tables.read(path) if path else None


def _tuned(arch: int, *key) -> Tile | BackwardTile | None:
    found = table()
    if found is None:
        return None
    if found.architecture != arch:
        raise tables.TableError(
            f"LORUN_KERNELS_CONFIGS: expected tiles for sm_{arch}, got a file for "
            f"sm_{found.architecture} ({found.device}); tune again on this GPU"
        )
    return found.tiles.get(tables.Key(*key))


def forward(g: Geometry, dtype: torch.dtype, arch: int, rank: int, mixed: bool, activation: str | None = None) -> Tile:
    """The tile of lora_conv2d's forward for this problem: the user's (see the module), else the shipped one."""
    tuned = _tuned(arch, "forward", g, str(dtype), rank, mixed, activation)
    return tuned or shipped_forward(g, dtype, arch, rank, mixed, activation)


def backward(
    g: Geometry, dtype: torch.dtype, arch: int, rank: int, mixed: bool, activation: str | None = None
) -> BackwardTile:
    """The tiles of lora_conv2d's backward for this problem: the user's, else the shipped ones."""
    tuned = _tuned(arch, "backward", g, str(dtype), rank, mixed, activation)
    return tuned or shipped_backward(g, dtype, arch, rank, activation)


def shipped_forward(
    g: Geometry, dtype: torch.dtype, arch: int, rank: int, mixed: bool, activation: str | None
) -> Tile:  # fmt: skip
    """The tile of lora_conv2d's forward that the library comes with."""
    strip = rows_tile(g.c, g.o, g.q, g, dtype, arch)
    if arch == 80 and mixed and activation in ("gelu", "silu") and strip is not None and max(strip.bc, strip.bo) == 64:
        strip = None  # spills 24 bytes with a residual
    if arch != 90 or dtype == torch.float32:
        return strip or taps_tile(g, dtype, arch)
    if strip is None or g.q <= 64 or _strip_rows(g, strip) < 8:
        return _patches_on_hopper(g, plain=rank == 0 and not mixed and activation in (None, "relu"))
    if g.kernel == (3, 3) and strip.bc <= 32 and strip.bo <= 32 and g.c % 2 == 0:
        return replace(strip, warps=8, stages=3, descriptors=max(strip.bc, strip.bo) > 16)
    return strip


def strip_parts(height: int, strips: int, dilation: int, programs: int) -> tuple[int, int]:
    """(rows of one program, programs per strip): as many programs as the GPU holds at once, of at least 4 rows each.

    Rows of one program lie ``dilation`` apart. ``strips``: those of all samples.
    """
    rows = ceil_div(height, dilation)
    parts = max(1, min(ceil_div(rows, 4), programs // (strips * dilation)))
    each = ceil_div(rows, parts)
    return each, ceil_div(rows, each) * dilation


def _strip_rows(g: Geometry, strip: Tile) -> int:
    """Rows that one program stores; it reads k - 1 more."""
    return strip_parts(g.p, g.n * ceil_div(g.q, strip.bw), g.dilation[0], strip.rows)[0]


def _patches_on_hopper(g: Geometry, plain: bool) -> Tile:
    """The patch tile of sm_90 in 16 bits: smaller patches where larger ones leave multiprocessors idle.

    plain: no adapter, and ReLU at most.
    """
    bo = min(128, next_power(g.o))
    if g.p == 1:
        return Tile(1, 128, min(64, next_power(g.c)), bo, 8 if bo == 128 else 4, 4 if bo < 128 else 3, True)
    programs = g.n * ceil_div(g.p, 8) * ceil_div(g.q, 16) * ceil_div(g.o, bo)
    # Blocks of 64 channels would be a quarter of zeros at 96.
    bc = 32 if g.c > 64 and g.c % 64 else min(64, next_power(g.c))
    if programs < 100:
        return Tile(8, 8, bc, min(64, bo), 4, 4)
    if bo < 128:
        return Tile(8, 16, bc, bo, 8 if bo == 64 else 4, 4, True)
    if bc == 32:
        return Tile(16 if plain else 8, 16, bc, bo, 8, 3)
    if plain and g.c == 128:
        return Tile(8, 16, 128, bo, 8, 3)
    return Tile(8, 16, bc, bo, 8, 3, True)


def strip_fits(c: int, o: int, g: Geometry, dtype: torch.dtype) -> bool:
    """Whether the weights of all taps of c -> o channels fit shared memory, and strips can compute the rest."""
    fits = next_power(max(c, o)) <= (64 if g.kernel[0] == 3 else 32)
    return fits and g.kernel in ((3, 3), (5, 5)) and g.stride == (1, 1) and dtype != torch.float32


def rows_tile(c: int, o: int, width: int, g: Geometry, dtype: torch.dtype, arch: int) -> Tile | None:
    """The strip tile for c -> o channels and rows ``width`` long, or None where patches are used.

    Strips need the weights of all taps in shared memory, and rows long enough to fill a tile. On sm_100 Triton 3.7
    compiles the widest strip to a kernel that stores nothing, and moves every accumulator through tensor memory as it
    goes up by one row: patches there.
    """
    k, wide = g.kernel[0], next_power(max(c, o))
    if width < 48 or not strip_fits(c, o, g, dtype):
        return None
    # Channels that are no multiple of a copy's 4 bytes go through registers, one by one.
    odd = c % 2 == 1
    if arch == 100 or (arch == 80 and (k == 5 or odd)):
        return None
    bw = 128 if width > 64 and (arch == 90 or wide == 32) else 64
    describe = arch >= 90
    programs = (132 if arch == 90 else 108) * (1 if wide == 64 or k == 5 else 2)
    return Tile(1, bw, next_power(c), next_power(o), 8 if wide == 64 or k == 5 or odd else 4, 2, describe, programs)


def taps_tile(g: Geometry, dtype: torch.dtype, arch: int) -> Tile:
    """The patch tile: any kernel size, stride, dilation and width."""
    flat = g.p == 1
    if dtype == torch.float32:
        return Tile(*((1, 64) if flat else (8, 8)), 16, min(32, next_power(g.o)), 4, 1 if arch == 100 else 2)
    bc, bo = min(64, next_power(g.c)), min(128, next_power(g.o))
    bh, bw = (1, 128) if flat else (8, 16)
    if arch == 80:
        return Tile(*((1, 64) if flat else (8, 8)), min(32, bc), min(64, bo), 4, 3)
    return Tile(bh, bw, bc, bo, 8 if bo == 128 else 4, 4 if bo < 128 else 3, True)


def shipped_backward(
    g: Geometry, dtype: torch.dtype, arch: int, rank: int, activation: str | None = None
) -> BackwardTile:
    """The tiles of lora_conv2d's backward that the library comes with."""
    flat = g.p == 1
    programs = {80: 216, 90: 264, 100: 296}[arch]
    if dtype == torch.float32:
        # 32 columns spill 24 bytes at 28 channels on sm_100.
        out = Tile(*((1, 32) if flat else (4, 8)), 16, min(16 if arch == 100 else 32, next_power(g.o)), 8, 2)
        image = Tile(*((1, 64) if flat else (8, 8)), 16, 16, 4, 2)
        factor = FactorTile(*((1, 32) if flat else (4, 8)), min(32, next_power(g.c)), 1, 32)
        return BackwardTile(out, image, factor, programs)
    wide = next_power(g.o) >= 128
    bh, bw = (1, 128) if flat else (8, 16)
    half = (1, 64) if flat else (8, 8)
    small = wide or arch != 90 or g.c % 2
    bc = min(32 if arch == 80 else 64, next_power(g.c))
    out = Tile(*(half if small else (bh, bw)), bc, min(64 if arch == 90 else 32, next_power(g.o)), 8, 2, arch >= 90)
    if arch == 100:
        out = replace(out, registers=255)
    image = rows_tile(g.o, g.c, g.w, g, dtype, arch)
    if image is None:
        bc = min(128, next_power(g.c))
        image = Tile(
            bh,
            bw,
            bc,
            min(64 if arch > 80 else 32, next_power(g.o)),
            8 if bc == 128 or arch == 80 else 4,
            2,
            arch >= 90,
        )
    else:
        image = replace(image, bc=image.bo, bo=image.bc)
    group = 1 if rank == 0 or g.taps == 1 else 4 if rank <= 16 else 2
    if group == 4 and g.taps == 9 and image.rows is not None and image.warps == 8 and arch == 90:
        group = 16  # x once for all taps; narrower layers have too few warps to hold the sums
    strip = None
    # With an activation, whose result is a second tile beside dy, 64 channels spill 8 to 128 bytes.
    narrow = activation is None or max(next_power(g.c), next_power(g.o)) <= 32
    if arch == 90 and 0 < rank <= 16 and g.q >= 48 and g.c % 2 == 0 and narrow and strip_fits(g.c, g.o, g, dtype):
        strip = Tile(1, 64, next_power(g.c), next_power(g.o), 4, 2, True, programs)
    return BackwardTile(out, image, FactorTile(bh, bw, min(64, next_power(g.c)), group), programs, strip)
