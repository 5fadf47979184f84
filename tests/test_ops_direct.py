"""The short way from Python to an op's kernel (ops/_direct.py) gives what the registered op gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lorun_fast as lf
from lorun_fast import functional as F
from lorun_fast.ops._backends import use_backend
from lorun_fast.ops._direct import direct_call

OPS = torch.ops.lorun_fast


def problem(**options):
    x, mask = torch.rand(2, 3, 4, 9, **options), torch.rand(4, 9, **options)
    return x, torch.rand(2, 4, 13, **options), mask, torch.tensor([0.3], **options)


def both_ways(run):
    """run(step), with the direct call and with the registered op, under everything that the two may differ in."""
    return [
        run(lambda x, y, m, r: F.cassi_step(x, y, m, r, step=2)),
        run(lambda x, y, m, r: OPS.cassi_step(x, y, m, r, None, 2, False)[0]),
    ]


def equal(results):
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_results_and_gradients_are_the_registered_ops():
    def run(step):
        leaves = [t.clone().requires_grad_() for t in problem_]
        out = step(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    problem_ = problem(dtype=torch.float64)
    for a, b in zip(*both_ways(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_a_graph_is_built_only_where_a_gradient_is_asked_for():
    x, y, mask, rho = problem()
    assert F.cassi_step(x, y, mask, rho, step=2).grad_fn is None
    asked = rho.requires_grad_()
    assert "cassi_step" in F.cassi_step(x, y, mask, asked, step=2).grad_fn.name()
    with torch.no_grad():
        assert not F.cassi_step(x, y, mask, asked, step=2).requires_grad
    with torch.inference_mode():
        assert F.cassi_step(x, y, mask, asked, step=2).is_inference()


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_changes_nothing(grad):
    x, y, mask, rho = problem()
    x.requires_grad_(grad)

    def run(step):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = step(x, y, mask, rho)
        assert out.dtype == torch.float32
        return [out, *(torch.autograd.grad(out.sum(), x) if grad else ())]

    equal(both_ways(run))


def test_modes_see_the_op():
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, y, mask, rho = problem()
    with Mode():
        F.cassi_step(x, y, mask, rho, step=2)
        F.cassi_step(x.requires_grad_(), y, mask, rho, step=2)
    assert seen.count("lorun_fast.cassi_step.default") == 2


def test_formulas_get_the_arguments_and_the_context():
    def setup(ctx, inputs, output):
        x, phi, ctx.block_size = inputs
        assert output.shape == (1, 16, 1, 1) and ctx.needs_input_grad[:2] == (True, False)
        ctx.save_for_backward(x, phi)

    def backward(ctx, grad):
        x, phi = ctx.saved_tensors
        return 7 * (phi.mT @ grad.flatten()).view(x.shape) + ctx.block_size, None, None

    x, phi, grad = torch.rand(1, 1, 4, 4, requires_grad=True), torch.rand(16, 16), torch.rand(1, 16, 1, 1)
    out = direct_call(OPS.block_cs.default, backward, setup)(x, phi, 4)
    torch.testing.assert_close(out.flatten(), phi @ x.detach().flatten())
    (got,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(got.flatten(), 7 * (phi.mT @ grad.flatten()) + 4)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_narrows_what_the_op_says(enabled):
    """x to bf16, while weight and factors stay wide, and nothing is narrowed below."""
    x, weight = torch.rand(2, 4, 5, 6, requires_grad=True), torch.rand(3, 4, 3, 3)
    down, up = torch.rand(2, 4, 3, 3, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    rest = (None, None, 1.0, [1, 1], [1, 1], [1, 1], 1, "silu", False, [0, 0])

    def run(conv):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = conv()
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
            return [out, *torch.autograd.grad(out.sum(), (x, down, up))]

    equal(
        [
            run(lambda: F.lora_conv2d(x, weight, None, down, up, padding=1, activation="silu")),
            run(lambda: OPS.lora_conv2d(x, weight, None, down, up, *rest)),
        ]
    )


def test_an_op_whose_result_is_a_list():
    x, weight, down, up = (torch.rand(s) for s in ((1, 2, 4, 4), (3, 2, 1, 1), (1, 2, 1, 1), (3, 1)))
    out = F.lora_conv2d(x.requires_grad_(), weight, None, down, up.requires_grad_())
    found = torch.autograd.grad(out.sum(), (x, up), create_graph=True)
    with pytest.raises(RuntimeError, match="lora_conv2d: expected one differentiation, got a second"):
        found[0].sum().backward()


def test_function_transforms():
    """grad, vjp, jvp, jacrev and vmap of torch.func, on a step and through a layer."""
    x, y, mask, rho = problem(dtype=torch.float64)

    def step(a):
        return F.cassi_step(a, y, mask, rho, step=2)

    leaf = x.clone().requires_grad_()
    out = step(leaf)
    (expected,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda a: step(a).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vjp(step, x)[1](2 * out.detach())[0], expected)
    tangent = torch.rand_like(x)
    torch.testing.assert_close(torch.func.jvp(step, (x,), (tangent,))[1], step(x + tangent) - step(x))
    jacobian = torch.func.jacrev(lambda a: F.cassi(a, mask, step=2))(x[:1])
    torch.testing.assert_close(torch.einsum("abcdefg,defg->abc", jacobian, x[:1]), F.cassi(x[:1], mask, step=2))
    torch.testing.assert_close(
        torch.func.vmap(lambda a: F.cassi(a[None], mask, step=2)[0])(x), F.cassi(x, mask, step=2)
    )

    z, weight, down, up = (
        torch.rand(s, dtype=torch.float64) for s in ((1, 2, 4, 4), (3, 2, 1, 1), (1, 2, 1, 1), (3, 1))
    )

    def layer(up):
        return F.lora_conv2d(z, weight, None, down, up, activation="relu").square().sum()

    leaf = up.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(layer)(up), torch.autograd.grad(layer(leaf), leaf)[0])


def _convolutions(inplace: bool) -> nn.Module:
    relu = nn.ReLU(inplace=inplace)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), relu, nn.ConvTranspose2d(8, 8, 2, stride=2), relu)


def _products(inplace: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=inplace), nn.Linear(16, 8))


@pytest.mark.parametrize("backend", ["auto", "aten", "winograd", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("denoiser", "shape"), [(_convolutions, (2, 8, 6, 6)), (_products, (2, 5, 8))])
def test_what_follows_a_layer_may_work_in_place(denoiser, shape, dtype, backend):
    z, found = torch.randn(shape, dtype=dtype), []
    for inplace in (True, False):
        torch.manual_seed(0)
        staged = lf.adapt(denoiser(inplace), stages=2).to(dtype)
        for p in staged.adapter_parameters():
            nn.init.normal_(p, std=0.1)
        with use_backend(backend):
            out = staged(z, stage=1)
            out.square().sum().backward()
        found.append([out, *(p.grad for p in staged.adapter_parameters())])
    equal(found)


def test_results_of_operators_may_be_changed_in_place():
    y = torch.rand(1, 1, 8, 8, requires_grad=True)
    for op in (lf.BlurDownsample(torch.rand(9, 9), 2, method="fft"), lf.BlurDownsample(torch.rand(3, 3), 2)):
        op.adjoint(y).mul_(2).sum().backward()
        grad, y.grad = y.grad, None
        torch.testing.assert_close(grad, 2 * op(torch.ones_like(op.adjoint(y))))


def test_compiled_function_transforms():
    op = lf.BlockCS.gaussian(0.25, 8)
    conv = lf.LoRAConv2d(1, 4, 3, padding=1, stages=1, rank=1)
    nn.init.normal_(conv.up)
    x, v = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
    for f in (op, conv, lambda x: conv(op.adjoint(op(x)))):

        def tangent(x, v, f=f):
            return torch.func.jvp(f, (x,), (v,))[1]

        def gradient(x, v, f=f):
            return torch.func.grad(lambda x: (f(x) ** 2).sum())(x)

        for transformed in (tangent, gradient):
            expected = transformed(x, v)
            assert expected.abs().max() > 0.1
            compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x, v), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_forward_mode(learned):
    """Below autograd a tangent would be dropped without an error."""
    x, y, mask, rho = problem(dtype=torch.float64)
    mask.requires_grad_(learned)
    tangent = torch.rand_like(x)
    with forward_ad.dual_level():
        moved = F.cassi_step(forward_ad.make_dual(x, tangent), y, mask, rho, step=2)
        got = forward_ad.unpack_dual(moved).tangent
    expected = F.cassi_step(x + tangent, y, mask, rho, step=2) - F.cassi_step(x, y, mask, rho, step=2)
    torch.testing.assert_close(got, expected)

    conv = lf.LoRAConv2d(4, 4, 3, padding=1, stages=1, rank=1, dtype=torch.float64).requires_grad_(learned)
    z, tangent = torch.rand(2, 1, 4, 6, 6, dtype=torch.float64)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(conv(forward_ad.make_dual(z, tangent))).tangent
    torch.testing.assert_close(got, conv(z + tangent) - conv(z))


class TestOpsInPython:
    """They are called as functions, unless somebody wants to see the op."""

    @staticmethod
    def call():
        x, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 3, 3, 3)
        down, up = torch.randn(2, 1, 3, 3, 3), torch.randn(2, 6, 1)
        return lambda x=x, down=down: F.lora_conv2d(x, weight, None, down, up, stage=torch.tensor([1, 0]), padding=1)

    @pytest.fixture
    def ops(self):
        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        seen = []
        self.mode = Seen()
        return seen

    def test_a_dispatch_mode_sees_them(self, ops):
        call = self.call()
        want = call()
        with self.mode:
            got = call()
        assert any("lorun_fast.lora_conv2d" in name for name in ops)
        assert torch.equal(got, want)

    def test_so_does_a_subclass(self):
        class Sub(torch.Tensor):
            @staticmethod
            def __new__(cls, inner):
                made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
                made.inner = inner
                return made

            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                seen.append(str(func))
                return func(*[a.inner if isinstance(a, Sub) else a for a in args], **(kwargs or {}))

        seen = []
        call, x = self.call(), torch.randn(2, 3, 4, 5)
        assert torch.equal(call(Sub(x)), call(x))
        assert seen == ["lorun_fast.lora_conv2d.default"]

    def test_else_the_dispatcher_does_not(self):
        call = self.call()
        activities = [torch.profiler.ProfilerActivity.CPU]
        down = torch.randn(2, 1, 3, 3, 3, requires_grad=True)
        with torch.profiler.profile(activities=activities) as seen:
            torch.autograd.grad(call(down=down).sum(), down)
        names = {event.key for event in seen.key_averages()}
        assert "aten::convolution" in names and not any("lorun_fast::" in name for name in names)
