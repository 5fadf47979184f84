"""winograd_conv2d: a 3x3 convolution with a quarter of its multiplications, against torch's in float64."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from threads_help import check_threads
from torch.library import opcheck
from variants_help import check_under, lesser_variants

from lorun_fast import _native
from lorun_fast.functional import winograd_block, winograd_conv2d, winograd_weight, winograd_weight_gradient
from lorun_fast.ops._checks import parameter_dtype
from lorun_fast.reference import winograd_conv2d as reference

op = torch.ops.lorun_fast.winograd_conv2d.default
block_op = torch.ops.lorun_fast.winograd_block.default
gradient_op = torch.ops.lorun_fast.winograd_weight_gradient.default

# N, in, out, H, W: whole tiles, ragged ends, less than a tile, many tiles of more than one thread, channels that fill
# no whole number of vectors
CASES = [
    (1, 8, 8, 4, 4),
    (2, 8, 24, 9, 6),
    (1, 16, 16, 1, 1),
    (1, 24, 8, 3, 17),
    (3, 16, 40, 5, 2),
    (1, 32, 32, 50, 47),
    (2, 64, 64, 20, 21),
    (0, 8, 8, 4, 4),
    (2, 28, 28, 33, 9),
    (1, 31, 20, 6, 17),
    (1, 12, 9, 3, 2),
    (2, 15, 25, 5, 5),
    (1, 17, 44, 1, 30),
]


def problem(case, dtype=torch.float32, seed=0):
    n, channels, out, height, width = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    weight = draw(out, channels, 3, 3) / (9 * channels) ** 0.5
    return draw(n, channels, height, width), weight, draw(out), draw(n, out, height, width)


NARROW = (torch.bfloat16, torch.float16)
# By dtype: absolute error of results of size 1, of a block of two convolutions, of a weight's gradient beside its
# largest value. 16 bits are rounded once where they are stored.
CLOSE = {
    torch.float64: (1e-12, 1e-12, 1e-13),
    torch.float32: (4e-5, 1e-4, 1e-5),
    torch.bfloat16: (2**-6, 2**-4, 1e-5),
    torch.float16: (2**-9, 2**-7, 1e-5),
}


def direct(x, weight, bias=None, activation=None, residual=None):
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    y = F.relu(y) if activation else y
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("epilogue", ["", "bias", "relu", "residual", "bias relu residual"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_equals_the_direct_convolution(poisoned, dtype, case, epilogue):
    x, weight, bias, residual = problem(case, dtype)
    bias = bias.to(parameter_dtype(dtype))
    settings = {
        "bias": bias if "bias" in epilogue else None,
        "activation": "relu" if "relu" in epilogue else None,
        "residual": residual if "residual" in epilogue else None,
    }
    y = winograd_conv2d(x, winograd_weight(weight), **settings)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    close = {"rtol": 2**-8 if dtype in NARROW else 0, "atol": CLOSE[dtype][0]}
    torch.testing.assert_close(y.double(), direct(x, weight, **settings), **close)
    points = winograd_weight(weight)
    definition = reference.winograd_conv2d(x, points, settings["bias"], "relu" in epilogue, settings["residual"])
    assert definition.dtype == dtype
    torch.testing.assert_close(definition.double(), y.double(), **close)


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_a_convolution_and_its_gradients_are_autograds(case):
    x, weight, bias, residual = (t.requires_grad_() for t in problem(case, torch.float64))
    y = reference.winograd_conv2d(x, winograd_weight(weight.detach()), bias, True, residual)
    torch.testing.assert_close(y, direct(x, weight, bias, "relu", residual))
    points = winograd_weight(weight.detach()).requires_grad_()
    g = torch.randn_like(y)
    expected = torch.autograd.grad(reference.winograd_conv2d(x, points, None, False, None), (x, points), g)
    for a, b in zip(reference.winograd_conv2d_backward(g, x.detach(), points.detach()), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("out", "channels"), [(8, 8), (24, 13), (3, 40), (1, 1), (0, 8)])
def test_the_weight_is_its_definition(poisoned, adjoint, dtype, out, channels):
    weight, wide = torch.randn(out, channels, 3, 3, dtype=dtype), parameter_dtype(dtype)
    for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        points = winograd_weight(w, adjoint=adjoint)
        assert points.shape == ((36, out, channels) if adjoint else (36, channels, out)) and points.dtype == wide
        expected = reference.winograd_weight(weight.double(), adjoint).to(wide)
        torch.testing.assert_close(points, expected, rtol=2e-7 if wide == torch.float32 else 1e-14, atol=1e-9)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    weight_op = torch.ops.lorun_fast.winograd_weight.default
    assert torch.autograd.gradcheck(weight_op, (weight, adjoint))
    opcheck(weight_op, (weight, adjoint))


def direct_gradient(grad, x):
    grad, x = grad.double(), x.double()
    weight = x.new_zeros(grad.shape[1], x.shape[1], 3, 3).requires_grad_()
    return torch.autograd.grad(F.conv2d(x, weight, padding=1), weight, grad)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_the_weights_gradient_is_the_direct_convolutions(poisoned, dtype, case):
    x, _, _, grad = problem(case, dtype)
    expected = direct_gradient(grad, x)
    # Relative to the largest value: sums of many pixels cancel.
    close = {"rtol": 0, "atol": CLOSE[dtype][2] * (expected.abs().max().item() or 1)}
    for found in (winograd_weight_gradient(grad, x), reference.winograd_weight_gradient(grad, x)):
        assert found.dtype == parameter_dtype(dtype) and found.permute(2, 3, 1, 0).is_contiguous()
        torch.testing.assert_close(found.double(), expected, **close)


def test_the_weights_gradient_passes_gradcheck_and_opcheck():
    x, _, _, grad = problem((2, 9, 20, 5, 6), torch.float64)
    x.requires_grad_(), grad.requires_grad_()
    assert torch.autograd.gradcheck(gradient_op, (grad, x), fast_mode=True)
    opcheck(gradient_op, (grad, x))
    for wanted in (x, grad):
        (found,) = torch.autograd.grad(winograd_weight_gradient(grad, x).sum(), wanted)
        assert found.shape == wanted.shape and found.abs().sum() > 0


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.cat([x, x], 3)[:, :, :, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("channels", [(8, 16), (28, 12)])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_weights_gradient_takes_any_layout(layout, channels):
    x, _, _, grad = problem((2, *channels, 10, 13))
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    torch.testing.assert_close(winograd_weight_gradient(grad, x).double(), direct_gradient(grad, x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", [(8, 16), (28, 12)])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_layout(layout, channels):
    x, weight, _, _ = problem((2, *channels, 10, 13))
    x = LAYOUTS[layout](x)
    points = winograd_weight(weight).transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(winograd_conv2d(x, points).double(), direct(x, weight), rtol=0, atol=3e-5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("epilogue", [False, True])
def test_opcheck(relu, epilogue):
    x, weight, bias, residual = problem((2, 9, 20, 5, 6))
    args = [x, winograd_weight(weight), bias if epilogue else None, residual if epilogue else None]
    args = [t if t is None else t.requires_grad_() for t in args]
    opcheck(op, (args[0], args[1], args[2], relu, args[3]))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("epilogue", [False, True])
def test_gradcheck(relu, epilogue):
    x, weight, bias, residual = problem((1, 8, 11, 3, 5), torch.float64)
    args = [x, winograd_weight(weight), bias if epilogue else None, residual if epilogue else None]
    args = [t if t is None else t.requires_grad_() for t in args]
    assert torch.autograd.gradcheck(op, (args[0], args[1], args[2], relu, args[3]), fast_mode=True)


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_in_16_bits(dtype):
    """Each in its tensor's dtype, as close to fp64's as images in 16 bits are."""
    values = [t.to(dtype) for t in problem((2, 9, 12, 5, 6), torch.float64)]
    weight = values[1].double().requires_grad_()

    def gradients(x, weight, bias, residual):
        wanted = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        points = winograd_weight(wanted[1])
        y = winograd_conv2d(wanted[0], points, wanted[2].to(points.dtype), activation="relu", residual=wanted[3])
        return torch.autograd.grad((y.double() ** 2).sum(), wanted)

    found, exact = gradients(*values), gradients(*(t.double() for t in values))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2**-5, atol=2**-5 * b.abs().max().item())
    x, grad = values[0].requires_grad_(), values[3].requires_grad_()
    of_weight = winograd_weight_gradient(grad, x)
    for a, b in zip(torch.autograd.grad((of_weight * weight.detach()).sum(), (grad, x)), (grad, x), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
    for call in ((op, (x, winograd_weight(weight.detach().float()), None, True, grad)), (gradient_op, (grad, x))):
        opcheck(*call)


def test_only_the_wanted_gradients_are_formed():
    x, weight, bias, residual = problem((1, 8, 8, 6, 5), torch.float64)
    points = winograd_weight(weight)
    for i in range(4):
        args = [x.clone(), points.clone(), bias.clone(), residual.clone()]
        args[i].requires_grad_()
        y = winograd_conv2d(*args[:3], activation="relu", residual=args[3])
        (grad,) = torch.autograd.grad(y.sum(), args[i])
        assert grad.shape == args[i].shape and grad.abs().sum() > 0


def test_adjointness():
    x, weight, _, g = problem((1, 28, 9, 7, 9), torch.float64)
    points = winograd_weight(weight)
    x.requires_grad_()
    y = winograd_conv2d(x, points)
    (back,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((y * g).sum(), (x * back).sum())
    torch.testing.assert_close(back, F.conv_transpose2d(g, weight, padding=1))
    torch.testing.assert_close(winograd_conv2d(g, winograd_weight(weight, adjoint=True)), back)


def test_compiles_as_one_graph():
    x, weight, bias, residual = problem((1, 28, 12, 9, 7))
    points = winograd_weight(weight)

    def call(x):
        return winograd_conv2d(2 * x, points, bias, activation="relu", residual=residual) + 1

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x))


def test_autocast_leaves_it_alone():
    x, weight, _, _ = problem((1, 8, 8, 9, 7))
    points = winograd_weight(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(winograd_conv2d(x, points), winograd_conv2d(x, points))
        assert winograd_conv2d(x, points).dtype == torch.float32


def test_nan_reaches_its_neighbourhood_through_relu():
    x, weight, _, _ = problem((1, 8, 8, 12, 12))
    x[0, 3, 5, 6] = float("nan")
    lost = winograd_conv2d(x, winograd_weight(weight), activation="relu").isnan().any(1)[0]
    assert lost[4:7, 5:8].all() and not lost[:, 9:].any() and not lost[9:].any()


@pytest.mark.parametrize("channels", [8, 9, 12, 20, 28, 31, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_pixel_reaches_further_than_its_neighbours_tiles(channels, dtype):
    """Also where a vector does not end with a pixel's channels: what lies beside them in memory is lost, not hidden."""
    x, weight, _, residual = problem((1, channels, channels, 12, 12), dtype)
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[3:9, 3:9] = True
    x[..., ~inside] = residual[..., ~inside] = float("nan")
    known = x.nan_to_num(), residual.nan_to_num()
    whole = x.contiguous(memory_format=torch.channels_last)
    y = winograd_conv2d(whole, winograd_weight(weight), residual=residual)[..., 4:8, 4:8]
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 3e-5}
    torch.testing.assert_close(y.double(), direct(known[0], weight, residual=known[1])[..., 4:8, 4:8], **close)


@pytest.mark.parametrize("channels", [16, 28])
def test_does_not_depend_on_threads_or_batch_mates(channels):
    x, weight, bias, _ = problem((4, channels, channels, 30, 31))
    points = winograd_weight(weight)
    whole = winograd_conv2d(x, points, bias)
    for i in range(4):
        assert torch.equal(winograd_conv2d(x[i : i + 1], points, bias), whole[i : i + 1])
    check_threads(lambda: winograd_conv2d(x, points, bias))
    check_threads(lambda: winograd_weight_gradient(whole, x))


# N, C, middle, H, W: one tile, ragged ends, less than a tile, rows for more than one thread, several panels of columns,
# filters too large for some second-level caches and for any
BLOCKS = [
    (1, 8, 8, 4, 4),
    (2, 8, 24, 9, 6),
    (1, 16, 16, 1, 1),
    (3, 16, 8, 2, 17),
    (1, 16, 16, 75, 47),
    (2, 32, 32, 21, 190),
    (1, 32, 16, 13, 700),
    (1, 64, 64, 20, 21),
    (1, 96, 104, 9, 10),
    (0, 8, 8, 4, 4),
    (2, 28, 28, 21, 90),
    (1, 9, 31, 6, 17),
    (3, 20, 12, 3, 1),
    (1, 76, 44, 9, 10),
]


def block_problem(case, dtype=torch.float32):
    n, channels, middle, height, width = case
    x, first, first_bias, _ = problem((n, channels, middle, height, width), dtype)
    _, second, second_bias, residual = problem((n, middle, channels, height, width), dtype, seed=1)
    return x, first, first_bias, second, second_bias, residual


@pytest.mark.parametrize("epilogue", [False, True])
@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_a_block_is_two_convolutions_to_the_last_bit(poisoned, dtype, case, epilogue):
    x, first, first_bias, second, second_bias, residual = block_problem(case, dtype)
    first_bias, second_bias = (t.to(parameter_dtype(dtype)) for t in (first_bias, second_bias))
    points = winograd_weight(first), winograd_weight(second)
    biases = (first_bias, second_bias) if epilogue else (None, None)
    settings = {"first_bias": biases[0], "second_bias": biases[1], "residual": residual if epilogue else None}
    y = winograd_block(x, *points, **settings)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    between = winograd_conv2d(x, points[0], biases[0], activation="relu")
    expected = winograd_conv2d(between, points[1], biases[1], residual=x)
    if not epilogue or dtype not in NARROW:  # which rounds a sum of three once
        assert torch.equal(y, expected + residual if epilogue else expected)
    exact = x + direct(direct(x, first, biases[0], "relu"), second, biases[1])
    close = {"rtol": 2**-8 if dtype in NARROW else 0, "atol": CLOSE[dtype][1]}
    torch.testing.assert_close(y.double(), exact + residual if epilogue else exact, **close)
    definition = reference.winograd_block(x, points[0], biases[0], points[1], biases[1], settings["residual"])
    torch.testing.assert_close(definition, y, **close)


@pytest.mark.parametrize("epilogue", [False, True])
def test_a_blocks_gradients(epilogue):
    x, first, first_bias, second, second_bias, residual = block_problem((1, 9, 12, 5, 6), torch.float64)
    biases = (first_bias, second_bias, residual) if epilogue else (None, None, None)
    args = [x, winograd_weight(first), biases[0], winograd_weight(second), *biases[1:]]
    args = [t if t is None else t.requires_grad_() for t in args]
    opcheck(block_op, args)
    assert torch.autograd.gradcheck(block_op, args, fast_mode=True)
    for i, wanted in enumerate(args):
        if wanted is not None:
            alone = [t if t is None else t.detach() for t in args]
            alone[i].requires_grad_()
            (grad,) = torch.autograd.grad(block_op(*alone).sum(), alone[i])
            assert grad.shape == wanted.shape and grad.abs().sum() > 0


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_block_takes_any_layout(layout):
    x, first, _, second, _, residual = block_problem((2, 28, 12, 10, 13))
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    y = winograd_block(x, winograd_weight(first), winograd_weight(second), residual=residual)
    expected = x + direct(direct(x, first, None, "relu"), second) + residual
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)


def test_a_block_compiles_as_one_graph():
    x, first, first_bias, second, _, residual = block_problem((1, 8, 8, 9, 7))
    points = winograd_weight(first), winograd_weight(second)

    def call(x):
        return winograd_block(2 * x, *points, first_bias=first_bias, residual=residual) + 1

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x))


def test_a_block_does_not_depend_on_threads_or_batch_mates():
    x, first, first_bias, second, second_bias, _ = block_problem((3, 16, 16, 90, 331))
    points, biases = (winograd_weight(first), winograd_weight(second)), (first_bias, second_bias)

    def call(x):
        return winograd_block(x, *points, first_bias=biases[0], second_bias=biases[1])

    whole = call(x)
    for i in range(3):
        assert torch.equal(call(x[i : i + 1]), whole[i : i + 1])
    check_threads(lambda: call(x))


def test_a_block_lets_nan_reach_its_neighbourhood():
    x, first, _, second, _, _ = block_problem((1, 8, 8, 20, 20))
    x[0, 3, 9, 10] = float("nan")
    lost = winograd_block(x, winograd_weight(first), winograd_weight(second)).isnan().any(1)[0]
    assert lost[7:12, 8:13].all() and not lost[:4].any() and not lost[:, :4].any() and not lost[:, 17:].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8, 4, 4)}, ValueError, r"x: expected \(N, C, H, W\), got shape \(8, 4, 4\)"),
        ({"first": torch.zeros(36, 16, 8)}, ValueError, r"first: expected \(36, 8, out\)"),
        ({"second": torch.zeros(36, 8, 8)}, ValueError, r"second: expected \(36, 16, out\)"),
        ({"second": torch.zeros(36, 16, 16)}, ValueError, r"second: expected \(36, 16, 8\), back to x's channels"),
        ({"second": torch.zeros(36, 16, 8).double()}, TypeError, "second: expected torch.float32 as x has"),
        ({"first_bias": torch.zeros(8)}, ValueError, r"first_bias: expected shape \(16\), got \(8\)"),
        ({"second_bias": torch.zeros(16)}, ValueError, r"second_bias: expected shape \(8\), got \(16\)"),
        ({"residual": torch.zeros(1, 8, 4, 5)}, ValueError, r"residual: expected shape \(1, 8, 4, 4\), got \(1, 8"),
        ({"first": None}, TypeError, "first: expected a tensor, got NoneType"),
    ],
)
def test_errors_of_a_block(change, error, message):
    arguments = {
        "x": torch.zeros(1, 8, 4, 4),
        "first": torch.zeros(36, 8, 16),
        "second": torch.zeros(36, 16, 8),
    } | change
    with pytest.raises(error, match=message):
        winograd_block(**arguments)


VARIANTS = """
from lorun_fast.functional import winograd_block, winograd_conv2d, winograd_weight, winograd_weight_gradient
for dtype, beside, near in dtypes(dict(rtol=0, atol=3e-5), dict(rtol=2**-7, atol=2**-6)):
    whole, odd = ((2, 8, 24, 9, 6), (1, 16, 16, 20, 23)), ((1, 28, 31, 9, 6), (2, 9, 12, 5, 17), (1, 20, 10, 4, 4))
    for n, i, o, h, w in (*whole, *odd):
        x, weight = torch.randn(n, i, h, w, dtype=dtype), torch.randn(o, i, 3, 3, dtype=dtype) / 12
        bias, one = torch.randn(o, dtype=beside), torch.ones(n, o, h, w, dtype=dtype)
        y = winograd_conv2d(x, winograd_weight(weight), bias, activation="relu", residual=one)
        expected = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1)) + 1
        torch.testing.assert_close(y.double(), expected, **near)
        weight = weight.double().requires_grad_()
        F.conv2d(x.double(), weight, padding=1).backward(y.double())
        scale = weight.grad.abs().max()
        close = dict(rtol=0, atol=1e-12 if dtype == torch.float64 else 3e-5)
        torch.testing.assert_close(winograd_weight_gradient(y, x).double() / scale, weight.grad / scale, **close)
    for c, m in ((16, 24), (28, 13)):
        x, residual = torch.randn(2, 2, c, 37, 90, dtype=dtype)
        first, second = torch.randn(m, c, 3, 3, dtype=dtype) / 12, torch.randn(c, m, 3, 3, dtype=dtype) / 12
        y = winograd_block(x, winograd_weight(first), winograd_weight(second), residual=residual)
        between = F.relu(F.conv2d(x.double(), first.double(), padding=1))
        expected = x + F.conv2d(between, second.double(), padding=1) + residual
        torch.testing.assert_close(y.double(), expected, **near | {"atol": 10 * near["atol"]})
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANTS)


VECTORS = ["baseline", "avx2", "avx512"]

# Tensors that end where the process may read no further.
BOUNDS = """
import ctypes, math, mmap
from lorun_fast.functional import winograd_block, winograd_conv2d, winograd_weight, winograd_weight_gradient
kept = []

def at_the_end(t):
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    moved = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - size)
    return moved.view(t.shape).copy_(t)

def image(*shape):
    return at_the_end(torch.randn(shape, dtype=dtype)).permute(0, 3, 1, 2)

for dtype, beside, _ in dtypes(None, None):
    for i, o, px in ((28, 28, 9), (9, 31, 8), (20, 12, 8), (20, 12, 9), (33, 8, 9)):
        # 9: the image's last whole tile ends with it; 8: so does the gradient's.
        x, g = image(1, px, px, i), image(1, px, px, o)
        first, second = (at_the_end(winograd_weight(torch.randn(s, dtype=dtype))) for s in ((o, i, 3, 3), (i, o, 3, 3)))
        bias = at_the_end(torch.randn(o, dtype=beside))
        y = winograd_conv2d(x, first, bias, residual=g)
        assert y.isfinite().all() and winograd_weight_gradient(g, x).isfinite().all()
        assert winograd_block(x, first, second, first_bias=bias, residual=x).isfinite().all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
@pytest.mark.parametrize("variant", VECTORS)
def test_reads_nothing_behind_its_tensors(variant):
    found = _native.build_info()["cpu_active"]
    if VECTORS.index(variant) > VECTORS.index(found):
        pytest.skip(f"this CPU's loops are {found}")
    check_under(variant, BOUNDS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8, 4, 4)}, ValueError, r"x: expected \(N, C, H, W\), got shape \(8, 4, 4\)"),
        ({"x": torch.zeros(1, 8, 4, 4).int()}, TypeError, "x: expected float32, float64, bfloat16 or float16, got"),
        ({"x": torch.zeros(1, 8, 4, 4).bfloat16()}, TypeError, "residual: expected torch.bfloat16 as x has, got"),
        (
            {"x": torch.zeros(1, 8, 4, 4).half(), "weight": torch.zeros(36, 8, 8).half(), "residual": None},
            TypeError,
            "weight: expected torch.float32 beside x in torch.float16, got torch.float16",
        ),
        ({"x": torch.zeros(1, 16, 4, 4)}, ValueError, r"weight: expected \(36, 16, out\)"),
        ({"x": torch.zeros(1, 4, 4, 4), "weight": torch.zeros(36, 4, 8)}, ValueError, "at least 8 channels, got 4 and"),
        ({"weight": torch.zeros(36, 8, 7), "bias": None, "residual": None}, ValueError, "8 channels, got 8 and 7"),
        ({"weight": torch.zeros(8, 8, 3, 3)}, ValueError, "of winograd_weight"),
        ({"weight": torch.zeros(36, 8, 8).double()}, TypeError, "weight: expected torch.float32 as x has"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(8\), got \(3\)"),
        ({"residual": torch.zeros(1, 8, 4, 5)}, ValueError, r"residual: expected shape \(1, 8, 4, 4\), got \(1, 8"),
        ({"activation": "gelu"}, ValueError, "activation: expected None or 'relu', got 'gelu'"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "x": torch.zeros(1, 8, 4, 4),
        "weight": torch.zeros(36, 8, 8),
        "bias": torch.zeros(8),
        "residual": torch.zeros(1, 8, 4, 4),
    } | change
    with pytest.raises(error, match=message):
        winograd_conv2d(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


@pytest.mark.parametrize(
    ("grad", "x", "error", "message"),
    [
        ((8, 4, 4), (1, 8, 4, 4), ValueError, r"grad: expected \(N, out, H, W\), got shape \(8, 4, 4\)"),
        ((1, 8, 4, 5), (1, 8, 4, 4), ValueError, r"got \(1, 8, 4, 5\) and \(1, 8, 4, 4\)"),
        ((1, 4, 4, 4), (1, 8, 4, 4), ValueError, "at least 8 channels, got 4 and 8"),
    ],
)
def test_errors_of_the_weights_gradient(grad, x, error, message):
    with pytest.raises(error, match=message):
        winograd_weight_gradient(torch.zeros(grad), torch.zeros(x))


def test_dtypes_of_the_weights_gradient():
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(TypeError, match=r"x: expected float32, float64, bfloat16 or float16, got torch\.int32"):
        winograd_weight_gradient(x, x.int())
    with pytest.raises(TypeError, match=r"grad: expected torch\.bfloat16 as x has, got torch\.float32"):
        winograd_weight_gradient(x, x.bfloat16())
    with pytest.raises(TypeError, match=r"grad: expected torch\.float32 as x has, got torch\.float64"):
        winograd_weight_gradient(x.double(), x)


def test_no_channels():
    x = torch.zeros(1, 0, 4, 5)
    assert winograd_conv2d(x, torch.zeros(36, 0, 0)).shape == x.shape
    assert winograd_block(x, torch.zeros(36, 0, 8), torch.zeros(36, 8, 0)).shape == x.shape
    assert winograd_weight_gradient(x, x).shape == (0, 0, 3, 3)


def test_a_weight_of_another_size():
    with pytest.raises(ValueError, match=r"weight: expected \(out, in, 3, 3\), got shape \(8, 8, 5, 5\)"):
        winograd_weight(torch.zeros(8, 8, 5, 5))
    with pytest.raises(TypeError, match=r"weight: expected float32, float64, bfloat16 or float16, got torch\.int32"):
        winograd_weight(torch.zeros(8, 8, 3, 3).int())


@pytest.mark.parametrize("adjoint", ["x", 2, [True]])
def test_a_flag_that_is_none(adjoint):
    with pytest.raises(TypeError, match=r"^adjoint: expected True, False or None, got"):
        winograd_weight(torch.rand(8, 8, 3, 3), adjoint=adjoint)
