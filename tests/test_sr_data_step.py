"""LoRun's exact data step: its weight, one noise level per sample, compilation, and what a file keeps of it."""

from __future__ import annotations

import pytest
import torch
from sr_help import tiny_sr_network

import lorun_fast as lf
from lorun_fast.network import falling_step_sizes


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return lf.load(tiny_sr_network(tmp_path_factory.mktemp("network") / "net.safetensors"))


@torch.no_grad()
def test_a_stage_is_the_minimiser_and_the_denoiser(net):
    torch.manual_seed(1)
    x, sigma = torch.rand(2, 3, 12, 16), torch.tensor([0.0, 0.1])
    y = net.op(torch.rand_like(x))
    got = net.stage_step(1, x, y, sigma=sigma)
    for i in range(2):
        # Half a gray level's rounding has a variance of 1 / (12 * 255^2); rho = 0.5 stands for an error of x of 0.05.
        mu = (float(sigma[i]) ** 2 + 1 / (12 * 255**2)) / 0.05**2
        z = net.op.prox(x[i : i + 1], y[i : i + 1], mu)
        want = net.denoiser(z, stage=1, sigma=sigma[i])
        torch.testing.assert_close(got[i : i + 1], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_data_step_fits_sharp_measurements_and_trusts_noisy_ones_less(net):
    torch.manual_seed(1)
    x = torch.rand(1, 3, 12, 16)
    y = net.op(torch.rand_like(x))
    errors = []
    for sigma in (None, 0.01, 0.1):
        z = net.op.prox(x, y, net._mu(net.step_size[0], x, sigma))
        errors.append((net.op(z) - y).norm().item())
    assert errors[0] < 0.02 * (net.op(x) - y).norm().item()
    assert errors[0] < errors[1] < errors[2] < (net.op(x) - y).norm().item()


def test_sigma_none_and_zero_are_one(net):
    x = torch.rand(1, 3, 12, 16)
    assert torch.equal(net._mu(net.step_size[0], x, None), net._mu(net.step_size[0], x, 0.0))


class Halves(torch.nn.Module):
    def forward(self, z):
        return z / 2


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
@pytest.mark.parametrize("plain", [lf.ResCNN(in_channels=1, out_channels=1, channels=4, blocks=1), Halves()])
@torch.no_grad()
def test_a_denoiser_without_a_noise_level_is_told_none(plain, sharing):
    """sigma then weighs y in the data step alone; a gradient step, which has no use for it, still refuses it."""
    if sharing == "lora" and isinstance(plain, Halves):
        plain = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), plain)
    op = lf.BlurDownsample(torch.ones(3, 3) / 9, 2)
    net = lf.LoRun(op, plain, stages=2, sharing=sharing, data_step="prox")
    y, x = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 12, 12)
    z = net.data_update(0, x, y, sigma=0.1)
    assert torch.equal(net.stage_step(0, x, y, sigma=0.1), net.denoiser(z, stage=0))
    assert not torch.allclose(net(y, sigma=0.1), net(y))
    fast = net.optimize(dtype=torch.float32)
    torch.testing.assert_close(fast(y, sigma=0.1), net.eval()(y, sigma=0.1), atol=1e-5, rtol=1e-5)
    with pytest.raises((TypeError, ValueError)):
        lf.LoRun(op, plain, stages=2, sharing=sharing)(y, sigma=0.1)


def test_step_sizes_learn_through_it(net):
    y = net.op(torch.rand(1, 3, 12, 16))
    net.step_size.grad = None
    net(y, sigma=0.05).square().mean().backward()
    assert torch.isfinite(net.step_size.grad).all() and (net.step_size.grad != 0).all()
    net.zero_grad()


def test_it_compiles_without_a_break(net, graph_counter):
    y = net.op(torch.rand(1, 3, 12, 16))
    compiled = torch.compile(net, backend=graph_counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(y, sigma=0.02), net(y, sigma=0.02), atol=1e-6, rtol=1e-6)
    assert graph_counter.graphs == 1


def test_a_file_keeps_it_and_older_files_mean_the_gradient(tmp_path, net):
    lf.save(net, tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors")
    y = net.op(torch.rand(1, 3, 12, 16))
    assert again.data_step == "prox" and "prox" in repr(again)
    with torch.no_grad():
        assert torch.equal(again(y, sigma=0.0), net(y, sigma=0.0))
    assert lf.load_pretrained("cs-25").data_step == "gradient"


def test_an_unknown_data_step_is_refused(net):
    with pytest.raises(ValueError, match="data_step: expected one of gradient, prox, got 'newton'"):
        lf.LoRun(net.op, lf.ResUNet(3, 3), data_step="newton")


@torch.no_grad()
def test_the_level_of_a_stage_weighs_the_data_and_is_what_the_denoiser_is_told(net):
    torch.manual_seed(2)
    own = lf.LoRun(net.op, net.denoiser, data_step="prox", noise_map="stage")
    own.step_size.copy_(net.step_size)
    x, sigma = torch.rand(2, 3, 12, 16), torch.tensor([0.0, 0.1])
    y = own.op(torch.rand_like(x))
    got = own.stage_step(1, x, y, sigma=sigma)
    for i in range(2):
        variance = 0.05**2 + float(sigma[i]) ** 2
        z = own.op.prox(x[i : i + 1], y[i : i + 1], (float(sigma[i]) ** 2 + 1 / (12 * 255**2)) / variance)
        want = own.denoiser(z, stage=1, sigma=variance**0.5)
        torch.testing.assert_close(got[i : i + 1], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(own(y), own(y, sigma=0.0))


def test_levels_fall_geometrically():
    levels = falling_step_sizes(9) / 10
    assert levels[0].item() == pytest.approx(49 / 255) and levels[-1].item() == pytest.approx(2 / 255)
    torch.testing.assert_close(levels[1:] / levels[:-1], (levels[1] / levels[0]).expand(8))


def test_a_noise_map_of_the_stage_is_kept_copied_and_checked(tmp_path, net):
    own = lf.LoRun(net.op, net.denoiser, data_step="prox", noise_map="stage")
    lf.save(own, tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors")
    assert again.noise_map == "stage" and "noise_map='stage'" in repr(again)
    assert lf.load_pretrained("cs-25").noise_map == "measurement"
    y = own.op(torch.rand(1, 3, 12, 16))
    with torch.no_grad():
        assert torch.equal(again(y), own.eval()(y))
        torch.testing.assert_close(again.optimize(dtype=torch.float32)(y), again(y), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="noise_map: expected one of measurement, stage, got 'none'"):
        lf.LoRun(net.op, lf.ResUNet(3, 3), noise_map="none")
    with pytest.raises(ValueError, match="noise_map='stage': expected data_step='prox', got 'gradient'"):
        lf.LoRun(net.op, lf.ResUNet(3, 3), noise_map="stage")
