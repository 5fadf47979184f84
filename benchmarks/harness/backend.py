"""Which implementation serves an op of ours."""

from __future__ import annotations

import torch


def backend(op: str, device: torch.device) -> str:
    """ "compiled" where an implementation is registered for this device's own dispatch key, else "reference"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    built = torch._C._dispatch_has_kernel_for_dispatch_key(f"lorun_fast::{op}", key)
    return "compiled" if built else "reference"


def note(ops: tuple[str, ...], device: torch.device) -> str:
    """For a row of ours: says so where it ran on the reference implementation."""
    plain = [op for op in ops if backend(op, device) == "reference"]
    return f"reference backend ({', '.join(plain)})" if plain else ""
