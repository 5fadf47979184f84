"""Training for spectral imaging: the recipe's batches and losses, runs that resume, every base, and refusals."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from apps_help import accepted, refused
from cassi_help import BANDS, STEP, mask
from safetensors.torch import load_file
from scipy.io import savemat

import lorun_fast as lf
from lorun_fast.apps.cli import build_parser
from lorun_fast.apps.tasks.cassi.training import Recipe

HEIGHT, WIDTH = 20, 24


def smooth(seed: int) -> np.ndarray:
    """(BANDS, HEIGHT, WIDTH) in [0, 1], with few spatial and spectral changes."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((3, HEIGHT // 4, WIDTH // 4))
    bands = np.tensordot(rng.random((BANDS, 3)) / 3, coarse, 1)
    return np.kron(bands, np.ones((4, 4))).astype(np.float32)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for i in range(3):
        savemat(folder / f"scene{i}.mat", {"img": np.moveaxis(smooth(i), 0, -1)})
    np.save(folder.parent / "mask.npy", mask(16, 18))
    return folder


def arguments(scenes, output, *more) -> list[str]:
    return [
        "train", "cassi", "--data", str(scenes), "-o", str(output), "--mask", str(scenes.parent / "mask.npy"),
        "--bands", str(BANDS), "--patch", "8", "12", "--batch", "2", "--base", "resunet", "--channels", "4", "8",
        "--stages", "2", "--base-steps", "3", "--steps", "3", "--warm-up", "1", "--validate-every", "2",
        "--checkpoint-every", "1", "--threads", "1", *map(str, more),
    ]  # fmt: skip


def recipe(scenes, *more) -> Recipe:
    line = arguments(scenes, "unused", *more)
    return Recipe(build_parser("train").parse_args(line))


def test_a_sensor_counts_levels_of_the_brightest_measurement(scenes):
    made = recipe(scenes, "--sensor-noise")
    x, op = torch.from_numpy(made.sampler(0)), made._operator(*made.size)
    y = made._measure(op, x, 0)
    levels = 2048 * y / (BANDS / STEP)
    assert (levels - levels.round()).abs().max() < 1e-2 and (levels.round() % 2 == 1).any()
    assert 0 < (y - op(x)).abs().mean() < 0.05 and abs((y - op(x)).mean()) < 0.01


def test_batches_depend_on_seed_and_step_alone(scenes):
    one, two = recipe(scenes), recipe(scenes)
    net = one.base()
    losses = [one.loss(net, one.draw(net, step)).item() for step in range(6)]
    assert losses[4] == two.loss(net, two.draw(net, 4)).item()
    assert len(set(losses)) == 6
    three = recipe(scenes, "--seed", 1)
    assert three.loss(net, three.draw(net, 4)).item() != losses[4]


def test_masks_are_windows_of_the_file_or_random(scenes):
    full = mask(16, 18)
    windows = {
        full[i : i + 8, j : j + 12][::a, ::b].tobytes()
        for i in range(9)
        for j in range(7)
        for a in (1, -1)
        for b in (1, -1)
    }
    drawn = []
    for share in (0, 0.5, 1):
        own = recipe(scenes, "--random-masks", share)
        ops = [own._operator(8, 12, np.random.default_rng(i)) for i in range(40)]
        assert all((op.bands, op.step) == (BANDS, STEP) for op in ops)
        drawn.append(sum(op.mask.numpy().tobytes() in windows for op in ops))
    assert drawn[0] == 40 and 10 <= drawn[1] <= 30 and drawn[2] == 0
    saved = recipe(scenes).base().op.mask
    assert saved.shape == (256, 256) and saved.unique().tolist() == [0, 1] and 0.49 < saved.mean() < 0.51


@pytest.mark.parametrize("planes", [(), (BANDS,)], ids=["a mask", "a mask per band"])
def test_each_crop_has_a_mask_of_its_own(scenes, tmp_path, planes):
    path = tmp_path / "own.npy"
    np.save(path, np.random.default_rng(0).random((*planes, 16, 18), dtype=np.float32))
    own = recipe(scenes, "--mask", path, "--batch", 6)
    batches = [own.draw(own.base(), step) for step in range(3)]
    assert len({batch.kind()[0] for batch in batches}) == 1
    random = []
    for batch in batches:
        masks = batch.op.mask
        assert masks.shape == (6, *(planes or (1,)), 8, 12)
        random += [mask.unique().tolist() == [0, 1] for mask in masks]
        alone = [
            lf.CASSI(mask if planes else mask[0], BANDS, STEP)(x[None]) for mask, x in zip(masks, batch.x, strict=True)
        ]
        torch.testing.assert_close(batch.others["y"], torch.cat(alone))
    assert 0 < sum(random) < 18


def test_loss_and_score(scenes):
    """Of a denoiser that returns what it gets, against the operator called here."""
    own = recipe(scenes, "--pretrain-unroll", 0, "--batch", 1, "--base", "cnn", "--channels", 4)
    net = own.base()
    with torch.no_grad():
        net.denoiser.base.tail.weight.zero_()
    x = torch.from_numpy(own.sampler(5))
    rng = np.random.default_rng((0, 5, 1))
    op = own._operator(8, 12, rng)
    y = op(x)
    want = (op.gradient_step(op.initial(y), y, net.step_size[0]) - x).square().mean().sqrt()
    torch.testing.assert_close(own.loss(net, own.draw(net, 5)), want, rtol=1e-4, atol=0)
    x = own.validation[0]
    assert x.shape == (1, BANDS, 16, 18)
    op = lf.CASSI(torch.from_numpy(mask(16, 18)), BANDS, STEP)
    y = op(x)
    error = (op.gradient_step(op.initial(y), y, net.step_size[0]).clamp(0, 1) - x).square().mean((2, 3))
    torch.testing.assert_close(
        torch.tensor(own.score(net, torch.device("cpu"))), (-10 * torch.log10(error)).mean().detach()
    )


def test_noise_reaches_the_measurements(scenes):
    x = torch.from_numpy(np.stack([smooth(0)]))
    for noise in (["--sensor-noise"], ["--noise", 0.1]):
        own = recipe(scenes, *noise)
        op = lf.CASSI(torch.ones(HEIGHT, WIDTH), BANDS, STEP)
        y = own._measure(op, x, 3)
        assert torch.equal(own._measure(op, x, 3), y) and not torch.equal(own._measure(op, x, 4), y)
        assert 0.005 < (y - op(x)).std() < 0.2


@pytest.mark.parametrize("data_step", ["gradient", "prox"])
def test_start_of_a_network(scenes, data_step):
    net = recipe(scenes, "--data-step", data_step).base()
    x = torch.rand(1, BANDS, 256, 256)
    y = net.op(x)
    before, after = (
        (net.op(v) - y).norm() for v in (net.op.initial(y), net.data_update(0, net.op.initial(y), y).detach())
    )
    assert after < before


def test_a_run_that_stops_and_resumes_gives_the_same_network(scenes, tmp_path, capsys):
    accepted(capsys, *arguments(scenes, tmp_path / "whole"))
    accepted(capsys, *arguments(scenes, tmp_path / "parts", "--stop-after", 2))
    accepted(capsys, *arguments(scenes, tmp_path / "parts", "--resume"))
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    with (tmp_path / "whole" / "log.csv").open() as f:
        assert [row["phase"] for row in csv.DictReader(f)] == ["base", "base", "stages", "stages"]
    # Tied first, then frozen with adapters; and on from a finished network.
    accepted(capsys, *arguments(scenes, tmp_path / "tied", "--sharing", "tied", "--init", tmp_path / "whole"))
    accepted(capsys, *arguments(scenes, tmp_path / "lora", "--init", tmp_path / "tied" / "model.safetensors"))
    tied, lora = lf.load(tmp_path / "tied" / "model.safetensors"), lf.load(tmp_path / "lora" / "model.safetensors")
    assert (tied.sharing, lora.sharing) == ("tied", "lora")
    assert torch.equal(tied.denoiser.base.head.weight, lora.denoiser.base.head.weight)
    accepted(capsys, *arguments(scenes, tmp_path / "on", "--init", tmp_path / "lora" / "model.safetensors"))
    assert lf.load(tmp_path / "on" / "model.safetensors").sharing == "lora"


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        (["--base", "transformer", "--channels", 4, 8, "--blocks", 1, 1], lf.SpectralTransformer),
        (["--base", "cnn", "--channels", 4, "--blocks", 1, "--data-step", "prox"], lf.ResCNN),
    ],
)
def test_every_base_trains(more, kind, scenes, tmp_path, capsys):
    accepted(capsys, *arguments(scenes, tmp_path / "run", "--base-steps", 1, "--steps", 1, *more))
    net = lf.load(tmp_path / "run" / "model.safetensors")
    assert type(net.denoiser.base) is kind and net.denoiser.base.in_channels == BANDS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--patch", 17], "--patch: expected at most the mask's (16, 18), got (17, 17)"),
        (["--patch", 1, 2, 3], "--patch: expected a side, or height and width, got 3 numbers"),
        (["--bands", 5], "expected 5 bands as (L, H, W) or (H, W, L), got a cube of shape (20, 24, 4)"),
        (["--base", "transformer", "--blocks", 1], "--blocks: expected 2 numbers for --channels, got 1"),
        (["--blocks", 1, 1], "--blocks: expected one number for --base resunet, got 2"),
        (["--blocks", -1], "--blocks: expected a whole number of at least 0, got '-1'"),
        (["--base", "cnn"], "--channels: expected one number for --base cnn, got 2"),
        (["--mask", "absent.npy"], "expected a mask (.mat, .npy or .npz), got absent.npy: no such file"),
        (["--step", "x"], "--step: expected a whole number of at least 0, got 'x'"),
    ],
)
def test_refused(more, message, scenes, tmp_path, capsys):
    assert message in refused(capsys, *arguments(scenes, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "side"),
    [
        (("--patch", HEIGHT, WIDTH), WIDTH),  # a crop of the whole scene fits it as it lies, but not turned
        (("--patch", 2 * WIDTH), 2 * WIDTH),
        (("--patch", 2 * WIDTH, "--mosaic", 1), WIDTH),
    ],
)
def test_scenes_too_small_for_crops_are_refused_at_once(more, side, scenes, tmp_path, capsys):
    np.save(tmp_path / "mask.npy", mask(2 * WIDTH, 2 * WIDTH))
    line = refused(capsys, *arguments(scenes, tmp_path / "run", "--mask", tmp_path / "mask.npy", *more))
    assert f"--data: expected scenes of at least {side} x {side} pixels, got {HEIGHT} x {WIDTH}" in line
    assert not (tmp_path / "run").exists()


def test_one_scene_is_too_few(scenes, tmp_path, capsys):
    line = refused(capsys, *arguments(scenes / "scene0.mat", tmp_path / "run", "--mask", scenes.parent / "mask.npy"))
    assert "--data: expected at least two scenes, got 1" in line
