"""Which implementation serves a LoRA op: what is there, why something is not, and the table that decides.

A backend registers under an op's name. The op asks :func:`choose` at every call; the table lists, per op and device,
the backends in the order that measurement gave, each with the condition under which it won and where that was seen.
``LORUN_BACKEND``, or :func:`use_backend`, puts one backend before the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops._checks import in_16_bits


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    name: as ``LORUN_BACKEND`` spells it. devices: device types it runs on.
    forward: takes the op's arguments. backward: takes those of the op's backward op; None where the op has none.
    missing: why it cannot run in this installation, or None. supports: takes the op's arguments, returns why this
        call cannot be served, or None.
    """

    name: str
    devices: tuple[str, ...]
    forward: Callable
    backward: Callable | None = None
    missing: Callable[[], str | None] = lambda: None
    supports: Callable[..., str | None] = lambda *args: None


@dataclass(frozen=True)
class Row:
    """One row of the table: ``backend`` where ``when`` holds for the op's arguments. measured: what decided.

    usual: whether most calls go by it, where it is available.
    """

    backend: str
    measured: str
    when: Callable[..., bool] = lambda *args: True
    usual: bool = True


def narrow_by_fast_loops(x: Tensor, *_) -> bool:
    """Where rows hold that were measured in 16 bits, with the loops for AVX2 and AVX-512."""
    return in_16_bits(x) and _native.has_fast_loops()


BACKENDS: dict[str, dict[str, Backend]] = {}
TABLE: dict[tuple[str, str], tuple[Row, ...]] = {}
REFERENCE = "reference"


def register(op: str, backend: Backend) -> None:
    """Adds a backend to an op; the table says when it is used."""
    BACKENDS.setdefault(op, {})[backend.name] = backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """With it, a backend of the LoRA ops goes before the table, as under ``LORUN_BACKEND``; "auto": the table alone.

    For all threads of the process, since backward passes may run in others; ops that no LoRA layer calls, and what is
    compiled already, stay as they are. Raises ValueError for a name that no backend has; calls under one that cannot
    run on this machine raise RuntimeError.
    """
    if name not in _native.WISHES:
        raise ValueError(f"name: expected one of {', '.join(_native.WISHES)}, got {name!r}")
    before, _native.WISH = _native.WISH, name
    try:
        yield
    finally:
        _native.WISH = before


def _no_device(backend: Backend) -> str | None:
    """Why the backend can serve no call on this machine, whatever the call's device; None where it could."""
    if "cpu" in backend.devices or torch.cuda.is_available():
        return None
    return f"it needs {' or '.join(backend.devices)}, which torch does not find"


def named(op: str, device: str) -> Backend | None:
    """The backend that LORUN_BACKEND names, None where the op has none of this name on this device.

    Raises RuntimeError when it cannot run here, also for calls on another device where its own does not exist.
    """
    backend = BACKENDS[op].get(_native.WISH)
    if backend is None:
        return None
    here = device in backend.devices
    reason = backend.missing() if here else _no_device(backend)
    if reason is not None:
        raise RuntimeError(f"LORUN_BACKEND={backend.name}: expected a backend that runs here, got none: {reason}")
    return backend if here else None


def choose(op: str, device: str, args: tuple) -> Backend:
    """The backend for this call: the one that LORUN_BACKEND names, else the first row of the table that applies.

    A call that the named one does not support goes by the table. Raises as :func:`named`.
    """
    known = BACKENDS[op]
    # A transform of torch.func goes through the definition: others look at values, or are not Dynamo's to see.
    if torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
        return known[REFERENCE]
    wished = named(op, device)
    if wished is not None and wished.supports(*args) is None:
        return wished
    for row in TABLE.get((op, device), ()):
        backend = known.get(row.backend)
        if backend is None or device not in backend.devices or not row.when(*args):
            continue
        if backend.missing() is None and backend.supports(*args) is None:
            return backend
    return known[REFERENCE]


def served(op: str, device: str) -> tuple[str, str]:
    """(the backend that usually serves the op on this device, why the others do not)."""
    known = {name: b for name, b in BACKENDS[op].items() if device in b.devices}
    missing = {name: b.missing() for name, b in known.items()}
    wish = _native.WISH if _native.WISH in known else None
    rows = [row for row in TABLE.get((op, device), ()) if row.backend in known]
    order = ([wish] if wish else []) + [row.backend for row in rows if row.usual] + [REFERENCE]
    best = next(name for name in order if missing[name] is None)
    reasons = []
    elsewhere = None if wish else BACKENDS[op].get(_native.WISH)
    if wish:
        reasons.append(f"LORUN_BACKEND={wish}")
    elif elsewhere is not None and (reason := _no_device(elsewhere)):
        reasons.append(f"LORUN_BACKEND={elsewhere.name}: {reason}")
    for name in known:
        if name in (best, REFERENCE):
            continue
        measured = next((row.measured for row in rows if row.backend == name), "no measurement puts it first")
        reasons.append(f"{name}: {missing[name] or measured}")
    if not reasons and best != REFERENCE:
        reasons += [row.measured for row in rows if row.backend == best]
    return best, "; ".join(reasons)
