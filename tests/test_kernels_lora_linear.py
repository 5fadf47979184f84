"""The linear kernels against the definition in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from kernels_help import DEVICE, assert_as_good_as_torch, needs_triton, poisoned  # noqa: F401

from lorun_fast.reference import lora as reference

needs_triton()

from lorun_fast.kernels import lora_linear  # noqa: E402
from lorun_fast.kernels.configs import BackwardTile, FactorTile, Tile  # noqa: E402

TILE = Tile(1, 16, 16, 16, 4, 2)
BACK = BackwardTile(TILE, TILE, FactorTile(1, 16, 16, 1, 16), 2)


@pytest.mark.parametrize("stage", [None, 2, torch.tensor([2, 0])], ids=["no stages", "one", "per sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_and_backward(stage, dtype, poisoned):  # noqa: F811
    lead = () if stage is None else (3,)
    if isinstance(stage, torch.Tensor):
        stage = stage.to(DEVICE)

    def draw(*shape):
        return torch.randn(*shape).to(DEVICE, dtype)

    x, weight, bias, residual = draw(2, 3, 5, 20), draw(24, 20) / 5, draw(24), draw(2, 3, 5, 24)
    down, up, dy = draw(*lead, 3, 20) / 5, draw(*lead, 24, 3), draw(2, 3, 5, 24)
    more = {"scale": 0.7, "stage": stage, "activation": "gelu"}

    def define(wide):
        tensors = [t.to(wide).requires_grad_() for t in (x, down, up, bias)]
        x_, down_, up_, bias_ = tensors
        y = reference.lora_linear(x_, weight.to(wide), bias_, down_, up_, residual=residual.to(wide), **more)
        return y, torch.autograd.grad(y, tensors, dy.to(wide))

    (truth, true_grads), (own, own_grads) = define(torch.float64), define(dtype)
    got = lora_linear.forward(x, weight, bias, down, up, residual=residual, tile=TILE, **more)
    assert_as_good_as_torch([got], [own], [truth])
    grads = lora_linear.backward(dy, x, weight, bias, down, up, need=(True, True, True), tile=BACK, **more)
    assert_as_good_as_torch(grads, own_grads, true_grads)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_the_saved_output_tells_the_derivative(activation, poisoned):  # noqa: F811
    x, weight, down, up = torch.randn(2, 5, 20), torch.randn(24, 20) / 5, torch.randn(3, 20) / 5, torch.randn(24, 3)
    x, weight, down, up, dy = (t.to(DEVICE) for t in (x, weight, down, up, torch.randn(2, 5, 24)))

    def define(wide):
        tensors = [t.to(wide).requires_grad_() for t in (x, down, up)]
        y = reference.lora_linear(tensors[0], weight.to(wide), None, *tensors[1:], activation=activation)
        return y.detach(), torch.autograd.grad(y, tensors, dy.to(wide))

    (y, own), (_, truth) = define(torch.float32), define(torch.float64)
    got = lora_linear.backward(dy, x, weight, None, down, up, activation=activation, output=y, tile=BACK)
    assert_as_good_as_torch(got[:3], own, truth)
    ones = lora_linear.backward(dy, x, weight, None, down, up, activation=activation, output=y.abs() + 1, tile=BACK)
    none = lora_linear.backward(dy, x, weight, None, down, up, tile=BACK)
    assert all(torch.equal(a, b) for a, b in zip(ones[:3], none[:3], strict=True))
