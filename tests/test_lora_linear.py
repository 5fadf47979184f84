"""lora_linear as an op: against dense weights in float64, gradients, tracing, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.ops import _backends

op = torch.ops.lorun_fast.lora_linear.default
BACKENDS = [name for name, b in _backends.BACKENDS["lora_linear"].items() if "cpu" in b.devices]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setattr(_native, "WISH", request.param)
    return request.param


def problem(stages: int | None = 3, dtype=torch.float64) -> dict[str, torch.Tensor]:
    lead = () if stages is None else (stages,)
    shapes = {"x": (4, 5, 6), "weight": (7, 6), "bias": (7,), "down": (*lead, 2, 6), "up": (*lead, 7, 2)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def dense(x, weight, bias, down, up, *, scale=1.0, stage=None, activation=None, residual=None):
    """Sample by sample, entry by entry."""
    out = []
    for n in range(len(x)):
        k = stage[n] if isinstance(stage, torch.Tensor) and stage.ndim else stage
        d, u = (down, up) if k is None else (down[k], up[k])
        update = sum(torch.outer(u[:, r], d[r]) for r in range(u.shape[1]))
        y = x[n] @ (weight + scale * update).T + bias
        y = torch.relu(y) if activation == "relu" else y * torch.sigmoid(y) if activation == "silu" else y
        out.append(y if residual is None else y + residual[n])
    return torch.stack(out)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    "stage",
    [None, 1, torch.tensor(1), torch.tensor([2, 0, 0, 1])],
    ids=["none", "one", "one, a tensor", "per sample"],
)
def test_value_and_gradients_equal_the_dense_form(backend, activation, stage):
    p = problem(None if stage is None else 3)
    for extra in ({}, {"residual": torch.randn(4, 5, 7, dtype=torch.float64)}):
        leaves = {name: t.clone().requires_grad_() for name, t in (p | extra).items()}
        settings = {"stage": stage, "scale": 0.7, "activation": activation}
        y, expected = lf.functional.lora_linear(**leaves, **settings), dense(**leaves, **settings)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        got = torch.autograd.grad((y * weights).sum(), leaves.values())
        want = torch.autograd.grad((expected * weights).sum(), leaves.values())
        for name, a, b in zip(leaves, got, want, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck_of_a_strided_input(backend):
    p = problem()
    x, down, up = p["x"].requires_grad_(), p["down"].requires_grad_(), p["up"].requires_grad_()

    def call(x, down, up):
        return lf.functional.lora_linear(x[:, ::2], p["weight"], None, down, up, stage=torch.tensor([2, 0, 0, 1]))

    assert torch.autograd.gradcheck(call, (x, down, up), fast_mode=True)


@pytest.mark.parametrize("stage", [None, torch.tensor([2, 0, 0, 1])], ids=["one", "per sample"])
def test_opcheck(stage):
    p = problem(None if stage is None else 3, torch.float32)
    tensors = [t.requires_grad_(name in ("x", "down", "up")) for name, t in p.items()]
    opcheck(op, (*tensors, stage, None, 0.5, "relu"))


def test_autocast_and_empty_batches():
    p = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = lf.functional.lora_linear(**p, stage=1)
    assert torch.equal(got, lf.functional.lora_linear(**(p | {"x": p["x"].bfloat16()}), stage=1))
    empty = lf.functional.lora_linear(**(p | {"x": p["x"][:0]}), stage=torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0, 5, 7)


def test_gradients_of_an_empty_batch_are_zero(backend):
    p = problem(dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (p | {"x": p["x"][:0]}).values()]
    for stage in (1, torch.zeros(0, dtype=torch.int64)):
        y = lf.functional.lora_linear(*leaves, stage=stage, activation="silu")
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(4, 5)}, ValueError, r"x: expected \(..., in\) for weight \(out, in\) = \(7, 6\)"),
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"scale": "a"}, TypeError, "scale: expected a number, got 'a'"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"down": torch.randn(3, 2, 5)}, ValueError, r"down, up: expected \(2, 6\) and \(7, 2\)"),
        ({"stage": torch.tensor([0, 1, 2, 3])}, IndexError, "stage: expected 0 to 2, got 3"),
        ({"stage": 5}, IndexError, "stage: expected 0 to 2, got 5"),
        ({"bias": torch.randn(6)}, ValueError, r"bias: expected \(7,\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of"),
        ({"residual": torch.randn(4, 7)}, ValueError, r"residual: expected the output's shape \(4, 5, 7\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        lf.functional.lora_linear(**({**problem(dtype=torch.float32), "stage": 0} | change))
