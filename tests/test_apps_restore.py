"""measure and restore: what the files hold, and everything that must be refused."""

from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from apps_help import BLOCK, accepted, contents, picture, refused, tiny_network
from PIL import Image
from scipy.io import savemat

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.apps import images, measurements, models, restoring
from lorun_fast.apps.cli import main
from lorun_fast.apps.runtime import Runtime

M = 16  # 25 % of 8 x 8


@pytest.fixture
def model(tmp_path):
    return tiny_network(tmp_path / "net.safetensors")


@pytest.fixture
def phi(model):
    return lf.load(model).op.phi.numpy()


def _y(path):
    with np.load(path, allow_pickle=False) as f:
        return {key: f[key] for key in f.files}


def _restored(model, y, size):
    net = lf.load(model)
    with torch.inference_mode():
        return net(torch.from_numpy(np.atleast_1d(y)), size=size).clamp(0, 1).numpy()


def test_measure_writes_phi_x(tmp_path, model, capsys):
    pixels = picture(tmp_path / "a.png", 24, 32)
    accepted(capsys, "measure", tmp_path / "a.png", "--model", model, "-o", tmp_path / "y.npz")
    arrays = _y(tmp_path / "y.npz")
    op = lf.load(model).op
    x = torch.from_numpy(pixels[None, None, ..., 0].astype(np.float32) / 255)
    assert arrays["y"].dtype == np.float32
    np.testing.assert_array_equal(arrays["y"], op(x).numpy())
    np.testing.assert_array_equal(arrays["phi"], op.phi.numpy())
    assert arrays["block_size"] == BLOCK
    assert arrays["size"].tolist() == [[24, 32]]
    assert arrays["name"].tolist() == ["a"]
    assert arrays["task"] == "cs" and arrays["noise"] == 0


def test_sizes_that_no_block_divides(tmp_path, model, capsys):
    shapes = {"a": (24, 32), "b": (19, 30), "c": (24, 32), "d": (7, 9)}
    for i, (name, shape) in enumerate(shapes.items()):
        picture(tmp_path / "photos" / f"{name}.png", *shape, seed=i)
    accepted(capsys, "measure", tmp_path / "photos", "--model", model, "-o", tmp_path / "y.npz")
    arrays = _y(tmp_path / "y.npz")
    assert [arrays[f"y_{i}"].shape for i in range(4)] == [(M, 3, 4), (M, 3, 4), (M, 3, 4), (M, 1, 2)]
    for batch in (1, 3):
        out = tmp_path / f"out{batch}"
        accepted(capsys, "restore", tmp_path / "y.npz", "-o", out, "--model", model, "--batch", batch, "--bits", "16")
        assert sorted(contents(out)) == ["a.png", "b.png", "c.png", "d.png"]
        for i, (name, shape) in enumerate(shapes.items()):
            got = images.load(out / f"{name}.png", "y")
            want = _restored(model, arrays[f"y_{i}"][None], shape)[0]
            assert got.shape == (1, *shape)
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_seed_decides_noise_and_phi(tmp_path, capsys):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", seed=1)
    files = {}
    for run, seed in (("first", 3), ("again", 3), ("other", 4)):
        path = tmp_path / f"{run}.npz"
        accepted(
            capsys, "measure", tmp_path / "a.png", tmp_path / "b.png", "--ratio", "25", "--gaussian",
            "--block-size", BLOCK, "--noise", "0.1", "--seed", seed, "-o", path,
        )  # fmt: skip
        files[run] = _y(path)
    for key in files["first"]:
        np.testing.assert_array_equal(files["first"][key], files["again"][key])
    assert (files["first"]["phi"] != files["other"]["phi"]).mean() > 0.9
    clean = lf.BlockCS.gaussian(0.25, BLOCK, seed=3)(
        torch.from_numpy(np.stack([images.load(tmp_path / f"{n}.png", "y") for n in "ab"]))
    ).numpy()
    noise = files["first"]["y"] - clean
    assert 0.08 < noise.std() < 0.12
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.3


def test_colour(tmp_path, model, capsys):
    picture(tmp_path / "photos" / "colour.png", 20, 28, mode="RGB")
    picture(tmp_path / "photos" / "gray.png", 20, 28, seed=1)
    for colour, rows in (("y", 2), ("channels", 4)):
        y, out = tmp_path / f"{colour}.npz", tmp_path / colour
        accepted(capsys, "measure", tmp_path / "photos", "--colour", colour, "--model", model, "-o", y)
        arrays = _y(y)
        assert arrays["y"].shape == (rows, M, 3, 4)
        for bits in (8, 16):
            accepted(capsys, "restore", y, "-o", out, "--model", model, "--bits", bits, "--batch", 2)
            assert sorted(contents(out)) == ["colour.png", "gray.png"]
            with Image.open(out / "gray.png") as image:
                assert image.mode == ("L" if bits == 8 else "I;16")
            with Image.open(out / "colour.png") as image:
                got = np.asarray(image)
                if colour == "y":
                    assert got.shape == (20, 28)
                    continue
            assert arrays["channel"].tolist() == ["R", "G", "B", ""]
            want = _restored(model, arrays["y"][:3], (20, 28))[:, 0].transpose(1, 2, 0)
            # Pillow reads the upper byte of 16-bit colour, which truncates.
            np.testing.assert_allclose(got / 255, want, atol=0.51 / 255 if bits == 8 else 1.01 / 255)


def test_channels_come_together_in_any_order(tmp_path, model, phi, capsys):
    y = np.random.default_rng(0).random((3, M, 2, 2), dtype=np.float32)
    np.savez(tmp_path / "y.npz", y=y, name=["p"] * 3, channel=["B", "R", "G"], size=[10, 16])
    accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model)
    with Image.open(tmp_path / "out" / "p.png") as image:
        got = np.asarray(image) / 255
    want = _restored(model, y[[1, 2, 0]], (10, 16))[:, 0].transpose(1, 2, 0)
    np.testing.assert_allclose(got, want, atol=0.51 / 255)
    np.savez(tmp_path / "two.npz", y=np.concatenate([y, y]), name=["p"] * 6, channel=["B", "R", "G"] * 2)
    accepted(capsys, "restore", tmp_path / "two.npz", "-o", tmp_path / "two", "--model", model)
    assert len(contents(tmp_path / "two")) == 2


def test_eleven_measurements_keep_their_order(tmp_path):
    """By number, not by letter, whether they have one shape or not."""
    ys = np.arange(11 * M, dtype=np.float32).reshape(11, M, 1, 1)
    np.savez(tmp_path / "scan.npz", y=ys)
    stack = measurements.read(tmp_path / "scan.npz", ("m", "rows", "columns"), ())
    np.savez(tmp_path / "scan.npz", **{f"y_{i}": y for i, y in enumerate(ys)})
    single = measurements.read(tmp_path / "scan.npz", ("m", "rows", "columns"), ())
    for file in (stack, single):
        assert [item.name for item in file.items] == [f"scan_{i:02}" for i in range(11)]
        assert all(np.array_equal(item.y, y) for item, y in zip(file.items, ys, strict=True))


@pytest.mark.parametrize(
    ("noise", "level", "said"),
    [
        ([[0.1]], 0.1, ""),  # as MATLAB's numbers are
        ([0.1, 0.2], 0, "y.npz: noise: expected one number, got shape (2,) of float64; taken as 0"),
        ("much", 0, "y.npz: noise: expected one number, got shape () of <U4; taken as 0"),
    ],
)
def test_noise_of_another_program(noise, level, said, tmp_path, capsys):
    np.savez(tmp_path / "y.npz", y=_zeros(M, 1, 1), noise=noise)
    assert measurements.read(tmp_path / "y.npz", ("m", "rows", "columns"), ()).noise == level
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("form", ["npz", "npy", "stack", "with phi"])
def test_a_hand_written_file_needs_only_y(form, tmp_path, model, phi, capsys):
    y = np.random.default_rng(0).random((2, M, 2, 3))
    path = tmp_path / ("scan.npy" if form == "npy" else "scan.npz")
    if form == "npy":
        np.save(path, y[0])
    elif form == "npz":
        np.savez(path, y=y[0])
    elif form == "stack":
        np.savez(path, y=(y * 1000).astype(np.int32))
    else:
        np.savez(path, y=y, phi=phi.astype(np.float16), block_size=BLOCK, size=[16, 21], name=["left", "right"])
    accepted(capsys, "restore", path, "-o", tmp_path / "out", "--model", model)
    sizes = {}
    for p in (tmp_path / "out").glob("*.png"):
        with Image.open(p) as image:
            sizes[p.name] = image.size
    assert (
        sizes
        == {
            "npz": {"scan.png": (24, 16)},
            "npy": {"scan.png": (24, 16)},
            "stack": {"scan_0.png": (24, 16), "scan_1.png": (24, 16)},
            "with phi": {"left.png": (21, 16), "right.png": (21, 16)},
        }[form]
    )


def test_a_key_that_is_not_known_is_told(tmp_path, model, capsys):
    np.savez(tmp_path / "y.npz", y=np.zeros((M, 1, 1), np.float32), sizes=[8, 8])
    assert main(["restore", str(tmp_path / "y.npz"), "-o", str(tmp_path / "out"), "--model", str(model)]) == 0
    assert "ignored keys sizes" in capsys.readouterr().err


def test_equal_names_do_not_overwrite_each_other(tmp_path, model, capsys):
    photos = tmp_path / "photos"
    picture(photos / "a.png", seed=0)
    picture(photos / "a.jpg", seed=1)
    picture(photos / "A.bmp", seed=2)
    picture(photos / "a_png.png", seed=3)
    picture(tmp_path / "more" / "a.png", seed=4)
    accepted(capsys, "measure", photos, tmp_path / "more", "--model", model, "-o", tmp_path / "y.npz")
    names = _y(tmp_path / "y.npz")["name"].tolist()
    assert names == ["A_bmp", "a_jpg", "a_png_2", "a_png", "a_png_3"]
    accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model)
    assert sorted(name.removesuffix(".png") for name in contents(tmp_path / "out")) == sorted(names)
    np.savez(tmp_path / "same.npz", y=np.zeros((3, M, 1, 1), np.float32), name=["x", "x", "x.png"])
    accepted(capsys, "restore", tmp_path / "same.npz", "-o", tmp_path / "same", "--model", model)
    assert len(contents(tmp_path / "same")) == 3


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".mat", "v7.3", "h5py"])
def test_phi_from_a_file(suffix, tmp_path, capsys):
    picture(tmp_path / "a.png")
    phi = np.random.default_rng(0).standard_normal((10, 36))
    path = tmp_path / f"phi{suffix if suffix[0] == '.' else '.mat'}"
    if suffix == ".npy":
        np.save(path, phi)
    elif suffix == ".npz":
        np.savez(path, A=phi)
    elif suffix == ".mat":
        savemat(path, {"A": phi, "other": 1})
    else:
        import h5py

        with h5py.File(path, "w", userblock_size=512 if suffix == "v7.3" else 0) as f:
            f["A"] = phi.T  # as MATLAB stores it
        if suffix == "v7.3":  # MATLAB's header
            header = b"MATLAB 7.3 MAT-file".ljust(124, b" ") + b"\x00\x02IM"
            path.write_bytes(header + path.read_bytes()[len(header) :])
    accepted(capsys, "measure", tmp_path / "a.png", "--phi", path, "--key", "A", "-o", tmp_path / "y.npz")
    arrays = _y(tmp_path / "y.npz")
    assert arrays["block_size"] == 6
    np.testing.assert_array_equal(arrays["phi"], phi.astype(np.float32))
    assert arrays["y"].shape == (1, 10, 4, 6)


def test_the_ratio_names_a_shipped_network(tmp_path, capsys, monkeypatch):
    weights = tiny_network(tmp_path / "weights" / "cs-25.safetensors", seed=5)
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "weights")
    picture(tmp_path / "a.png")
    accepted(capsys, "measure", tmp_path / "a.png", "--ratio", "25", "-o", tmp_path / "y.npz")
    np.testing.assert_array_equal(_y(tmp_path / "y.npz")["phi"], lf.load(weights).op.phi.numpy())
    accepted(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "a.png").exists()
    assert "(25)" in refused(capsys, "measure", tmp_path / "a.png", "--ratio", "10", "-o", tmp_path / "z.npz")
    line = refused(
        capsys, "measure", tmp_path / "a.png", "--ratio", "25", "--block-size", "33", "-o", tmp_path / "z.npz"
    )
    assert "--block-size: expected 8" in line
    assert "cs-25" in accepted(capsys, "info")


def test_a_disk_that_gets_full_ends_the_command(tmp_path, model, capsys, monkeypatch):
    """Pictures are saved in threads: the error of one is the command's, and leaves complete files only."""
    for i in range(12):
        picture(tmp_path / "photos" / f"{i:02}.png", seed=i)
    accepted(capsys, "measure", tmp_path / "photos", "--model", model, "-o", tmp_path / "y.npz")
    replace = os.replace

    def full(source, target):
        if target.name == "01.png":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    line = refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model)
    assert line.endswith("01.png, got: no space left on device")
    written = contents(tmp_path / "out")
    assert "00.png" in written and "11.png" not in written
    assert all(name.endswith(".png") and data.endswith(b"IEND\xaeB`\x82") for name, data in written.items())


KERNELS = pytest.mark.parametrize(("amx", "loops"), [(False, "baseline"), (False, "avx512"), (True, "avx512")])


@KERNELS
@pytest.mark.parametrize("size", [(24, 32), (19, 30)])
def test_bf16_and_threads(tmp_path, model, capsys, monkeypatch, amx, loops, size):
    # Without matrix tiles their ops run plain loops; sides that are no multiple of the network's cell are padded.
    monkeypatch.setattr(_native, "build_info", lambda: {"amx": amx, "cpu_active": loops})
    picture(tmp_path / "a.png", *size)
    accepted(capsys, "measure", tmp_path / "a.png", "--model", model, "-o", tmp_path / "y.npz")
    restored = {}
    threads = torch.get_num_threads()
    for dtype in ("fp32", "bf16"):
        text = accepted(
            capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / dtype, "--model", model, "--dtype", dtype,
            "--threads", "1", "--device", "cpu", "--bits", "16",
        )  # fmt: skip
        assert f"1 threads, {dtype}" in text and "images/s" in text and "MiB" in text
        restored[dtype] = images.load(tmp_path / dtype / "a.png", "y")
    assert torch.get_num_threads() == threads
    difference = np.abs(restored["fp32"] - restored["bf16"]).max()
    assert 0 < difference < 0.05


@KERNELS
def test_how_a_network_is_prepared(monkeypatch, model, amx, loops):
    monkeypatch.setattr(_native, "build_info", lambda: {"amx": amx, "cpu_active": loops})
    net = lf.load(model).eval()

    def prepared(device: str, dtype: torch.dtype):
        return restoring.prepared(net, Runtime(torch.device(device), dtype, 1))

    assert prepared("cpu", torch.float32).report["dtype"][0] == "float32"
    # Where the network is decides what is done; this one is on a CPU.
    for dtype in (torch.float32, torch.bfloat16):
        assert prepared("cuda", dtype).report["dtype"][0] == str(dtype).removeprefix("torch.")
    narrow = prepared("cpu", torch.bfloat16)
    assert (narrow is net) == (loops == "baseline")
    if narrow is not net:
        assert narrow.report["convolutions"][0] == ("matrix tiles" if amx else "F(4x4, 3x3)")


def test_another_phi_of_the_same_shape(tmp_path, model, capsys):
    """Refused, and restored with the file's own Phi when told so."""
    picture(tmp_path / "a.png")
    other = tiny_network(tmp_path / "other.safetensors", seed=9)
    accepted(capsys, "measure", tmp_path / "a.png", "--model", other, "-o", tmp_path / "y.npz")
    line = refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model)
    assert "expected the Phi that" in line and "--use-file-phi" in line
    assert not (tmp_path / "out").exists()
    accepted(
        capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, "--use-file-phi",
        "--bits", "16",
    )  # fmt: skip
    net, own = lf.load(model), lf.load(other).op
    with torch.inference_mode():
        want = net(torch.from_numpy(_y(tmp_path / "y.npz")["y"]), op=own, size=(24, 32)).clamp(0, 1).numpy()
    np.testing.assert_allclose(images.load(tmp_path / "out" / "a.png", "y"), want[0], atol=1e-4)


def _zeros(*shape):
    return np.zeros(shape, np.float32)


BAD_FILES = {
    "no y": ({"phi": _zeros(M, 64)}, "expected the measurements as y"),
    "y twice": ({"y": _zeros(M, 1, 1), "y_0": _zeros(M, 1, 1)}, "got both"),
    "a gap": ({"y_0": _zeros(M, 1, 1), "y_2": _zeros(M, 1, 1)}, "without a gap"),
    "ratio": ({"y": _zeros(M + 1, 2, 2)}, "m = 16"),
    "axes swapped": ({"y": _zeros(2, 2, M)}, "m = 16"),
    "dimensions": ({"y": _zeros(M, 4)}, "expected shape (m, rows, columns)"),
    "empty": ({"y": _zeros(M, 0, 4)}, "expected shape (m, rows, columns)"),
    "NaN": ({"y": np.full((M, 1, 1), np.nan, np.float32)}, "got 16 NaN or infinite of 16"),
    "infinity": ({"y": np.array([np.inf] + [0] * (M - 1)).reshape(M, 1, 1)}, "got 1 NaN or infinite"),
    "beyond float32": ({"y": np.full((M, 1, 1), 1e300)}, "NaN or infinite"),
    "complex": ({"y": _zeros(M, 1, 1) * 1j}, "expected real numbers"),
    "text": ({"y": np.full((M, 1, 1), "a")}, "expected real numbers"),
    "objects": ({"y": np.full((M, 1, 1), None)}, "Python objects"),
    "block size": ({"y": _zeros(M, 1, 1), "block_size": 33}, "expected block_size 8"),
    "block size of another kind": ({"y": _zeros(M, 1, 1), "block_size": [8, 8]}, "expected block_size 8"),
    "ratio of Phi": ({"y": _zeros(M, 1, 1), "phi": _zeros(M + 1, 64)}, "expected Phi of shape (16, 64)"),
    "block size of Phi": ({"y": _zeros(M, 1, 1), "phi": _zeros(M, 81)}, "expected Phi of shape (16, 64)"),
    "NaN in Phi": ({"y": _zeros(M, 1, 1), "phi": np.full((M, 64), np.nan)}, "phi: expected finite"),
    "size": ({"y": _zeros(M, 2, 2), "size": [17, 16]}, "expected 3 x 2 blocks"),
    "size below zero": ({"y": _zeros(M, 1, 1), "size": [-8, 8]}, "expected positive integers"),
    "sizes": ({"y": _zeros(M, 1, 1), "size": _zeros(3, 2).astype(int)}, "shape (2,) or (1, 2)"),
    "float size": ({"y": _zeros(M, 1, 1), "size": [8.0, 8.0]}, "expected positive integers"),
    "path as a name": ({"y": _zeros(M, 1, 1), "name": "../escaped"}, "expected a plain file name"),
    "empty name": ({"y": _zeros(M, 1, 1), "name": ""}, "expected a plain file name"),
    "number of names": ({"y": _zeros(2, M, 1, 1), "name": "one"}, "expected 2 strings"),
    "name of another kind": ({"y": _zeros(M, 1, 1), "name": 5}, "expected 1 string"),
    "noise below zero": ({"y": _zeros(M, 1, 1), "noise": -0.1}, "noise: expected a number of at least 0"),
    "NaN for noise": ({"y": _zeros(M, 1, 1), "noise": np.nan}, "noise: expected a number of at least 0"),
    "noise beyond float32": ({"y": _zeros(M, 1, 1), "noise": 1e300}, "that fp32 holds, got 1e+300"),
    "channel": ({"y": _zeros(M, 1, 1), "channel": "X"}, "expected R, G, B or an empty string"),
    "half a colour image": ({"y": _zeros(2, M, 1, 1), "channel": ["R", "G"], "name": ["a", "a"]}, "channels R, G"),
    "two reds": ({"y": _zeros(3, M, 1, 1), "channel": ["R", "R", "B"], "name": ["a"] * 3}, "channels R, G and B"),
    "channels of different sizes": (
        {"y": _zeros(3, M, 1, 1), "channel": ["R", "G", "B"], "name": ["a"] * 3, "size": [[8, 8], [8, 8], [8, 7]]},
        "expected one size",
    ),
    "task": ({"y": _zeros(M, 1, 1), "task": "cassi"}, "expected task 'cs'"),
    "unknown task": ({"y": _zeros(M, 1, 1), "task": "ct"}, "y.npz: task: expected one of cs, sr, cassi, got 'ct'"),
    "long name": ({"y": _zeros(M, 1, 1), "name": "x" * 400}, "expected names of at most 255 bytes, got 404: 'xxx"),
    "long name of wide letters": ({"y": _zeros(M, 1, 1), "name": "ü" * 126}, "at most 255 bytes, got 256: 'ü"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_does_not_fit_is_refused(case, tmp_path, model, capsys):
    arrays, message = BAD_FILES[case]
    work = tmp_path / "work"
    work.mkdir()
    (work / "y.npz").touch()
    np.savez(work / "y.npz", **arrays)
    before = contents(work)
    line = refused(capsys, "restore", work / "y.npz", "-o", work / "out", "--model", model)
    assert message in line, line
    assert contents(work) == before and not (work / "out").exists()


def test_use_file_phi_without_phi(tmp_path, model, capsys):
    np.savez(tmp_path / "y.npz", y=_zeros(M, 1, 1))
    line = refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, "--use-file-phi")
    assert "key phi" in line


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "folder", "pickle"])
def test_a_damaged_measurement_file(damage, tmp_path, model, capsys):
    path = tmp_path / "y.npz"
    if damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("y = 1\n")
    elif damage == "truncated":
        np.savez(path, y=_zeros(4, M, 3, 3))
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "folder":
        path.mkdir()
    elif damage == "pickle":
        np.save(tmp_path / "o.npy", np.array([{"y": 1}]), allow_pickle=True)
        (tmp_path / "o.npy").rename(path)
    line = refused(capsys, "restore", path, "-o", tmp_path / "out", "--model", model)
    assert "y.npz" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["unknown", "truncated", "empty", "text", "foreign", "noise level"])
def test_a_damaged_network(damage, tmp_path, model, capsys):
    np.savez(tmp_path / "y.npz", y=_zeros(M, 1, 1))
    path = tmp_path / "weights.safetensors"
    if damage == "truncated":
        path.write_bytes(model.read_bytes()[:-100])
    elif damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("weights\n")
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(2)}, path)
    elif damage == "noise level":
        denoiser = lf.ResUNet(channels=(4, 8), blocks=1, noise_level=True)
        lf.save(lf.LoRun(lf.BlockCS.gaussian(0.25, BLOCK), denoiser, stages=2), path)
    name = "cs-99" if damage == "unknown" else path
    for command in (
        ["restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", name],
        ["evaluate", name, tmp_path],
        ["measure", tmp_path, "-o", tmp_path / "z.npz", "--model", name],
        ["info", name],
        ["demo", "--model", name, "-o", tmp_path / "out"],
    ):
        assert str(name) in refused(capsys, *command)
    assert not (tmp_path / "out").exists() and not (tmp_path / "z.npz").exists()


def test_outputs_that_cannot_be_written(tmp_path, model, capsys):
    picture(tmp_path / "a.png")
    np.savez(tmp_path / "y.npz", y=_zeros(M, 1, 1))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(capsys, "restore", tmp_path / "y.npz", "-o", out, "--model", model)
    for out in ("file/y.npz", "missing/y.npz", "folder.npz", "y.png"):
        refused(capsys, "measure", tmp_path / "a.png", "--model", model, "-o", tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(tmp_path, model, capsys, monkeypatch):
    picture(tmp_path / "a.png")
    out = tmp_path / "out"
    accepted(capsys, "measure", tmp_path / "a.png", "--model", model, "-o", tmp_path / "y.npz")
    accepted(capsys, "restore", tmp_path / "y.npz", "-o", out, "--model", model)
    before = contents(tmp_path)

    def full(_self, f, _format=None, **_options):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "no space left" in refused(capsys, "restore", tmp_path / "y.npz", "-o", out, "--model", model)

    def full_too(f, **_arrays):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_too)
    line = refused(capsys, "measure", tmp_path / "a.png", "--model", model, "-o", tmp_path / "y.npz")
    assert "no space left" in line
    assert contents(tmp_path) == before


BAD_PHI = {
    "missing file": (None, [], "no such file"),
    "suffix": (b"1 2 3", [], "expected a matrix file"),
    "transposed": (_zeros(64, 16), [], "transposed"),
    "not square": (_zeros(16, 60), [], "B*B a square number"),
    "another block size": (_zeros(16, 64), ["--block-size", "9"], "B*B = 81"),
    "a vector": (_zeros(64), [], "expected a matrix"),
    "NaN": (np.full((16, 64), np.nan), [], "NaN"),
    "objects": (np.full((16, 64), None), [], "expected"),
    "block size of zero": (_zeros(16, 64), ["--block-size", "0"], "at least 1"),
    "gaussian": (_zeros(16, 64), ["--gaussian"], "--ratio beside --gaussian"),
}


@pytest.mark.parametrize("case", BAD_PHI)
def test_a_phi_that_cannot_be_used(case, tmp_path, capsys):
    values, options, message = BAD_PHI[case]
    picture(tmp_path / "a.png")
    path = tmp_path / ("phi.txt" if isinstance(values, bytes) else "phi.npy")
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif values is not None:
        np.save(path, values, allow_pickle=True)
    line = refused(capsys, "measure", tmp_path / "a.png", "--phi", path, *options, "-o", tmp_path / "y.npz")
    assert message in line, line
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize(
    "content", [b"", b"MATLAB 5.0 MAT-file, broken", b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"]
)
def test_a_damaged_mat_file(content, tmp_path, capsys):
    picture(tmp_path / "a.png")
    (tmp_path / "phi.mat").write_bytes(content)
    line = refused(capsys, "measure", tmp_path / "a.png", "--phi", tmp_path / "phi.mat", "-o", tmp_path / "y.npz")
    assert "expected a complete .mat file" in line
    savemat(tmp_path / "phi.mat", {"A": _zeros(16, 64)})
    line = refused(capsys, "measure", tmp_path / "a.png", "--phi", tmp_path / "phi.mat", "-o", tmp_path / "y.npz")
    assert "variable 'phi'" in line and "got A" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells a machine without a GPU apart")
def test_a_mat_file_in_hdf5_without_h5py(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "a.png")
    (tmp_path / "phi.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    monkeypatch.setitem(sys.modules, "h5py", None)
    line = refused(capsys, "measure", tmp_path / "a.png", "--phi", tmp_path / "phi.mat", "-o", tmp_path / "y.npz")
    assert "expected h5py, got no such package: pip install" in line


def test_cuda_without_a_gpu(tmp_path, model, capsys):
    np.savez(tmp_path / "y.npz", y=_zeros(M, 1, 1))
    line = refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, "--device", "cuda")
    assert "CUDA" in line


def test_out_of_memory_is_told(tmp_path, model, capsys, monkeypatch):
    from lorun_fast.apps import restoring

    np.savez(tmp_path / "y.npz", y=_zeros(M, 1, 1))

    def exhausted(*_args, **_kwargs):
        return torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(restoring, "restore", exhausted)
    line = refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model)
    assert "--batch" in line

    def broken(*_args, **_kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(restoring, "restore", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["restore", str(tmp_path / "y.npz"), "-o", str(tmp_path / "out"), "--model", str(model)])


@pytest.mark.parametrize(
    ("option", "task"),
    [
        (("--sigma", "0.1"), "sr"),
        (("--edges", "reflect"), "sr"),
        (("--scale", "4"), "cassi"),
        (("--mask", "nofile.mat"), "cassi"),
        (("--cube", "mat"), "cassi"),
    ],
)
def test_options_of_other_tasks_are_refused(tmp_path, model, capsys, option, task):
    picture(tmp_path / "a.png")
    accepted(capsys, "measure", tmp_path / "a.png", "--model", model, "-o", tmp_path / "y.npz")
    line = refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, *option)
    assert f"{option[0]}: expected measurements of task {task!r} beside it, got 'cs'" in line
    line = refused(capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, "--key", "y")
    assert "--key: expected a .mat file beside it, got" in line
    assert not (tmp_path / "out").exists()


def test_originals_beside_the_measurements_stay(tmp_path, model, capsys, monkeypatch):
    picture(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path / "photos")
    accepted(capsys, "measure", ".", "--model", model, "-o", "y.npz")
    before = contents(tmp_path / "photos")
    line = refused(capsys, "restore", "y.npz", "-o", ".", "--model", model)
    assert "got . with a.png" in line
    assert contents(tmp_path / "photos") == before
    accepted(capsys, "restore", "y.npz", "-o", "restored", "--model", model)
    (tmp_path / "photos" / "a.png").unlink()
    for _ in range(2):  # what came of the measurements may be written again
        accepted(capsys, "restore", "y.npz", "-o", ".", "--model", model)


def test_a_network_with_nan_restores_nothing(tmp_path, model, capsys):
    net = lf.load(model)
    with torch.no_grad():
        net.denoiser.base.head.weight.fill_(float("nan"))
    lf.save(net, tmp_path / "nan.safetensors")
    picture(tmp_path / "a.png")
    accepted(capsys, "measure", tmp_path / "a.png", "--model", model, "-o", tmp_path / "y.npz")
    line = refused(
        capsys, "restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", tmp_path / "nan.safetensors"
    )
    assert "expected finite images, got NaN or infinite values" in line
    assert not list((tmp_path / "out").glob("*.png"))


def _shots(folder, phi, shapes, seed=0):
    """One measurement file per name, of so many blocks and without a name inside; the y of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ys = {name: rng.random((M, *blocks), dtype=np.float32) for name, blocks in shapes.items()}
    for name, y in ys.items():
        path = folder / name
        if path.suffix == ".mat":
            savemat(path, {"meas": y})
        elif path.suffix == ".npy":
            np.save(path, y)
        else:
            np.savez(path, y=y, phi=phi, block_size=BLOCK)
    return ys


def _sizes_of_calls(monkeypatch):
    """The shapes of y that the network is called with, as they come."""
    seen, real = [], restoring.restore

    def recorded(net, y, *args, **kwargs):
        seen.append(y.shape)
        return real(net, y, *args, **kwargs)

    monkeypatch.setattr(restoring, "restore", recorded)
    return seen


def test_a_folder_of_measurements(tmp_path, model, phi, capsys, monkeypatch):
    """Files of three kinds and two sizes: equal sizes share a batch, one summary over all."""
    shapes = {"a.npz": (2, 3), "b.npy": (1, 2), "c.mat": (2, 3), "d.npz": (2, 3)}
    ys = _shots(tmp_path / "ph", phi, shapes)
    (tmp_path / "ph" / "notes.txt").write_text("mine")
    (tmp_path / "ph" / ".hidden.npz").write_text("not mine")
    (tmp_path / "ph" / "below").mkdir()
    seen = _sizes_of_calls(monkeypatch)
    out = tmp_path / "out"
    command = ["restore", tmp_path / "ph", "-o", out, "--model", model, "--batch", 2, "--bits", 16]
    text = accepted(capsys, *command)
    assert seen == [(2, M, 2, 3), (1, M, 2, 3), (1, M, 1, 2)]
    assert f"4 images of 4 files into {out}" in text and text.count("images/s") == 1 and text.count("MiB") == 1
    assert sorted(contents(out)) == ["a.png", "b.png", "c.png", "d.png"]
    for name, y in ys.items():
        want = _restored(model, y[None], None)[0]
        np.testing.assert_allclose(images.load((out / name).with_suffix(".png"), "y"), want, atol=1e-4)
    before = contents(out)
    main([str(word) for word in [*command, "--tile", 40]])
    assert "skipped 1 files that are not measurements (.npz, .npy, .mat): notes.txt" in capsys.readouterr().err
    assert contents(out) == before  # images below a tile's side


def test_several_files_with_several_images(tmp_path, model, capsys, monkeypatch):
    """Gray and colour, files and a folder, some named twice: as each would be restored alone."""
    (tmp_path / "ph").mkdir()
    sizes = {"one": [(16, 16), (19, 30)], "two": [(16, 16), (16, 16), (19, 30)], "three": [(16, 16)]}
    for i, (name, shapes) in enumerate(sizes.items()):
        for k, shape in enumerate(shapes):
            picture(tmp_path / name / f"{name}{k}.png", *shape, mode="RGB", seed=10 * i + k)
        more = ("--colour", "channels") if name == "two" else ()
        accepted(capsys, "measure", tmp_path / name, "--model", model, "-o", tmp_path / "ph" / f"{name}.npz", *more)
        accepted(capsys, "restore", tmp_path / "ph" / f"{name}.npz", "-o", tmp_path / "alone", "--model", model)
    seen = _sizes_of_calls(monkeypatch)
    named = (tmp_path / "ph" / "two.npz", tmp_path / "ph", tmp_path / "ph" / "one.npz")
    text = accepted(capsys, "restore", *named, "-o", tmp_path / "out", "--model", model, "--batch", 4)
    assert "6 images of 3 files" in text
    assert sum(shape[0] for shape in seen) == 2 + 3 * 3 + 1
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_each_file_is_read_once_to_check_it_and_once_to_restore_it(tmp_path, model, phi, capsys, monkeypatch):
    """Memory does not grow with the number of files, and a single one is read only once."""
    rng = np.random.default_rng(0)
    (tmp_path / "ph").mkdir()
    for name in "ab":
        ys = {f"y_{i}": rng.random((M, 1, 1 + i % 2), dtype=np.float32) for i in range(4)}
        np.savez(tmp_path / "ph" / f"{name}.npz", **ys)
    read, real = [], measurements.Raw
    monkeypatch.setattr(measurements, "Raw", lambda path, key=None: read.append(path.name) or real(path, key))
    accepted(capsys, "restore", tmp_path / "ph", "-o", tmp_path / "out", "--model", model, "--batch", 2)
    assert read == ["a.npz", "b.npz"] * 2
    assert sorted(contents(tmp_path / "out")) == [f"{n}_{i}.png" for n in "ab" for i in range(4)]
    read.clear()
    accepted(capsys, "restore", tmp_path / "ph" / "a.npz", "-o", tmp_path / "out", "--model", model, "--batch", 2)
    assert read == ["a.npz"]


def test_names_of_several_files_do_not_collide(tmp_path, model, capsys):
    """A name that several files use gets the file's in front; others stay as they are."""
    y = np.zeros((M, 1, 1), np.float32)
    for folder, name in (("p", "y1"), ("p", "y2"), ("q", "shot"), ("r", "shot")):
        (tmp_path / folder).mkdir(exist_ok=True)
        named = {"name": ["a", f"own{name}"]} if folder == "p" else {}
        np.savez(tmp_path / folder / f"{name}.npz", y=np.stack([y, y]) if named else y, **named)
    np.save(tmp_path / "p" / "A.npy", y)
    np.savez(tmp_path / "p" / "z.npz", y=y, name="y1_a")
    accepted(capsys, "restore", *(tmp_path / f for f in "pqr"), "-o", tmp_path / "out", "--model", model)
    assert sorted(name.removesuffix(".png") for name in contents(tmp_path / "out")) == [
        "A", "owny1", "owny2", "shot_npz", "shot_npz_2", "y1_a_png", "y1_a_png_2", "y2_a",
    ]  # fmt: skip


BAD_FOLDERS = {
    "nothing": ([], "expected measurements (.npz, .npy, .mat) in"),
    "other files": (["notes.txt"], "got 1 other files"),
    "photographs": (["a.png", "b.jpg"], "`lorun-fast measure` makes them from photographs, `lorun-fast evaluate`"),
    "truncated": (["a.npz", "cut.npz", "z.npz"], "cut.npz"),
    "empty": (["a.npz", "empty.npy"], "empty.npy"),
    "broken .mat": (["a.npz", "broken.mat"], "broken.mat"),
    "another ratio": (["a.npz", "ratio.npz"], "ratio.npz: expected y of shape (m, rows, columns) with m = 16"),
    "another Phi": (["a.npz", "phi.npz"], "phi.npz: expected the Phi that"),
    "another task": (["a.npz", "task.npz"], "task.npz: expected task 'cs'"),
    "half a colour image": (["a.npz", "half.npz"], "half.npz: expected channels R, G and B"),
    "NaN": (["a.npz", "nan.npz"], "nan.npz: y: expected finite values"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_does_not_fit_is_refused_before_anything_is_written(case, tmp_path, model, phi, capsys):
    names, message = BAD_FOLDERS[case]
    folder = tmp_path / "ph"
    folder.mkdir()
    y = _zeros(M, 1, 1)
    special = {
        "ratio.npz": {"y": _zeros(M + 1, 1, 1)},
        "phi.npz": {"y": y, "phi": phi[::-1]},
        "task.npz": {"y": y, "task": "sr"},
        "half.npz": {"y": np.stack([y, y]), "name": ["a", "a"], "channel": ["R", "G"]},
        "nan.npz": {"y": y + np.nan},
    }
    for name in names:
        if name.endswith((".png", ".jpg")):
            picture(folder / name)
        elif name.endswith(".npz"):
            np.savez(folder / name, **special.get(name, {"y": y}))
        else:
            (folder / name).write_bytes(b"MATLAB 5.0 MAT-file, broken" if name == "broken.mat" else b"")
    if "cut.npz" in names:
        (folder / "cut.npz").write_bytes((folder / "a.npz").read_bytes()[:-100])
    before = contents(tmp_path)
    line = refused(capsys, "restore", folder, "-o", tmp_path / "out", "--model", model)
    assert message in line, line
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()
    if case == "photographs":  # and one of them by name
        assert "`lorun-fast measure`" in refused(capsys, "restore", folder / "a.png", "-o", tmp_path / "out")
    if len(names) > 1 and case != "photographs":  # the others are as they should be
        files = [folder / name for name in names if name in ("a.npz", "z.npz")]
        accepted(capsys, "restore", *files, "-o", tmp_path / "out", "--model", model)


def test_a_file_that_vanishes_during_the_work_is_one_line(tmp_path, model, phi, capsys, monkeypatch):
    _shots(tmp_path / "ph", phi, {f"{i}.npz": (1, 1) for i in range(5)})
    real = restoring.restore

    def restored(*args, **kwargs):
        (tmp_path / "ph" / "4.npz").unlink(missing_ok=True)
        return real(*args, **kwargs)

    monkeypatch.setattr(restoring, "restore", restored)
    line = refused(capsys, "restore", tmp_path / "ph", "-o", tmp_path / "out", "--model", model, "--batch", 1)
    assert "4.npz: no such file" in line
    written = contents(tmp_path / "out")
    assert "0.png" in written and all(data.endswith(b"IEND\xaeB`\x82") for data in written.values())


def test_the_first_file_chooses_the_network_of_all(tmp_path, capsys, monkeypatch):
    for name, ratio in (("cs-25", 0.25), ("cs-10", 0.1)):
        tiny_network(tmp_path / "weights" / f"{name}.safetensors", ratio=ratio)
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "weights")
    for i in range(3):
        picture(tmp_path / "photos" / f"{i}.png", seed=i)
        accepted(
            capsys, "measure", tmp_path / "photos" / f"{i}.png", "--ratio", "10", "-o", tmp_path / f"{i}.npz",
            *(("--gaussian", "--block-size", BLOCK) if i == 2 else ()),
        )  # fmt: skip
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    assert "cs-10" in accepted(capsys, "restore", *files, "-o", tmp_path / "out")
    accepted(capsys, "measure", tmp_path / "photos" / "0.png", "--ratio", "25", "-o", tmp_path / "25.npz")
    assert "as in cs-10" in refused(capsys, "restore", *files, tmp_path / "25.npz", "-o", tmp_path / "out")


def test_use_file_phi_of_several_files(tmp_path, model, capsys):
    """Each file's own Phi; files of one Phi may share a batch, others do not."""
    nets = [tiny_network(tmp_path / f"{i}.safetensors", seed=20 + i) for i in range(2)]
    for i, name in enumerate(("a", "b", "c")):
        picture(tmp_path / f"{name}.png", seed=i)
        accepted(capsys, "measure", tmp_path / f"{name}.png", "--model", nets[i % 2], "-o", tmp_path / f"{name}.npz")
    text = accepted(
        capsys, "restore", *(tmp_path / f"{n}.npz" for n in "abc"), "-o", tmp_path / "out", "--model", model,
        "--use-file-phi", "--batch", 3, "--bits", 16,
    )  # fmt: skip
    assert "and 1 more" in text
    net = lf.load(model)
    for i, name in enumerate(("a", "b", "c")):
        y = torch.from_numpy(_y(tmp_path / f"{name}.npz")["y"])
        with torch.inference_mode():
            want = net(y, op=lf.load(nets[i % 2]).op, size=(24, 32)).clamp(0, 1).numpy()[0]
        np.testing.assert_allclose(images.load(tmp_path / "out" / f"{name}.png", "y"), want, atol=1e-4)


def test_the_key_of_several_files_needs_a_mat_file(tmp_path, model, phi, capsys):
    _shots(tmp_path / "ph", phi, {"a.npz": (1, 1), "b.npz": (1, 1)})
    line = refused(capsys, "restore", tmp_path / "ph", "-o", tmp_path / "out", "--model", model, "--key", "meas")
    assert "--key: expected a .mat file beside it, got" in line
    _shots(tmp_path / "ph", phi, {"c.mat": (1, 1)})
    accepted(capsys, "restore", tmp_path / "ph", "-o", tmp_path / "out", "--model", model, "--key", "meas")


def test_restored_beside_the_measurements_of_a_folder(tmp_path, model, capsys):
    ph = tmp_path / "ph"
    for name in "ab":
        picture(ph / f"{name}.png")
        accepted(capsys, "measure", ph / f"{name}.png", "--model", model, "-o", ph / f"{name}.npz")
    line = refused(capsys, "restore", ph, "-o", ph, "--model", model)
    assert f"got {ph} with a.png" in line
    for name in "ab":
        (ph / f"{name}.png").unlink()
    for _ in range(2):
        accepted(capsys, "restore", ph, "-o", ph, "--model", model)


def test_only_what_the_command_wrote_is_replaced(tmp_path, model, capsys):
    """Whatever the folder and its age: the pictures may be the originals, or what somebody made of restored ones."""
    ph, out = tmp_path / "ph", tmp_path / "out"
    picture(ph / "a.png")
    command = ["restore", tmp_path / "y.npz", "--model", model, "-o"]
    accepted(capsys, "measure", ph, "--model", model, "-o", tmp_path / "y.npz")
    before = contents(ph)
    line = refused(capsys, *command, ph)
    assert f"(--overwrite replaces them), got {ph} with a.png" in line
    assert contents(ph) == before
    for _ in range(2):
        accepted(capsys, *command, out)
    shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy)
    (tmp_path / "copy" / "a.png").touch()
    accepted(capsys, *command, tmp_path / "copy")
    restored = (out / "a.png").read_bytes()
    picture(out / "a.png", seed=1)
    mine = (out / "a.png").read_bytes()
    refused(capsys, *command, out)
    assert (out / "a.png").read_bytes() == mine
    accepted(capsys, *command, out, "--overwrite")
    assert (out / "a.png").read_bytes() == restored


def test_a_name_that_restore_refuses_is_not_measured(tmp_path, capsys):
    for name in ("a:1.png", "what?.png"):
        picture(tmp_path / name)
        line = refused(capsys, "measure", tmp_path / name, "--ratio", "25", "--gaussian", "-o", tmp_path / "y.npz")
        assert f"{name}: name: expected a plain file name, got {name[:-4]!r}" in line
        sr = ("--gaussian", 1, "--scale", 2, "-o", tmp_path / "y.npz")
        assert refused(capsys, "measure", "sr", tmp_path / name, *sr) == line


def test_measurements_do_not_replace_what_they_are_made_with(tmp_path, capsys):
    picture(tmp_path / "a.png")
    np.savez(tmp_path / "phi.npz", phi=np.eye(16, 64, dtype=np.float32))
    before = contents(tmp_path)
    line = refused(capsys, "measure", tmp_path / "a.png", "--phi", tmp_path / "phi.npz", "-o", tmp_path / "phi.npz")
    assert "expected another file to write than those that are read" in line
    assert contents(tmp_path) == before
