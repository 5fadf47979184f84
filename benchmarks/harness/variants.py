"""The same contender, under torch.compile or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.harness.registry import Problem, Run


def as_run(built: Callable | Run) -> Run:
    """What a contender's function returned, as a :class:`Run`."""
    return built if isinstance(built, Run) else Run(built)


def compiled(build: Callable[[Problem], Callable | Run]) -> Callable[[Problem], Run]:
    """The contender under torch.compile with static shapes and Inductor's defaults."""

    def build_compiled(p: Problem) -> Run:
        run = as_run(build(p))
        return replace(run, fn=torch.compile(run.fn, dynamic=False))

    return build_compiled


def capture(fn: Callable, warm_up: int = 3) -> Callable:
    """Records fn() once; the result replays the recording and returns its output, the same memory at every call.

    It keeps fn, which may own what the recording reads: weights merged beforehand would be freed, and overwritten.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()

    def replay(_kept=fn):
        graph.replay()
        return out

    return replay


def graphed(build: Callable[[Problem], Callable | Run]) -> Callable[[Problem], Run]:
    """The contender's forward pass, replayed as a CUDA graph."""

    def build_graphed(p: Problem) -> Run:
        run = as_run(build(p))
        with torch.no_grad():
            return replace(run, fn=capture(run.fn), recorded=True)

    return build_graphed
