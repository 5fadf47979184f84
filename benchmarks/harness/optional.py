"""Packages that a rival needs and a machine may lack: imported when the rival is built, or Unavailable."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from benchmarks.harness.registry import Unavailable

# torchvision registers shapes for operators that its own library defines. A wheel that does not fit this torch
# (the index's, beside a CPU-only one) cannot load that library, and its import stops there; deepinv's and
# PEFT's with it. With the names defined it goes on, and nothing here calls them.
_SHAPED = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
_SHAPED += ("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
_libraries: list[torch.library.Library] = []


def _prepare_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is None or _libraries:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SHAPED:
            library.define(schema)
        _libraries.append(library)


def package(name: str) -> ModuleType:
    """Imports a package, or raises :class:`Unavailable` with the reason."""
    if importlib.util.find_spec(name) is None:
        raise Unavailable("not installed")
    try:
        _prepare_torchvision()
        return importlib.import_module(name)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise Unavailable(f"does not import: {type(error).__name__}: {first[:120]}") from error
