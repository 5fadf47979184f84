"""Is the result right? Nothing is timed before this module says so."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import TRAIN, Problem, Run

# Largest accepted error relative to the largest value. Each admits rounding in the storage dtype several times
# over, as rivals that round every intermediate need, and excludes the next coarser one (tf32 rounds to 5e-4).
TOLERANCE = {"fp64": 1e-10, "fp32": 3e-5, "bf16": 4e-2, "fp16": 5e-3}


@functools.lru_cache(maxsize=1)
def _draw(shape: torch.Size) -> Tensor:
    """Kept for the next contender: a draw of a large result takes the CPU longer than a GPU needs for the table."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def output_gradient(out: Tensor) -> Tensor:
    """The gradient that every contender's result is given: a fixed draw, shaped and laid out like the result."""
    return torch.empty_like(out, requires_grad=False).copy_(_draw(out.shape))


def step(run: Run, p: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """One call in the problem's mode: the result, and in training the gradients for ``wrt``."""
    if run.step is not None:
        return run.step
    call = _plain_step(run, p)
    return call if run.backend is None else lf.use_backend(run.backend)(call)


def _plain_step(run: Run, p: Problem) -> Callable[[], tuple[Tensor, ...]]:
    if p.mode != TRAIN:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (run.fn(),)

        return forward
    wrt = run.parameters or tuple(p.inputs[name] for name in run.wrt or p.wrt)
    grads: list[Tensor] = []

    def forward_backward() -> tuple[Tensor, ...]:
        out = run.fn()
        if not grads:
            grads.append(output_gradient(out))
        return (out.detach(), *torch.autograd.grad(out, wrt, grads[0]))

    return forward_backward


def truth(reference: Callable[..., Tensor], wrt: tuple[str, ...], p: Problem) -> tuple[Tensor, ...]:
    """The result and its gradients for ``wrt`` in float64, from the inputs exactly as they are stored."""
    wide = {name: t.detach().double() if t.is_floating_point() else t for name, t in p.inputs.items()}
    if p.mode != TRAIN:
        with torch.no_grad():
            return (reference(**wide),)
    for name in wrt:
        wide[name].requires_grad_()
    out = reference(**wide)
    # Contenders get the output's gradient in the dtype they store: the definition must see the same, rounded values.
    grad = output_gradient(out).to(p.inputs[p.wrt[0]].dtype).double()
    return (out.detach(), *torch.autograd.grad(out, [wide[name] for name in wrt], grad))


def _without_ones(t: Tensor) -> tuple[int, ...]:
    return tuple(s for s in t.shape if s != 1)


def error(got: tuple[Tensor, ...], want: tuple[Tensor, ...], jumps: bool = False) -> float:
    """The largest |got - want| relative to the largest |want|, over the results; infinite for NaN or another shape.

    Shapes may differ in dimensions of one: the (out, r, 1, 1) of a 1 x 1 convolution is the (out, r) of a product.
    jumps: of the gradients, all but the first result, the L2 norm of their difference, all taken together, relative
    to theirs; and a fiftieth of the same for each of them, so that a small one cannot hide behind the others.
    """
    if len(got) != len(want):
        return math.inf
    pairs = []
    for g, w in zip(got, want, strict=True):
        if _without_ones(g) != _without_ones(w) or not torch.isfinite(g).all():
            return math.inf
        if w.numel():
            pairs.append((g.double().reshape(w.shape) - w, w))
    by_value, by_norm = (pairs[:1], pairs[1:]) if jumps else (pairs, [])
    worst = max((_ratio(d.abs().max(), w.abs().max()) for d, w in by_value), default=0.0)
    if by_norm:
        norms = [(d.norm(), w.norm()) for d, w in by_norm]
        together = (torch.stack(column).norm() for column in zip(*norms, strict=True))
        worst = max(worst, _ratio(*together), max(_ratio(*pair) for pair in norms) / 50)
    return worst


def _ratio(difference: Tensor, size: Tensor) -> float:
    return difference.item() / (size.item() or 1.0)


def poison(like: tuple[Tensor, ...]) -> None:
    """Leaves NaN in freed memory of the results' sizes: an element that is not written shows, not an old result."""
    widths = (torch.bfloat16, torch.float32, torch.float64)
    junk = [torch.full_like(t, math.nan, dtype=dtype) for t in like for dtype in widths for _ in range(2)]
    del junk


class Verdict:
    """Compares a contender's results with the definition, computed once per definition."""

    def __init__(self, p: Problem, dtype: str):
        self.tolerance = TOLERANCE[dtype] if p.tolerance is None else p.tolerance
        self._problem = p
        self._truth: dict[tuple[Callable, tuple[str, ...]], tuple[Tensor, ...]] = {}
        self._inputs = {name: t.detach().clone() for name, t in p.inputs.items()}

    def truth(self, run: Run) -> tuple[Tensor, ...]:
        key = (run.reference or self._problem.reference, run.wrt or self._problem.wrt)
        if key not in self._truth:
            self._truth[key] = truth(*key, self._problem)
        return self._truth[key]

    def error(self, run: Run, call: Callable[[], tuple[Tensor, ...]]) -> float:
        """The error of one call; raises RuntimeError if the call wrote to the problem's inputs."""
        want = self.truth(run)
        poison(want)
        result = error(call(), want, self._problem.jumps)
        for name, t in self._inputs.items():
            now = self._problem.inputs[name].detach()
            if not torch.equal(now, t):
                with torch.no_grad():
                    now.copy_(t)
                raise RuntimeError(f"it wrote to its input {name}")
        return result
