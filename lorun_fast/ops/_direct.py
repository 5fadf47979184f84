"""The way from Python to an op's kernel in eager mode.

torch.library.register_autograd registers a Python function for the dispatcher's autograd key: every call then leaves
C++ for Python and comes back, also when nothing needs a gradient, and building a graph binds arguments by name. That
is most of what a small op costs. So a call from here decides in Python: below autograd if nothing needs a gradient,
else through a torch.autograd.Function with the same formulas. Autocast, too, narrows here what the op says and is
off below. Tracing takes the registered op as it is; transforms of torch.func, which do not take a gradient that is
registered in Python, and forward-mode differentiation take the definition. An op that is written in Python for every
device is called as the function it is, unless a dispatch mode or a tensor subclass wants to see it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lorun_fast.ops._flops import tell_counters

below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_dispatch_modes = torch._C._len_torch_dispatch_stack
_PLAIN = (Tensor, torch.nn.Parameter)
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_active = torch._C._is_any_autocast_enabled
_without_autocast = torch._C._DisableAutocast
_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad


def transforms_active() -> bool:
    """Whether a call may be differentiated in another way than by a backward pass."""
    return _functorch_active() or forward_ad._current_level >= 0


def direct_call(
    op: Callable,
    backward: Callable,
    setup_context: Callable,
    autocast: Callable | None = None,
    definition: Callable | None = None,
    python: bool = False,
) -> Callable:
    """A callable with ``op``'s arguments and results, whose graph nodes run ``setup_context`` and ``backward``.

    autocast: as for :func:`lorun_fast.ops._library.define`. definition: the same in differentiable PyTorch, for
        function transforms and forward mode. python: it is what every device computes, by whatever means.
    """

    below = op._op  # what calling the op calls

    def compute(args):
        with below_autograd():
            if _dispatch_modes():
                tell_counters()
            elif python and all(type(a) in _PLAIN for a in args if isinstance(a, Tensor)):
                return definition(*args)
            return below(*args)

    def forward(ctx, *args):
        output = compute(args)
        setup_context(ctx, args, output)
        return tuple(output) if isinstance(output, list) else output

    name = op._schema.name.split("::")[1]
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(name, (torch.autograd.Function,), methods)
    # What Function.apply ends in where no transform is active. It would look for that once more, and for signatures.
    apply = super(torch.autograd.Function, node).apply

    def call(*args):
        if _functorch_active() or forward_ad._current_level >= 0:  # transforms_active(), without its call
            return (definition or op)(*args)
        if torch.compiler.is_compiling():
            return op(*args)
        if _autocast_active():
            device = args[0].device.type
            if autocast is not None and torch.is_autocast_enabled(device):
                args = autocast(torch.get_autocast_dtype(device), *args)
            with _without_autocast():
                return apply(*args) if _grad_enabled() and _any_requires_grad(*args) else compute(args)
        return apply(*args) if _grad_enabled() and _any_requires_grad(*args) else compute(args)

    return call
