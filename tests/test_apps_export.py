"""``lorun-fast export``: files that say what they take, checked against the network; what is refused in one line."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from apps_help import accepted, contents, refused, small_files, tiny_network
from cassi_help import tiny_network as tiny_cassi_network
from sr_help import tiny_sr_network

import lorun_fast as lf


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"{name} ")).removeprefix(name).strip()


def apart(text: str) -> float:
    return float(re.search(r"largest difference to the network here (\S+), in a batch of", text)[1])


@pytest.mark.filterwarnings("error")
def test_a_program_of_any_size(tmp_path, capsys):
    model, file = tiny_network(tmp_path / "cs.safetensors"), tmp_path / "cs.pt2"
    text = accepted(capsys, "export", model, "-o", file, "--size", "dynamic")
    assert row(text, "inputs") == "y (batch, 16, rows, columns)"
    assert row(text, "output") == "x (batch, 1, 8*rows, 8*columns)"
    assert str(file) in row(text, "file") and apart(text) < 1e-4
    y = torch.rand(3, 16, 2, 4)
    got, want = torch.export.load(file).module()(y), lf.load(model)(y)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_onnx_file_with_more_inputs(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    model, file = tiny_sr_network(tmp_path / "sr.safetensors"), tmp_path / "sr.onnx"
    np.save(tmp_path / "k.npy", np.full((2, 3), 1 / 6, np.float32))
    options = ["--size", 12, 18, "--scale", 3, "--kernel", tmp_path / "k.npy", "--inputs", "kernel", "sigma"]
    text = accepted(capsys, "export", model, "-o", file, *options, "--batch", 2, "--sigma", 0.1)
    assert "inputs   y (2, 3, 4, 6)\n         kernel (2, 3)\n         sigma ()\noutput   x (2, 3, 12, 18)\n" in text
    assert re.search(r"MiB, opset \d+", row(text, "file")) and apart(text) < 1e-4


def test_a_mask_tells_the_size(tmp_path, capsys):
    model, file = tiny_cassi_network(tmp_path / "cassi.safetensors"), tmp_path / "cassi.pt2"
    height, width = lf.load(model).op.mask.shape[-2:]
    text = accepted(capsys, "export", model, "-o", file)
    assert row(text, "output").endswith(f", {height}, {width})") and apart(text) < 1e-4
    assert "--size: expected" in refused(capsys, "export", model, "-o", file, "--size", height, width + 1)


def test_without_onnxruntime_the_file_is_not_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = tiny_network(tmp_path / "cs.safetensors")
    text = accepted(capsys, "export", model, "-o", tmp_path / "cs.onnx", "--size", 13, 8)
    assert row(text, "checked").startswith("not run here: pip install onnxruntime")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "net.txt", "--size", 8, 8], "-o: expected a name that ends in .onnx or .pt2, got"),
        (["-o", "net.pt2"], "expected --size H W or --size dynamic, got none"),
        (["-o", "net.pt2", "--size", 8], "--size: expected two whole numbers H W, or dynamic, got 8"),
        (
            ["-o", "net.pt2", "--size", 8, "dynamic"],
            "--size: expected two whole numbers H W, or dynamic, got 8 dynamic",
        ),
        (["-o", "net.pt2", "--size", 8, 0], "expected a whole number of at least 1, got '0'"),
        (["-o", "net.pt2", "--size", 8, 8, "--batch", "any"], "expected a whole number of at least 1, got 'any'"),
        (["-o", "net.pt2", "--size", 8, 8, "--inputs", "kernel"], "inputs: expected some of phi, got 'kernel'"),
        (["-o", "net.pt2", "--size", 8, 8, "--scale", 2], "--scale: expected a network for task 'sr', got"),
        (
            ["-o", "net.pt2", "--size", 8, 8, "--sigma", 0.1],
            "--sigma: expected a network that takes a noise level, got",
        ),
        (["-o", "net.pt2", "--size", 8, 8, "--opset", 18], "--opset: expected a file in .onnx, got"),
        (["-o", "none/net.pt2", "--size", 8, 8], "expected an existing folder for net.pt2, got none"),
    ],
)
def test_what_is_refused(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_network(tmp_path / "cs.safetensors")
    before = contents(tmp_path)
    assert message in refused(capsys, "export", "cs.safetensors", *options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_full_disk_leaves_nothing(suffix, tmp_path, capsys):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    model, file = tiny_network(tmp_path / "cs.safetensors"), tmp_path / f"net.{suffix}"
    before = contents(tmp_path)
    with small_files(9000):
        assert f"expected to write {file}, got: file too large" in refused(
            capsys, "export", model, "-o", file, "--size", 8, 8
        )
    assert contents(tmp_path) == before


def test_sizes_are_multiples_of_the_scale_and_kernels_one(tmp_path, capsys):
    model = tiny_sr_network(tmp_path / "sr.safetensors")
    np.save(tmp_path / "k.npy", np.ones((2, 3, 3), np.float32))
    start = ("export", model, "-o", tmp_path / "sr.pt2", "--size")
    assert "--size: expected multiples of the scale, 2, got 7 8" in refused(capsys, *start, 7, 8)
    line = refused(capsys, *start, 8, 8, "--kernel", tmp_path / "k.npy")
    assert "--kernel: expected a file of one kernel, got" in line and "with 2" in line


def test_without_onnx_the_extra_is_named(tmp_path, capsys, monkeypatch):
    model = tiny_network(tmp_path / "cs.safetensors")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "lorun_fast.interop.onnx", raising=False)
    line = refused(capsys, "export", model, "-o", tmp_path / "net.onnx", "--size", 8, 8)
    assert "pip install 'lorun-fast[onnx]'" in line
    assert not (tmp_path / "net.onnx").exists()
