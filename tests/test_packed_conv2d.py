"""packed_conv2d, packed_block: convolutions with a packed weight, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from threads_help import check_threads
from torch.library import opcheck
from variants_help import check_under, lesser_variants

from lorun_fast import _native
from lorun_fast.adapters import FORMS, factor_shapes, merged_weight
from lorun_fast.functional import packed_block, packed_conv2d, packed_weight
from lorun_fast.reference import packed_conv2d as reference

op = torch.ops.lorun_fast.packed_conv2d.default
block_op = torch.ops.lorun_fast.packed_block.default

# N, in, out, H, W, kernel, stride, padding, shuffle: full tiles and ragged ones, one strip of 64 pixels and its half
# and several, one block of 16 channels and two and an odd number, kernels and strides, cells of 2 x 2 and 4 x 4
CASES = [
    (1, 16, 16, 8, 64, 3, 1, 1, 1),
    (1, 32, 48, 5, 32, 3, 1, 1, 1),
    (2, 28, 31, 9, 37, 3, 1, 1, 1),
    (1, 1, 16, 6, 130, 3, 1, 1, 1),
    (1, 16, 1, 3, 70, 3, 1, 1, 1),
    (2, 64, 64, 20, 21, 3, 1, 1, 1),
    (1, 16, 32, 8, 66, 2, 2, 0, 1),
    (1, 16, 40, 4, 129, 3, 1, 0, 1),
    (1, 16, 32, 5, 20, 3, 1, 1, 1),
    (2, 3, 7, 11, 12, 5, 2, 2, 1),
    (1, 8, 8, 1, 1, 3, 1, 1, 1),
    (1, 5, 24, 3, 9, 7, 3, 5, 1),
    (1, 32, 64, 5, 9, 1, 1, 0, 2),
    (2, 64, 128, 3, 40, 1, 1, 0, 2),
    (1, 9, 64, 2, 3, 1, 1, 0, 4),
    (0, 8, 8, 4, 4, 3, 1, 1, 1),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Of the largest value: one rounding of the result, and of the middle of a block.
CLOSE = {torch.bfloat16: 4.1e-3, torch.float16: 5.2e-4, torch.float32: 3e-6, torch.float64: 1e-14}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_shape(case):
    n, _, out, height, width, kernel, stride, padding, shuffle = case
    rows, columns = ((length + 2 * padding - kernel) // stride + 1 for length in (height, width))
    return n, out // shuffle**2, rows * shuffle, columns * shuffle


def problem(case, dtype=torch.bfloat16, seed=0):
    n, channels, out, height, width, kernel, stride, padding, shuffle = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weight = (draw(out, channels, kernel, kernel) / (kernel**2 * channels) ** 0.5).to(dtype)
    residual = draw(*result_shape(case)).to(dtype)
    settings = {"out": out, "kernel": kernel, "stride": stride, "padding": padding, "shuffle": shuffle}
    return draw(n, channels, height, width).to(dtype), weight, draw(out).to(wide(dtype)), residual, settings


def expected_of(x, weight, bias, residual, settings, relu):
    """By torch's own operations, in float64."""
    weight, bias, shuffle = weight.double(), None if bias is None else bias.double(), settings["shuffle"]
    if shuffle > 1:
        # The cells of a transposed convolution.
        cells = weight.unflatten(0, (shuffle, shuffle, -1)).squeeze(-1).squeeze(-1).permute(3, 2, 0, 1)
        y = F.conv_transpose2d(x.double(), cells, None, stride=shuffle)
        if bias is not None:
            channels, height, width = y.shape[1:]
            each = bias.unflatten(0, (shuffle, shuffle, channels)).permute(2, 0, 1)
            y = y + each.repeat(1, height // shuffle, width // shuffle)
    else:
        y = F.conv2d(x.double(), weight, bias, settings["stride"], settings["padding"])
    y = F.relu(y) if relu else y
    return y if residual is None else y + residual.double()


def assert_close(y, expected):
    limit = CLOSE[y.dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("epilogue", ["", "bias", "relu", "residual", "bias relu residual"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torchs_convolution(poisoned, dtype, case, epilogue):
    x, weight, bias, residual, settings = problem(case, dtype)
    bias = bias if "bias" in epilogue else None
    residual = residual if "residual" in epilogue else None
    activation = "relu" if "relu" in epilogue else None
    y = packed_conv2d(x, packed_weight(weight), bias, activation=activation, residual=residual, **settings)
    assert y.dtype == dtype and y.shape == result_shape(case) and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected_of(x, weight, bias, residual, settings, activation))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_passes_where_it_is_positive(poisoned, dtype, case):
    x, weight, bias, gate, settings = problem(case, dtype)
    gate = F.relu(gate)
    expected = expected_of(x, weight, bias, None, settings, False)
    expected = torch.ops.aten.threshold_backward(expected, gate.double(), 0)
    for given in (gate, gate.contiguous(memory_format=torch.channels_last)):
        y = packed_conv2d(x, packed_weight(weight), bias, gate=given, **settings)
        assert_close(y, expected)
        assert not y[gate == 0].any()


def test_a_gate_of_nan_passes_as_torchs_does():
    x, weight, _, gate, settings = problem((1, 16, 16, 5, 70, 3, 1, 1, 1))
    gate[0, 3, 2, 5] = float("nan")
    passed = torch.ops.aten.threshold_backward(torch.ones_like(gate), gate, 0) > 0
    assert (
        torch.equal(packed_conv2d(x, packed_weight(weight), gate=gate, **settings) != 0, passed) and passed[0, 3, 2, 5]
    )


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_torchs_convolution_and_its_gradients_are_autograds(case):
    x, weight, bias, residual, settings = problem(case, torch.float64)
    *leaves, packed = (t.requires_grad_() for t in (x, bias, packed_weight(weight)))
    y = reference.packed_conv2d(x, packed, bias, residual, **settings, relu=False)
    torch.testing.assert_close(y, expected_of(x, weight, bias, residual, settings, False))
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (leaves[0], packed, leaves[1]), g)
    found = reference.packed_conv2d_backward(g, x.detach(), packed.detach(), **settings)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "channels", "kernel"), [(16, 16, 3), (7, 33, 3), (40, 1, 2), (1, 8, 7), (18, 64, 1)])
def test_the_packed_weight_is_its_definition(poisoned, adjoint, dtype, out, channels, kernel):
    weight = torch.randn(out, channels, kernel, kernel).to(dtype)
    for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        packed = packed_weight(w, adjoint=adjoint)
        assert torch.equal(packed, reference.packed_weight(weight, adjoint=adjoint)) and packed.dtype == dtype
    of = (channels, out) if adjoint else (out, channels)
    assert torch.equal(reference.unpacked_weight(packed, *of, kernel, adjoint), weight)


def factors(shape, form, rank, dtype=torch.float32):
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in factor_shapes(shape, rank, form)]


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "channels", "kernel", "rank"), [(16, 16, 3, 2), (7, 33, 3, 5), (40, 1, 2, 1)])
def test_the_packed_weight_of_factors_is_the_merged_weights(
    poisoned, adjoint, form, dtype, out, channels, kernel, rank
):
    weight = torch.randn(out, channels, kernel, kernel)
    down, up = factors(weight.shape, form, rank)
    wide = torch.float64
    exact = merged_weight(weight.to(dtype).to(wide), down.to(dtype).to(wide), up.to(dtype).to(wide), 0.5)
    expected = reference.packed_weight(exact, adjoint=adjoint)
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    layouts = (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT)
    for w in layouts:
        for stored in {dtype, torch.promote_types(dtype, torch.float32)}:
            given = (w.to(dtype).to(stored), down.to(dtype).mT.contiguous().mT, up.to(dtype))
            packed = packed_weight(*given, scale=0.5, dtype=dtype, adjoint=adjoint)
            assert packed.dtype == dtype
            torch.testing.assert_close(packed.to(wide), expected, rtol=tolerance, atol=tolerance / 4)


def test_zero_factors_leave_the_packed_weight_to_the_last_bit():
    weight = torch.randn(24, 24, 3, 3)
    down, up = factors(weight.shape, "peft", 3)
    for w in (weight, weight.bfloat16()):
        packed = packed_weight(w, down, torch.zeros_like(up), dtype=torch.bfloat16)
        assert torch.equal(packed, packed_weight(weight.bfloat16()))
        assert torch.equal(packed, packed_weight(w, dtype=torch.bfloat16))


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_the_packed_weight_is_an_op(adjoint, kernel, form):
    small = torch.randn(2, 3, kernel, kernel, dtype=torch.float64)
    tensors = [small, *(factors(small.shape, form, 2, torch.float64) if form else (None, None))]
    given = (*(t if t is None else t.requires_grad_() for t in tensors), 0.7, None, adjoint)
    weight_op = torch.ops.lorun_fast.packed_weight.default
    assert torch.autograd.gradcheck(weight_op, given)
    opcheck(weight_op, given)
    assert torch.autograd.gradcheck(packed_weight_at(0.7, adjoint), given[:3])


def packed_weight_at(scale, adjoint):
    return lambda *tensors: packed_weight(*tensors, scale=scale, adjoint=adjoint)


def test_the_gradients_of_a_narrowed_packed_weight_have_their_tensors_dtypes():
    weight, down, up = (t.requires_grad_() for t in (torch.randn(8, 8, 3, 3), *factors((8, 8, 3, 3), "peft", 2)))
    packed = packed_weight(weight, down, up, dtype=torch.bfloat16)
    packed.backward(torch.ones_like(packed))
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (weight, down, up))


# N, channels, middle, H, W
BLOCKS = [
    (1, 16, 16, 8, 64),
    (2, 28, 20, 9, 130),
    (1, 64, 64, 7, 32),
    (1, 8, 8, 1, 1),
    (2, 16, 40, 2, 63),
    (0, 8, 8, 4, 4),
]


def block_problem(case, dtype=torch.bfloat16):
    n, channels, middle, height, width = case
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    first = (draw(middle, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
    second = (draw(channels, middle, 3, 3) / (9 * middle) ** 0.5).to(dtype)
    x, residual = (draw(n, channels, height, width).to(dtype) for _ in range(2))
    return x, first, draw(middle).to(wide(dtype)), second, draw(channels).to(wide(dtype)), residual


def block_expected(x, first, first_bias, second, second_bias, residual):
    dtype = x.dtype
    first_bias, second_bias = (None if b is None else b.double() for b in (first_bias, second_bias))
    middle = F.relu(F.conv2d(x.double(), first.double(), first_bias, padding=1)).to(dtype).double()
    y = x.double() + F.conv2d(middle, second.double(), second_bias, padding=1)
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_is_two_convolutions(poisoned, dtype, case, added, biased):
    x, first, first_bias, second, second_bias, residual = block_problem(case, dtype)
    first_bias, second_bias = (first_bias, second_bias) if biased else (None, None)
    residual = residual if added else None
    y = packed_block(
        x, packed_weight(first), packed_weight(second), first_bias=first_bias, second_bias=second_bias,
        middle=case[2], residual=residual,
    )  # fmt: skip
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    # Where the middle rounds the other way than it does here, a product moves by its rounding.
    expected = block_expected(x, first, first_bias, second, second_bias, residual)
    limit = 2 * CLOSE[dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("width", [1500, 3000])
def test_images_wider_than_the_cache(width):
    case = (1, 64, 64, 3, width, 3, 1, 1, 1)
    x, weight, bias, residual, settings = problem(case)
    y = packed_conv2d(x, packed_weight(weight), bias, residual=residual, **settings)
    assert_close(y, expected_of(x, weight, bias, residual, settings, False))
    x, first, first_bias, second, second_bias, residual = block_problem((1, 64, 64, 3, width))
    y = packed_block(
        x, packed_weight(first), packed_weight(second), first_bias=first_bias, second_bias=second_bias,
        residual=residual,
    )  # fmt: skip
    expected = block_expected(x, first, first_bias, second, second_bias, residual)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2 * CLOSE[y.dtype] * expected.abs().max().item())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
def test_any_layout(layout):
    x, weight, bias, residual, settings = problem((2, 8, 16, 10, 13, 3, 1, 1, 1))
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "strided": torch.cat([x, x], 3)[:, :, :, ::2],
        "expanded": x[:1].expand_as(x),
    }[layout]
    packed = packed_weight(weight).transpose(2, 3).contiguous().transpose(2, 3)
    bias = torch.stack([bias, bias], 1)[:, 0]
    y = packed_conv2d(x, packed, bias, residual=residual.mT.contiguous().mT, **settings)
    assert_close(y, expected_of(x, weight, bias, residual, settings, False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [(1, 8, 16, 5, 6, 3, 1, 1, 1), (1, 3, 64, 2, 3, 1, 1, 0, 2)])
@pytest.mark.parametrize("epilogue", [False, True])
def test_opcheck(case, dtype, epilogue):
    x, weight, bias, residual, settings = problem(case, dtype)
    tensors = [x, packed_weight(weight), bias if epilogue else None, residual if epilogue else None]
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    opcheck(op, (*tensors, *settings.values(), epilogue))
    opcheck(op, (*tensors[:3], None, *settings.values(), False, residual.detach()))
    x, first, first_bias, second, second_bias, residual = block_problem((1, 5, 6, 4, 5), dtype)
    tensors = [x, packed_weight(first), first_bias, packed_weight(second), second_bias, residual if epilogue else None]
    opcheck(block_op, (*(t if t is None else t.requires_grad_() for t in tensors), 6))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("epilogue", [False, True])
@pytest.mark.parametrize(
    "case", [(1, 3, 5, 4, 5, 3, 1, 1, 1), (1, 3, 5, 5, 6, 3, 2, 1, 1), (1, 2, 32, 2, 3, 1, 1, 0, 2)]
)
def test_gradcheck(case, relu, epilogue):
    x, weight, bias, residual, settings = problem(case, torch.float64)
    tensors = [x, packed_weight(weight), bias if epilogue else None, residual if epilogue else None]
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(op, (*tensors, *settings.values(), relu), fast_mode=True)
    gated = (*tensors[:3], None, *settings.values(), False, residual.detach())
    assert torch.autograd.gradcheck(op, gated, fast_mode=True)


def test_gradcheck_of_a_block():
    x, first, first_bias, second, second_bias, residual = block_problem((1, 3, 4, 4, 5), torch.float64)
    tensors = [x, packed_weight(first), first_bias, packed_weight(second), second_bias, residual]
    assert torch.autograd.gradcheck(block_op, (*(t.requires_grad_() for t in tensors), 4), fast_mode=True)


def test_only_the_wanted_gradients_are_formed():
    x, first, first_bias, second, second_bias, residual = block_problem((1, 3, 4, 4, 5), torch.float64)
    tensors = [x, packed_weight(first), first_bias, packed_weight(second), second_bias, residual]
    for i in range(6):
        leaves = [t.detach().clone() for t in tensors]
        leaves[i].requires_grad_()
        (grad,) = torch.autograd.grad(block_op(*leaves, 4).sum(), leaves[i])
        assert grad.shape == leaves[i].shape and grad.abs().sum() > 0


def test_adjointness():
    x, weight, _, g, settings = problem((1, 16, 8, 7, 9, 3, 1, 1, 1), torch.float64)
    x.requires_grad_()
    y = packed_conv2d(x, packed_weight(weight), **settings)
    (back,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((y * g).sum(), (x * back).sum())
    torch.testing.assert_close(back, F.conv_transpose2d(g, weight, padding=1))
    adjoint = packed_weight(weight, adjoint=True)
    torch.testing.assert_close(packed_conv2d(g, adjoint, out=16, kernel=3, padding=1), back)


def test_compiles_as_one_graph():
    x, weight, bias, residual, settings = problem((1, 8, 8, 9, 7, 3, 1, 1, 1))
    packed = packed_weight(weight)

    def call(x):
        y = packed_conv2d(2 * x, packed, bias, activation="relu", residual=residual, **settings)
        y = packed_conv2d(y, packed, gate=residual, **settings)
        return packed_block(y, packed, packed) + 1

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x))


def test_autocast_leaves_it_alone():
    x, weight, _, _, settings = problem((1, 8, 8, 9, 7, 3, 1, 1, 1), torch.float32)
    packed = packed_weight(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_conv2d(x, packed, **settings).dtype == torch.float32
        assert packed_block(x, packed, packed).dtype == torch.float32


def test_nan_reaches_its_neighbourhood_through_relu():
    x, weight, _, _, settings = problem((1, 8, 8, 12, 12, 3, 1, 1, 1))
    x[0, 3, 5, 6] = float("nan")
    lost = packed_conv2d(x, packed_weight(weight), activation="relu", **settings).isnan().any(1)[0]
    assert lost[4:7, 5:8].all()
    # A tile multiplies what lies right of a kernel's row by zero.
    assert not lost[:4].any() and not lost[7:].any() and not lost[:, 8:].any() and not lost[:, :4].any()


def test_sums_that_overflow_go_through_relu():
    x = torch.full((1, 1, 4, 4), 3e38).bfloat16()
    ten = packed_weight(torch.full((8, 1, 1, 1), 10.0).bfloat16())
    assert (packed_conv2d(x, ten, out=8, kernel=1, activation="relu") == float("inf")).all()
    assert (packed_conv2d(-x, ten, out=8, kernel=1, activation="relu") == 0).all()


def test_does_not_depend_on_threads_or_batch_mates():
    x, weight, bias, _, settings = problem((4, 16, 16, 30, 70, 3, 1, 1, 1))
    packed = packed_weight(weight)

    def call(x):
        return packed_block(packed_conv2d(x, packed, bias, **settings), packed, packed)

    whole = call(x)
    for i in range(4):
        assert torch.equal(call(x[i : i + 1]), whole[i : i + 1])
    check_threads(lambda: call(x))


VARIANTS = """
from lorun_fast.functional import packed_block, packed_conv2d, packed_weight
for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 5e-6), (torch.float64, 1e-13)):
    for n, i, o, h, w in ((2, 9, 24, 9, 6), (1, 16, 16, 5, 70)):
        x, weight = torch.randn(n, i, h, w).to(dtype), (torch.randn(o, i, 3, 3) / 12).to(dtype)
        bias = torch.randn(o, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        one = x.new_ones(n, o, h, w)
        settings = {"out": o, "kernel": 3, "padding": 1}
        y = packed_conv2d(x, packed_weight(weight), bias, activation="relu", residual=one, **settings)
        expected = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1)) + 1
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=limit)
        gate = torch.randn(y.shape).to(dtype)
        y = packed_conv2d(x, packed_weight(weight), bias, gate=gate, **settings)
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) * (gate > 0)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=limit)
        back = packed_weight((torch.randn(i, o, 3, 3) / 12).to(dtype))
        y = packed_block(x, packed_weight(weight), back, middle=o)
        middle = packed_conv2d(x, packed_weight(weight), activation="relu", **settings)
        expected = packed_conv2d(middle, back, out=i, kernel=3, padding=1, residual=x)
        torch.testing.assert_close(y, expected)
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANTS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8, 4, 4)}, ValueError, r"x: expected \(N, C, H, W\), got shape \(8, 4, 4\)"),
        ({"x": torch.zeros(1, 8, 4, 4).int()}, TypeError, "x: expected float32, float64, bfloat16 or float16"),
        (
            {"x": torch.zeros(1, 16, 4, 4)},
            ValueError,
            r"weight: expected \(1, 6, 16, 32\) of packed_weight for \(8, 16",
        ),
        ({"x": torch.zeros(1, 8, 4, 4).bfloat16()}, TypeError, "weight: expected torch.bfloat16 as x has"),
        ({"x": torch.zeros(1, 8, 4, 0)}, ValueError, r"at least 3 pixels with the padding, got shape \(1, 8, 4, 0\)"),
        (
            {"kernel": 9},
            ValueError,
            "kernel, stride, padding: expected 1 to 7, 1 or more and 0 or more, got 9, 1 and 1",
        ),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding: expected at least 0, got -1"),
        ({"out": "8"}, TypeError, "out: expected a whole number, got '8'"),
        ({"kernel": None}, TypeError, "kernel: expected a whole number, got None"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        ({"residual": 1.0}, TypeError, "residual: expected a tensor, got float"),
        ({"shuffle": 3}, ValueError, "out: expected channels in whole cells of 3 x 3, got 8"),
        ({"shuffle": 2}, ValueError, "out: expected rows of a cell in multiples of 16 channels, got 8 in 2 rows"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(8\), got \(3\)"),
        ({"bias": torch.zeros(8).bfloat16()}, TypeError, "bias: expected torch.float32 beside torch.float32"),
        ({"residual": torch.zeros(1, 8, 4, 5)}, ValueError, r"residual: expected shape \(1, 8, 4, 4\), got \(1, 8"),
        ({"residual": torch.zeros(1, 8, 4, 4).double()}, TypeError, "residual: expected torch.float32 as x has"),
        ({"activation": "gelu"}, ValueError, "activation: expected None or 'relu', got 'gelu'"),
        ({"gate": 1.0}, TypeError, "gate: expected a tensor, got float"),
        ({"gate": torch.zeros(1, 8, 4, 5)}, ValueError, r"gate: expected shape \(1, 8, 4, 4\), got \(1, 8"),
        ({"gate": torch.zeros(1, 8, 4, 4).double()}, TypeError, "gate: expected torch.float32 as x has"),
        ({"gate": torch.zeros(1, 8, 4, 4), "activation": "relu"}, ValueError, "gate: expected neither an activation"),
        (
            {"gate": torch.zeros(1, 8, 4, 4), "residual": torch.zeros(1, 8, 4, 4)},
            ValueError,
            "gate: expected neither an activation nor a residual",
        ),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "x": torch.zeros(1, 8, 4, 4),
        "weight": packed_weight(torch.zeros(8, 8, 3, 3)),
        "out": 8,
        "kernel": 3,
        "padding": 1,
    } | change
    with pytest.raises(error, match=message):
        packed_conv2d(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias", None), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8, 4, 4)}, ValueError, r"x: expected \(N, C, H, W\)"),
        ({"second": torch.zeros(1, 6, 16, 32)}, ValueError, "second: expected .* of packed_weight for"),
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"x": torch.zeros(1, 0, 4, 4)}, ValueError, "middle, x: expected one channel or more, got 0 and 0"),
        ({"middle": 0}, ValueError, "middle: expected at least 1, got 0"),
        ({"middle": 8.0}, TypeError, "middle: expected a whole number, got 8.0"),
        ({"middle": 17}, ValueError, r"first: expected \(2, 3, 16, 32\) of packed_weight for \(17, 8, 3, 3\)"),
        ({"first_bias": torch.zeros(9)}, ValueError, r"first_bias: expected shape \(8\), got \(9\)"),
        ({"second_bias": torch.zeros(9)}, ValueError, r"second_bias: expected shape \(8\), got \(9\)"),
        ({"residual": torch.zeros(1, 8, 4, 5)}, ValueError, r"residual: expected shape \(1, 8, 4, 4\)"),
    ],
)
def test_errors_of_a_block(change, error, message):
    packed = packed_weight(torch.zeros(8, 8, 3, 3))
    arguments = {"x": torch.zeros(1, 8, 4, 4), "first": packed, "second": packed} | change
    with pytest.raises(error, match=message):
        packed_block(arguments.pop("x"), arguments.pop("first"), arguments.pop("second"), **arguments)


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
def test_numbers_whose_products_64_bits_do_not_hold():
    x, weight = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 16, 32)
    for stride, padding in ((2**61, 0), (2**61, 2**61)):
        with pytest.raises(RuntimeError, match="a stride of 1 to"):
            packed_conv2d(x, weight, out=16, kernel=1, stride=stride, padding=padding)
    with pytest.raises(RuntimeError, match="out: expected channels in whole cells"):
        op(x, weight, None, None, 16, 1, 1, 0, 2**32, False)


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
def test_an_image_without_channels():
    x = torch.zeros(1, 0, 4, 4)
    with pytest.raises(RuntimeError, match=r"x: expected .* with channels"):
        op(x, torch.zeros(1, 0, 16, 32), None, None, 16, 1, 1, 0, 1, False)
    with pytest.raises(RuntimeError, match=r"x: expected .* with channels"):
        block_op(x, torch.zeros(1, 0, 16, 32), None, torch.zeros(0, 3, 16, 32), None, None, 4)


def test_weights_of_another_shape():
    for shape in ((8, 8, 3, 5), (8, 8, 9, 9), (8, 3, 3), (0, 8, 3, 3)):
        with pytest.raises(ValueError, match="weight: expected"):
            packed_weight(torch.zeros(shape))


def test_factors_that_do_not_fit_the_packed_weight():
    weight, down, up = torch.zeros(8, 8, 3, 3), torch.zeros(2, 8, 3, 3), torch.zeros(8, 2)
    for given, error, message in (
        ((down, None), ValueError, "down, up: expected two tensors"),
        ((down, up[:7]), ValueError, "down, up: expected .* for weight"),
        ((down[None], up[None]), ValueError, "down, up: expected no stage axis"),
        ((down.int(), up), TypeError, "down: expected float32"),
        ((down.to("meta"), up), ValueError, "down is on meta, but weight is on cpu"),
    ):
        with pytest.raises(error, match=message):
            packed_weight(weight, *given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "a"}, "scale: expected a number, got 'a'"),
        ({"dtype": torch.int8}, "dtype: expected float32, .* got torch.int8"),
        ({"dtype": "bfloat16"}, "dtype: expected float32, .* got bfloat16"),
        ({"adjoint": "yes"}, "adjoint: expected True, False or None, got 'yes'"),
    ],
)
def test_what_does_not_say_how_to_pack(change, message):
    with pytest.raises(TypeError, match=message):
        packed_weight(torch.zeros(8, 8, 3, 3), **change)


@pytest.mark.parametrize("size", [(0, 0, 4), (0, 4, 0), (2, 0, 4), (2, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_images_without_pixels(dtype, size):
    """A width of zero divided by zero, which ended the process."""
    x, packed = torch.zeros(size[0], 16, *size[1:], dtype=dtype), packed_weight(torch.zeros(16, 16, 3, 3, dtype=dtype))
    assert packed_block(x, packed, packed, residual=x).shape == x.shape


def test_a_stride_past_the_image_takes_no_memory_of_its_own():
    weight, x = packed_weight(torch.rand(16, 16, 3, 3).bfloat16()), torch.rand(1, 16, 9, 5).bfloat16()
    expected = packed_conv2d(x, weight, out=16, kernel=3, stride=11, padding=1)
    for stride in (12, 2**31 - 1):
        assert torch.equal(packed_conv2d(x, weight, out=16, kernel=3, stride=stride, padding=1), expected)
