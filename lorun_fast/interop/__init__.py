"""In and out of other libraries: adapter weights of PEFT and loralib, operators and priors for deepinv, networks as
programs that need no lorun_fast and as ONNX files.

Each module but ``export`` needs its library and says so when it is imported without it; ``lorun_fast`` itself needs
none.
"""

from __future__ import annotations

import importlib

from lorun_fast.interop._packages import require

_MODULES = ("deepinv", "export", "loralib", "onnx", "peft")

__all__ = ["deepinv", "export", "loralib", "onnx", "peft", "require"]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"lorun_fast.interop.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
