"""Every base denoiser serves every task: shapes, adapters, saving. And what ResCNN is by itself."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch

import lorun_fast as lf

BASES = {
    "cnn": lambda c: lf.ResCNN(c, c, channels=8, blocks=1),
    "unet": lambda c: lf.ResUNet(c, c, channels=(8, 8), blocks=1),
    "transformer": lambda c: lf.SpectralTransformer(c, c, channels=(8, 16), blocks=(1, 1), head_channels=8),
}
TASKS = {
    "cs": lambda: (lf.BlockCS.gaussian(0.25, 4, seed=0), (2, 1, 10, 13)),
    "cassi": lambda: (lf.CASSI((torch.rand(9, 11) > 0.5).float(), 5), (2, 5, 9, 11)),
    "sr": lambda: (lf.BlurDownsample(torch.full((3, 3), 1 / 9), 2), (2, 3, 12, 10)),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("base", BASES)
def test_every_base_adapts_and_runs_for_every_task(base, task, tmp_path):
    op, shape = TASKS[task]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adapt: .* grouped layers")
        net = lf.LoRun(op, BASES[base](shape[1]), stages=2, step_size=0.1)
    x = torch.rand(shape)
    y, size = op(x), shape[-2:]
    restored = net(y, size=size)
    assert restored.shape == x.shape
    ((restored - x) ** 2).mean().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert len(trained) == 1 + 2 * len(net.denoiser.adapted)
    with torch.no_grad():
        for layer in net.denoiser.adapted.values():
            layer.up.normal_(0, 0.1)
    lf.save(net, tmp_path / "net.safetensors")
    torch.testing.assert_close(lf.load(tmp_path / "net.safetensors")(y, size=size), net.eval()(y, size=size))


@pytest.mark.parametrize("base", ["cnn", "unet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_in_16_bits_layers_meet_and_give_images_with_channels_innermost(base, channels):
    """From the first on: learning takes a multiple of the time where one of its images lies otherwise."""
    staged = lf.adapt(BASES[base](channels), stages=2)
    met = {"in": [], "out": []}
    layers = [layer for layer in staged.adapted.values() if isinstance(layer, lf.LoRAConv2d)]

    def meet(layer, args, out):
        met["in"].append(args[0])
        met["out"].append(out)

    for layer in layers:
        layer.register_forward_hook(meet)
    x = torch.rand(2, channels, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            staged(x, stage=1)
        last = [t.is_contiguous(memory_format=torch.channels_last) for t in (*met["in"], *met["out"])]
        assert len(last) == 2 * len(layers) and all(last) == (dtype != torch.float32)
        for images in met.values():
            images.clear()


def test_res_cnn():
    net = lf.ResCNN(3, 2, channels=6, blocks=2, noise_level=True)
    z = torch.randn(2, 3, 5, 7)
    assert net(z, 0.1).shape == (2, 2, 5, 7)
    assert not torch.allclose(net(z, 0.1), net(z, 0.9))
    again = lf.ResCNN(**net.config())
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(z, 0.1), net(z, 0.1))
    assert sum(p.numel() for p in lf.ResCNN().parameters()) == 166_752
    with pytest.raises(ValueError, match=r"z: expected \(N, 3, H, W\), got shape \(1, 1, 4, 4\)"):
        net(torch.randn(1, 1, 4, 4), 0.1)
    with pytest.raises(ValueError, match="residual needs out_channels <= in_channels, got 2 > 1"):
        lf.ResCNN(1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lf.ResCNN(channels=None), "channels: expected a whole number, got None"),
        (lambda: lf.ResCNN(blocks=1.5), "blocks: expected a whole number, got 1.5"),
        (lambda: lf.ResUNet(in_channels="a"), "in_channels: expected a whole number, got 'a'"),
        (lambda: lf.ResUNet(channels=8), "channels: expected one number per scale, got 8"),
        (lambda: lf.ResUNet(channels=()), r"channels: expected one number per scale, got \(\)"),
        (lambda: lf.ResUNet(channels=(4, 8.0)), "channels: expected a whole number, got 8.0"),
        (lambda: lf.SpectralTransformer(blocks=1), "blocks: expected one number per scale, got 1"),
        (lambda: lf.ResUNet()(None), "z: expected a tensor, got NoneType"),
        (lambda: lf.ResUNet()(torch.ones(1, 1, 4, 4, dtype=torch.int64)), "z: expected float32, .*got torch.int64"),
        (
            lambda: lf.ResUNet(noise_level=True)(torch.ones(1, 1, 4, 4), "a"),
            "sigma: expected a number or a tensor, got 'a'",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_channels_of_an_array():
    assert lf.ResUNet(channels=np.array([4, 8])).config()["channels"] == [4, 8]
    assert lf.SpectralTransformer(blocks=torch.tensor([1, 1, 1])).blocks == (1, 1, 1)
    for channels, got in ((np.array([4.0, 8.0]), "a whole number, got 4.0"), (np.array(8), "one number per scale")):
        with pytest.raises(TypeError, match=f"channels: expected {got}"):
            lf.ResUNet(channels=channels)


def test_a_denoiser_has_channels():
    for channels in ((4, -1), (0,)):
        with pytest.raises(ValueError, match="channels: expected at least 1"):
            lf.ResUNet(channels=channels)


def test_a_noise_level_for_another_batch():
    for sigma, shape in ((torch.ones(3), "(3)"), (torch.ones(2, 2), "(2, 2)")):
        with pytest.raises(ValueError, match=rf"sigma: expected a number, 0-d or \(2,\), got shape {re.escape(shape)}"):
            lf.ResCNN(channels=4, noise_level=True)(torch.ones(2, 1, 8, 8), sigma)


@pytest.mark.parametrize("base", [lf.ResUNet, lf.ResCNN, lf.SpectralTransformer])
def test_an_empty_batch(base):
    assert base(4, 4)(torch.ones(0, 4, 8, 8)).shape == (0, 4, 8, 8)
    for shape in ((1, 4, 0, 8), (1, 4, 8, 0)):
        with pytest.raises(ValueError, match="z: expected at least one row and one column, got shape"):
            base(4, 4)(torch.ones(shape))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("base", BASES)
def test_a_network_under_transforms(base, task):
    """torch.vmap, and one gradient per sample, are what a loop over the samples gives."""
    op, shape = TASKS[task]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adapt: .* grouped layers")
        net = lf.LoRun(op, BASES[base](shape[1]), stages=2, step_size=0.1)
    size = shape[-2:]
    y = op(torch.rand(3, *shape[1:])).unsqueeze(1)
    torch.testing.assert_close(torch.vmap(lambda v: net(v, size=size))(y), torch.stack([net(v, size=size) for v in y]))
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad}

    def loss(learned, v):
        return torch.func.functional_call(net, learned, v, {"size": size}).square().mean()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(learned, y)
    for n, v in enumerate(y):
        wanted = torch.autograd.grad(net(v, size=size).square().mean(), list(learned.values()))
        for (name, got), want in zip(each.items(), wanted, strict=True):
            torch.testing.assert_close(got[n], want, msg=lambda m, name=name: f"{name}: {m}")
