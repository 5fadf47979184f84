"""The one place where operator schemas are registered.

Python owns every schema, so an op exists whether or not something is built. The definition in
``lorun_fast.reference`` serves every device until the extension ``lorun_fast._C`` registers a faster
implementation for its own dispatch key. A second DEF of the namespace would raise: define ops through here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorun_fast.ops._direct import direct_call
from lorun_fast.ops._flops import FORMULAS

NAMESPACE = "lorun_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
SCHEMAS: dict[str, str] = {}
DEFINITIONS: dict[str, Callable] = {}
"""What an op computes where nothing faster is registered; by way of ops/_backends.py for those that have backends."""
UNAVAILABLE: dict[str, Callable[[int], str | None]] = {}
"""Of ops whose CUDA kernel runs on some GPUs only: why not on the one of this index, or None."""


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast: Callable | None = None,
    direct: bool = False,
    python: bool = False,
    flops: Callable[..., int] | None = None,
    unavailable: Callable[[int], str | None] | None = None,
) -> Callable:
    """Registers one op and returns its overload packet's default overload.

    schema: ``name(args) -> returns`` without the namespace.
    reference: the definition in plain PyTorch; registered as CompositeExplicitAutograd.
    fake: shapes, strides and dtypes of the result; the argument checks live in it too, so that tracing
        raises what eager raises.
    backward, setup_context: as for ``torch.library.register_autograd``.
    autocast: autocast(dtype, *args) -> args, how autocast to that dtype changes the arguments; unchanged without it.
    direct: return a callable instead that reaches the same implementations sooner in eager mode (see ops/_direct.py).
        For ops that return a tensor, or a tuple or list of them.
    python: ``reference`` is what every device computes, so that such a call need not look for another.
    flops: for torch.utils.flop_counter, the op's arguments with shapes in place of tensors, and out_shape; for ops that
        are called directly.
    unavailable: as in UNAVAILABLE.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    op = packet.default
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, _outside_autocast(op, device, autocast), f"Autocast{device.upper()}")
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    SCHEMAS[name], DEFINITIONS[name] = schema, reference
    if unavailable is not None:
        UNAVAILABLE[name] = unavailable
    if flops is not None:
        FORMULAS[packet] = flops
    return direct_call(op, backward, setup_context, autocast, reference, python) if direct else op


def _outside_autocast(op: Callable, device: str, autocast: Callable | None) -> Callable:
    """Ops compute in the dtypes they are given: autocast must not reach the products inside them."""

    def call(*args):
        if autocast is not None:
            args = autocast(torch.get_autocast_dtype(device), *args)
        with torch.autocast(device, enabled=False):
            return op(*args)

    return call


def once(name: str) -> dict[str, Callable]:
    """define()'s autograd arguments for the backward op of ``name``: differentiating it is an error that says so."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{name}: expected one differentiation, got a second: it is differentiable once")

    return {"backward": backward, "setup_context": lambda ctx, inputs, output: None}
