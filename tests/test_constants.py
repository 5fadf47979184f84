"""Step sizes that are numbers become tensors once (ops/_constants.py), and nobody can tell."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorun_fast import functional as F
from lorun_fast.ops import _constants
from lorun_fast.ops._constants import constant

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    found: dict = {}
    monkeypatch.setattr(_constants, "_KEPT", found)
    return found


def problem(**options):
    x, mask = torch.rand(2, 3, 4, 9, **options), torch.rand(4, 9, **options)
    return x, torch.rand(2, 4, 13, **options), mask


def test_a_value_is_made_once_for_each_dtype():
    first = constant(0.3, torch.float32, CPU)
    assert constant(0.3, torch.float32, CPU) is first and torch.equal(first, torch.full((1,), 0.3))
    wide = constant(0.3, torch.float64, CPU)
    assert wide.dtype == torch.float64 and wide.item() == 0.3
    assert constant(1, torch.float32, CPU) is constant(1.0, torch.float32, CPU)
    assert not first.requires_grad


def test_a_step_finds_it(kept):
    x, y, mask = problem()
    wanted = F.cassi_step(x, y, mask, torch.tensor(0.3), step=2)
    assert not kept
    for _ in range(2):
        assert torch.equal(F.cassi_step(x, y, mask, 0.3, step=2), wanted)
    F.block_cs_step(torch.rand(1, 1, 4, 4), torch.rand(1, 5, 1, 1), torch.rand(5, 16), 0.3, block_size=4)
    F.blur_downsample_step(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 2, 2), torch.rand(3, 3), 0.3, scale=2)
    assert list(kept) == [(0.3, torch.float32, None)]
    with pytest.raises(TypeError, match="rho: expected a number or a tensor, got str"):
        F.cassi_step(x, y, mask, "0.3", step=2)


def test_first_seen_under_inference_mode():
    """An inference tensor could not be saved for the backward pass of a later call."""
    x, y, mask = problem()
    with torch.inference_mode():
        F.cassi_step(x, y, mask, 0.3, step=2)
    F.cassi_step(x.requires_grad_(), y, mask, 0.3, step=2).sum().backward()
    with torch.no_grad():
        assert not constant(0.3, torch.float32, CPU).is_inference()
    assert x.grad is not None


def test_zeros_keep_their_sign_and_nan_is_not_kept(kept):
    assert not constant(0.0, torch.float32, CPU).signbit()
    assert constant(-0.0, torch.float32, CPU).signbit()
    assert constant(math.nan, torch.float32, CPU).isnan()
    assert not kept


def test_there_is_an_end(kept, monkeypatch):
    monkeypatch.setattr(_constants, "MOST", 3)
    for k in range(1, 9):
        assert constant(k, torch.float32, CPU).item() == k
        assert len(kept) <= 3
    assert constant(8, torch.float32, CPU) is constant(8, torch.float32, CPU)


def test_modes_see_it_made(kept):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    constant(0.3, torch.float32, CPU)
    with Mode():
        constant(0.3, torch.float32, CPU)
        constant(0.4, torch.float32, CPU)
    assert seen.count("aten.full.default") == 2 and len(kept) == 1


def test_tracing_and_transforms_keep_none(kept):
    x, y, mask = problem()
    step = torch.compile(lambda a: F.cassi_step(a, y, mask, 0.3, step=2), fullgraph=True, backend="eager")
    torch.testing.assert_close(step(x), F.cassi_step(x, y, mask, torch.tensor(0.3), step=2))
    gradient = torch.func.grad(lambda a: F.cassi_step(a, y, mask, 0.3, step=2).sum())(x)
    assert gradient.shape == x.shape and not kept


def test_threads_get_one_tensor():
    found, ready = [], threading.Barrier(8)

    def run():
        ready.wait()
        found.append([constant(k / 7, torch.float32, CPU) for k in range(1, 40)])

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for same in zip(*found, strict=True):
        assert all(t is same[0] for t in same) and same[0].numel() == 1


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_a_graph_has_its_own(cuda, kept):
    """First used while a graph is recorded: filled at replay only. Eager calls must not find that one."""
    x, y, mask = (t.to(cuda) for t in problem())
    F.cassi_step(x, y, mask, 0.7, step=2)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = [F.cassi_step(x, y, mask, rho, step=2) for rho in (0.3, 0.7)]
    assert [key[0] for key in kept] == [0.7]
    wanted = [F.cassi_step(x, y, mask, torch.tensor(rho, device=cuda), step=2) for rho in (0.3, 0.7)]
    assert torch.equal(F.cassi_step(x, y, mask, 0.3, step=2), wanted[0])
    for _ in range(2):
        for out in recorded:
            out.fill_(-1)
        graph.replay()
        for out, want in zip(recorded, wanted, strict=True):
            assert torch.equal(out, want)
    del graph, recorded
    assert torch.equal(F.cassi_step(x, y, mask, 0.3, step=2), wanted[0])


@pytest.mark.gpu
def test_each_stream_has_its_own(cuda):
    """One that a stream has only been asked to fill is not there yet for another."""
    slow, side = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(100_000_000)
        first = constant(0.3, torch.float32, cuda)
        assert constant(0.3, torch.float32, cuda) is first
    with torch.cuda.stream(side):
        assert constant(0.3, torch.float32, cuda).item() == torch.tensor(0.3).item()
    assert constant(0.3, torch.float32, cuda).item() == torch.tensor(0.3).item()
    torch.cuda.synchronize()
