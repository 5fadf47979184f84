"""How a stage reaches the adapted layers inside a denoiser that knows nothing of stages.

The staged denoiser sets the stage for the duration of one call; the layers read it and pass it on as an
argument of their op. The value is local to the thread, so concurrent calls at different stages do not meet.
Dynamo and export trace it as an ordinary value: nothing of it remains in the graph but the stage itself.
docs/stages.md holds the comparison with torch.func.functional_call that led here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

_current = threading.local()


def call_at(stage: int | Tensor, fn: Callable, *args):
    """fn(*args) with ``stage`` in scope. Scopes nest; the previous value returns even after an exception."""
    previous = getattr(_current, "stage", None)
    _current.stage = stage
    try:
        return fn(*args)
    finally:
        _current.stage = previous


def current_stage() -> int | Tensor | None:
    """The stage in scope on this thread, or None."""
    return getattr(_current, "stage", None)
