"""Triton kernels, installed as lorun_fast.kernels. One file per op; no public names.

Importing this package imports no Triton: :func:`unavailable` says why its modules cannot be used here.
"""

from __future__ import annotations

import functools
import importlib

OLDEST_TRITON = (3, 6)


@functools.cache
def unavailable() -> str:
    """Why no kernel can run in this process, whatever the device; empty where they can."""
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # a broken installation raises nearly anything
        return f"Triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return ""
