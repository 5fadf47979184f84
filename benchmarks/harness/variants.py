"""The same contender, under torch.compile or replayed as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.harness.check import step
from benchmarks.harness.registry import TRAIN, Problem, Run, Unavailable


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
    Raises Unavailable for what a graph cannot hold, as a wait for the device.
    """
    gc.collect()  # a graph of autograd left over from another stream would draw that one into the recording
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            fn()
    here.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # On the stream of the calls before: autograd's nodes run, and wait, on the streams that made them.
        with torch.cuda.graph(graph, stream=stream):
            out = fn()
    except RuntimeError as error:
        torch.cuda.set_stream(here)
        first = error.__context__ or error  # the end of a recording that failed fails, too
        reason = str(first).strip().partition("\n")[0][:160]
        raise Unavailable(f"no CUDA graph: {type(first).__name__}: {reason}") from error

    def replay(_kept=fn):
        graph.replay()
        return out

    return replay


def graphed(build: Callable[[Problem], Callable | Run]) -> Callable[[Problem], Run]:
    """The contender replayed as a CUDA graph: its forward pass, or in training that and the gradients."""

    def build_graphed(p: Problem) -> Run:
        run = as_run(build(p))
        if p.mode == TRAIN:
            return replace(run, step=capture(step(run, p)), recorded=True)
        with torch.no_grad():
            return replace(run, fn=capture(run.fn), recorded=True)

    return build_graphed
