"""One step of training: what a batch is, the optimizer's rates, and on a GPU the same step recorded."""

from __future__ import annotations

import copy
import csv
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from cassi_help import BANDS
from PIL import Image

import lorun_fast as lf
from lorun_fast.apps import tasks
from lorun_fast.apps.batches import Batch
from lorun_fast.apps.cli import build_parser, main
from lorun_fast.apps.tasks.cs.training import Recipe
from lorun_fast.apps.training_step import RecordedStep, Step
from lorun_fast.network import LoRun

# Everything that a task can draw: passes of the block's own, noise beside x, an operator of the batch's own.
OPTIONS = {
    "cs": ["--block-size", "8", "--patch", "16", "--channels", "8", "16"],
    "sr": ["--patch", "24", "--kernel-size", "5", "--channels", "8", "16"],
    "sr gradient": ["--patch", "24", "--kernel-size", "5", "--channels", "8", "16", "--data-step", "gradient"],
    "cassi": [
        "--bands",
        str(BANDS),
        "--patch",
        "16",
        "--channels",
        "8",
        "16",
        "--blocks",
        "0",
        "1",
        "--data-step",
        "prox",
    ],
    "cassi noise": [
        "--bands",
        str(BANDS),
        "--patch",
        "16",
        "--base",
        "resunet",
        "--channels",
        "8",
        "16",
        "--sensor-noise",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for task in ("images", "cubes"):
        (folder / task).mkdir()
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        coarse.resize((160, 160), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")
        np.save(folder / "cubes" / f"{i}.npy", np.kron(rng.random((BANDS, 8, 8)), np.ones((4, 4))).astype(np.float32))
    return folder


def arguments(data, which, *more):
    task, *_ = which.split()
    folder = data / ("cubes" if task == "cassi" else "images")
    common = ["--data", str(folder), "-o", "unused", "--batch", "2", "--pretrain-unroll", "1", "--threads", "1"]
    return ["train", task, *common, *OPTIONS[which], *more]


def recipe_of(data, which, *more):
    args = build_parser("train").parse_args(arguments(data, which, *more))
    return tasks.recipe(args.task).Recipe(args)


def step_of(net, recipe, device="cpu", dtype=torch.float32, rate=1e-3) -> Step:
    groups = [([p for p in net.parameters() if p.requires_grad], rate)]
    return Step(net, recipe, groups, 0.1, dtype, torch.device(device))


def staged(recipe) -> LoRun:
    base = recipe.base()
    return LoRun(base.op, base.denoiser.base, 3, data_step=base.data_step, noise_map=base.noise_map)


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("phase", ["base", "stages"])
def test_a_batch_takes_the_values_of_another_of_its_kind(data, which, phase):
    recipe = recipe_of(data, which)
    net = recipe.base() if phase == "base" else staged(recipe)
    first = {}
    with torch.no_grad():
        for step in range(24):
            batch = recipe.draw(net, step)
            held = first.setdefault(batch.kind(), batch)
            loss = recipe.loss(net, batch)
            held.copy_(batch)
            assert torch.equal(recipe.loss(net, held), loss)
    scales = 3 if which.startswith("sr") else 1
    gaussian = which == "sr" and phase == "base"  # noise alone: no scale, no passes
    assert len(first) == (1 if gaussian else scales * (2 if phase == "base" else 1))


@pytest.mark.parametrize("which", [which for which in OPTIONS if which != "sr"])  # whose block learns noise alone
def test_a_block_learns_from_what_its_own_passes_leave(data, which):
    recipe = recipe_of(data, which)
    net = recipe.base()
    batch = recipe.draw(net, 0)
    with torch.no_grad():
        losses = {recipe.loss(net, dataclasses.replace(batch, passes=passes)).item() for passes in range(3)}
    assert len(losses) == 3


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("which", [which for which in OPTIONS if which != "sr"])  # which is scored on Gaussian noise
def test_a_block_is_scored_after_as_many_passes_as_it_learns_from(data, which, passes):
    recipe = recipe_of(data, which, "--pretrain-unroll", str(passes))
    net, seen = recipe.base(), []

    def stage_step(k, x, y, op=None, sigma=None):
        seen.append((id(op or net.op), id(sigma)))
        return LoRun.stage_step(net, k, x, y, op, sigma)

    net.stage_step = stage_step
    recipe.score(net, torch.device("cpu"))
    assert len(seen) == (1 + passes) * len(recipe.validation)
    for i in range(0, len(seen), 1 + passes):  # of one image
        assert len(set(seen[i : i + 1 + passes])) == 1


def test_what_a_batch_is_of_is_its_kind():
    x = torch.zeros(2, 3, 4, 4)
    kinds = [
        batch.kind()
        for batch in (
            Batch(x),
            Batch(x[:1]),
            Batch(x, passes=1),
            Batch(x, {"y": x}),
            Batch(x, {"z": x}),
            Batch(x.half()),
            Batch(x, op=lf.BlurDownsample(x[0, 0], 2)),
            Batch(x, op=lf.BlurDownsample(x[0, 0], 4)),
            Batch(x, op=lf.CASSI(x[0, 0], 3)),
        )
    ]
    assert len(set(kinds)) == len(kinds) and Batch(x + 1).kind() == kinds[0]


def test_a_batch_stays_where_it_is():
    """A step moves it, its operator too, and may be asked for it again."""
    x = torch.zeros(1, 3, 4, 4)
    batch = Batch(x, {"y": x}, lf.CASSI(x[0, 0], 3), 2)
    moved = batch.to(torch.device("meta"))
    assert [t.device.type for t in moved.tensors()] == 3 * ["meta"]
    assert [t.device.type for t in batch.tensors()] == 3 * ["cpu"]
    assert moved.kind() == batch.kind() and moved.op.config() == batch.op.config()


def test_rates_follow_the_step_whatever_was_saved(data):
    recipe = recipe_of(data, "cs")
    step = step_of(staged(recipe), recipe, rate=0.5)
    step.set_rates(0.1)
    step(recipe.draw(step.net, 0))
    saved = step.optimizer.state_dict()
    saved["param_groups"][0] |= {"lr": 7.0, "weight_decay": 1.0}
    other = step_of(step.net, recipe, rate=0.5)
    other.load_state_dict(saved)
    (group,) = other.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0)
    assert all(state["step"] == 1 for state in other.optimizer.state.values())
    assert len(other.optimizer.state) == len(other.parameters)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_computes_in_the_dtype_that_is_asked_for(data, tmp_path, dtype, monkeypatch):
    """Its losses and its validations."""
    seen = {"loss": set(), "score": set()}

    def noting(name):
        own = getattr(Recipe, name)

        def noted(*args):
            seen[name].add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return own(*args)

        return noted

    for name in seen:
        monkeypatch.setattr(Recipe, name, noting(name))
    line = arguments(data, "cs", "--stages", "2", "--base-steps", "1", "--steps", "1", "--device", "cpu")
    assert main([*line, "--dtype", dtype, "-o", str(tmp_path / "run")]) == 0
    expected = torch.bfloat16 if dtype == "bf16" else False
    assert seen == {"loss": {expected}, "score": {expected}}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["base", "stages"])
@pytest.mark.parametrize("which", OPTIONS)
def test_a_recorded_step_is_the_step(data, which, phase, dtype):
    recipe = recipe_of(data, which)
    net = (recipe.base() if phase == "base" else staged(recipe)).cuda().train()
    plain = step_of(copy.deepcopy(net), recipe, "cuda", dtype)
    recorded = RecordedStep(step_of(net, recipe, "cuda", dtype))
    start = [p.detach().clone() for p in recorded.step.parameters]
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-4}
    for index in range(32):
        for step in (plain, recorded.step):
            step.set_rates(1 / (index + 1))
        want = plain(recipe.draw(plain.net, index))
        got = recorded(recipe.draw(net, index).pinned())
        torch.testing.assert_close(got, want, **tolerance)
    assert recorded.recorded
    moved = [(p - before).abs().max() for p, before in zip(recorded.step.parameters, start, strict=True)]
    learn = [p.grad is not None for p in plain.parameters]  # noise alone teaches no step size
    assert all((m > 0) == learns for m, learns in zip(moved, learn, strict=True))
    for p, q, m in zip(recorded.step.parameters, plain.parameters, moved, strict=True):
        assert (p - q).abs().max() <= (0.05 if dtype == torch.float32 else 0.5) * m + 1e-6


def test_a_recording_is_of_its_thread_alone(data, monkeypatch):
    """Threads that draw batches pin memory meanwhile; recorded as torch does by default, that ends the run."""
    modes = []

    @contextmanager
    def graph(*_, capture_error_mode="global"):
        modes.append(capture_error_mode)
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    for name in ("Stream", "CUDAGraph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    recipe = recipe_of(data, "cs")
    recorded = RecordedStep(step_of(staged(recipe), recipe))
    recorded._record(recipe.draw(recorded.step.net, 0))
    assert modes == ["thread_local"]


@pytest.mark.gpu
def test_memory_is_pinned_while_a_step_is_recorded(data, monkeypatch):
    recipe = recipe_of(data, "cs")
    recorded = RecordedStep(step_of(staged(recipe).cuda().train(), recipe, "cuda"))
    loss = recipe.loss

    def meanwhile(net, batch):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.empty(2**20 * len(pinned) + 1).pin_memory).result()
        pinned.append(torch.cuda.is_current_stream_capturing())
        return loss(net, batch)

    pinned = []
    monkeypatch.setattr(recipe, "loss", meanwhile)
    for index in range(4):
        recorded(recipe.draw(recorded.step.net, index).pinned())
    assert pinned == [False, False, True]


@pytest.mark.gpu
def test_a_recorded_step_leaves_an_overflow_out(data):
    recipe = recipe_of(data, "cs")
    net = staged(recipe).cuda().train()
    recorded = RecordedStep(step_of(net, recipe, "cuda"))
    for index in range(4):
        recorded(recipe.draw(net, index).pinned())
    before = [p.detach().clone() for p in recorded.step.parameters]
    bad = recipe.draw(net, 4)
    bad.x[0, 0, 0, 0] = float("inf")
    loss, norm = recorded(bad.pinned())
    assert not loss.isfinite() and not norm.isfinite()
    assert all(torch.equal(p, q) for p, q in zip(recorded.step.parameters, before, strict=True))
    assert all(state["step"] == 4 for state in recorded.step.optimizer.state.values())
    loss, _ = recorded(recipe.draw(net, 5).pinned())
    assert loss.isfinite() and not torch.equal(recorded.step.parameters[0], before[0])


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--no-cuda-graph"], ["--checkpoint"]], ids=["recorded", "plain", "recomputed"])
def test_a_run_on_a_gpu_stops_and_goes_on(data, tmp_path, more):
    line = arguments(data, "cs", "--device", "cuda", "--stages", "2", "--base-steps", "8", "--steps", "8", *more)
    line += ["--warm-up", "2", "--validate-every", "4"]

    def log(folder):
        with (folder / "log.csv").open() as f:
            return [[float(row[k]) for k in ("step", "loss", "validation_psnr_db")] for row in csv.DictReader(f)]

    def run(folder, *extra):
        assert main([*line, "-o", str(folder), *extra]) == 0

    run(tmp_path / "whole")
    run(tmp_path / "parts", "--stop-after", "6")
    run(tmp_path / "parts", "--resume", "--stop-after", "7")
    assert main(["train", "resume", str(tmp_path / "parts")]) == 0
    np.testing.assert_allclose(log(tmp_path / "parts"), log(tmp_path / "whole"), rtol=1e-2)
    assert (tmp_path / "parts" / "model.safetensors").exists()
