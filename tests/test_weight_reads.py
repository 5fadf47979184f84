"""Denoisers whose own code computes with a layer's weight: adapt() says so, current_weight() brings the adapter in."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorun_fast as lf
from lorun_fast.layers import current_weight


class Sparse(nn.Module):
    """A learned sparse code: one dictionary for both directions, past the layer in one of them."""

    def __init__(self):
        super().__init__()
        self.dictionary = nn.Conv2d(2, 8, 3, padding=1)
        self.after = nn.Conv2d(2, 2, 3, padding=1)
        nn.init.uniform_(self.after.weight, -0.1, 0.1)

    def forward(self, z):
        return self.after(self.back(torch.relu(self.dictionary(z.to(self.after.weight.dtype)))))

    def back(self, code):
        return F.conv_transpose2d(code, self.dictionary.weight, padding=1)


class Current(Sparse):
    """The same, with the adapter in both directions."""

    def back(self, code):
        return F.conv_transpose2d(code, current_weight(self.dictionary), padding=1)


class Body(nn.Module):
    """Reads of other kinds: an index, a property, a fact, a layer that only asks for the layout of another."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        self.asked, self.tail = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    @property
    def scaled(self):
        return 2 * self.tail.weight

    def forward(self, z):
        z = z.to(self.asked.weight) + torch.zeros_like(self.asked.weight).sum() + self.asked.weight.shape[0]
        z = z * self.asked.weight.new_ones(1)
        return self.asked(F.conv2d(F.conv2d(z, self.body[0].weight), self.scaled))

    def unused(self):
        return self.asked.weight.sum()


Z = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def adapted(**kwargs) -> lf.StagedDenoiser:
    staged = lf.adapt(Current(), stages=3, gamma=50, **kwargs)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    return staged


def by_hand(staged: lf.StagedDenoiser, stage: int, z: torch.Tensor) -> torch.Tensor:
    dictionary, after = staged.adapted["dictionary"], staged.adapted["after"]
    weight = dictionary.stage_weight(stage)
    code = torch.relu(F.conv2d(z, weight, dictionary.bias, padding=1))
    return F.conv2d(F.conv_transpose2d(code, weight, padding=1), after.stage_weight(stage), after.bias, padding=1)


def test_adapt_names_weights_that_are_read_past_their_layers():
    with pytest.warns(UserWarning, match=r"the weight of 0\.dictionary \(.*test_weight_reads\.py:\d+\), 1\.dictionary"):
        lf.adapt(nn.Sequential(Sparse(), Sparse()), stages=2)
    with pytest.warns(UserWarning) as found:
        lf.adapt(Body(), stages=2)
    message = str(found[0].message)
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "2 * self.tail.weight" in text)
    assert f"tail ({__file__}:{line})" in message and "body.0 (" in message and "asked" not in message


@pytest.mark.parametrize(
    "denoiser",
    [lf.ResUNet(), lf.ResCNN(), Current()],
    ids=lambda module: type(module).__name__,
)
def test_adapt_says_nothing_where_layers_are_called(denoiser):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.adapt(denoiser, stages=2)


def test_excluded_layers_may_be_read():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.adapt(Sparse(), stages=2, exclude="dictionary")


def test_code_without_a_source_is_passed_over():
    names: dict = {}
    text = "class Typed(nn.Module):\n  def forward(self, z):\n    return F.conv2d(z, self.conv.weight)\n"
    exec(text, {"nn": nn, "F": F, "__name__": "__main__"}, names)
    denoiser = names["Typed"]()
    denoiser.conv = nn.Conv2d(2, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.adapt(denoiser, stages=2)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_current_weight_is_that_of_the_stage(form, merged):
    staged = adapted(form=form).double()
    z = Z.double()
    expected = [by_hand(staged, k, z) for k in range(3)]
    if merged:
        staged.merge()
    for k in range(3):
        torch.testing.assert_close(staged(z, stage=k), expected[k])
        torch.testing.assert_close(staged(z, stage=torch.tensor(k)), expected[k])


def test_gradients_reach_the_factors_through_a_weight():
    staged = adapted()
    layer = staged.adapted["dictionary"]
    staged(Z, stage=1).sum().backward()
    got = layer.down.grad.clone(), layer.up.grad.clone()
    layer.down.grad = layer.up.grad = None
    by_hand(staged, 1, Z).sum().backward()
    torch.testing.assert_close(got, (layer.down.grad, layer.up.grad))


def test_current_weight_of_one_stage_per_sample_and_outside_a_call():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 1)

        def forward(self, z):
            return current_weight(self.conv)

    staged = lf.adapt(Weights(), stages=3, gamma=50)
    for p in staged.adapter_parameters():
        nn.init.normal_(p)
    layer = staged.adapted["conv"]
    found = staged(Z, stage=torch.tensor([2, 0, 2]))
    torch.testing.assert_close(found, torch.stack([layer.stage_weight(k) for k in (2, 0, 2)]))
    with pytest.raises(ValueError, match="stage: expected 0 to 2, got none"):
        current_weight(layer)
    plain = nn.Conv2d(2, 4, 1)
    assert current_weight(plain) is plain.weight


def test_compiled_and_optimized_networks_share_the_weight_too():
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), nn.Sequential(nn.Conv2d(1, 2, 1), Current(), nn.Conv2d(2, 1, 1)), 3)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    y = net.op(torch.rand(1, 1, 16, 16))
    expected = net(y)
    for convolutions in ("direct", "winograd"):
        fast = net.eval().optimize(dtype=torch.float32, convolutions=convolutions)
        torch.testing.assert_close(fast(y), expected, rtol=1e-4, atol=1e-4)
    staged = adapted()
    graphs = []
    compiled = torch.compile(staged, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for k in range(3):
        torch.testing.assert_close(compiled(Z, stage=k), staged(Z, stage=k))
    assert len(graphs) <= 2
