"""Packages that only the interop tests need."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

from lorun_fast.interop import require


def interop_module(name: str) -> tuple[ModuleType, ModuleType]:
    """(lorun_fast.interop.NAME, the package NAME); skips the test module without the package, but not in CI."""
    try:
        return importlib.import_module(f"lorun_fast.interop.{name}"), require(name)
    except ImportError as error:
        _skip(error)


def package(name: str) -> ModuleType:
    """The package NAME, likewise."""
    try:
        return require(name)
    except ImportError as error:
        _skip(error)


def _skip(error: ImportError):
    if os.environ.get("CI"):
        raise error
    pytest.skip(str(error), allow_module_level=True)
