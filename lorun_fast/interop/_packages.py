"""Importing optional libraries, with one clear error when that fails."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from types import ModuleType

import torch

# A Library that is collected takes its definitions with it.
_declared: list[torch.library.Library] = []


def require(package: str, *, extra: str | None = None) -> ModuleType:
    """Imports an optional library ("peft", "loralib", "deepinv", "onnx") and returns it.

    extra: of this package, which installs it beside what it works with. Raises ImportError with the command that
    installs it. A torchvision that was built for another torch (such as
    the CUDA build beside a CPU-only torch) is made importable first, with a warning; see docs/interop.md.
    """
    if package in ("peft", "deepinv"):
        _make_torchvision_importable()
    command = f"pip install {package}"
    if extra is not None:
        command = f"pip install 'lorun-fast[{extra}]' (or '.[{extra}]' in a clone)"
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ImportError(f"this needs the package {package}, which is not installed: {command}") from None
        raise ImportError(
            f"the package {package} is installed, but something it needs is not ({error}): {command}"
        ) from error


def _make_torchvision_importable() -> None:
    """Declares the operators whose absence stops ``import torchvision``.

    torchvision attaches shape functions to some of its operators when it is imported. If its binary does not fit
    the installed torch, the operators do not exist and the import fails. Neither PEFT nor deepinv calls them: with
    their names declared, all that is written in Python works, and a call to one of them raises.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    while True:
        try:
            import torchvision
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
            continue
        break
    if _declared:
        warnings.warn(
            f"torchvision {torchvision.__version__} does not fit torch {torch.__version__}: it was imported without "
            "its compiled operators",
            RuntimeWarning,
            stacklevel=3,
        )
