"""Peak memory of one call, beyond what was there before it: temporaries, saved tensors and the result.

CUDA: the caching allocator's own peak. CPU (Linux): growth of the process's peak resident set during the
second call, with glibc told to give each block of 64 KiB or more its own mapping and to return it when freed,
so every byte touched counts, whoever allocated it: ATen, an extension or a library. Memory that a library
keeps from its first call on is not seen. Both calls run in a thread of their own, whose heap holds no freed blocks
of earlier work that would be taken, and counted, in place of such mappings. Resolution: about half a MiB.
"""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import allocator

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
HOW = {"cuda": "max_memory_allocated", "cpu": "peak RSS growth"}


def resident(key: str) -> int:
    """Bytes of this process's memory: "VmRSS", what it has now, or "VmHWM", its peak."""
    return int(re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE).group(1)) << 10


def reset_peak() -> None:
    """Sets the peak of this process's memory to its present size."""
    _CLEAR.write_text("5")


def _cpu(call: Callable) -> int | None:
    try:
        if not allocator.apply("return"):
            return None
        call()
        gc.collect()
        allocator.apply("return")
        reset_peak()
        before = resident("VmRSS")
        result = call()
        peak = resident("VmHWM")
    except (OSError, AttributeError):
        return None
    del result
    return max(peak - before, 0)


def _cuda(call: Callable, device: torch.device) -> int:
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def peak(call: Callable, device: torch.device, setting: str) -> int | None:
    """Bytes, or None where it cannot be told. ``setting``: the allocator setting to return to."""
    if device.type == "cuda":
        return _cuda(call, device)
    found: list[int | None] = []
    try:
        thread = threading.Thread(target=lambda: found.append(_cpu(call)))
        thread.start()
        thread.join()
        if not found:
            raise RuntimeError("the call failed while its memory was measured")
        return found[0]
    finally:
        if setting == "keep":
            allocator.apply("keep")
