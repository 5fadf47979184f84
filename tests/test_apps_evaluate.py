"""evaluate and demo: scores, their agreement with measure and restore, what is written."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from apps_help import accepted, contents, picture, refused, tiny_network
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import lorun_fast as lf
from lorun_fast.apps import images, models, tiling
from lorun_fast.apps.cli import main


@pytest.fixture
def model(tmp_path):
    return tiny_network(tmp_path / "net.safetensors")


def _evaluate(capsys, model, folder, *options):
    target = model.parent / "scores.json"
    text = accepted(capsys, "evaluate", model, folder, "--json", target, *options)
    return json.loads(target.read_text()), text


def test_agrees_with_measure_and_restore(tmp_path, model, capsys):
    photos = tmp_path / "photos"
    picture(photos / "a.png", 24, 32)
    picture(photos / "b.png", 19, 30, mode="RGB", seed=1)
    picture(photos / "c.png", 24, 32, seed=2)
    for colour, noise in (("y", 0), ("channels", 0.05)):
        options = ["--colour", colour, "--noise", noise, "--seed", 7]
        report, text = _evaluate(capsys, model, photos, *options, "--save", tmp_path / "saved")
        accepted(capsys, "measure", photos, "--model", model, *options, "-o", tmp_path / "y.npz")
        accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model)
        assert contents(tmp_path / "out") == contents(tmp_path / "saved")
        assert [row["name"] for row in report["images"]] == ["a.png", "b.png", "c.png"]
        for row in report["images"]:
            original = images.load(photos / row["name"], colour)
            restored = images.load(tmp_path / "out" / row["name"], colour)
            assert row["size"] == list(original.shape[1:])
            psnr = peak_signal_noise_ratio(original, restored, data_range=1)
            ssim = structural_similarity(original * 255, restored * 255, data_range=255, channel_axis=0)
            assert math.isclose(row["psnr"], psnr, abs_tol=0.02)  # the file is rounded to 8 bits
            assert math.isclose(row["ssim"], ssim, abs_tol=2e-3)
            assert row["seconds"] > 0
            assert f"{row['psnr']:.2f}" in text
        for key in ("psnr", "ssim", "seconds", "start_psnr", "start_ssim"):
            assert math.isclose(report["mean"][key], np.mean([row[key] for row in report["images"]]))
        assert (report["m"], report["block_size"], report["phi"], report["ratio"]) == (16, 8, "fixed", 0.25)
        assert report["model"] == str(model) and len(report["model_sha256"]) == 64
        assert set(report["versions"]) == {"lorun_fast", "torch", "python"}


def test_tiles_are_those_of_restore_and_hardly_change_the_scores(tmp_path, model, capsys, monkeypatch):
    for i, mode in enumerate(("L", "RGB")):
        picture(tmp_path / "photos" / f"{i}.png", 90, 70, mode=mode, seed=i)
    whole, _ = _evaluate(capsys, model, tmp_path / "photos", "--colour", "channels")
    tiles = ("--tile", 48)
    places, counts = tiling.Tiled._places, []

    def counted(own, shape):
        found = places(own, shape)
        counts.append(len(found))
        return found

    monkeypatch.setattr(tiling.Tiled, "_places", counted)
    tiled, _ = _evaluate(
        capsys, model, tmp_path / "photos", "--colour", "channels", *tiles, "--save", tmp_path / "saved"
    )
    assert (whole["tile"], tiled["tile"]) == (None, 48) and set(counts) == {4 * 3}
    for one, two in zip(whole["images"], tiled["images"], strict=True):
        assert math.isclose(one["psnr"], two["psnr"], abs_tol=0.01)
        assert one["start_psnr"] == two["start_psnr"]
    accepted(capsys, "measure", tmp_path / "photos", "--model", model, "--colour", "channels", "-o", tmp_path / "y.npz")
    accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, *tiles)
    assert contents(tmp_path / "out") == contents(tmp_path / "saved")
    line = refused(capsys, "evaluate", model, tmp_path / "photos", "--tile", 32)
    assert "--tile: expected at least 40 pixels, got 32" in line


def test_batches_do_not_change_the_scores(tmp_path, model, capsys):
    for i in range(5):
        picture(tmp_path / "photos" / f"{i}.png", *((24, 32) if i % 2 else (20, 20)), seed=i)
    reports = [
        _evaluate(capsys, model, tmp_path / "photos", "--batch", batch, "--noise", "0.02")[0]["images"]
        for batch in (1, 2, 8)
    ]
    for other in reports[1:]:
        for one, two in zip(reports[0], other, strict=True):
            assert one["name"] == two["name"]
            assert math.isclose(one["psnr"], two["psnr"], abs_tol=1e-3)


def test_the_start_is_the_adjoint(tmp_path, model, capsys):
    picture(tmp_path / "photos" / "a.png", 20, 28)
    report, _ = _evaluate(capsys, model, tmp_path / "photos")
    op = lf.load(model).op
    x = torch.from_numpy(images.load(tmp_path / "photos" / "a.png", "y"))[None]
    start = op.adjoint(op(x), (20, 28)).clamp(0, 1)
    want = peak_signal_noise_ratio(x.numpy(), start.numpy(), data_range=1)
    assert math.isclose(report["images"][0]["start_psnr"], want, abs_tol=1e-4)


def test_what_json_cannot_say_is_null(tmp_path, capsys, monkeypatch):
    """An image below the SSIM window, and one that comes back exactly."""
    model = tiny_network(tmp_path / "net.safetensors")
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(tmp_path / "black.png")
    picture(tmp_path / "small.png", 6, 24)
    report, text = _evaluate(capsys, model, tmp_path)
    black, small = report["images"]
    assert black["psnr"] is None and black["ssim"] == 1.0
    assert small["ssim"] is None and small["psnr"] > 0
    assert report["mean"]["psnr"] == small["psnr"] and report["mean"]["ssim"] == 1.0
    assert "inf" in text


def test_folders_with_other_files(tmp_path, model, capsys):
    from lorun_fast.apps.cli import main

    photos = tmp_path / "photos"
    picture(photos / "a.png")
    (photos / "notes.txt").write_text("not an image")
    (photos / ".hidden.png").write_text("not an image")
    (photos / "below").mkdir()
    assert main(["evaluate", str(model), str(photos)]) == 0
    captured = capsys.readouterr()
    assert "skipped 1 files that are not images: notes.txt" in captured.err
    assert "mean of 1" in captured.out


def test_a_note_comes_once(tmp_path, model, capsys):
    frames = [Image.new("L", (24, 24), tone) for tone in (50, 200)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert main(["evaluate", str(model), str(tmp_path / "two.gif")]) == 0
    assert capsys.readouterr().err.count("only the first of 2 frames is read") == 1


def test_refusals_write_nothing(tmp_path, model, capsys):
    photos = tmp_path / "photos"
    picture(photos / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    picture(tmp_path / "links" / "a.png")
    (tmp_path / "links" / "b.png").symlink_to("gone.png")
    picture(tmp_path / "other" / "a.jpg")
    picture(tmp_path / "other" / "b" / "a.png")
    (tmp_path / "mine.json").write_text("mine")
    before = contents(tmp_path)
    good = ["evaluate", model, photos]
    for command, message in (
        (["evaluate", model, tmp_path / "nowhere", "--json", tmp_path / "mine.json"], "no such file"),
        (["evaluate", model, tmp_path / "empty", "--json", tmp_path / "mine.json"], "got no files"),
        (["evaluate", model, tmp_path / "text", "--json", tmp_path / "mine.json"], "got 1 other files"),
        (["evaluate", model, tmp_path / "text" / "a.txt", "--json", tmp_path / "mine.json"], "expected an image"),
        (["evaluate", model, tmp_path / "links", "--json", tmp_path / "mine.json"], "b.png: no such file"),
        (["evaluate", "cs-99", photos, "--json", tmp_path / "mine.json"], "cs-99"),
        ([*good, "--json", tmp_path / "no" / "s.json"], "existing folder"),
        ([*good, "--json", photos], "expected a file"),
        ([*good, "--save", tmp_path / "mine.json"], "expected a folder"),
        ([*good, "--save", photos], "another folder"),
        ([*good, "--save", photos, "--overwrite"], "another folder"),
        (["evaluate", model, tmp_path / "other" / "a.jpg", "--save", photos], "with a.png"),
        ([*good, "--json", tmp_path / "other" / "b" / "a.png"], "not an image's"),
        (["evaluate", model, photos, "--json", model], "those that are read"),
    ):
        assert message in refused(capsys, *command)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_an_unreadable_image_in_a_folder(damage, tmp_path, model, capsys):
    photos = tmp_path / "photos"
    picture(photos / "a.png", 64, 64)
    data = (photos / "a.png").read_bytes()
    (photos / "b.png").write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"hello"}[damage])
    for command in (
        ["evaluate", model, photos, "--json", tmp_path / "s.json", "--save", tmp_path / "out"],
        ["measure", photos, "--model", model, "-o", tmp_path / "y.npz"],
    ):
        assert "b.png" in refused(capsys, *command)
    assert not any((tmp_path / name).exists() for name in ("s.json", "out", "y.npz"))


def test_demo(tmp_path, capsys, monkeypatch):
    net = lf.load(tiny_network(tmp_path / "weights" / "cs-25.safetensors"))
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    text = accepted(capsys, "demo", "cs", "--batch", "2")
    from lorun_fast.apps.tasks.cs.demo import _PHOTOGRAPHS

    kinds = ("original", "start", "restored")
    written = set(contents(tmp_path / "demo-output"))
    assert written == {f"{name}_{kind}.png" for name in _PHOTOGRAPHS for kind in kinds} | {"comparison.png"}
    with Image.open(tmp_path / "demo-output" / "comparison.png") as image:
        assert image.size[0] > 1000 and len(image.getcolors(2**24)) > 1000
    for name in _PHOTOGRAPHS:
        line = next(line for line in text.splitlines() if line.startswith(name))
        original, start, restored = (images.load(tmp_path / f"demo-output/{name}_{k}.png", "channels") for k in kinds)
        x = torch.from_numpy(original)[:, None]
        with torch.inference_mode():
            want = net(net.op(x), size=x.shape[-2:])[:, 0].clamp(0, 1).numpy()
        np.testing.assert_allclose(restored, want, atol=0.51 / 255)
        assert original.shape == restored.shape and f"{original.shape[2]}x{original.shape[1]}" in line
        for image in (start, restored):
            psnr = peak_signal_noise_ratio(original, image, data_range=1)
            assert any(abs(float(number) - psnr) < 0.03 for number in line.split()[2:])
    assert "s in all" in text


def test_demo_without_its_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "cs-25" in refused(capsys, "demo")
    assert contents(tmp_path) == {}
