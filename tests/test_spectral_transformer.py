"""The spectral Transformer base: sizes, counts, what its attention depends on, adapters, configuration."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lorun_fast as lf
from lorun_fast import convolutions
from lorun_fast.denoisers import spectral_transformer
from lorun_fast.denoisers.spectral_transformer import SpectralBlock


def small(**more):
    return lf.SpectralTransformer(4, 4, channels=(4, 8), blocks=(1, 1), head_channels=4, **more)


def adapted(net, stages=3, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says which depthwise layers keep their weights: tested below
        return lf.adapt(net, stages, **more)


def test_parameters_stay_within_the_published_sizes():
    net = lf.SpectralTransformer()
    report = adapted(net, 9, gamma=10).parameter_report()
    assert report.base == sum(p.numel() for p in net.parameters()) == 252_514
    assert report.total == 567_010
    largest = adapted(lf.SpectralTransformer(channels=(28, 56, 112), blocks=(1, 2, 3)), 9).parameter_report()
    assert largest.base <= 600_000 and largest.total <= 1_620_000


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8), (16, 33)])
def test_any_size(size):
    z = torch.randn(2, 4, *size)
    assert small()(z).shape == z.shape


def test_padding_inside_does_not_reach_an_image_of_whole_cells():
    net = small().double()
    odd = torch.randn(1, 4, 7, 5, dtype=torch.float64)
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(net(odd), net(padded)[:, :, :7, :5])


def test_exposure_does_not_matter():
    net = small().double()
    z = torch.rand(1, 4, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(net(1e-3 * z), 1e-3 * net(z), rtol=1e-9, atol=1e-15)
    assert torch.equal(net(0 * z), 0 * z)


def test_gradients_agree_with_finite_differences():
    net = small().double()
    z = torch.rand(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(net, (z,), fast_mode=True)


def test_adapters_reach_linear_and_convolution_layers_and_leave_depthwise_ones():
    net = small()
    with pytest.warns(UserWarning, match="3 grouped layers keep their base weights"):
        staged = lf.adapt(net, stages=3)
    plain = {n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}
    depthwise = {n for n in plain if n.endswith("local")}
    assert set(staged.skipped) == depthwise and set(staged.adapted) == plain - depthwise
    z = torch.rand(2, 4, 8, 8)
    assert torch.equal(staged(z, stage=2), net(z))
    with torch.no_grad():
        for layer in staged.adapted.values():
            layer.up.normal_(0, 0.3)
    apart = torch.cat([staged(z[:1], stage=2), staged(z[1:], stage=0)])
    assert not torch.allclose(apart[1:], staged(z[1:], stage=2), atol=1e-3)
    torch.testing.assert_close(staged(z, stage=torch.tensor([2, 0])), apart)
    staged.merge()
    torch.testing.assert_close(staged(z, stage=torch.tensor([2, 0])), apart)


def test_one_graph_serves_every_stage_but_the_first(graph_counter):
    staged = adapted(small(), 9)
    compiled = torch.compile(lambda z, k: staged(z, stage=k), fullgraph=True, backend=graph_counter)
    z = torch.rand(1, 4, 8, 8)
    for k in range(9):
        torch.testing.assert_close(compiled(z, k), staged(z, stage=k))
    assert graph_counter.graphs == 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_is_torchs_own(strict):
    net, z = small(), torch.rand(1, 4, 8, 8)
    program = torch.export.export(net, (z,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.conv2d.default") == 6 and not any("lorun_fast" in target for target in targets)
    torch.testing.assert_close(program.module()(z), net(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_depthwise_layers_kernel_changes_rounding_only(monkeypatch, record_calls, dtype):
    block, x = SpectralBlock(8, 2, 2), torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)

    def gradients():
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = block(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in block.parameters())]

    calls = record_calls(convolutions, "depthwise_conv2d")
    found = gradients()
    monkeypatch.setattr(spectral_transformer, "depthwise", lambda conv, x: conv(x))
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for got, expected in zip(found, gradients(), strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=close)
    assert len(calls) == 1


def test_noise_level_map():
    net = small(noise_level=True)
    z = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(net(z, torch.tensor([0.1, 0.1])), net(z, 0.1))
    assert not torch.allclose(net(z, 0.9), net(z, 0.1))
    with pytest.raises(ValueError, match="pass sigma"):
        net(z)
    with pytest.raises(ValueError, match="takes no sigma"):
        small()(z, 0.1)


def test_saved_and_loaded(tmp_path):
    net = lf.SpectralTransformer(4, 3, (4, 12), (0, 1), head_channels=5, expansion=1, residual=False)
    again = lf.SpectralTransformer(**net.config())
    again.load_state_dict(net.state_dict())
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(again(z), net(z))
    assert net.body[0].heads == 3
    whole = lf.LoRun(lf.CASSI(torch.rand(8, 8), 4), small(), 2, sharing="tied")
    lf.save(whole, tmp_path / "net.safetensors")
    y = torch.rand(1, 8, 14)
    torch.testing.assert_close(lf.load(tmp_path / "net.safetensors")(y), whole(y))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"z: expected \(N, 4, H, W\), got shape \(1, 3, 4, 4\)"):
        small()(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="blocks: expected one number for each of 3 scales, got 2"):
        lf.SpectralTransformer(blocks=(1, 1))
    with pytest.raises(ValueError, match="residual needs out_channels <= in_channels, got 4 > 3"):
        lf.SpectralTransformer(3, 4)
