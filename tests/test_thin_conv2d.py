"""fused_conv2d from or to few channels on a CPU, by kernels of its own with gradients, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from threads_help import check_threads
from torch.library import opcheck
from variants_help import check_under, lesser_variants

from lorun_fast import _native
from lorun_fast.functional import fused_conv2d, thin_weight_gradient
from lorun_fast.ops.fused_conv2d import is_thin

op = torch.ops.lorun_fast.thin_conv2d.default
gradient_op = torch.ops.lorun_fast.thin_weight_gradient.default

CHANNELS = [(1, 8), (1, 16), (3, 40), (4, 24), (8, 1), (16, 1), (48, 1), (16, 2), (24, 3), (32, 3), (16, 4)]
# N, H, W: one pixel, ragged ends, a whole step of pixels and one more or less, rows for more than one thread, no images
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
IMAGES = [(1, 1, 1), (2, 9, 33), (1, 5, 16), (1, 3, 15), (1, 2, 17), (1, 40, 100), (0, 4, 4)]


def problem(channels, out, n, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    return draw(n, channels, height, width), draw(out, channels, 3, 3), draw(out), draw(n, out, height, width)


def direct(x, weight, bias=None, activation=None, residual=None):
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    y = F.relu(y) if activation else y
    return y if residual is None else y + residual.double()


@pytest.fixture
def calls(record_calls):
    """Whether the op was asked for: a result alone would not tell."""
    from lorun_fast.ops import fused_conv2d as ops

    return record_calls(ops, "_thin_op")


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(("channels", "out"), CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_a_convolution_and_what_follows(poisoned, calls, dtype, channels, out, image):
    x, weight, bias, residual = problem(channels, out, *image, dtype=dtype)
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-6 * channels + 1e-5}
    close["rtol"] = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0)  # rounded once
    for settings in (
        {},
        {"bias": bias, "activation": "relu"},
        {"residual": residual},
        {"bias": bias, "activation": "relu", "residual": residual},
    ):
        y = fused_conv2d(x, weight, **settings)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), direct(x, weight, **settings), **close)
    assert len(calls) == 4


def test_what_is_thin(calls):
    def weight(out, channels):
        return torch.ones(out, channels, 3, 3)

    for out, channels in ((5, 16), (16, 5), (1, 12), (12, 3), (4, 4)):
        assert not is_thin(weight(out, channels))
        x = torch.ones(1, channels, 4, 5)
        torch.testing.assert_close(fused_conv2d(x, weight(out, channels))[0, 0, 1, 1].item(), 9.0 * channels)
    assert not calls and is_thin(weight(1, 16)) and is_thin(weight(8, 4))


@pytest.mark.skipif(not _native.available(), reason="the definition takes any")
def test_the_kernel_refuses_what_does_not_fit():
    for out, channels in ((5, 16), (4, 12), (1, 1)):
        with pytest.raises(RuntimeError, match=f"1 to 4 channels on one side .* got {channels} and {out}"):
            op(torch.ones(1, channels, 4, 4), torch.ones(out, channels, 3, 3), None, None, False)
    with pytest.raises(RuntimeError, match="weight: expected float32"):
        op(torch.ones(1, 8, 4, 4), torch.ones(1, 8, 3, 3).double(), None, None, False)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.cat([x, x], 3)[:, :, :, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("channels", "out"), [(16, 3), (2, 8)])
def test_any_layout(channels, out, layout):
    x, weight, _, residual = (LAYOUTS[layout](t) if t.ndim == 4 else t for t in problem(channels, out, 2, 10, 13))
    y = fused_conv2d(x, weight, residual=residual)
    torch.testing.assert_close(y.double(), direct(x, weight, residual=residual), rtol=0, atol=3e-5)


@pytest.mark.parametrize("image", [*IMAGES, (1, 3, 64), (2, 70, 65)])
@pytest.mark.parametrize(("channels", "out"), CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_gradient(poisoned, dtype, channels, out, image):
    x, weight, _, grad = problem(channels, out, *image, dtype=dtype)
    found = thin_weight_gradient(grad, x)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32) and found.is_contiguous()
    # Of sums over all pixels of products of about 1.
    bound = (1e-14 if dtype == torch.float64 else 1e-6) * max(x[:, 0].numel(), 1) ** 0.5 + 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=10 * bound)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("channels", "out"), [(16, 3), (2, 8)])
def test_the_weights_gradient_of_any_layout(channels, out, layout):
    x, weight, _, grad = (LAYOUTS[layout](t) if t.ndim == 4 else t for t in problem(channels, out, 2, 10, 13))
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    torch.testing.assert_close(thin_weight_gradient(grad, x).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("grad", "x", "error"),
    [
        ((1, 5, 4, 4), (1, 16, 4, 4), "1 to 4 channels on one side .* 5 and 16"),
        ((1, 1, 4, 4), (1, 12, 4, 4), "1 to 4 channels on one side .* 1 and 12"),
        ((1, 1, 4, 5), (1, 8, 4, 4), r"expected \(N, out, H, W\) and \(N, in, H, W\), got \(1, 1, 4, 5\)"),
        ((2, 1, 4, 4), (1, 8, 4, 4), r"got \(2, 1, 4, 4\) and \(1, 8, 4, 4\)"),
        ((1, 1, 4), (1, 8, 4, 4), r"grad: expected \(N, out, H, W\)"),
    ],
)
def test_the_weights_gradient_refuses_what_does_not_fit(grad, x, error):
    for call in (thin_weight_gradient, gradient_op):
        with pytest.raises((ValueError, RuntimeError), match=error if call is thin_weight_gradient else "expected"):
            call(torch.ones(grad), torch.ones(x))


def test_the_weights_gradient_is_of_images_of_one_dtype():
    grad, x = torch.ones(1, 1, 4, 4), torch.ones(1, 8, 4, 4)
    with pytest.raises(TypeError, match=r"grad: expected torch\.float32 as x has, got torch\.bfloat16"):
        thin_weight_gradient(grad.bfloat16(), x)
    with pytest.raises(TypeError, match=r"x: expected float32, float64, bfloat16 or float16, got torch\.int64"):
        thin_weight_gradient(grad.long(), x.long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "out"), [(16, 1), (1, 8)])
def test_gradients_in_16_bits(channels, out, dtype):
    values = [t.to(dtype) for t in problem(channels, out, 1, 9, 7, dtype=torch.float64)]

    def gradients(*given):
        x, weight, bias, residual = (t.detach().requires_grad_() for t in given)
        y = fused_conv2d(x, weight, bias, activation="relu", residual=residual)
        return torch.autograd.grad((y.double() ** 2).sum(), [x, weight, bias, residual])

    for a, b in zip(gradients(*values), gradients(*(t.double() for t in values)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2**-5, atol=2**-5 * b.abs().max().item())
    x, weight, bias, residual = values
    opcheck(op, (x.requires_grad_(), weight, bias, residual, True))
    opcheck(gradient_op, (residual.requires_grad_(), x))


@pytest.mark.parametrize(("channels", "out"), [(8, 2), (1, 8)])
def test_opcheck_and_gradients_of_the_weights_gradient(channels, out):
    x, _, _, grad = (t.requires_grad_() for t in problem(channels, out, 1, 3, 5, dtype=torch.float64))
    opcheck(gradient_op, (grad, x))
    assert torch.autograd.gradcheck(gradient_op, (grad, x), fast_mode=True)


@pytest.mark.parametrize(("channels", "out"), [(16, 1), (1, 8)])
def test_gradients_come_from_these_kernels_too(monkeypatch, calls, record_calls, channels, out):
    from lorun_fast.ops import fused_conv2d as ops

    gradients = record_calls(ops, "_gradient_op")
    x, weight, bias, residual = (t.requires_grad_() for t in problem(channels, out, 1, 9, 7))
    y = fused_conv2d(x, weight, bias, activation="relu", residual=residual)

    def refused(*_):
        raise AssertionError("a direct convolution")

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", refused)
    found = torch.autograd.grad(y.square().sum(), [x, weight, bias, residual])
    monkeypatch.undo()
    assert len(calls) == 3 and len(gradients) == 1  # forward, what ReLU took, image
    expected = torch.autograd.grad(
        direct(x, weight, bias, "relu", residual).square().sum(), [x, weight, bias, residual]
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("channels", "out"), [(16, 1), (8, 3), (1, 16)])
def test_the_weights_gradient_does_not_depend_on_threads(channels, out):
    x, _, _, grad = problem(channels, out, 3, 50, 43)
    check_threads(lambda: thin_weight_gradient(grad, x))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("epilogue", [False, True])
@pytest.mark.parametrize(("channels", "out"), [(8, 2), (1, 8)])
def test_opcheck_and_gradients(channels, out, epilogue, relu):
    x, weight, bias, residual = problem(channels, out, 1, 3, 5, dtype=torch.float64)
    args = [x, weight, bias if epilogue else None, residual if epilogue else None]
    args = [t if t is None else t.requires_grad_() for t in args]
    opcheck(op, (*args, relu))
    assert torch.autograd.gradcheck(lambda *args: op(*args, relu), args, fast_mode=True)


def test_adjointness():
    x, weight, _, g = problem(16, 1, 2, 7, 9, dtype=torch.float64)
    x.requires_grad_()
    y = fused_conv2d(x, weight)
    (back,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((y * g).sum(), (x * back).sum())


def test_compiles_as_one_graph(calls):
    x, weight, bias, residual = problem(16, 1, 1, 9, 7)

    def call(x):
        return fused_conv2d(2 * x, weight, bias, activation="relu", residual=residual) + 1

    expected = call(x)
    assert calls
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), expected)
    gradient = torch.compile(lambda grad, x: thin_weight_gradient(2 * grad, x), fullgraph=True)
    torch.testing.assert_close(gradient(residual, x), thin_weight_gradient(2 * residual, x))


def test_nan_reaches_its_neighbourhood_through_relu():
    for channels, out in ((16, 1), (1, 8)):
        x, weight, _, _ = problem(channels, out, 1, 12, 40)
        x[0, 0, 5, 20] = float("nan")
        lost = fused_conv2d(x, weight, activation="relu").isnan().any(1)[0]
        assert lost[4:7, 19:22].all() and lost.sum() == 9


@pytest.mark.parametrize(("channels", "out"), [(16, 1), (8, 3), (1, 16)])
def test_does_not_depend_on_threads_or_batch_mates(channels, out):
    x, weight, bias, _ = problem(channels, out, 3, 50, 43)
    whole = fused_conv2d(x, weight, bias)
    for i in range(3):
        assert torch.equal(fused_conv2d(x[i : i + 1], weight, bias), whole[i : i + 1])
    check_threads(lambda: fused_conv2d(x, weight, bias))


VARIANTS = """
from lorun_fast.functional import fused_conv2d, thin_weight_gradient
for dtype, _, near in dtypes(dict(rtol=0, atol=3e-5), dict(rtol=2**-8, atol=1e-4)):
    for i, o in ((16, 1), (24, 2), (16, 3), (8, 4), (1, 16), (4, 8)):
        x, weight = torch.randn(2, i, 6, 23, dtype=dtype), torch.randn(o, i, 3, 3, dtype=dtype)
        bias, residual = torch.randn(o, dtype=dtype), torch.randn(2, o, 6, 23, dtype=dtype)
        y = fused_conv2d(x, weight, bias, activation="relu", residual=residual)
        expected = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1)) + residual
        torch.testing.assert_close(y.double(), expected, **near)
        found = thin_weight_gradient(residual, x).double()
        expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, residual.double(), padding=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANTS)
