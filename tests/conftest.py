"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Threads that spin while they wait slow tests down many times over beside other work; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Triton's interpreter runs the kernels on the CPU; Triton reads this when it is first imported. On a machine with a GPU
# the same tests compile and run them there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


class GraphCounter:
    """A torch.compile backend that runs the graph as it is and counts how many graphs there were."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def graph_counter() -> GraphCounter:
    return GraphCounter()


@pytest.fixture
def record_calls(monkeypatch):
    """record_calls(module, name): a list of the arguments that the function of that name is called with from now on."""

    def record(module, name: str) -> list[tuple]:
        found, own = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: found.append(args) or own(*args))
        return found

    return record


@pytest.fixture
def poisoned():
    """Fills what torch allocates with NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
