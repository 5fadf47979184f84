"""Loads the compiled operators once, and remembers why they are missing when they are.

Without them every op runs on ``lorun_fast.reference``. ``LORUN_BACKEND=reference`` asks for that; its other values
name a backend of the LoRA ops (ops/_backends.py).
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

HOW_TO_BUILD = (
    "build it with `pip install --no-build-isolation -e .` "
    "(needs a C++20 compiler; LORUN_FORCE_BUILD=1 shows why it fails)"
)
_TARGET_TORCH = "2.11"
WISH = os.environ.get("LORUN_BACKEND") or "auto"
_CPUS = ("baseline", "avx2", "avx512", "", None)
WISHES = ("auto", "reference", "aten", "packed", "triton", "winograd")


def _is_command() -> bool:
    """Whether the process is one of this project's commands, which cannot catch what importing this package raises."""
    started = (getattr(sys, "argv", None) or [""])[0]
    if started == "-m":  # while python imports the packages above the module, to find it
        return any(word.removeprefix("-m").startswith("lorun_fast.") for word in sys.orig_argv)
    path = Path(started)
    return path.stem == "lorun-fast" or path.resolve().parent == Path(__file__).resolve().parents[1] / "benchmarks"


def _refuse(message: str) -> NoReturn:
    """Raises ValueError; ends this project's commands with one line and status 2."""
    if _is_command():
        print(f"lorun-fast: error: {message}", file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(message)


def _load():
    """(module, reason): exactly one of them is empty."""
    for name, wish, wishes in (("LORUN_BACKEND", WISH, WISHES), ("LORUN_CPU", os.environ.get("LORUN_CPU"), _CPUS)):
        if wish not in wishes:
            known = ", ".join(w for w in wishes if w)
            _refuse(f"{name}: expected one of {known}, got {wish!r}")
    if WISH == "reference":
        return None, "disabled by LORUN_BACKEND=reference"
    if find_spec("lorun_fast._C") is None:
        reason = f"lorun_fast._C is not built for this Python: {HOW_TO_BUILD}"
    else:
        try:
            return importlib.import_module("lorun_fast._C"), ""
        except ImportError as error:
            reason = (
                f"lorun_fast._C does not load with torch {torch.__version__} (expected torch >= {_TARGET_TORCH}, "
                f"with CUDA if it was built with CUDA): {error}; {HOW_TO_BUILD}"
            )
    warnings.warn(
        f"lorun_fast runs on its slower reference implementations. {reason}. LORUN_BACKEND=reference silences this.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason


_module, _reason = _load()


def available() -> bool:
    """Whether the compiled operators are registered."""
    return _module is not None


def reason() -> str:
    """Why they are not; empty if they are."""
    return _reason


def build_info() -> dict:
    """How the extension was built; empty without it.

    Keys: compiler, flags, torch (built with), torch_target (oldest it runs on, a pair), cuda, cuda_archs,
    cpu_variants, cpu_active, amx (whether this CPU's matrix tiles are in use).
    """
    return {} if _module is None else _module.build_info()


MEASURED_LOOPS = ("avx2", "avx512")
"""Of a CPU, those that the tables of what is faster than torch go by."""


@functools.cache
def has_fast_loops() -> bool:
    """Whether this CPU's loops are among them."""
    return build_info().get("cpu_active") in MEASURED_LOOPS


@functools.cache
def has_tiles() -> bool:
    """Whether matrix tiles (AMX) are in use."""
    return bool(build_info().get("amx"))
