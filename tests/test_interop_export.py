"""Programs of torch's own ops: every op's definition, networks of every task, and where there is no lorun_fast."""

from __future__ import annotations

import subprocess
import sys

import export_help
import pytest
import torch
from export_help import KERNEL, restored
from memory_help import _CLOSE, FAMILIES, Draw
from own_operator_help import Inpainting
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import lorun_fast as lf
from lorun_fast import adapters, operators
from lorun_fast.interop import export
from lorun_fast.ops._library import SCHEMAS

# Runs a program where an import of lorun_fast fails.
ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorun_fast":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
import torch

program, y, x = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(y)), x)
assert not any(name.startswith("lorun_fast") for name in sys.modules)
"""


def _fft():
    draw = torch.randn
    x, y, rho = draw(2, 3, 12, 8), draw(2, 3, 6, 4), torch.rand(2, 3)
    for kernel in (torch.rand(5, 3), torch.rand(2, 17, 15)):
        yield "blur_downsample_fft", (x, kernel, 2)
        yield "blur_downsample_fft_adjoint", (y, kernel, 2)
        yield "blur_downsample_fft_descend", (x, y, kernel, rho, 2)
        yield "blur_downsample_fft_step", (x, y, kernel, rho, 2)
        yield "blur_downsample_fft_grad_kernel", (x, y, *kernel.shape[-2:], 2, kernel.ndim == 3)


def _lora(form: str):
    draw = torch.randn
    geometry = (0.5, [1, 1], [1, 1], [1, 1], 1)
    x, y, each = draw(2, 4, 6, 7), draw(2, 6, 6, 7), torch.tensor([2, 0])

    def layer(*shape, transposed=False):
        factors = adapters.factor_shapes(shape, 2, form, transposed=transposed)
        return draw(shape), [draw(3, *s) for s in factors]

    (first, (down, up)), (second, (down2, up2)) = layer(6, 4, 3, 3), layer(4, 6, 3, 3)
    bias, other = draw(6), draw(4)
    wide, factors = layer(4, 6, 3, 3, transposed=True)
    for stage, d, u, d2, u2 in ((each, down, up, down2, up2), (None, down[1], up[1], down2[1], up2[1])):
        layers = (first, bias, d, u, second, other, d2, u2, stage)
        yield "lora_conv2d", (x, first, bias, d, u, stage, y, *geometry, "gelu", False, [0, 0])
        yield (
            "lora_conv2d_backward",
            (y, x, first, bias, d, u, stage, None, *geometry, "silu", False, [0, 0], [True] * 5),
        )
        yield "lora_residual_block", (x, *layers, x, 1.0, 0.5)
        yield "lora_residual_block_backward", (x, x, *layers, 1.0, 0.5, [True] * 9)
    yield "lora_conv2d", (x, wide, None, *factors, each, None, 0.5, [2, 2], [1, 1], [1, 1], 1, None, True, [1, 0])
    yield "lora_merge_stage", ([first, second], [down, down2], [up, up2], [1.0, 0.5], [False, False], 1)
    linear, down, up = draw(3, 4), draw(3, 2, 4), draw(3, 3, 2)
    yield "lora_linear", (draw(2, 5, 4), linear, draw(3), down, up, each, draw(2, 5, 3), 0.5, "relu")
    yield "lora_linear_backward", (
        draw(2, 5, 3), draw(2, 5, 4), linear, draw(3), down, up, each, None, 0.5, "gelu", [True] * 5
    )  # fmt: skip


def _fused():
    draw = torch.randn
    yield "fused_conv2d", (draw(2, 64, 6, 7), draw(64, 64, 3, 3), draw(64), draw(2, 64, 6, 7), True)


def _masks():
    draw = torch.randn
    x, y, rho = draw(2, 4, 5, 7), draw(2, 5, 13), torch.rand(2, 1)
    for mask in (draw(2, 1, 5, 7), draw(2, 4, 5, 7)):
        yield "cassi", (x, mask, 2)
        yield "cassi_adjoint", (y, mask, 4, 2)
        yield "cassi_step", (x, y, mask, rho, torch.rand_like(y), 2, True)
        yield "cassi_grad_mask", (x, y, 2, mask.shape[1] > 1, True)
        yield "cassi_prox_weight", (mask, torch.rand(2), 4, 2)


CALLS = {name: lambda name=name: FAMILIES[name](Draw(3)) for name in FAMILIES}
CALLS |= {
    "fft": _fft,
    "a mask per sample": _masks,
    "loralib": lambda: _lora("loralib"),
    "peft": lambda: _lora("peft"),
    "fused": _fused,
}


class Calls(nn.Module):
    """Several ops, whose arguments are the tensors of forward()."""

    def __init__(self, calls):
        super().__init__()
        self.names = [name for name, _ in calls]
        leaves, self.spec = pytree.tree_flatten([args for _, args in calls])
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = tuple(leaves[i] for i in self.places)
        self.rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors):
        leaves = list(self.rest)
        for place, t in zip(self.places, tensors, strict=True):
            leaves[place] = t
        calls = zip(self.names, pytree.tree_unflatten(leaves, self.spec), strict=True)
        return [getattr(torch.ops.lorun_fast, name)(*args) for name, args in calls]


def ours(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "lorun_fast" in str(node.target)]


@pytest.mark.parametrize("family", CALLS)
def test_a_program_has_every_ops_definition(family):
    torch.manual_seed(0)
    module = Calls(list(CALLS[family]()))
    with torch.no_grad():
        program = torch.export.export(module, module.tensors)
        assert ours(program)
        found = export.portable(program)
        assert not ours(found)
        pairs = zip(module.names, found.module()(*module.tensors), module(*module.tensors), strict=True)
    for name, got, want in pairs:
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            close = max(_CLOSE.get(t.dtype, 0) for t in (*module.tensors, a))
            assert not a.numel() or (a - b).abs().max() <= close * (1 + b.abs().max()), name


def test_no_op_is_left_out():
    assert {name for calls in CALLS.values() for name, _ in calls()} == set(SCHEMAS)
    assert {op._schema.name.split("::")[1] for op in export.decompositions()} == set(SCHEMAS)


def test_a_users_own_network_keeps_its_dynamic_sizes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.op = lf.BlurDownsample(KERNEL, 2)

        def forward(self, x, y):
            return torch.relu(self.op.gradient_step(x, y, 0.5))

    net, op = Net(), lf.BlurDownsample(KERNEL, 2)
    batch, rows = Dim("batch"), Dim("rows")
    shapes = {"x": {0: batch, 2: 2 * rows}, "y": {0: batch, 2: rows}}
    x = torch.rand(2, 3, 12, 8)
    found = export.portable(torch.export.export(net, (x, op(x)), dynamic_shapes=shapes))
    assert not ours(found)
    for x in (torch.rand(5, 3, 8, 8), torch.rand(1, 3, 2, 8)):
        torch.testing.assert_close(found.module()(x, op(x)), net(x, op(x)))


def test_an_operator_of_ones_own(monkeypatch):
    monkeypatch.setitem(operators.OPERATORS, "Inpainting", Inpainting)
    net = lf.LoRun(Inpainting((torch.rand(12, 8) > 0.5).float()), lf.ResUNet(1, 1, (4, 8), 1), stages=2)
    y = net.op(torch.rand(3, 1, 12, 8))
    program = export.program(net.eval(), y[:1])
    assert not ours(program)
    torch.testing.assert_close(program.module()(y), restored(net, y), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="inputs: expected some of none, got 'mask'"):
        export.program(net, y, inputs="mask")


@pytest.mark.parametrize("learn", [False, True])
def test_phi_is_looked_at_before_it_is_traced(learn):
    """A network as it comes from a file: with orthonormal rows its program factorises nothing, with others it does."""
    phi = lf.BlockCS.gaussian(0.25, 8).phi
    for rows, factorises in ((phi, False), (2 * phi, True)):
        net = export_help.tiny(lf.BlockCS(rows, 8, learn=learn), 1, data_step="prox")
        y = torch.rand(2, 16, 2, 3)
        program = export.program(net, y)
        assert any("cholesky" in str(node.target) for node in program.graph.nodes) == factorises
        torch.testing.assert_close(program.module()(y), restored(net, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "step"),
    [(export_help.block_cs, "gradient"), (export_help.block_cs, "prox"), (export_help.cassi, "prox")],
)
def test_a_network_for_any_batch(make, step):
    net = make(data_step=step)
    y = torch.rand(3, 16, 2, 3) if net.op.task == "cs" else torch.rand(3, 12, 16)
    program = export.program(net, y[:1])
    assert not ours(program)
    assert list(export.dimensions(program).values()) == ["batch"]
    for given in (y, y[:1]):
        torch.testing.assert_close(program.module()(given), restored(net, given), rtol=1e-4, atol=1e-5)


def test_super_resolution_for_any_size_kernel_and_noise():
    net = export_help.sr()
    other = lf.BlurDownsample(KERNEL.flip(0), 3)
    program = export.program(net, torch.rand(1, 3, 8, 7), inputs=("kernel", "sigma"), dynamic_size=True)
    assert not any(node.meta["val"].is_complex() for node in program.graph.nodes if _is_tensor(node))
    assert sorted(export.dimensions(program).values()) == ["batch", "columns", "rows"]
    for shape, sigma in (((3, 3, 5, 9), 0.1), ((1, 3, 1, 2), 0.0)):
        y = torch.rand(shape)
        got = program.module()(y, kernel=other.kernel, sigma=torch.tensor(sigma))
        torch.testing.assert_close(got, restored(net, y, op=other, sigma=sigma), rtol=1e-4, atol=1e-5)


def _is_tensor(node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def test_a_kernel_and_a_noise_level_per_sample():
    net = export_help.sr(stages=1)
    op = lf.BlurDownsample(KERNEL[None], 3)
    program = export.program(net, torch.rand(1, 3, 4, 5), op=op, inputs=("sigma", "kernel"), sigma=torch.tensor([0.1]))
    kernels, y, sigma = torch.stack([KERNEL, KERNEL.flip(0), KERNEL.flip(1)]), torch.rand(3, 3, 4, 5), torch.rand(3)
    got = program.module()(y, sigma=sigma, kernel=kernels)
    want = restored(net, y, op=lf.BlurDownsample(kernels, 3), sigma=sigma)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "scale", "size"), [((5, 4), 2, (6, 7)), ((2, 9, 11), 3, (3, 2)), ((1, 1), 3, (1, 5))]
)
def test_the_proximal_step_in_real_arithmetic(kernel, scale, size):
    torch.manual_seed(0)
    op = lf.BlurDownsample(torch.rand(kernel, dtype=torch.float64) / 10, scale)
    x = torch.rand(2, 3, *(scale * side for side in size), dtype=torch.float64)
    y, mu = torch.rand(2, 3, *size, dtype=torch.float64), torch.rand(2, 3, 1, 1, dtype=torch.float64) + 0.01
    real = export.without_fft(op)
    torch.testing.assert_close(real.prox(x, y, mu), op.prox(x, y, mu), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(real(x), op(x), rtol=1e-10, atol=1e-10)


def test_one_stage_and_an_image_size():
    net = export_help.block_cs()
    z = torch.rand(3, 1, 13, 10)
    program = export.program(net.denoiser[1], z[:1], dynamic_size=True)
    torch.testing.assert_close(program.module()(z), net.denoiser[1](z).detach(), rtol=1e-4, atol=1e-5)
    y = net.op(z)
    program = export.program(net, y, size=(13, 10), dynamic_batch=False)
    torch.testing.assert_close(program.module()(y), restored(net, y, size=(13, 10)), rtol=1e-4, atol=1e-5)


def test_an_optimized_network_becomes_plain_again():
    net = export_help.tiny(lf.BlockCS.gaussian(0.25, 8), 1, lf.ResCNN(channels=8, blocks=1))
    fast, y = net.optimize(dtype=torch.float32, convolutions="winograd"), torch.rand(2, 16, 2, 2)
    program = export.program(fast, y)
    assert not ours(program)
    torch.testing.assert_close(program.module()(y), restored(net, y), rtol=1e-3, atol=1e-4)


def test_the_program_runs_where_lorun_fast_cannot_be_imported(tmp_path):
    net = export_help.block_cs()
    y = torch.rand(3, 16, 2, 3)
    portable = export.program(net, y)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in portable.state_dict.values())  # what is saved
    program, given, found = (tmp_path / name for name in ("net.pt2", "y.pt", "x.pt"))
    torch.export.save(portable, program)
    torch.save(y, given)
    subprocess.run([sys.executable, "-c", ALONE, program, given, found], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(found), restored(net, y), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    net, y = export_help.sr(), torch.rand(2, 3, 4, 5)
    several = lf.BlurDownsample(torch.stack([KERNEL, KERNEL]), 3)
    with pytest.raises(TypeError, match="net: expected a LoRun or a stage of a staged denoiser, got ResUNet"):
        export.program(net.denoiser.base, y)
    with pytest.raises(ValueError, match="inputs: expected some of sigma, kernel, got 'mask'"):
        export.program(net, y, inputs="mask")
    with pytest.raises(ValueError, match="kernel: expected one for all samples, or dynamic_batch=False, got one per"):
        export.program(net, y, op=several)
    with pytest.raises(ValueError, match="sigma: expected one for all samples, or dynamic_batch=False, got one per"):
        export.program(net, y, sigma=torch.rand(2))
    with pytest.raises(ValueError, match=r"size: expected None beside dynamic_size=True, got \(12, 15\)"):
        export.program(net, y, size=(12, 15), dynamic_size=True)
    with pytest.raises(ValueError, match="dynamic_size: expected False for CASSI"):
        export.program(export_help.cassi(), torch.rand(1, 12, 16), dynamic_size=True)
    with pytest.raises(ValueError, match="op, size: expected None beside a stage, got BlurDownsample and None"):
        export.program(net.denoiser[0], y, op=several)
    with pytest.raises(ValueError, match="op: expected an operator for task 'sr', got BlockCS"):
        export.program(net, y, op=lf.BlockCS.gaussian(0.25, 8))
    with pytest.raises(ValueError, match="net: expected its weights, got no values for"):
        export.program(net.to("meta"), y)
    with pytest.raises(TypeError, match=r"program: expected an ExportedProgram .*, got LoRun"):
        export.portable(net)
    with pytest.raises(TypeError, match="op: expected a SensingOperator, got Tensor"):
        export.without_fft(y)


def test_a_third_librarys_op_is_named():
    with torch.library._scoped_library("elsewhere", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        torch.library.register_fake("elsewhere::twice", torch.empty_like, lib=library)

        class Net(nn.Module):
            def forward(self, x):
                return torch.ops.elsewhere.twice(lf.functional.block_cs(x, PHI, block_size=2))

        program = torch.export.export(Net(), (torch.rand(1, 1, 4, 4),))
        with pytest.raises(
            ValueError, match=r"torch's own ops and lorun_fast's, got elsewhere\.twice\.default as well"
        ):
            export.portable(program)


PHI = torch.eye(4)[:2]


def test_a_denoiser_that_cannot_be_traced_is_an_error_in_one_line():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, z):
            return self.conv(z) if z.sum() > 0 else z

    net = export_help.tiny(lf.BlockCS.gaussian(0.25, 8), 1, Asks())
    with pytest.raises(ValueError, match=r"net: expected a network that torch\.export can trace, got ") as caught:
        export.program(net, torch.rand(1, 16, 2, 2))
    assert "\n" not in str(caught.value)
