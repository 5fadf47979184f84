"""The shipped weights: what they hold, and that they restore a photograph they were not trained on."""

from __future__ import annotations

import pytest
import torch
from skimage import data
from torch import nn

import lorun_fast as lf
from lorun_fast.io import pretrained_names


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * torch.log10(torch.mean((a.clamp(0, 1) - b) ** 2))).item()


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    return torch.from_numpy(data.astronaut()[:192, 128:320].mean(2) / 255).float()[None, None]


def test_the_names_are_those_that_the_docs_promise():
    assert pretrained_names() == ["cassi", "cs-1", "cs-10", "cs-25", "cs-4", "sr"]


@torch.no_grad()
def test_cs_25(photograph):
    net = lf.load_pretrained("cs-25")
    assert (net.stages, net.sharing, net.form, net.denoiser.merged) == (9, "lora", "loralib", True)
    assert (net.op.block_size, tuple(net.op.phi.shape)) == (32, (256, 1024))
    assert net.parameter_report().total == 1_768_171
    y = net.op(photograph)
    iterates = [psnr(x, photograph) for x in net(y, return_stages=True)]
    assert iterates[-1] > 33
    assert iterates[-1] > iterates[0] + 14


@torch.no_grad()
@pytest.mark.parametrize(("name", "m", "least"), [("cs-10", 102, 27), ("cs-4", 41, 24), ("cs-1", 10, 20)])
def test_the_lower_ratios(photograph, name, m, least):
    net = lf.load_pretrained(name)
    assert (net.stages, net.sharing, tuple(net.op.phi.shape)) == (9, "lora", (m, 1024))
    iterates = [psnr(x, photograph) for x in net(net.op(photograph), return_stages=True)]
    assert iterates[-1] > max(least, iterates[0])


@torch.no_grad()
def test_the_adapters_of_cs_25_are_what_makes_it_good(photograph):
    net = lf.load_pretrained("cs-25")
    y = net.op(photograph)
    with_adapters = psnr(net(y), photograph)
    for layer in net.denoiser.adapted.values():
        nn.init.zeros_(layer.up)
    net.eval()
    assert with_adapters > psnr(net(y), photograph) + 1


@torch.no_grad()
def test_sizes_that_no_block_divides(photograph):
    net = lf.load_pretrained("cs-25")
    odd = photograph[..., :101, :75]
    restored = net(net.op(odd), size=(101, 75))
    assert restored.shape == odd.shape
    assert psnr(restored, odd) > 28
