"""Where a row was measured: device, versions, threads, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def cpu_name() -> str:
    """The processor's name as the system gives it, with its core count."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def commit() -> str:
    """LORUN_COMMIT, else git's short hash, "+" appended where tracked files differ, else "unknown"."""
    named = os.environ.get("LORUN_COMMIT")
    if named:
        return named
    try:
        call = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "timeout": 20}
        short = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **call).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **call).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return short + ("+" if changed else "")


def version(package: str) -> str:
    """A package's version, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: L2 of a GPU, the largest the system lists for a CPU; 32 MiB where unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=32 << 20)


def facts(device: torch.device, allocator: str) -> dict[str, str | int]:
    """The columns that every row of a run shares."""
    return {
        "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "device": device.type,
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
    }
