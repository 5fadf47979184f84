"""The commands of super-resolution: measure to restore for every size, evaluate, demo, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from apps_help import accepted, contents, picture, refused
from PIL import Image
from scipy import ndimage
from scipy.io import savemat
from sr_help import random_kernels, tiny_sr_network

import lorun_fast as lf
from lorun_fast.apps import images, tiling
from lorun_fast.apps.cli import main
from lorun_fast.apps.tasks.sr import kernels, protocol
from lorun_fast.apps.tasks.sr.pictures import margin


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sr_network(tmp_path_factory.mktemp("network") / "net.safetensors")


@pytest.fixture
def kernel(tmp_path):
    (found,) = random_kernels((4, 7))
    np.save(tmp_path / "k.npy", found)
    return found


@pytest.mark.parametrize(("size", "scale", "pixels"), [((3, 3), 2, 24), ((25, 25), 3, 24), ((5, 67), 1, 136)])
def test_pieces_overlap_by_48_pixels_or_twice_the_kernel(size, scale, pixels):
    assert margin(lf.BlurDownsample(torch.ones(size), scale)) == pixels


@pytest.mark.parametrize("edges", ["wrap", "reflect"])
def test_pieces_are_of_one_size_and_see_their_margin(edges):
    y, seen = np.random.default_rng(0).random((2, 21, 35)), []

    def mean(piece):
        seen.append(piece.shape[-2:])
        blurred = ndimage.uniform_filter(piece, (0, 5, 5), mode="constant")
        return blurred.repeat(2, -2).repeat(2, -1)

    got = tiling.apply(mean, y, 8, 2, scale=2, edges=edges)
    whole = ndimage.uniform_filter(y, (0, 5, 5), mode=edges)
    np.testing.assert_allclose(got, whole.repeat(2, -2).repeat(2, -1))
    assert seen == 15 * [(12, 12)]


def arrays(path):
    with np.load(path, allow_pickle=False) as f:
        return {key: f[key] for key in f.files}


def restored(model, y, kernel, scale, sigma=0.0):
    net = lf.load(model)
    with torch.inference_mode():
        op = lf.BlurDownsample(torch.from_numpy(kernel), scale)
        return net(torch.from_numpy(y)[None], op=op, sigma=sigma)[0].numpy()


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_measure_is_scipys_convolution(tmp_path, kernel, capsys, scale):
    pixels = picture(tmp_path / "a.png", 24, 30, mode="RGB")
    accepted(capsys, "measure", "sr", tmp_path / "a.png", "--kernel", tmp_path / "k.npy", "--scale", scale, "-o",
             tmp_path / "y.npz")  # fmt: skip
    found = arrays(tmp_path / "y.npz")
    want = ndimage.convolve(pixels / 255.0, kernel.astype(np.float64)[..., None], mode="wrap")[::scale, ::scale]
    np.testing.assert_allclose(found["y"][0], want.transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(found["kernel"], kernel)
    assert (found["scale"], found["task"], found["edges"], found["noise"]) == (scale, "sr", "wrap", 0)
    assert found["size"].tolist() == [[24, 30]]


@pytest.mark.parametrize("how", ["crop", "reflect"])
def test_measure_to_restore_for_sizes_that_no_scale_divides(tmp_path, model, kernel, capsys, how):
    shapes = {"a": (25, 31), "b": (24, 30), "c": (25, 31), "d": (7, 11)}
    for i, (name, shape) in enumerate(shapes.items()):
        picture(tmp_path / "photos" / f"{name}.png", *shape, mode="L" if name == "b" else "RGB", seed=i)
    accepted(capsys, "measure", "sr", tmp_path / "photos", "--kernel", tmp_path / "k.npy", "--scale", "3", "--size",
             how, "-o", tmp_path / "y.npz")  # fmt: skip
    found = arrays(tmp_path / "y.npz")
    for batch in (1, 3):
        out = tmp_path / f"out{batch}"
        accepted(capsys, "restore", tmp_path / "y.npz", "-o", out, "--model", model, "--batch", batch, "--bits", 16)
        assert sorted(contents(out)) == ["a.png", "b.png", "c.png", "d.png"]
    for i, (name, (height, width)) in enumerate(shapes.items()):
        y = found[f"y_{i}"]
        size = (height, width) if how == "reflect" else (height // 3 * 3, width // 3 * 3)
        assert y.shape == (1 if name == "b" else 3, -(-size[0] // 3), -(-size[1] // 3))
        want = restored(model, np.broadcast_to(y, (3, *y.shape[1:])).copy(), kernel, 3)[:, : size[0], : size[1]]
        if name == "b":
            want = want.mean(0, keepdims=True)
        want = want.clip(0, 1)
        for batch in (1, 3):
            with Image.open(tmp_path / f"out{batch}" / f"{name}.png") as opened:
                assert opened.size == size[::-1]
                assert ("RGB" in opened.mode) == (name != "b")
            got = images.load(tmp_path / f"out{batch}" / f"{name}.png", "channels")
            np.testing.assert_allclose(got, want, atol=1.1 / 255 if name != "b" else 1e-4)


def test_what_is_reflected_is_the_edge(tmp_path, capsys):
    pixels = picture(tmp_path / "a.png", 25, 32)
    np.save(tmp_path / "k.npy", np.ones((1, 1), np.float32))
    for how, size in (("crop", (24, 30)), ("reflect", (25, 32))):
        accepted(capsys, "measure", "sr", tmp_path / "a.png", "--kernel", tmp_path / "k.npy", "--scale", 3, "--size",
                 how, "-o", tmp_path / f"{how}.npz")  # fmt: skip
        assert arrays(tmp_path / f"{how}.npz")["size"].tolist() == [list(size)]
    want = np.pad(pixels[..., 0], ((0, 2), (0, 1)), "symmetric")[::3, ::3] / 255
    np.testing.assert_allclose(arrays(tmp_path / "reflect.npz")["y"][0, 0], want, atol=1e-6)


def test_the_noise_level_reaches_the_network(tmp_path, model, kernel, capsys):
    picture(tmp_path / "a.png", 24, 24, mode="RGB")
    accepted(capsys, "measure", "sr", tmp_path / "a.png", "--kernel", tmp_path / "k.npy", "--scale", 2, "--noise",
             0.05, "-o", tmp_path / "y.npz")  # fmt: skip
    y = arrays(tmp_path / "y.npz")["y"][0]
    outputs = []
    for more, level in (((), 0.05), (("--sigma", 0.01), 0.01)):
        accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, *more)
        got = images.load(tmp_path / "out" / "a.png", "channels")
        np.testing.assert_allclose(got, restored(model, y, kernel, 2, level).clip(0, 1), atol=0.6 / 255)
        outputs.append(got)
    assert np.abs(outputs[0] - outputs[1]).max() > 2 / 255


def test_a_picture_that_was_measured_already(tmp_path, model, kernel, capsys):
    pixels = picture(tmp_path / "small.png", 16, 20, mode="RGB")
    accepted(capsys, "measure", "sr", tmp_path / "small.png", "--kernel", tmp_path / "k.npy", "--scale", 2,
             "--measured", "-o", tmp_path / "y.npz")  # fmt: skip
    found = arrays(tmp_path / "y.npz")
    np.testing.assert_array_equal(found["y"][0], pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    assert found["edges"] == "reflect" and found["size"].tolist() == [[32, 40]]
    pictures = []
    for edges in ((), ("--edges", "reflect"), ("--edges", "wrap")):
        accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, *edges)
        pictures.append(images.load(tmp_path / "out" / "small.png", "channels"))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0] - pictures[2]).max() > 1 / 255


def test_files_keep_their_own_kernels_edges_and_noise(tmp_path, model, kernel, capsys):
    (other,) = random_kernels((5, 5))
    np.save(tmp_path / "other.npy", other)
    (tmp_path / "ph").mkdir()
    files = {
        "a": ("k", "--measured", "--noise", 0.2),
        "b": ("k",),
        "c": ("other", "--noise", 0.2),
        "d": ("k",),
        "e": ("other", "--noise", 0.2),
    }
    for i, (name, (k, *more)) in enumerate(files.items()):
        picture(tmp_path / f"{name}.png", 16, 20, seed=i)
        accepted(capsys, "measure", "sr", tmp_path / f"{name}.png", "--kernel", tmp_path / f"{k}.npy", "--scale", 2,
                 *more, "-o", tmp_path / "ph" / f"{name}.npz")  # fmt: skip
        accepted(capsys, "restore", tmp_path / "ph" / f"{name}.npz", "-o", tmp_path / "alone", "--model", model)
    command = ["restore", tmp_path / "ph", "-o", tmp_path / "out", "--model", model, "--batch", 1]
    assert main([str(word) for word in command]) == 0
    printed = capsys.readouterr()
    assert "and 2 more" in printed.out and "5 images of 5 files" in printed.out
    assert printed.err.count("beyond the 25/255") == 1  # said once, not once per file
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    accepted(capsys, *command[:-1], 2)  # b and d share a batch
    for name in files:
        got, want = (images.load(tmp_path / f / f"{name}.png", "y") for f in ("out", "alone"))
        np.testing.assert_allclose(got, want, atol=1.1 / 255)


@pytest.mark.parametrize("edges", ["wrap", "reflect"])
def test_tiles_give_the_whole_image(tmp_path, model, capsys, edges):
    picture(tmp_path / "a.png", 150, 201, mode="RGB")
    accepted(capsys, "measure", "sr", tmp_path / "a.png", "--gaussian", 0.8, "--scale", 3, "-o", tmp_path / "y.npz")
    results = []
    for tile in ((), ("--tile", 64)):
        accepted(
            capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, "--edges", edges, *tile
        )
        results.append(images.load(tmp_path / "out" / "a.png", "channels"))
    assert results[0].shape == (3, 150, 201)
    # Tiles of a periodic image see its other side beyond the edge, the convolutions of the whole image see zeros.
    inside = slice(40, -40) if edges == "wrap" else slice(None)
    np.testing.assert_allclose(results[1][:, inside, inside], results[0][:, inside, inside], atol=1.1 / 255)


def test_evaluate_scores_every_kernel_and_scale(tmp_path, model, capsys):
    for i, shape in enumerate([(33, 41), (48, 48)]):
        picture(tmp_path / "photos" / f"{i}.png", *shape, mode="RGB", seed=i)
    blur = random_kernels((3, 3), (5, 4))
    cell = np.empty((1, 2), dtype=object)
    cell[0, 0], cell[0, 1] = blur
    savemat(tmp_path / "k.mat", {"kernels": cell})
    for name in ("usrnet", "float"):
        out = accepted(
            capsys, "evaluate", model, tmp_path / "photos", "--kernels", tmp_path / "k.mat", "--scale", 2, 3,
            "--protocol", name, "--json", tmp_path / "s.json", "--figure", tmp_path / "s.png", "--save", tmp_path / "x",
        )  # fmt: skip
        report = json.loads((tmp_path / "s.json").read_text())
        assert [(r["scale"], r["kernel"]) for r in report["kernels"]] == [(2, 1), (2, 2), (3, 1), (3, 2)]
        for row in report["kernels"]:
            for i, entry in enumerate(row["images"]):
                image = images.load(tmp_path / "photos" / f"{i}.png", "channels")
                x = protocol.original(image, row["scale"])
                k = blur[row["kernel"] - 1]
                y = protocol.measure(x, k, row["scale"], 0.0, np.random.default_rng(0), name)
                got = restored(model, y, k, row["scale"])
                assert entry["psnr"] == pytest.approx(protocol.psnr(got, x, row["scale"], name), abs=1e-2)
                start = lf.BlurDownsample(torch.from_numpy(k), row["scale"]).initial(torch.from_numpy(y)[None])[0]
                assert entry["start_psnr"] == pytest.approx(
                    protocol.psnr(start.numpy(), x, row["scale"], name), abs=1e-2
                )
            assert row["psnr"] == pytest.approx(np.mean([entry["psnr"] for entry in row["images"]]))
        for mean in report["mean"]:
            own = [r["psnr"] for r in report["kernels"] if r["scale"] == mean["scale"]]
            assert mean["psnr"] == pytest.approx(np.mean(own))
            assert f"{mean['psnr']:.2f}" in out
        assert report["protocol"] == name and report["task"] == "sr"
        assert Image.open(tmp_path / "s.png").size[0] > 300
        assert len(contents(tmp_path / "x")) == 8


def test_evaluate_in_tiles_scores_what_restore_makes(tmp_path, model, capsys):
    picture(tmp_path / "a.png", 144, 192, mode="RGB")
    np.save(tmp_path / "k.npy", random_kernels((3, 3))[0])
    command = ["evaluate", model, tmp_path / "a.png", "--kernels", tmp_path / "k.npy", "--scale", 3, "--protocol",
               "float", "--json", tmp_path / "s.json", "--save", tmp_path / "saved"]  # fmt: skip
    scores = {}
    for tile in (None, 64):
        accepted(capsys, *command, *(() if tile is None else ("--tile", tile)))
        report = json.loads((tmp_path / "s.json").read_text())
        assert report["tile"] == tile
        scores[tile] = report["kernels"][0]["images"][0]["psnr"]
    assert scores[64] == pytest.approx(scores[None], abs=0.3) and scores[64] != scores[None]
    options = ("--kernel", tmp_path / "k.npy", "--scale", 3, "-o", tmp_path / "y.npz")
    accepted(capsys, "measure", "sr", tmp_path / "a.png", *options)
    accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, "--tile", 64)
    saved = images.load(tmp_path / "saved" / "a_x3_k1.png", "channels")
    np.testing.assert_allclose(images.load(tmp_path / "out" / "a.png", "channels"), saved, atol=1.1 / 255)


def test_a_stopped_evaluation_goes_on(tmp_path, model, capsys, monkeypatch):
    from lorun_fast.apps.tasks.sr import evaluate

    picture(tmp_path / "photos" / "a.png", 32, 40, mode="RGB")
    np.save(tmp_path / "k.npy", np.stack(random_kernels((3, 3), (3, 3))))
    scores, part = tmp_path / "s.json", tmp_path / "s.json.part"
    command = ["evaluate", model, tmp_path / "photos", "--kernels", tmp_path / "k.npy", "--scale", 2, 3, "--json"]
    accepted(capsys, *command, scores)
    whole = json.loads(scores.read_text())
    assert not part.exists()

    scores.write_text("older")
    one, calls = evaluate._one_kernel, []

    class Killed(BaseException):
        pass

    def stopping(*args):
        if len(calls) == 3:
            raise Killed
        calls.append(args)
        return one(*args)

    monkeypatch.setattr(evaluate, "_one_kernel", stopping)
    with pytest.raises(Killed):
        accepted(capsys, *command, scores)
    assert scores.read_text() == "older" and len(json.loads(part.read_text())["kernels"]) == 3
    assert "--json: expected no unfinished evaluation, got" in refused(capsys, *command, scores)
    assert "got another noise" in refused(capsys, *command, scores, "--noise", 0.1, "--resume")
    assert "another scales or kernels" in refused(capsys, *command, scores, "--index", 2, "--resume")
    assert "got another normalise, another kernels_sha256" in refused(
        capsys, *command, scores, "--normalise", "--resume"
    )
    other = "fp32" if whole["dtype"] == "bf16" else "bf16"
    assert "got another dtype" in refused(capsys, *command, scores, "--dtype", other, "--resume")
    for path, what in ((tmp_path / "k.npy", "kernels"), (tmp_path / "photos" / "a.png", "images")):
        kept = path.read_bytes()
        if what == "kernels":
            np.save(path, np.load(path)[::-1])
        else:
            picture(path, 32, 40, mode="RGB", seed=1)
        assert f"got another {what}_sha256" in refused(capsys, *command, scores, "--resume")
        path.write_bytes(kept)
    kept = part.read_text()
    part.write_text(json.dumps({k: v for k, v in json.loads(kept).items() if "sha256" not in k}))
    assert "expected the rows of this version, got" in refused(capsys, *command, scores, "--resume")
    part.write_text(kept)
    assert "--resume: expected --json FILE" in refused(capsys, *command[:-1], "--resume")
    calls.clear()
    accepted(capsys, *command, scores, "--resume")
    again = json.loads(scores.read_text())
    assert len(calls) == 1 and not part.exists()
    assert [row["psnr"] for row in again["kernels"]] == [row["psnr"] for row in whole["kernels"]]
    part.write_text("{")
    assert "expected the rows of an evaluation, got" in refused(capsys, *command, scores, "--resume")


def test_a_kernel_that_does_not_sum_to_one_is_used_and_noted(tmp_path, model, capsys):
    picture(tmp_path / "a.png", 24, 24)
    np.save(tmp_path / "k.npy", np.full((2, 2), 0.2, np.float32))
    command = ["measure", "sr", tmp_path / "a.png", "--kernel", tmp_path / "k.npy", "--scale", 2, "-o"]
    from lorun_fast.apps.cli import main

    assert main([str(a) for a in [*command, tmp_path / "y.npz"]]) == 0
    assert "sums to 0.8, not 1" in capsys.readouterr().err
    assert main([str(a) for a in [*command, tmp_path / "n.npz", "--normalise"]]) == 0
    assert "sums to" not in capsys.readouterr().err
    np.testing.assert_allclose(arrays(tmp_path / "y.npz")["y"], 0.8 * arrays(tmp_path / "n.npz")["y"], rtol=1e-5)
    assert main(["restore", str(tmp_path / "y.npz"), "-o", str(tmp_path / "out"), "--model", str(model)]) == 0
    assert "sums to 0.8, not 1" in capsys.readouterr().err


def test_demo_makes_its_pictures_without_a_network(tmp_path, model, capsys, monkeypatch):
    import socket

    def no_network(*_, **__):
        raise AssertionError("the demo opened a socket")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    out = accepted(capsys, "demo", "sr", "--model", model, "-o", tmp_path / "demo")
    names = set(contents(tmp_path / "demo"))
    want = {f"{n}_{k}.png" for n in ("astronaut", "chelsea", "coffee", "camera")
            for k in ("original", "small", "start", "restored")}  # fmt: skip
    assert names == want | {"comparison.png"}
    small, whole = (Image.open(tmp_path / "demo" / f"coffee_{k}.png").size for k in ("small", "restored"))
    assert whole == (4 * small[0], 4 * small[1])
    assert "chelsea" in out and "x3" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--kernel", "nan.npy"), "expected finite values"),
        (("--kernel", "large.npy"), "expected a kernel of at most 24 x 30 as the image"),
        (("--kernel", "two.npy"), "expected --index 1 to 2"),
        (("--kernel", "two.npy", "--index", "3"), "--index: expected 1 to 2"),
        (("--gaussian", "0"), "expected a width above 0"),
        (("--gaussian", "1", "--index", "1"), "expected --kernel beside --key and --index"),
        (("--kernel", "k.npy", "--scale", "0"), "expected a whole number of at least 1"),
        (("--kernel", "k.npy", "--scale", "31"), "a.png: expected an image of at least 31 x 31 pixels"),
    ],
)
def test_measure_refuses(tmp_path, kernel, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png", 24, 30)
    np.save("nan.npy", np.full((3, 3), np.nan))
    np.save("large.npy", np.full((25, 3), 1 / 75))
    np.save("two.npy", np.full((2, 3, 3), 1 / 9))
    before = contents(tmp_path)
    scale = () if "--scale" in more else ("--scale", "2")
    assert message in refused(capsys, "measure", "sr", "a.png", *scale, "-o", "y.npz", *more)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": None}, "expected the keys kernel and scale, got no kernel"),
        ({"scale": None, "kernel": None}, "got no kernel and no scale"),
        ({"kernel": np.full((3, 3), np.nan)}, "kernel: expected finite values"),
        ({"kernel": np.ones((1, 3, 3)) / 9}, "kernel: expected shape (kh, kw)"),
        ({"kernel": np.ones((13, 3)) / 39}, "expected a kernel of at most 12 x 16"),
        ({"scale": 2.0}, "scale: expected one whole number"),
        ({"scale": 0}, "scale: expected one whole number"),
        ({"scale": 3}, "expected y of 4 x 6 pixels for the 12 x 16 image"),
        ({"edges": "black"}, "edges: expected wrap or reflect"),
        ({"y": np.zeros((2, 6, 8))}, "expected y of shape (1 or 3, rows, columns)"),
        ({"y": np.zeros((6, 8))}, "y: expected shape (channels, rows, columns)"),
        ({"size": (13, 16)}, "expected y of 7 x 8 pixels"),
        ({"task": "cs"}, "expected task 'sr'"),
    ],
)
def test_restore_refuses(tmp_path, model, capsys, changes, message):
    good = {"y": np.zeros((3, 6, 8)), "size": (12, 16), "kernel": np.ones((3, 3)) / 9, "scale": 2, "task": "sr"}
    np.savez(tmp_path / "y.npz", **{k: v for k, v in (good | changes).items() if v is not None})
    assert message in refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--kernels"),
        (("--kernels", "large.npy"), "expected a kernel of at most 24 x 24 as the image"),
        (("--kernels", "nan.npy"), "expected finite values"),
        (("--kernels", "k.npy", "--index", "2"), "--index: expected 1 to 1"),
        (("--kernels", "k.npy", "--scale", "4"), "expected an image of more than 32 pixels a side"),
        (("--kernels", "k.npy", "--json", "none/s.json"), "expected an existing folder"),
        (
            ("--kernels", "k.npy", "--json", "k.npy"),
            "expected another file to write than those that are read, got k.npy",
        ),
        (("--kernels", "k.npy", "--figure", "a.png"), "expected another file to write than those that are read, got a"),
        (("--kernels", "k.npy", "--figure", "a.json"), "--figure: expected a name that ends in .png, got a.json"),
        (("--kernels", "k.npy", "--figure", "a_x2_k1.png", "--save", "."), ".: a_x2_k1.png is in use"),
        (("--kernels", "k.npy", "--save", "saved"), "(--overwrite replaces them), got saved with a_x2_k1.png"),
    ],
)
def test_evaluate_refuses(tmp_path, model, kernel, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png", 30, 30)
    np.save("nan.npy", np.full((3, 3), np.nan))
    np.save("large.npy", np.full((25, 3), 1 / 75))
    picture(tmp_path / "saved" / "a_x2_k1.png")
    before = contents(tmp_path)
    scale = () if "--scale" in more else ("--scale", "2")
    assert message in refused(capsys, "evaluate", model, "a.png", *scale, *more)
    assert contents(tmp_path) == before


def test_a_noise_level_beyond_the_training_is_noted(tmp_path, model, kernel, capsys):
    from lorun_fast.apps.cli import main

    picture(tmp_path / "a.png", 24, 24)
    accepted(capsys, "measure", "sr", tmp_path / "a.png", "--kernel", tmp_path / "k.npy", "--scale", 2, "--noise", 0.2,
             "-o", tmp_path / "y.npz")  # fmt: skip
    assert main(["restore", str(tmp_path / "y.npz"), "-o", str(tmp_path / "out"), "--model", str(model)]) == 0
    assert "beyond the 25/255" in capsys.readouterr().err


def test_the_demos_kernels_sum_to_one():
    from lorun_fast.apps.tasks.sr.demo import _cases

    for case in _cases():
        assert math.isclose(case.kernel.sum(dtype=np.float64), 1, abs_tol=1e-5), case.name
    assert kernels.gaussian(1.6).shape == (25, 25)
