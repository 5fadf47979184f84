"""How a stage reaches the adapted layers inside a denoiser that knows nothing of stages.

The staged denoiser sets the stage for the duration of one call; the layers read it and pass it on as an
argument of their op. The value is local to the thread, so concurrent calls at different stages do not meet.
Dynamo and export trace it as an ordinary value: nothing of it remains in the graph but the stage itself.
docs/stages.md holds the comparison with torch.func.functional_call that led here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from torch import Tensor, nn


class _Scope(threading.local):
    def __init__(self):
        # Set from the start: a graph would be guarded by their absence, and compiled again once they are there.
        self.stage: int | Tensor | None = None
        self.weights: dict[nn.Module, Tensor] | None = None
        self.held: dict[nn.Module, tuple[Tensor, ...]] | None = None


_current = _Scope()


def call_at(stage: int | Tensor, weights: dict[nn.Module, Tensor], fn: Callable, *args):
    """fn(*args) with ``stage`` in scope. Scopes nest; the previous value returns even after an exception.

    weights: the stage's merged weight of layers for which it is formed already.
    """
    previous = _current.stage, _current.weights
    _current.stage, _current.weights = stage, weights
    try:
        return fn(*args)
    finally:
        _current.stage, _current.weights = previous


def call_holding(held: dict[nn.Module, tuple[Tensor, ...]], fn: Callable, *args):
    """fn(*args) with the merged weights of all stages in scope, which every stage's call then takes its own from."""
    previous = _current.held
    _current.held = held
    try:
        return fn(*args)
    finally:
        _current.held = previous


def held_weights(layers: Iterable[nn.Module], stage: int) -> dict[nn.Module, Tensor]:
    """Those in scope of these layers at a stage."""
    held = _current.held
    return {layer: held[layer][stage] for layer in layers if layer in held} if held else {}


def current_stage() -> int | Tensor | None:
    """The stage in scope on this thread, or None."""
    return _current.stage


def weight_in_scope(layer: nn.Module) -> Tensor | None:
    """The layer's merged weight of the stage in scope, or None where it is not formed."""
    weights = _current.weights
    return weights.get(layer) if weights else None
