"""Training: exact resume after a kill at any moment, two phases, refusals."""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from apps_help import small_files
from PIL import Image
from safetensors.torch import load_file

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.apps import models, train, unrolling
from lorun_fast.apps.cli import build_parser, main
from lorun_fast.apps.runtime import fastest_dtype
from lorun_fast.apps.sampling import PatchSampler, find_images, held_out
from lorun_fast.apps.tasks.cs.training import Recipe
from lorun_fast.apps.training_step import Step
from lorun_fast.io import read_config


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("camera", "coins", "moon", "page"):
        Image.fromarray(getattr(data, name)()[:128, :128]).save(folder / f"{name}.png")
    return folder


def arguments(photographs, output, *more) -> list[str]:
    return [
        "train", "cs", "--data", str(photographs), "-o", str(output), "--block-size", "8", "--patch", "16",
        "--batch", "2",
        "--channels", "4", "8", "--stages", "2", "--base-steps", "6", "--steps", "6", "--warm-up", "2",
        "--validate-every", "4", "--checkpoint-every", "1", "--threads", "1", *more,
    ]  # fmt: skip


def log_without_time(folder):
    with (folder / "log.csv").open() as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def assert_same_run(a, b):
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert log_without_time(a) == log_without_time(b)


@pytest.fixture(scope="module")
def uninterrupted(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(photographs, folder)) == 0
    return folder


def test_a_run_leaves_its_record(uninterrupted):
    rows = log_without_time(uninterrupted)
    assert [(r["phase"], r["step"]) for r in rows] == [("base", "4"), ("base", "6"), ("stages", "4"), ("stages", "6")]
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["peak_memory_gib"] > 0
    assert set(summary["seconds"]) == {"base", "stages"}
    assert Image.open(uninterrupted / "curve.png").size[0] > 100
    net = lf.load(uninterrupted / "model.safetensors")
    assert (net.stages, net.sharing) == (2, "lora")


def test_the_weights_do_not_tell_where_they_were_trained(uninterrupted, photographs):
    notes = read_config(uninterrupted / "model.safetensors")["notes"]["training"]
    assert notes["settings"]["data"] == [photographs.name] and notes["settings"]["block_size"] == 8
    assert str(photographs.parent) not in json.dumps(notes)


def test_the_phases_draw_different_batches(photographs, tmp_path, monkeypatch):
    draw, seen = Recipe.draw, {1: set(), 2: set()}
    monkeypatch.setattr(Recipe, "draw", lambda own, net, step: seen[net.stages].add(step) or draw(own, net, step))
    assert main(arguments(photographs, tmp_path / "run")) == 0
    assert len(seen[1]) == len(seen[2]) == 6 and not seen[1] & seen[2]


def test_a_finished_run_is_named_by_its_folder(uninterrupted, photographs, tmp_path, capsys):
    scores = {}
    for name in (uninterrupted, uninterrupted / "model.safetensors"):
        assert main(["evaluate", str(name), str(photographs), "--json", str(tmp_path / "scores.json")]) == 0
        report = json.loads((tmp_path / "scores.json").read_text())
        scores[name] = report["model_sha256"], report["mean"]["psnr"]
    assert len(set(scores.values())) == 1
    (tmp_path / "unfinished").mkdir()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "unfinished"), str(photographs)]) == 2
    assert "or the folder of a finished run, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "loops", "amx", "asked", "used"),
    [
        ("fp32", "avx2", False, "auto", "winograd"),
        ("fp32", "avx512", True, "auto", "winograd"),
        ("fp32", "baseline", False, "auto", "auto"),
        ("fp32", "avx2", False, "aten", "aten"),
        ("bf16", "avx2", False, "auto", "winograd"),
        ("bf16", "avx512", True, "auto", "auto"),
    ],
)
def test_a_cpu_trains_by_minimal_filtering(photographs, tmp_path, monkeypatch, dtype, loops, amx, asked, used):
    monkeypatch.setattr(_native, "WISH", asked)
    info = _native.build_info() | {"cpu_active": loops, "amx": amx}
    monkeypatch.setattr(_native, "build_info", lambda: info)
    loss, seen = Recipe.loss, []
    monkeypatch.setattr(Recipe, "loss", lambda *call: seen.append(_native.WISH) or loss(*call))
    assert main(arguments(photographs, tmp_path / "run", "--dtype", dtype, "--stop-after", "7")) == 0
    assert seen == [used] * 7
    assert asked == _native.WISH


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [(("amx_bf16", "avx512_bf16"), "bf16"), (("avx512_bf16",), "bf16"), ((), "fp32")],
)
def test_the_default_dtype_is_the_fastest(photographs, tmp_path, monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
    assert main(arguments(photographs, tmp_path / "run", "--device", "cpu", "--stop-after", "1")) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == dtype
    assert fastest_dtype(torch.device("cuda")) == "bf16"


def test_phase_two_trains_adapters_and_steps_on_a_frozen_base(uninterrupted):
    base, model = load_file(uninterrupted / "base.safetensors"), load_file(uninterrupted / "model.safetensors")
    for name, tensor in base.items():
        if name.startswith("denoiser.base."):
            assert torch.equal(model[name], tensor), name
    assert not torch.equal(model["step_size"], base["step_size"].expand(2))
    assert all(t.abs().max() > 0 for name, t in model.items() if name.endswith(".up"))


def test_the_base_is_trained_with_its_adapters_where_asked(photographs, uninterrupted, tmp_path):
    more = ("--init", str(uninterrupted), "--train-base")
    assert main(arguments(photographs, tmp_path / "run", *more)) == 0
    base, model = load_file(uninterrupted / "base.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    weights = [name for name in base if name.startswith("denoiser.base.")]
    assert weights and not any(torch.equal(model[name], base[name]) for name in weights)
    assert all(t.abs().max() > 0 for name, t in model.items() if name.endswith(".up"))
    net = lf.load(tmp_path / "run" / "model.safetensors")
    assert not any(p.requires_grad for p in net.denoiser.base_parameters())


@pytest.mark.parametrize("stop", [3, 9])
def test_stopping_and_resuming_changes_nothing(photographs, uninterrupted, tmp_path, stop):
    assert main(arguments(photographs, tmp_path / "run", "--stop-after", str(stop))) == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with (tmp_path / "run" / "log.csv").open("a") as f:  # as a run does that is killed before its next checkpoint
        f.write(f"{'base' if stop == 3 else 'stages'},4,1,1,1,1,1\n")
    assert main(arguments(photographs, tmp_path / "run", "--resume", "--no-cuda-graph")) == 0  # which is free to change
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_run_goes_on_by_its_own_settings(photographs, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    assert main(arguments(photographs, folder, "--stop-after", "8", "--checkpoint-every", "3")) == 0
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    del settings["phi_start"]  # an option that is younger than the run
    config.write_text(json.dumps(settings))
    assert main(["train", "resume", str(folder), "--threads", "1", "--stop-after", "2"]) == 0
    assert not (folder / "model.safetensors").exists()
    assert main(["train", "resume", str(folder), "--threads", "1"]) == 0
    assert_same_run(folder, uninterrupted)


def test_a_run_goes_on_from_another_folder(photographs, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(photographs.parent)
    warm = ("--warm-start", os.path.relpath(uninterrupted))
    assert main(arguments(photographs.name, tmp_path / "run", *warm, "--stop-after", "1")) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["data"] == [str(photographs.resolve())]
    assert settings["warm_start"] == str(uninterrupted.resolve())
    monkeypatch.chdir(tmp_path)
    assert main(["train", "resume", "run", "--threads", "1", "--stop-after", "1"]) == 0
    (tmp_path / "cs-25").mkdir()  # does not stand for the shipped network, but for data
    settings = {"warm_start": "cs-25", "init": None, "data": ["cs-25"]}
    assert train._absolute(settings) == settings | {"data": [str((tmp_path / "cs-25").resolve())]}


@pytest.mark.parametrize("change", ["another file", "another size", "no fingerprint"])
def test_a_run_goes_on_with_its_own_data(photographs, tmp_path, capsys, change, monkeypatch):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photographs, data)
    monkeypatch.chdir(tmp_path)
    assert main(arguments(data, run, "--stop-after", "1")) == 0
    shutil.copyfile(data / "moon.png", data / ("page.png" if change == "another size" else "z.png"))
    if change == "no fingerprint":  # and relative paths, as runs had that are older than both
        settings = json.loads((run / "config.json").read_text())
        del settings["data_files"]
        (run / "config.json").write_text(json.dumps(settings | {"data": ["data"]}))
    for line in (["train", "resume", str(run), "--stop-after", "1"], arguments("data", run, "--resume")):
        assert main(line) == (0 if change == "no fingerprint" else 2)
        if change != "no fingerprint":
            message = f"expected the training data of the run, but names or sizes changed in {data}"
            assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a run to resume, found no config.json"),
        ("{", "expected a file of the run, got a damaged"),
        ('{"task": "ct"}', "expected one of the tasks cs, sr, cassi, got 'ct'"),
        ("{}", "expected one of the tasks cs, sr, cassi, got None"),
        ('{"task": "cs", "zeal": 3}', "expected the options of this version, got zeal too"),
    ],
)
def test_what_is_no_run_to_go_on_with(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["train", "resume", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_another_process_trains(photographs, uninterrupted, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(arguments(photographs, folder, "--stop-after", "2")) == 0
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    capsys.readouterr()
    assert main(["train", "resume", str(folder), "--threads", "1"]) == 2
    assert "run: expected a run that no other process trains, got one in use" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    os.close(other)
    assert main(["train", "resume", str(folder), "--threads", "1"]) == 0
    assert_same_run(folder, uninterrupted)


def test_kill_9_and_resume_changes_nothing(photographs, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "lorun_fast.apps", *arguments(photographs, folder)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        state = folder / "checkpoint.pt"
        if state.exists() and torch.load(state, weights_only=True)["phase"] == "stages":
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(arguments(photographs, folder, "--resume")) == 0
    assert_same_run(folder, uninterrupted)


def test_a_second_run_starts_from_the_base_of_the_first(photographs, uninterrupted, tmp_path):
    more = ("--sharing", "tied", "--init", str(uninterrupted))
    assert main(arguments(photographs, tmp_path / "tied", *more)) == 0
    net = lf.load(tmp_path / "tied" / "model.safetensors")
    assert net.sharing == "tied"
    assert {row["phase"] for row in log_without_time(tmp_path / "tied")} == {"stages"}


def test_stages_start_from_a_saved_tied_network(photographs, uninterrupted, tmp_path):
    tied = tmp_path / "tied"
    assert main(arguments(photographs, tied, "--sharing", "tied", "--init", str(uninterrupted))) == 0
    more = ("--init", str(tied / "model.safetensors"), "--lr", "0", "--operator-lr", "0")
    assert main(arguments(photographs, tmp_path / "lora", *more)) == 0
    before, after = load_file(tied / "model.safetensors"), load_file(tmp_path / "lora" / "model.safetensors")
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_a_network_of_the_same_kind_goes_on(photographs, uninterrupted, tmp_path):
    source = uninterrupted / "model.safetensors"
    same = ("--init", str(source), "--lr", "0", "--operator-lr", "0")
    assert main(arguments(photographs, tmp_path / "same", *same)) == 0
    before, after = load_file(source), load_file(tmp_path / "same" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())
    assert main(arguments(photographs, tmp_path / "more", "--init", str(source))) == 0
    after = load_file(tmp_path / "more" / "model.safetensors")
    changed = {name for name, t in before.items() if not torch.equal(after[name], t)}
    assert changed == {name for name in before if name.endswith((".up", ".down"))} | {"step_size", "op.phi"}


def test_the_file_to_start_from_is_read_once(photographs, uninterrupted, tmp_path, monkeypatch):
    """A second time it may be gone, or another."""
    read, paths = models.read_network, []
    monkeypatch.setattr(models, "read_network", lambda path: paths.append(path) or read(path))
    for name in ("base", "model"):
        file = tmp_path / f"{name}.safetensors"
        shutil.copy(uninterrupted / file.name, file)
        assert main(arguments(photographs, tmp_path / name, "--init", str(file), "--stop-after", "1")) == 0
        assert paths.count(file) == 1


def test_a_warm_start_takes_the_base_and_leaves_the_rest(photographs, uninterrupted, tmp_path):
    source = uninterrupted / "model.safetensors"
    more = ("--warm-start", str(source), "--lr", "0", "--operator-lr", "0", "--ratio", "10")
    assert main(arguments(photographs, tmp_path / "warm", *more)) == 0
    before, after = load_file(source), load_file(tmp_path / "warm" / "base.safetensors")
    shared = [name for name in after if name.startswith("denoiser.base.")]
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)
    assert after["op.phi"].shape != before["op.phi"].shape


def test_a_pca_start_keeps_more_of_an_image_than_a_gaussian_one(photographs, tmp_path):
    errors = {}
    for start in ("pca", "gaussian"):
        more = ("--phi-start", start, "--lr", "0", "--operator-lr", "0")
        assert main(arguments(photographs, tmp_path / start, *more)) == 0
        op = lf.load(tmp_path / start / "base.safetensors").op
        gram = op.phi.detach().double() @ op.phi.detach().double().mT
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)
        pixels = np.asarray(Image.open(photographs / "camera.png"), dtype=np.float32) / 255
        x = torch.from_numpy(pixels)[None, None]
        errors[start] = (op.adjoint(op(x)) - x).square().mean().item()
    assert errors["pca"] < errors["gaussian"] / 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--output", "{run}"],
            "expected a new folder, got one that holds a run, to go on with: lorun-fast train resume",
        ),
        (
            ["--output", "{run}", "--resume", "--lr", "0.5"],
            "expected the settings of the run, but lr was 0.001 and is 0.5",
        ),
        (["--resume"], "expected a run to resume, found no config.json"),
        (["--data", "{empty}"], "expected a folder with images below it, got {empty}"),
        (["--patch", "12"], "--patch: expected a multiple of --block-size 8, got 12"),
        (["--patch", "512"], "expected at least two images of at least 512x512 pixels"),
        (["--init", "{empty}"], "--init: expected a run folder with base.safetensors or a saved network, got {empty}"),
        (
            ["--init", "{run}/model.safetensors", "--sharing", "tied"],
            "expected a tied network with the operator and denoiser",
        ),
        (["--init", "{run}/model.safetensors", "--stages", "3"], "got {run}/model.safetensors: 2 stages, lora"),
        (["--init", "{run}/model.safetensors", "--gamma", "60"], "differ (denoiser.base.encoder.0.0.conv1.down, "),
        (["--sharing", "tied", "--train-base"], "--train-base: expected --sharing lora, got tied"),
        (["--steps", "0"], "expected a whole number of at least 1, got '0'"),
        (["--gamma", "0"], "expected a number above 0 and up to 100, got '0'"),
        (["--gamma", "1000"], "expected a number above 0 and up to 100, got '1000'"),
        (["--pretrain-unroll", "-1"], "expected a whole number of at least 0, got '-1'"),
        (["--clip", "inf"], "expected a number from 0 to 1e+30, got 'inf'"),
        (["--threads", "1000000"], "expected a whole number from 1 to 1024, got '1000000'"),
        (["--init", "{text}"], "{text}: expected a complete safetensors file, got a damaged one"),
        (["--warm-start", "{text}"], "{text}: expected a complete safetensors file, got a damaged one"),
        (["--init", "cs-25"], "expected a tied network with the operator and denoiser that the options name, or"),
        (
            ["--warm-start", "sr", "--channels", "5", "7"],
            "--warm-start: expected a network with a base of the same kind",
        ),
        (["--ratio", "120"], "--ratio: expected a number above 0 and up to 100, got '120'"),
    ],
)
def test_refusals_are_one_line(photographs, uninterrupted, tmp_path, capsys, more, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no network")
    names = {n: str(tmp_path / f) for n, f in (("empty", "empty"), ("text", "text.safetensors"))}
    names["run"] = str(uninterrupted)
    before = {p.name: p.read_bytes() for p in uninterrupted.iterdir()}
    assert main(arguments(photographs, tmp_path / "new", *(m.format(**names) for m in more))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.format(**names) in error
    assert {p.name: p.read_bytes() for p in uninterrupted.iterdir()} == before
    assert not (tmp_path / "new").exists() or "--resume" in more  # the corrected command starts anew


def test_images_smaller_than_a_patch_are_left_out_with_a_note(photographs, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    Image.fromarray(np.zeros((15, 19), np.uint8)).save(folder / "a.png")  # would be the first, which draws the curve
    assert main(arguments(folder, tmp_path / "run", "--stop-after", "1")) == 0
    assert "note: --data: left out 1 images smaller than 16x16 pixels: a.png" in capsys.readouterr().err


def test_what_else_lies_below_training_data(photographs, uninterrupted, tmp_path):
    """Hidden files, folders with a picture's name, and the picture of a run."""
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    shutil.copytree(uninterrupted, folder / "run")
    (folder / "dir.png").mkdir()
    (folder / "dir.png" / "b.png").write_bytes((photographs / "moon.png").read_bytes())
    (folder / "._camera.png").write_text("of macOS")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "c.png").write_text("no image")
    found = [str(path.relative_to(folder)) for path in find_images([folder])]
    assert found == ["camera.png", "coins.png", "dir.png/b.png", "moon.png", "page.png"]


def test_a_folder_of_training_data_that_cannot_be_read(photographs, tmp_path, capsys, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", closed)
    assert main(arguments(photographs, tmp_path / "run")) == 2
    assert f"expected a readable folder, got {photographs}: permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_a_damaged_run_is_not_resumed(photographs, uninterrupted, tmp_path, capsys, name):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / name).write_text("{")
    assert main(arguments(photographs, run, "--resume")) == 2
    assert f"expected a file of the run, got a damaged {run / name}" in capsys.readouterr().err


def test_the_learning_rate_rises_in_a_line_and_falls_to_a_hundredth():
    factor = [train.learning_rate_factor(step, 110, 10) for step in range(111)]
    np.testing.assert_allclose(factor[:11], [*np.arange(1, 11) / 10, 1])
    np.testing.assert_allclose([factor[10], factor[60], factor[110]], [1, 0.505, 0.01])
    assert all(np.diff(factor[10:]) < 0)
    assert train.learning_rate_factor(0, 5, 0) == 1


def test_nothing_decays_and_an_operator_learns_at_a_rate_of_its_own(photographs):
    args = build_parser("train").parse_args(arguments(photographs, "unused", "--lr", "0.2", "--operator-lr", "0.1"))
    net = Recipe(args).base()
    step = Step(net, None, train._peaks(net, args), args.clip, torch.float32, torch.device("cpu"))
    denoiser, operator = step.optimizer.param_groups
    assert (denoiser["peak"], operator["peak"]) == (0.2, 0.1)
    assert denoiser["weight_decay"] == operator["weight_decay"] == 0
    assert operator["params"] == [net.op.phi] and len(denoiser["params"]) == len(list(net.parameters())) - 1


def test_every_step_has_its_own_learning_rate(photographs, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: seen.append([g["lr"] for g in self.param_groups]) or step(self)
    )
    assert main(arguments(photographs, tmp_path / "run", "--lr", "0.002", "--operator-lr", "0.001")) == 0
    factors = [train.learning_rate_factor(index, 6, 2) for index in range(6)]
    np.testing.assert_allclose(seen, [[0.002 * f, 0.001 * f] for f in 2 * factors])


def test_the_log_holds_the_mean_loss_since_the_last_line(photographs, tmp_path, monkeypatch):
    seen, loss = [], Recipe.loss
    monkeypatch.setattr(Recipe, "loss", lambda *args: seen.append(loss(*args)) or seen[-1])
    assert main(arguments(photographs, tmp_path / "run", "--checkpoint-every", "100")) == 0
    seen = [each.item() for each in seen]
    want = [np.mean(part) for part in (seen[:4], seen[4:6], seen[6:10], seen[10:])]
    np.testing.assert_allclose([float(r["loss"]) for r in log_without_time(tmp_path / "run")], want, rtol=1e-5)
    # What is logged is kept, whatever --checkpoint-every says.
    last = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert (last["phase"], last["step"]) == ("stages", 6)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(photographs, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert main(arguments(photographs, tmp_path / "run", "--clip", "1e-3")) == 0
    # What the log holds is the norm before.
    assert all(float(row["gradient_norm"]) > 2e-3 for row in log_without_time(tmp_path / "run"))
    assert len(norms) == 12 and max(norms) < 1.01e-3


def test_a_batch_whose_gradient_overflows_is_left_out(photographs, tmp_path, monkeypatch):
    calls, steps, clip, step = itertools.count(), [], torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def overflowing(*args):
        norm = clip(*args)
        return torch.tensor(float("inf")) if next(calls) == 2 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflowing)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(step(self)))
    assert main(arguments(photographs, tmp_path / "run")) == 0
    assert len(steps) == next(calls) - 1 == 11


@pytest.mark.parametrize(
    ("every", "said"), [("1", "last checkpoint holds is still there"), ("50", "no checkpoint yet")]
)
def test_a_run_that_diverges_stops(photographs, tmp_path, capsys, every, said):
    more = ("--lr", "1e30", "--clip", "1e30", "--checkpoint-every", every)
    assert main(arguments(photographs, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected a finite loss, got nan in step" in error or "expected a finite loss, got inf in step" in error
    assert said in error
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("stop", [["--stop-after", "3"], []], ids=["the last step of this start", "any step"])
def test_a_loss_that_is_not_finite_is_not_kept(photographs, uninterrupted, tmp_path, capsys, monkeypatch, stop):
    """The step is named, and what was kept before it is what the run goes on from."""
    run, calls, loss = tmp_path / "run", itertools.count(1), Recipe.loss
    line = arguments(photographs, run, "--checkpoint-every", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "loss", lambda *args: loss(*args) * (float("nan") if next(calls) == 3 else 1))
        assert main([*line, *stop]) == 2
    assert "got nan in step 3 of phase base" in capsys.readouterr().err
    assert torch.load(run / "checkpoint.pt")["step"] == 2
    assert main(["train", "resume", str(run)]) == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("name", ["checkpoint.pt", "base.safetensors"])
def test_a_full_disk_ends_a_run_in_one_line(photographs, tmp_path, capsys, monkeypatch, name):
    run = tmp_path / "run"
    if name != "checkpoint.pt":  # the larger file, and the first
        monkeypatch.setattr(torch, "save", lambda state, file: None)
    with small_files(5000):
        assert main(arguments(photographs, run)) == 2
    assert f"expected to write {run / name}, got: file too large" in capsys.readouterr().err
    assert not (run / name).exists()


def test_batches_are_a_function_of_seed_and_step():
    images = [np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)]
    sampler = PatchSampler(images, 8, 3, seed=1)
    assert torch.equal(sampler(5), PatchSampler(images, 8, 3, seed=1)(5))
    assert not torch.equal(sampler(5), sampler(6))
    assert not torch.equal(sampler(5), PatchSampler(images, 8, 3, seed=2)(5))
    batch = sampler(0)
    assert batch.shape == (3, 1, 8, 8)
    assert batch.min() >= 0 and batch.max() <= 1


def test_patches_lie_anywhere_in_any_orientation_and_every_pixel_counts_alike():
    image = np.arange(9, dtype=np.uint8).reshape(3, 3)
    sampler = PatchSampler([image], 2, 50, seed=0)
    found = {tuple(np.rint(255 * patch).ravel()) for step in range(20) for patch in sampler(step).numpy()}
    assert len(found) == 4 * 8
    small, large = np.zeros((10, 10), np.uint8), np.full((10, 30), 255, np.uint8)
    assert PatchSampler([small, large], 2, 4000, seed=0)(0).mean().item() == pytest.approx(0.75, abs=0.03)


def test_a_tenth_is_held_out_evenly():
    paths = [Path(str(i)) for i in range(40)]
    for most, count in ((12, 4), (2, 2)):
        validation, training = held_out(paths, most)
        assert [p.name for p in validation] == [str(i * 40 // count) for i in range(count)]
        assert sorted([*validation, *training]) == sorted(paths)
    assert len(held_out(paths[:5], 12)[0]) == 1


def test_only_a_single_block_passes_again():
    op, y = lf.BlockCS.gaussian(0.5, 4), torch.rand(1, 8, 2, 2)
    x = op.initial(y)
    for stages in (1, 2):
        net = lf.LoRun(op, lf.ResCNN(channels=4, blocks=1), stages=stages, sharing="tied")
        again = unrolling.more_passes(net, x, y, 2)
        if stages == 1:
            torch.testing.assert_close(again, net.stage_step(0, net.stage_step(0, x, y), y))
        else:
            assert again is x


def test_learning_rate():
    factors = [train.learning_rate_factor(s, 100, 10) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[-1] < 0.02
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
