"""depthwise_conv2d and its gradients, against torch's in float64; and the layers that it serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from threads_help import check_threads
from torch import nn
from torch.library import opcheck
from variants_help import check_under, lesser_variants

import lorun_fast as lf
from lorun_fast import _native, convolutions
from lorun_fast.functional import depthwise_conv2d
from lorun_fast.ops import depthwise_conv2d as ops

op = torch.ops.lorun_fast.depthwise_conv2d.default
backward_op = torch.ops.lorun_fast.depthwise_conv2d_backward.default

# N, C, H, W: a channel alone and fewer than a vector, vectors that overlap, one row, one column and one pixel, rows
# beside whole bands, wide images of many channels in several panels, parts of the gradients' sums, no images
CASES = [
    (1, 1, 5, 6),
    (2, 3, 4, 7),
    (1, 5, 9, 3),
    (2, 12, 6, 5),
    (1, 17, 7, 8),
    (1, 28, 33, 33),
    (2, 64, 8, 20),
    (1, 16, 1, 9),
    (1, 16, 9, 1),
    (3, 16, 1, 1),
    (1, 1100, 5, 35),
    (1, 24, 50, 90),
    (0, 16, 4, 4),
]
# dtype and how close results are, those of one rounding in 16 bits
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def problem(case, dtype=torch.float32):
    """x, weight, bias and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = case, (case[1], 1, 3, 3), (case[1],), case
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def direct(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


def gradients(call, x, weight, bias, grad):
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    return torch.autograd.grad(call(x, weight, bias), (x, weight, bias), grad)


def assert_close(found, expected, limit):
    """Within a part of each value, and of the largest for what cancels."""
    largest = expected.abs().max().item() if expected.numel() else 0
    least = 2e-6 if limit > 1e-7 else 1e-13
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=least * max(1.0, largest))


@pytest.fixture
def calls(record_calls):
    """The op's calls: a result alone would not tell."""
    return record_calls(ops, "_op")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_is_a_grouped_convolution(poisoned, calls, dtype, case):
    x, weight, bias, _ = problem(case, dtype)
    for shift in (None, bias):
        y = depthwise_conv2d(x, weight, shift)
        assert y.dtype == dtype and y.shape == x.shape and (y.stride(1) == 1 or not _native.available())
        exact = [None if t is None else t.double() for t in (x, weight, shift)]
        assert_close(y, direct(*exact), DTYPES[dtype])
    assert len(calls) == (2 if _native.available() else 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_gradients_are_autograds(poisoned, dtype, case):
    values = problem(case, dtype)
    found = gradients(op, *values)
    for got, exact in zip(found, gradients(direct, *(t.double() for t in values)), strict=True):
        assert got.dtype == dtype
        assert_close(got, exact, DTYPES[dtype])
    x, weight, _, grad = values
    nothing, *others = backward_op(grad, x, weight, False)
    assert nothing.shape == (0,) and all(torch.equal(a, b) for a, b in zip(others, found[1:], strict=True))


@pytest.mark.skipif(not _native.available(), reason="torch's convolution refuses them")
@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_images_without_pixels(size):
    x, weight, _, grad = problem((1, 16, *size))
    assert depthwise_conv2d(x, weight).shape == x.shape
    grad_x, grad_weight, grad_bias = backward_op(grad, x, weight, True)
    assert grad_x.shape == x.shape and not grad_weight.any() and not grad_bias.any()


def test_shapes_on_the_meta_device():
    """Which has no autocast to be asked for."""
    x, weight = torch.empty(2, 16, 5, 6, device="meta"), torch.empty(16, 1, 3, 3, device="meta")
    found = depthwise_conv2d(x, weight)
    assert found.is_meta and found.shape == x.shape


def test_each_gradient_alone():
    x, weight, bias, grad = problem((2, 20, 9, 11), torch.float64)
    expected = gradients(direct, x, weight, bias, grad)
    for i in range(3):
        args = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        (found,) = torch.autograd.grad(depthwise_conv2d(*args), args[i], grad)
        torch.testing.assert_close(found, expected[i])


def test_x_is_not_kept_for_a_weight_that_does_not_learn():
    x, weight, _, _ = problem((1, 8, 4, 4))
    kept = []
    for learns in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            op(x.requires_grad_(), weight.requires_grad_(learns), None)
    assert kept.count(x.shape) == 1 and kept.count(weight.shape) == 2


@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_and_gradients_of_gradients(biased):
    x, weight, bias, grad = (t.requires_grad_() for t in problem((2, 3, 4, 5), torch.float64))
    args = (x, weight, bias if biased else None)
    opcheck(op, args)
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)
    for of_x in (False, True):
        opcheck(backward_op, (grad, x, weight, of_x))
        assert torch.autograd.gradcheck(
            lambda *args, of_x=of_x: backward_op(*args, of_x)[not of_x :], (grad, x, weight)
        )


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.cat([x, x], 3)[:, :, :, ::2],
    "some channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_layout(layout):
    x, weight, bias, grad = problem((2, 20, 10, 13), torch.float64)
    x, grad = (LAYOUTS[layout](t) for t in (x, grad))
    torch.testing.assert_close(depthwise_conv2d(x, weight, bias), direct(x, weight, bias))
    found = gradients(depthwise_conv2d, x, weight.mT.contiguous().mT, bias, grad)
    torch.testing.assert_close(found, gradients(direct, x, weight, bias, grad))


def test_does_not_depend_on_threads_or_batch_mates():
    x, weight, bias, grad = problem((3, 40, 50, 43))
    whole = depthwise_conv2d(x, weight, bias)
    for i in range(3):
        assert torch.equal(depthwise_conv2d(x[i : i + 1], weight, bias), whole[i : i + 1])
    check_threads(lambda: depthwise_conv2d(x, weight, bias))
    check_threads(lambda: backward_op(grad, x, weight, True))
    assert torch.equal(backward_op(grad, x, weight, True)[0][1:2], backward_op(grad[1:2], x[1:2], weight, True)[0])


@pytest.mark.skipif(not _native.available(), reason="torch's own is free to")
def test_a_value_does_not_depend_on_the_image_around_it():
    """A panel's edge, a band's and a row of its own sum as any pixel does."""
    x, weight, bias, _ = problem((1, 1100, 9, 70))
    whole = depthwise_conv2d(x, weight, bias)
    for left in range(0, 60, 7):
        part = depthwise_conv2d(x[:, :, 1:8, left : left + 9], weight, bias)
        assert torch.equal(part[:, :, 1:-1, 1:-1], whole[:, :, 2:7, left + 1 : left + 8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_stay_what_they_are(dtype):
    weight = torch.zeros(16, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    x = torch.ones(1, 16, 12, 12, dtype=dtype)
    x[0, :, 2, 3], x[0, :, 7, 8] = float("nan"), float("inf")
    y = depthwise_conv2d(x, weight)
    assert y.isnan()[0, :, 2, 3].all() and y[0, :, 7, 8].eq(float("inf")).all()
    assert y.isfinite().sum() == 16 * (144 - 9 - 9)  # zeros times either are NaN


def test_bf16_is_rounded_to_nearest_even():
    weight = torch.zeros(32, 1, 3, 3, dtype=torch.bfloat16)
    weight[:, :, 1, 1], weight[:, :, 0, 1] = 1, 2**-9
    x = torch.randn(1, 32, 9, 10).bfloat16()
    x[0, :, 1::3], x[0, :, 2::3] = 1.0, 1.0078125  # halfway between two numbers, to the lower and to the upper one
    wide = F.conv2d(x.float(), weight.float(), padding=1, groups=32)
    assert torch.equal(depthwise_conv2d(x, weight), wide.bfloat16())


@pytest.mark.parametrize("learns", [False, True])
def test_compiles_as_one_graph(learns):
    x, weight, bias, grad = problem((2, 20, 6, 7))

    def call(x, weight, bias):
        return depthwise_conv2d(2 * x, weight, bias) + 1

    compiled = torch.compile(call, fullgraph=True)
    if learns:
        found = gradients(compiled, x, weight, bias, grad)
        torch.testing.assert_close(found, gradients(call, x, weight, bias, grad), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(compiled(x, weight, bias), call(x, weight, bias))


def test_under_autocast_it_is_the_convolution_in_bf16():
    values = problem((2, 20, 6, 7))
    rounded = [t.bfloat16().double() for t in values]
    with torch.autocast("cpu", torch.bfloat16):
        found, torchs = depthwise_conv2d(*values[:3]), direct(*values[:3])
        assert depthwise_conv2d(*(t.double() for t in values[:3])).dtype == torch.float64
        ours = gradients(depthwise_conv2d, *values[:3], values[3].bfloat16())
    assert found.dtype == torchs.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), direct(*rounded[:3]), rtol=1e-2, atol=1e-2)
    assert [g.dtype for g in ours] == [torch.float32] * 3
    truth = gradients(direct, *rounded)
    torch.testing.assert_close([g.double() for g in ours], [g.double() for g in truth], rtol=1e-2, atol=1e-2)


def test_transforms_of_functions():
    x, weight, _, _ = problem((2, 4, 5, 6), torch.float64)
    torch.testing.assert_close(torch.func.vmap(lambda x: depthwise_conv2d(x[None], weight)[0])(x), direct(x, weight))
    primal, tangent = torch.func.jvp(lambda w: depthwise_conv2d(x, w), (weight,), (weight,))
    torch.testing.assert_close(tangent, primal)


def test_flops_are_torchs():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, _, _ = problem((2, 6, 7, 9))
    counts = []
    for call in (depthwise_conv2d, direct):
        with FlopCounterMode(display=False) as counter:
            call(x, weight)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 6 * 63 * 9
    with FlopCounterMode(display=False) as counter:
        backward_op(x, x, weight, True)
    assert counter.get_total_flops() == 2 * counts[0]


def test_wrong_arguments():
    x, weight, bias, _ = problem((2, 8, 5, 6))
    for args, error, said in (
        ((x[0], weight), ValueError, r"x: expected \(N, C, H, W\), got shape \(8, 5, 6\)"),
        ((x, weight[:4]), ValueError, r"weight: expected \(8, 1, 3, 3\), got \(4, 1, 3, 3\)"),
        ((x[:, :0], weight), ValueError, r"x: expected one channel or more, got shape \(2, 0, 5, 6\)"),
        ((x, weight, bias[:3]), ValueError, r"bias: expected shape \(8\), got \(3\)"),
        ((x, weight.double()), TypeError, "weight: expected torch.float32 as x has, got torch.float64"),
        ((x.int(), weight), TypeError, "x: expected float32, float64, bfloat16 or float16, got torch.int32"),
        (([1.0], weight), TypeError, "x: expected a tensor, got list"),
        ((x, weight, 1.0), TypeError, "bias: expected a tensor, got float"),
    ):
        with pytest.raises(error, match=said):
            depthwise_conv2d(*args)


@pytest.mark.skipif(not _native.available(), reason="the definition has torch's own errors")
def test_the_kernel_refuses_what_does_not_fit():
    x, weight, bias, grad = problem((2, 8, 5, 6))
    for call, said in (
        (lambda: op(x, weight[:4], None), r"weight: expected shape \(8, 1, 3, 3\), got \(4, 1, 3, 3\)"),
        (lambda: op(x, weight.double(), None), "weight: expected x's dtype"),
        (lambda: op(x, weight, bias[:3]), r"bias: expected shape \(8\), got \(3\)"),
        (lambda: op(x[:, :0], weight[:0], None), "x: expected one channel or more"),
        (lambda: backward_op(grad[:1], x, weight, True), r"grad: expected shape \(2, 8, 5, 6\), got \(1, 8, 5, 6\)"),
        (lambda: backward_op(grad.double(), x, weight, True), "grad: expected x's dtype"),
    ):
        with pytest.raises(RuntimeError, match=said):
            call()


def layer(channels=16, **more):
    return nn.Conv2d(channels, channels, **{"kernel_size": 3, "padding": 1, "groups": channels, **more})


def image(channels=16):
    return torch.randn(2, channels, 7, 9).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def layers_calls(record_calls):
    """Of the op, by layers."""
    return record_calls(convolutions, "depthwise_conv2d")


def test_a_depthwise_layer_is_served(layers_calls):
    for conv in (layer(), layer(padding="same", bias=False)):
        x = image().requires_grad_()
        y, expected = convolutions.depthwise(conv, x), conv(x)
        torch.testing.assert_close(y, expected)
        learning = (x, *conv.parameters())
        found, wanted = (torch.autograd.grad(t.square().sum(), learning) for t in (y, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(layers_calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert convolutions.depthwise(conv, image()).dtype == torch.bfloat16
    assert len(layers_calls) == 3


def test_direct_replaces_no_layer_and_leaves_a_denoisers_own_kernels(layers_calls):
    """SpectralTransformer's own, which optimize(convolutions="direct") is not about."""
    op = lf.CASSI((torch.rand(16, 16) > 0.5).float(), 4)
    base = lf.SpectralTransformer(4, 4, channels=(16,), blocks=(1,), head_channels=8)
    net = lf.LoRun(op, base, stages=2, sharing="tied").eval()
    fast = net.optimize(convolutions="direct", dtype=torch.float32)
    assert fast.report["convolutions"] == ("direct", "asked for")
    assert not any(isinstance(m, convolutions.StandIn) for m in fast.denoiser.modules())
    y, calls = op(torch.rand(1, 4, 16, 16)), []
    for each in (net, fast):
        with torch.no_grad():
            each(y)
        calls.append(len(layers_calls))
        layers_calls.clear()
    assert calls[0] == calls[1] > 0


class Other(nn.Conv2d):
    pass


def test_other_layers_are_called(layers_calls):
    seen = []
    watched, replaced = layer(), layer()
    watched.register_forward_hook(lambda *args: seen.append(args))
    replaced.forward = lambda x: seen.append(x) or x
    for conv in (
        watched,
        replaced,
        layer(stride=2),
        layer(dilation=2),
        layer(kernel_size=5, padding=2),
        layer(padding=0),
        layer(padding_mode="reflect"),
        layer(groups=8),
        nn.Conv2d(16, 32, 3, padding=1, groups=16),
        nn.utils.parametrizations.weight_norm(layer()),
        Other(16, 16, 3, padding=1, groups=16),
        nn.Identity(),
    ):
        x = image()
        assert torch.equal(convolutions.depthwise(conv, x), conv(x))
    conv, x = layer(4), image(4)
    assert torch.equal(convolutions.depthwise(conv, x), conv(x))
    conv, x = layer(), image().contiguous()
    assert convolutions.depthwise(conv, x).is_contiguous() and convolutions.depthwise(conv, x[0]).shape == x[0].shape
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    try:
        convolutions.depthwise(conv, image())
    finally:
        handle.remove()
    assert not layers_calls and len(seen) == 2 + 2 + 1


def test_a_stand_in_for_inference():
    conv, x = layer(24), image(24)
    stand_in = convolutions.DepthwiseConv2d(conv)
    torch.testing.assert_close(stand_in(x), conv(x))
    torch.testing.assert_close(convolutions.convolve(stand_in, x, "relu", x), conv(x).relu() + x)
    torch.testing.assert_close(convolutions.depthwise(stand_in, x), conv(x))
    assert list(stand_in.state_dict()) == list(conv.state_dict())
    module = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), conv, layer(24, dtype=torch.float64), layer(24, stride=2))
    assert convolutions.replace_convolutions([module], "winograd") == (2, 4)
    assert [type(m) for m in module][1:] == [convolutions.DepthwiseConv2d, nn.Conv2d, nn.Conv2d]
    narrow, x = layer(24, dtype=torch.bfloat16), x.bfloat16()
    torch.testing.assert_close(convolutions.DepthwiseConv2d(narrow)(x), narrow(x), rtol=0.02, atol=0.02)
    for other in (layer(16, groups=8), layer(4), layer(dtype=torch.float64)):
        with pytest.raises(ValueError, match="conv: expected a depthwise 3 x 3 convolution with stride and padding 1"):
            convolutions.DepthwiseConv2d(other)


VARIANTS = """
from lorun_fast.functional import depthwise_conv2d
for dtype, _, close in dtypes(dict(rtol=2e-5, atol=2e-5), dict(rtol=2e-2, atol=5e-2)):
    for shape in ((2, 1, 5, 6), (1, 3, 6, 7), (2, 13, 9, 6), (1, 28, 11, 33), (1, 1100, 5, 35)):
        x, weight, bias, grad = (torch.randn(s).to(dtype) for s in (shape, (shape[1], 1, 3, 3), shape[1:2], shape))
        found, expected = [], []
        for call, results, to in ((depthwise_conv2d, found, dtype), (None, expected, torch.float64)):
            args = [t.to(to).requires_grad_() for t in (x, weight, bias)]
            y = call(*args) if call else F.conv2d(*args, padding=1, groups=shape[1])
            results += [y.detach(), *torch.autograd.grad(y, args, grad.to(to))]
        for got, want in zip(found, expected):
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(got.double() / scale, want / scale, **close)
    x, weight = torch.randn(1, 32, 9, 10).to(dtype), torch.zeros(32, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1], weight[:, :, 0, 1] = 1, 2**-9
    x[0, :, 1::3], x[0, :, 2::3], x[0, :, 4] = 1.0, 1.0078125, float("nan")
    x.view(torch.int16 if x.element_size() == 2 else torch.int32)[0, :, 6, 5] = -1  # a NaN of all bits
    rounded = F.conv2d(x.double(), weight.double(), padding=1, groups=32).to(dtype)
    assert torch.equal(depthwise_conv2d(x, weight).nan_to_num(7), rounded.nan_to_num(7))
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANTS)


@pytest.mark.skipif(_native.build_info().get("cpu_active") != "avx512", reason="no AVX-512")
def test_avx512_without_its_rounding_to_bf16():
    check_under("avx512", VARIANTS)
