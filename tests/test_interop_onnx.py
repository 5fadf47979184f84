"""Networks as ONNX files, run by onnxruntime: equal to rounding, for any batch; what cannot go is refused."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import export_help
import pytest
import torch
from export_help import KERNEL, restored
from optional_packages import interop_module, package
from torch import Tensor, nn

import lorun_fast as lf
from lorun_fast.interop import export as programs

bridge, onnx = interop_module("onnx")
onnxruntime = package("onnxruntime")


def run(path: Path, **feed: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (x,) = session.run(["x"], {name: t.numpy() for name, t in feed.items()})
    return torch.from_numpy(x)


def shapes(path: Path) -> dict[str, list]:
    graph = onnx.load(path).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.onnx"


def test_block_cs_for_any_batch(path):
    net = export_help.block_cs()
    bridge.export(net, torch.rand(1, 16, 2, 3), path, size=(13, 20))
    assert shapes(path) == {"y": ["batch", 16, 2, 3], "x": ["batch", 1, 13, 20]}
    for n in (1, 3):
        y = torch.rand(n, 16, 2, 3)
        close(run(path, y=y), restored(net, y, size=(13, 20)))


def test_super_resolution_for_any_size_kernel_and_noise(path):
    net = export_help.sr(stages=1)
    bridge.export(net, torch.rand(1, 3, 4, 5), path, inputs=("kernel", "sigma"), dynamic_size=True)
    assert shapes(path) == {
        "y": ["batch", 3, "rows", "columns"],
        "kernel": [5, 4],
        "sigma": [],
        "x": ["batch", 3, "3*rows", "3*columns"],
    }
    for n, rows, columns in ((1, 4, 5), (3, 5, 9), (1, 1, 2)):
        y, kernel = torch.rand(n, 3, rows, columns), KERNEL.flip(0)
        want = restored(net, y, op=lf.BlurDownsample(kernel, 3), sigma=0.1)
        close(run(path, y=y, kernel=kernel, sigma=torch.tensor(0.1)), want)


def test_a_kernel_per_sample_needs_a_fixed_batch(path):
    """With one: the operators below."""
    op = lf.BlurDownsample(torch.stack([KERNEL, KERNEL.flip(1)]), 3)
    with pytest.raises(ValueError, match="expected convolutions with a fixed number of groups"):
        bridge.export(export_help.sr(stages=1), torch.rand(2, 3, 4, 5), path, op=op, inputs="kernel")
    assert not path.exists()


def test_spectral_imaging_and_its_mask(path):
    net, mask = export_help.cassi(stages=1, data_step="prox"), torch.rand(12, 10)
    bridge.export(net, torch.rand(1, 12, 16), path, inputs="mask")
    assert shapes(path) == {"y": ["batch", 12, 16], "mask": [12, 10], "x": ["batch", 4, 12, 10]}
    for n in (1, 3):
        y = torch.rand(n, 12, 16)
        close(run(path, y=y, mask=mask), restored(net, y, op=lf.CASSI(mask, bands=4, step=2)))


def test_a_mask_per_sample(path):
    net, masks, y = export_help.cassi(stages=1, data_step="prox"), torch.rand(2, 1, 12, 10), torch.rand(2, 12, 16)
    op = lf.CASSI(masks, bands=4, step=2)
    bridge.export(net, y, path, op=op, inputs="mask")
    assert shapes(path) == {"y": ["batch", 12, 16], "mask": ["batch", 1, 12, 10], "x": ["batch", 4, 12, 10]}
    close(run(path, y=y, mask=masks), restored(net, y, op=op))
    more, y = torch.rand(3, 1, 12, 10), torch.rand(3, 12, 16)
    close(run(path, y=y, mask=more), restored(net, y, op=lf.CASSI(more, bands=4, step=2)))


def test_one_stage(path):
    stage, z = export_help.sr().denoiser[1], torch.rand(3, 3, 7, 10)
    bridge.export(stage, z[:1], path, sigma=0.0, inputs="sigma")
    assert shapes(path) == {"z": ["batch", 3, 7, 10], "sigma": [], "x": ["batch", 3, 7, 10]}
    close(run(path, z=z, sigma=torch.tensor(0.2)), stage(z, 0.2).detach())


class Steps(nn.Module):
    """Somebody's own network of the operators' steps."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, y):
        x = self.op.adjoint(y)
        return self.op.prox(self.op.gradient_step(x, y, 0.1), y, 0.3), self.op(x)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (lf.BlockCS.gaussian(0.25, 8), (2, 16, 2, 3)),
        (lf.CASSI(torch.rand(4, 6, 5), step=1), (2, 6, 8)),
        (lf.CASSI(torch.rand(6, 5), bands=3, step=0), (2, 6, 5)),
        (programs.without_fft(lf.BlurDownsample(torch.rand(2, 9, 1) / 9, 2)), (2, 3, 3, 4)),
    ],
    ids=["block_cs", "masks", "undispersed", "blurs"],
)
def test_operators_of_a_users_own_network(op, shape, path):
    torch.manual_seed(0)
    net, y = Steps(op), torch.rand(shape)
    bridge.save(torch.export.export(net, (y,)), path)
    found = onnxruntime.InferenceSession(path).run(["x_0", "x_1"], {"y": y.numpy()})
    for got, want in zip(found, net(y), strict=True):
        close(torch.from_numpy(got), want)


def test_the_fft_has_a_way_around_it(path):
    program = torch.export.export(Steps(lf.BlurDownsample(KERNEL, 2)), (torch.rand(1, 3, 4, 5),))
    path.write_text("before")
    with pytest.raises(ValueError, match="program: expected real numbers, which ONNX holds, got torch") as caught:
        bridge.save(program, path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_a_shipped_network(path):
    net = lf.load_pretrained("cs-25").with_stages([4]).eval()
    y = net.op(torch.rand(2, 1, 40, 50)).detach()
    bridge.export(net, y[:1], path, size=(40, 50))
    close(run(path, y=y), restored(net, y, size=(40, 50)))


def test_complex_numbers_are_refused(path):
    """torch.onnx would write a file whose y is real, or has one axis more than it says."""

    class Fourier(lf.SensingOperator):
        def forward(self, x):
            return torch.fft.fft2(x)

        def adjoint(self, y, size=None):
            return torch.fft.ifft2(y, norm="forward").real

    net = lf.LoRun(Fourier(), lf.ResCNN(channels=4, blocks=0), stages=1)
    with pytest.raises(ValueError, match=r"expected real numbers, which ONNX holds, got torch\.complex64 in y"):
        bridge.export(net, net.op(torch.rand(2, 1, 8, 8)), path)
    assert not path.exists()


@pytest.fixture
def smallest() -> torch.export.ExportedProgram:
    net = export_help.tiny(lf.BlockCS.gaussian(0.25, 8), 1, lf.ResCNN(channels=4, blocks=0), stages=1)
    return programs.program(net, torch.rand(1, 16, 2, 3))


def test_a_file_says_nothing_of_the_machine_and_the_exporter_nothing_at_all(smallest, path, capfd, recwarn):
    recwarn.clear()
    bridge.save(smallest, path)
    assert capfd.readouterr() == ("", "") and not recwarn.list
    assert not re.search(rb"\.py|/[a-z]+/[a-z]+/", path.read_bytes())


def test_a_version_that_torch_does_not_write(smallest, path):
    with pytest.raises(ValueError, match=r"opset: expected a version that torch\.onnx writes, such as \d+, got 3"):
        bridge.save(smallest, path, opset=3)
    assert not list(path.parent.iterdir())


def test_paths_are_looked_at_first(tmp_path):
    with pytest.raises(IsADirectoryError, match="expected a file to write, found a folder"):
        bridge.export(None, None, tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder to write into, found no"):
        bridge.save(None, tmp_path / "none" / "net.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "lorun_fast.interop.onnx")
    with pytest.raises(ImportError, match=rf"needs the package {missing}, .*: pip install 'lorun-fast\[onnx\]'"):
        importlib.import_module("lorun_fast.interop.onnx")
