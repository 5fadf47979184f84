"""Training of the super-resolution task: random kernels, mixed scales and noise, resuming, both data steps."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lorun_fast as lf
from lorun_fast.apps.cli import main
from lorun_fast.apps.sampling import PatchSampler
from lorun_fast.apps.tasks.sr import kernels, training


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "camera", "chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()[:150, :150]).save(folder / f"{name}.png")
    return folder


def arguments(photographs, output, *more) -> list[str]:
    return [
        "train", "sr", "--data", str(photographs), "-o", str(output), "--patch", "24", "--batch", "2", "--kernel-size",
        "9", "--channels", "4", "8", "--stages", "2", "--base-steps", "4", "--steps", "4", "--warm-up", "2",
        "--validate-every", "4", "--checkpoint-every", "1", "--threads", "1", "--dtype", "fp32", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(photographs, folder)) == 0
    return folder


def test_the_trained_network_takes_other_kernels_scales_and_noise_levels(trained):
    net = lf.load(trained / "model.safetensors")
    assert (net.data_step, net.sharing, net.denoiser.base.noise_level) == ("prox", "lora", True)
    assert net.noise_map == "stage" and net.step_size[0] > 10 * net.step_size[1]
    for scale, size in ((2, 25), (3, 8)):
        op = lf.BlurDownsample(kernels.gaussian(1.2, size), scale)
        assert net(torch.rand(2, 3, 8, 9), op=op, sigma=0.02).shape == (2, 3, 8 * scale, 9 * scale)


def test_stopping_and_resuming_changes_nothing(photographs, trained, tmp_path):
    assert main(arguments(photographs, tmp_path / "run", "--stop-after", "6")) == 0
    assert main(arguments(photographs, tmp_path / "run", "--resume")) == 0
    first, second = load_file(trained / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_phase_two_goes_on_from_a_saved_tied_network(photographs, trained, tmp_path):
    assert main(arguments(photographs, tmp_path / "tied", "--sharing", "tied", "--init", str(trained))) == 0
    source = tmp_path / "tied" / "model.safetensors"
    assert main(arguments(photographs, tmp_path / "more", "--init", str(source), "--lr", "0")) == 0
    before, after = load_file(source), load_file(tmp_path / "more" / "model.safetensors")
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert lf.load(tmp_path / "more" / "model.safetensors").data_step == "prox"


@pytest.mark.parametrize("data_step", ["gradient", "prox"])
def test_the_measurements_noise_and_the_gradient_step_can_be_trained_instead(photographs, tmp_path, data_step):
    more = ("--data-step", data_step, "--noise-map", "measurement")
    assert main(arguments(photographs, tmp_path / "run", *more)) == 0
    net = lf.load(tmp_path / "run" / "model.safetensors")
    assert (net.data_step, net.noise_map) == (data_step, "measurement")
    assert net.step_size[0] < 2 * net.step_size[1]


def test_the_gradient_step_has_no_level_of_its_own(photographs, tmp_path, capsys):
    assert main(arguments(photographs, tmp_path / "run", "--data-step", "gradient")) == 0
    assert lf.load(tmp_path / "run" / "model.safetensors").noise_map == "measurement"
    more = ("--data-step", "gradient", "--noise-map", "stage")
    assert main(arguments(photographs, tmp_path / "other", *more)) == 2
    assert "--noise-map stage: expected --data-step prox, got gradient" in capsys.readouterr().err


def test_phase_one_learns_gaussian_noise_of_every_level(photographs):
    made = recipe(photographs, data_step="prox", batch=512)
    net, seen = made.base(), []

    def denoiser(z, stage, sigma):
        seen.append((z, sigma))
        return z

    net.denoiser.forward = denoiser
    batch = made.draw(net, 3)
    x = batch.x
    loss = made.loss(net, batch)
    ((z, level),) = seen
    assert level.min() < 0.7 / 255 and 40 / 255 < level.max() < 60 / 255
    spread = (z - x).flatten(1).std(1)
    assert ((spread / level - 1).abs() < 0.1).all()
    assert loss.item() == pytest.approx(level.mean().item(), rel=0.01)


def test_a_block_on_gaussian_noise_is_scored_on_noise_of_15_of_255(photographs):
    made = recipe(photographs, data_step="prox")
    net, seen = made.base(), []

    def denoiser(z, stage, sigma):
        seen.append(sigma)
        return z  # so that what is left is the noise

    net.denoiser.forward = denoiser
    score = made.score(net, torch.device("cpu"))
    assert len(seen) == len(made.validation) and all(sigma.item() == pytest.approx(15 / 255) for sigma in seen)
    assert score == pytest.approx(-20 * np.log10(15 / 255), abs=0.3)  # a little more, for what is clipped


def recipe(photographs, **changes) -> training.Recipe:
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    args = parser.parse_args([])
    settings = {"data": [photographs], "batch": 64, "seed": 0, "patch": 24, "pretrain_unroll": 1}
    vars(args).update(settings | changes)
    return training.Recipe(args)


def test_batches_mix_kernels_and_noise_and_go_through_every_scale(photographs):
    made = recipe(photographs)
    x = made.sampler(0)
    assert x.shape == (64, 3, 24, 24)
    scales = set()
    for step in range(12):
        batch = made.disturbed(x, np.random.default_rng((0, step, 1)))
        y, op, sigma = made.measure(batch), batch.op, batch.others["sigma"]
        scales.add(op.scale)
        assert op.kernel.shape == (64, 25, 25)
        assert 0.3 < (sigma == 0).float().mean() < 0.7 and sigma.max() <= 25 / 255
        error = (y - op(x)).flatten(1)
        assert error[sigma == 0].abs().max() <= 0.5 / 255 + 1e-6
        levels = 255 * y[sigma == 0]
        assert (levels - levels.round()).abs().max() < 1e-3
        ratio = error[sigma > 0.02].std(1) / sigma[sigma > 0.02]
        assert 0.8 < ratio.median() < 1.2
    assert scales == {2, 3, 4}


@pytest.mark.parametrize("stages", [1, 2])
def test_the_loss_is_of_what_the_network_restores_knowing_the_noise(photographs, stages):
    made = recipe(photographs, data_step="prox", noise_map="measurement", noiseless=0.0, batch=2, channels=[4, 8])
    base = made.base()
    net = base if stages == 1 else lf.LoRun(base.op, base.denoiser.base, stages, data_step="prox")
    batch = made.draw(net, 1)
    y, sigma = made.measure(batch), batch.others["sigma"]
    with torch.no_grad():
        x = batch.op.initial(y)
        for stage in [0] * (batch.passes + 1) if stages == 1 else range(stages):
            x = net.stage_step(stage, x, y, batch.op, sigma)
        want = (x - batch.x).square().mean((1, 2, 3)).sqrt().mean()
        torch.testing.assert_close(made.loss(net, batch), want)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_measurements_is_without_noise(photographs, share):
    made = recipe(photographs, noiseless=share)
    sigma = made.disturbed(made.sampler(0), np.random.default_rng(0)).others["sigma"]
    assert abs((sigma == 0).float().mean() - share) < 0.15


def test_gray_images_count_as_colour_ones_with_equal_channels(tmp_path):
    for i in range(12):
        gray = np.random.default_rng(i).integers(0, 256, (150, 150), dtype=np.uint8)
        Image.fromarray(gray).save(tmp_path / f"{i:02}.png")
    x = recipe(tmp_path, batch=2).sampler(0)
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2]) and x.std() > 0.1


def test_a_patch_keeps_its_colours():
    image = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    x = PatchSampler([image], 6, 1, 0)(0)
    pixels = {tuple(p) for p in (255 * x[0]).round().int().reshape(3, -1).T.tolist()}
    assert pixels == {tuple(p) for p in image.reshape(-1, 3).tolist()}


@pytest.mark.parametrize("size", [25, 12])
def test_a_gaussian_has_its_widths_axes_and_centre(size):
    kernel = kernels.gaussian(2.0, 2 * size + 1, ratio=0.5, angle=0.3).astype(np.float64)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    rows, columns = np.mgrid[: 2 * size + 1, : 2 * size + 1] - size
    moments = np.array([[(kernel * a * b).sum() for b in (columns, rows)] for a in (columns, rows)])
    values, vectors = np.linalg.eigh(moments)
    np.testing.assert_allclose(np.sqrt(values), [1.0, 2.0], rtol=0.02)
    assert abs(vectors[:, 1] @ [np.cos(0.3), np.sin(0.3)]) == pytest.approx(1, abs=1e-3)
    peak = np.unravel_index(kernels.gaussian(1.0, size).argmax(), (size, size))
    assert peak == (size // 2, size // 2)


def test_random_kernels_sum_to_one_stay_inside_and_differ():
    rng = np.random.default_rng(0)
    drawn = np.stack([kernels.draw(rng, 25) for _ in range(200)]).astype(np.float64)
    assert drawn.min() >= 0
    np.testing.assert_allclose(drawn.sum((1, 2)), 1, atol=1e-5)
    border = drawn.sum((1, 2)) - drawn[:, 1:-1, 1:-1].sum((1, 2))
    assert border.max() < 0.2 and np.median(border) < 0.005
    axis = np.arange(25) - 12
    centre = np.stack([(drawn.sum(2) * axis).sum(1), (drawn.sum(1) * axis).sum(1)])
    assert np.abs(centre).max() < 1.0
    spread = np.sqrt((drawn * (axis[:, None] ** 2 + axis**2)).sum((1, 2)))
    assert spread.min() < 1.2 and spread.max() > 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--patch", "20"), "--patch: expected a multiple of 12"),
        (("--noiseless", "1.5"), "--noiseless: expected a number from 0 to 1"),
        (("--scales", "0"), "expected a whole number of at least 1"),
    ],
)
def test_wrong_settings_are_refused(photographs, tmp_path, capsys, more, message):
    assert main(arguments(photographs, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_phase_two_goes_on_from_a_trained_network(photographs, trained, tmp_path):
    source = trained / "model.safetensors"
    assert main(arguments(photographs, tmp_path / "more", "--init", str(source))) == 0
    before, after = load_file(source), load_file(tmp_path / "more" / "model.safetensors")
    changed = {name for name, t in before.items() if not torch.equal(after[name], t)}
    assert changed == {name for name in before if name.endswith((".up", ".down"))} | {"step_size"}


def test_held_out_images_may_be_smaller_than_the_usual_crop(tmp_path):
    for i in range(2):
        Image.new("RGB", (40, 31)).save(tmp_path / f"{i}.png")
    assert [image.shape for image in recipe(tmp_path, scales=[2, 3]).validation] == [(30, 30, 3)]
