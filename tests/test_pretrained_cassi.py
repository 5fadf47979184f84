"""The shipped spectral network: what it holds, and that it restores a cube that it was not trained on."""

from __future__ import annotations

import pytest
import torch

import lorun_fast as lf
from lorun_fast.apps.tasks.cassi import synthetic
from lorun_fast.apps.tasks.cassi.scores import psnr_bands, spectral_angle


@pytest.fixture(scope="module")
def net() -> lf.LoRun:
    return lf.load_pretrained("cassi")


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return torch.from_numpy(synthetic.cube(96, 128))[None]


def own_mask(truth: torch.Tensor, step: int = 2) -> lf.CASSI:
    """A mask that the network never saw, of the cube's size."""
    generator = torch.Generator().manual_seed(11)
    return lf.CASSI(torch.randint(0, 2, truth.shape[2:], generator=generator).float(), 28, step)


def test_what_it_holds(net):
    assert (net.stages, net.sharing, net.data_step, net.denoiser.merged) == (9, "lora", "prox", True)
    assert isinstance(net.denoiser.base, lf.SpectralTransformer)
    assert net.parameter_report().total == 536_833
    # The mask inside is a random one of our own, not research data.
    assert net.op.mask.shape == (256, 256) and net.op.mask.unique().tolist() == [0, 1]


@torch.no_grad()
def test_it_restores_through_a_mask_of_yours(net, truth):
    op = own_mask(truth)
    y = op(truth)
    scores = [sum(psnr_bands(x[0].numpy(), truth[0].numpy())) / 28 for x in net(y, op=op, return_stages=True)]
    assert scores[-1] > scores[0] + 6
    angles = [spectral_angle(x[0].numpy(), truth[0].numpy()) for x in (op.initial(y), net(y, op=op))]
    assert angles[1] < 0.55 * angles[0]


@torch.no_grad()
def test_the_unit_of_a_measurement_does_not_matter(net, truth):
    op = own_mask(truth)
    y = op(truth)
    torch.testing.assert_close(net(1000 * y, op=op), 1000 * net(y, op=op), rtol=1e-3, atol=1e-1)


@torch.no_grad()
def test_the_adapters_are_what_makes_it_good(truth):
    net, op = lf.load_pretrained("cassi"), own_mask(truth)
    y = op(truth)
    with_adapters = (net(y, op=op) - truth).square().mean()
    for layer in net.denoiser.adapted.values():
        torch.nn.init.zeros_(layer.up)
    net.eval()
    assert with_adapters < 0.9 * (net(y, op=op) - truth).square().mean()
