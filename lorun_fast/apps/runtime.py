"""Device, precision, threads, memory: what the user may choose about how a network runs."""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.ops import _backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BATCH = {"cpu": 1, "cuda": 8}
_LARGEST = 1e30  # noise of some times more would be infinite in fp32
_MOST_THREADS = 1024  # thousands more and the thread pool ends the process


def _whole(text: str, least: int, most: float, wanted: str) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text!r}")
    return int(text)


def _number(text: str, fits: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value) or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text!r}")
    return value


def at_least_one(text: str) -> int:
    """The argparse type of counts."""
    return _whole(text, 1, math.inf, "of at least 1")


def none_or_more(text: str) -> int:
    """The argparse type of counts that may be 0."""
    return _whole(text, 0, math.inf, "of at least 0")


def threads(text: str) -> int:
    """The argparse type of --threads."""
    return _whole(text, 1, _MOST_THREADS, f"from 1 to {_MOST_THREADS}")


def seed(text: str) -> int:
    """The argparse type of --seed."""
    return _whole(text, 0, 2**63 - 1, "from 0 to 2^63 - 1")


def percentage(text: str) -> float:
    """The argparse type of shares that 0 makes no sense of."""
    return _number(text, lambda value: 0 < value <= 100, "above 0 and up to 100")


def not_negative(text: str) -> float:
    """The argparse type of noise levels."""
    return _number(text, lambda value: 0 <= value <= _LARGEST, f"from 0 to {_LARGEST:g}")


def share(text: str) -> float:
    """The argparse type of parts of a whole."""
    return _number(text, lambda value: 0 <= value <= 1, "from 0 to 1")


def fastest_dtype(device: torch.device) -> str:
    """The dtype in which training takes the least time: "bf16" on a GPU, else by the CPU's instructions."""
    capabilities = torch.cpu.get_capabilities()
    narrow = device.type == "cuda" or capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16" if narrow else "fp32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--batch, --dtype, --device, --threads."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--batch", type=at_least_one, metavar="N", help="images of one size at a time (default: 1 on a CPU, 8 on a GPU)"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the denoiser; Phi stays fp32 (default: fp32)"
    )
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: all cores)")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every demo: -o, --model, and how it runs."""
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: demo-output"
    )
    parser.add_argument("--model", metavar="NAME|FILE", help="another network than the shipped one")
    add_arguments(parser)


@dataclass(frozen=True)
class Runtime:
    """How a network runs. dtype: of the denoiser, under autocast."""

    device: torch.device
    dtype: torch.dtype
    batch: int

    def describe(self) -> str:
        """One line: device, dtype, threads, batch."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{name}{threads}, {self.dtype_name}, batch {self.batch}"

    @property
    def dtype_name(self) -> str:
        """As the option spells it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def synchronize(self) -> None:
        """Waits for the device, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> int | None:
        """Bytes: of the GPU's allocator, or of the whole process; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def usable(name: str) -> torch.device:
    """The device of this name. Raises UserError where it, or the backend that LORUN_BACKEND names, cannot run."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected a CUDA device for cuda, got none that torch can use")
    try:
        for op in _backends.BACKENDS:
            _backends.named(op, name)
    except RuntimeError as error:
        raise UserError(first_line(error)) from error
    return torch.device(name)


def default_device() -> str:
    """cuda where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def chosen(args: argparse.Namespace) -> Iterator[Runtime]:
    """The runtime that the options describe, while the block runs.

    Raises as :func:`usable`, and UserError when memory runs out inside.
    """
    device = usable(args.device or default_device())
    before = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield Runtime(device, DTYPES[args.dtype], args.batch or _BATCH[device.type])
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise UserError(f"expected enough memory on {device}, got none left: try a smaller --batch") from error
    finally:
        torch.set_num_threads(before)


def _out_of_memory(error: BaseException) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep large blocks instead of returning them to the system at every free.

    For a process of its own, before it works: page faults take a third of a restoration's time otherwise.
    Returns whether it was done; left alone on other systems, under another allocator, or where the
    environment sets MALLOC_* itself.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return False
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # the parameters' numbers in glibc's malloc.h
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
