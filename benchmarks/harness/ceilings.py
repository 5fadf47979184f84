"""What the machine can do, measured in the run that uses it: copies of several sizes, a matrix product per dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from benchmarks.harness.machine import cache_bytes
from benchmarks.harness.registry import COLD, DTYPES, WARM, Work
from benchmarks.harness.timing import Budget, Stats, Timer, interleave

COPY_MIB = {"cpu": (1, 4, 16, 64, 256), "cuda": (4, 16, 64, 256, 2048)}
PRODUCT = {"cpu": 1536, "cuda": 8192}
# Matrix tiles of a CPU (AMX) reach their speed on larger ones only: asked where the product above ran at this speed.
LARGE_PRODUCT, LARGE_FROM = 4096, 1e12
QUICK_COPY_MIB, QUICK_PRODUCT = (1, 8), 256


@dataclass(frozen=True)
class Ceiling:
    """One measured ceiling. bytes: read and written, of a copy; flops: of a product."""

    name: str
    bytes: float
    flops: float
    stats: Stats


@dataclass
class Ceilings:
    """copies: bytes per second of a warm copy by the bytes it moves; memory: from memory, caches flushed.
    products: operations per second by dtype."""

    copies: dict[float, float]
    memory: float
    products: dict[str, float]
    rows: list[Ceiling] = field(default_factory=list)

    def bandwidth(self, nbytes: float, regime: str) -> float:
        """Bytes per second to hold a case to: from memory when cold; when warm, the best copy at least as large."""
        if regime == COLD:
            return self.memory
        return max([rate for moved, rate in self.copies.items() if moved >= nbytes], default=self.memory)

    def limit(self, work: Work, dtype: str, regime: str) -> tuple[float, str]:
        """Seconds below which no implementation runs, and what sets them: "memory" or "arithmetic"."""
        move = work.bytes / self.bandwidth(work.bytes, regime)
        compute = work.flops / self.products[dtype]
        return (move, "memory") if move >= compute else (compute, "arithmetic")


def percent_of_limit(limit: float, median: float) -> float:
    """How much of the limit a median reaches, in percent."""
    return 100 * limit / median


def measure(device: torch.device, dtypes: list[str], timer: Timer, budget: Budget, *, quick: bool = False) -> Ceilings:
    """Measures copies (fp32, read plus write) and square matrix products of random numbers."""
    rows: list[Ceiling] = []
    copies: dict[float, float] = {}
    memory = 0.0
    for mib in QUICK_COPY_MIB if quick else COPY_MIB[device.type]:
        moved = mib << 20
        source = torch.rand(moved // 8, device=device)
        target = torch.empty_like(source)
        for regime in (WARM, COLD):
            copy = {"copy": lambda source=source, target=target: target.copy_(source)}
            stats = interleave(copy, timer, regime, budget)["copy"]
            rows.append(Ceiling(f"copy {mib} MiB, {regime}", moved, 0, stats))
            if regime == WARM:
                copies[moved] = moved / stats.median
            else:
                memory = max(memory, moved / stats.median)
        if moved >= 4 * cache_bytes(device):
            # Larger than every cache: it comes from memory whether or not that was flushed.
            memory = max(memory, copies[moved])
        del source, target
    products: dict[str, float] = {}
    for dtype in dtypes:
        for n in (QUICK_PRODUCT if quick else PRODUCT[device.type], LARGE_PRODUCT):
            if n == LARGE_PRODUCT and (quick or device.type != "cpu" or products[dtype] < LARGE_FROM):
                continue
            a, b = (torch.rand(n, n, device=device).sub_(0.5).to(DTYPES[dtype]) for _ in range(2))
            stats = interleave({"product": lambda a=a, b=b: a @ b}, timer, WARM, budget)["product"]
            products[dtype] = max(products.get(dtype, 0.0), 2 * n**3 / stats.median)
            rows.append(Ceiling(f"matrix product {n}, {dtype}", 3 * n * n * a.element_size(), 2 * n**3, stats))
    return Ceilings(copies, memory, products, rows)
