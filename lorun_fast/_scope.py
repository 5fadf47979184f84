"""How a stage reaches the adapted layers inside a denoiser that knows nothing of stages.

The staged denoiser sets the stage for the duration of one call; the layers read it and pass it on as an
argument of their op. The value is local to the thread, so concurrent calls at different stages do not meet.
Dynamo and export trace it as an ordinary value: nothing of it remains in the graph but the stage itself.
docs/stages.md holds the comparison with torch.func.functional_call that led here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """What a pass over all stages forms once, of some layers: the weights of all stages, or their factors, down and up,
    taken apart, (1, ...) each.
    """

    weights: dict[nn.Module, tuple[Tensor, ...]]
    factors: dict[nn.Module, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


class _Scope(threading.local):
    def __init__(self):
        # Set from the start: a graph would be guarded by their absence, and compiled again once they are there.
        self.stage: int | Tensor | None = None
        self.weights: dict[nn.Module, Tensor] | None = None
        self.held = Held({}, {})


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


def call_holding(held: Held, fn: Callable, *args):
    """fn(*args) with what all stages need in scope, which every stage's call then takes its own from."""
    previous = _current.held
    _current.held = held
    try:
        return fn(*args)
    finally:
        _current.held = previous


def held_weights(layers: Iterable[nn.Module], stage: int) -> dict[nn.Module, Tensor]:
    """Those in scope of these layers at a stage."""
    held = _current.held.weights
    return {layer: held[layer][stage] for layer in layers if layer in held} if held else {}


def held_factors(layer: nn.Module, stage: int) -> tuple[Tensor, Tensor] | None:
    """A layer's factors at a stage, (1, ...) each, where those in scope were taken apart."""
    if torch.compiler.is_compiling():  # a graph would be guarded by all that is held
        return None
    held = _current.held.factors.get(layer)
    return None if held is None else (held[0][stage], held[1][stage])


def current_stage() -> int | Tensor | None:
    """The stage in scope on this thread, or None."""
    return _current.stage


def weight_in_scope(layer: nn.Module) -> Tensor | None:
    """The layer's merged weight of the stage in scope, or None where it is not formed."""
    weights = _current.weights
    return weights.get(layer) if weights else None
