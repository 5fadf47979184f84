"""The shipped super-resolution network, on a photograph that it was not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data

import lorun_fast as lf
from lorun_fast.apps.cli import main
from lorun_fast.apps.runtime import Runtime
from lorun_fast.apps.tasks.sr import kernels, pictures, protocol


@pytest.fixture(scope="module")
def net() -> lf.LoRun:
    return lf.load_pretrained("sr")


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return data.astronaut()[:168, 120:288].transpose(2, 0, 1).astype(np.float32) / 255


def scores(net, x, kernel, scale, noise=0.0) -> list[float]:
    """PSNR of every iterate, the start first."""
    op = lf.BlurDownsample(torch.from_numpy(kernel), scale)
    y = protocol.measure(x, kernel, scale, noise, np.random.default_rng(0), "usrnet")
    with torch.no_grad():
        iterates = net(torch.from_numpy(y)[None], op=op, sigma=noise, return_stages=True)
    return [protocol.psnr(v[0].numpy(), x, scale, "usrnet") for v in iterates]


def test_what_it_is(net):
    assert (net.stages, net.sharing, net.form) == (9, "lora", "loralib")
    assert (net.data_step, net.noise_map) == ("prox", "stage")
    assert net.parameter_report().total == 1_769_296
    assert net.denoiser.merged


@pytest.mark.parametrize(
    ("scale", "kernel", "gain"),
    [
        (2, kernels.gaussian(1.4), 4.4),
        (2, kernels.motion(np.random.default_rng(3), 19), 5.2),
        (3, kernels.gaussian(3.0, 21, ratio=0.4, angle=1.0), 4.2),
        (4, kernels.gaussian(2.2, 16), 2.8),
    ],
    ids=["x2", "x2 motion", "x3 oblique", "x4 even"],
)
def test_one_network_beats_bicubic_for_every_kernel_and_scale(net, photograph, scale, kernel, gain):
    found = scores(net, protocol.original(photograph, scale), kernel, scale)
    assert found[-1] > found[0] + gain


def test_it_denoises_when_told_to(net, photograph):
    x, kernel = protocol.original(photograph, 2), kernels.gaussian(1.2)
    noisy = scores(net, x, kernel, 2, noise=20 / 255)
    assert noisy[-1] > noisy[0] + 4.5


def test_gray_pictures_are_denoised_as_well(net):
    x = data.camera()[60:228, 150:318].astype(np.float32)[None, None] / 255
    op = lf.BlurDownsample(torch.from_numpy(kernels.gaussian(1.6)), 2)
    noise = 5 / 255
    y = op(torch.from_numpy(x)).numpy()
    y += noise * np.random.default_rng(0).standard_normal(y.shape, dtype=np.float32)
    how = Runtime(torch.device("cpu"), torch.float32, 1)
    found, _ = pictures.restore(net, y, None, how, op=op, sigma=noise)
    with torch.no_grad():
        start = op.initial(torch.from_numpy(y)).numpy()
        same = net(torch.from_numpy(np.repeat(y, 3, 1)), op=op, sigma=noise).numpy()

    def psnr(z) -> float:
        return -10 * np.log10(((z.clip(0, 1) - x) ** 2).mean())

    assert psnr(found) > psnr(start) + 2
    # Told that its three equal channels differ in their noise, the network takes some of it for the image.
    assert psnr(found) > psnr(same) + 0.5


def test_restoring_needs_no_name(photograph, tmp_path, capsys):
    from lorun_fast.apps import images

    images.save(tmp_path / "a.png", photograph[:, :97, :110])
    command = ["measure", "sr", str(tmp_path / "a.png"), "--gaussian", "1.3", "--scale", "3", "--size", "reflect"]
    assert main([*command, "-o", str(tmp_path / "y.npz")]) == 0
    assert main(["restore", str(tmp_path / "y.npz"), "-o", str(tmp_path / "out")]) == 0
    assert "sr: x3, kernel 25x25" in capsys.readouterr().out
    restored = images.load(tmp_path / "out" / "a.png", "channels")
    assert restored.shape == (3, 97, 110)
    assert 24 < protocol.psnr(restored, photograph[:, :97, :110], 3, "float") < 60
