"""packed_factor_gradients: the gradients of a convolution's low-rank factors, against autograd's in float64."""

from __future__ import annotations

import pytest
import torch
from threads_help import check_threads
from torch.library import opcheck
from variants_help import check_under, lesser_variants

from lorun_fast import _native
from lorun_fast.functional import packed_factor_gradients
from lorun_fast.reference import packed_factor_gradients as reference

op = torch.ops.lorun_fast.packed_factor_gradients.default

# N, out, in, rank, H, W, kernel, padding: tiles inside the row and at its edges, one and several, one to four of them,
# odd channels, results larger and smaller than the image, rows without a neighbour, more rows than are laid out at a
# time, the largest rank of a tile and one more
CASES = [
    (1, 64, 64, 7, 40, 64, 3, 1),
    (2, 17, 31, 3, 9, 13, 3, 1),
    (1, 8, 5, 16, 33, 70, 5, 0),
    (1, 64, 64, 7, 1, 1, 3, 1),
    (2, 33, 20, 1, 20, 35, 1, 0),
    (1, 16, 16, 2, 12, 256, 7, 3),
    (1, 9, 48, 10, 11, 47, 3, 3),
    (1, 3, 1, 1, 20, 100, 3, 0),
    (2, 5, 8, 17, 6, 20, 3, 1),
    (1, 4, 3, 2, 6, 6, 2, 0),
    (0, 3, 3, 2, 6, 6, 3, 1),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def problem(case, dtype=torch.bfloat16):
    n, out, channels, rank, height, width, kernel, padding = case
    generator = torch.Generator().manual_seed(0)
    results = (height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1)
    shapes = ((n, out, *results), (n, channels, height, width), (rank, channels, kernel, kernel), (out, rank))
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    return (*tensors, padding)


def call(grad, x, down, up, padding):
    return packed_factor_gradients(grad, x, down, up, padding=padding)


def wide(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def rounded_between(grad, x, down, up, padding):
    """The definition in float64, with what lies between rounded to bf16."""
    s = torch.einsum("nohw,or->nrhw", grad, up).bfloat16().double()
    t = torch.nn.functional.conv2d(x, down, padding=padding).bfloat16().double()
    weight = torch.zeros_like(down, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, padding=padding)
    return torch.autograd.grad(y, weight, s)[0], torch.einsum("nohw,nrhw->or", grad, t)


def assert_close(found, tensors, limit):
    expected = reference.packed_factor_gradients(*wide(tensors))
    by_tiles = tensors[0].dtype == torch.bfloat16 and tensors[2].shape[0] <= 16 and _native.build_info()["amx"]
    if by_tiles:
        expected, limit = rounded_between(*wide(tensors)), 1e-4
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= limit * max(1.0, b.norm().item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(poisoned, dtype, case):
    tensors = problem(case, dtype)
    found = call(*tensors)
    assert all(g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for g in found)
    assert_close(found, tensors, 1e-13 if dtype == torch.float64 else 3e-6)


def test_the_definition_is_autograds():
    grad, x, down, up, padding = problem((2, 4, 3, 2, 7, 6, 3, 1), torch.float64)
    leaves = [down.requires_grad_(), up.requires_grad_()]
    y = torch.nn.functional.conv2d(x, (up @ down.flatten(1)).view(4, 3, 3, 3), padding=padding)
    expected = torch.autograd.grad(y, leaves, grad)
    for a, b in zip(reference.packed_factor_gradients(grad, x, down, up, padding), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
def test_any_layout(layout):
    grad, x, down, up, padding = problem((2, 5, 8, 3, 10, 13, 3, 1))
    x, grad = (
        {
            "contiguous": t,
            "channels_last": t.contiguous(memory_format=torch.channels_last),
            "strided": torch.cat([t, t], 3)[:, :, :, ::2],
            "expanded": t[:1].expand_as(t),
        }[layout]
        for t in (x, grad)
    )
    factors = (down.transpose(2, 3), up.mT.contiguous().mT) if layout == "strided" else (down, up)
    tensors = (grad, x, *factors, padding)
    assert_close(call(*tensors), tensors, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    *tensors, padding = problem((2, 3, 5, 2, 4, 6, 3, 1), dtype)
    opcheck(op, (*[t.requires_grad_() for t in tensors], padding))


@pytest.mark.parametrize("case", [(2, 3, 2, 2, 4, 5, 3, 1), (1, 2, 3, 1, 4, 5, 2, 0), (1, 2, 3, 2, 3, 4, 1, 0)])
def test_gradcheck(case):
    *tensors, padding = problem(case, torch.float64)
    assert torch.autograd.gradcheck(op, (*[t.requires_grad_() for t in tensors], padding))


def test_only_the_wanted_gradient_is_formed():
    *tensors, padding = problem((1, 3, 5, 2, 4, 6, 3, 1), torch.float64)
    for i in range(4):
        leaves = [t.detach().clone() for t in tensors]
        leaves[i].requires_grad_()
        (found,) = torch.autograd.grad(sum(g.sum() for g in op(*leaves, padding)), leaves[i])
        assert found.shape == leaves[i].shape and found.abs().sum() > 0


def test_adjointness():
    """<grad_down, d> = <grad, conv(x, up . d)>, and the same of up: both are linear in the other factor."""
    grad, x, down, up, padding = problem((2, 4, 5, 2, 9, 8, 3, 1), torch.float64)
    g_down, g_up = call(grad, x, down, up, padding)
    y = torch.nn.functional.conv2d(x, (up @ down.flatten(1)).view(4, 5, 3, 3), padding=padding)
    for gradient, factor in ((g_down, down), (g_up, up)):
        torch.testing.assert_close((gradient * factor).sum(), (grad * y).sum(), rtol=1e-12, atol=0)


def test_compiles_as_one_graph():
    tensors = problem((1, 3, 8, 2, 9, 7, 3, 1))

    def run(grad, *rest):
        return [g + 1 for g in call(2 * grad, *rest)]

    for a, b in zip(torch.compile(run, fullgraph=True)(*tensors), run(*tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_does_not_depend_on_threads():
    tensors = problem((3, 20, 24, 7, 30, 41, 3, 1))
    check_threads(lambda: call(*tensors))


VARIANTS = """
from lorun_fast.functional import packed_factor_gradients
from lorun_fast.reference import packed_factor_gradients as reference
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    shapes = ((2, 5, 6, 37), (2, 9, 6, 37), (3, 9, 3, 3), (5, 3))
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    found = packed_factor_gradients(*tensors, padding=1)
    expected = reference.packed_factor_gradients(*[t.double() for t in tensors], 1)
    for a, b in zip(found, expected):
        assert (a.double() - b).norm() <= (1e-13 if dtype == torch.float64 else 3e-6) * b.norm()
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANTS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8, 4, 4)}, ValueError, r"x: expected \(N, in, H, W\), got shape \(8, 4, 4\)"),
        ({"grad": torch.zeros(8, 4, 4)}, ValueError, r"grad: expected \(N, out, H', W'\)"),
        ({"grad": torch.zeros(1, 3, 4, 5)}, ValueError, r"grad: expected shape \(1, 3, 4, 4\), got \(1, 3, 4, 5\)"),
        ({"grad": torch.zeros(1, 5, 4, 4)}, ValueError, r"grad: expected shape \(1, 3, 4, 4\)"),
        ({"grad": torch.zeros(1, 3, 4, 4).double()}, TypeError, "grad: expected torch.float32 as x has"),
        ({"x": torch.zeros(1, 8, 4, 4).int()}, TypeError, "x: expected float32, float64, bfloat16 or float16"),
        ({"down": torch.zeros(2, 7, 3, 3)}, ValueError, r"down: expected \(r, 8, k, k\) for x \(1, 8, 4, 4\)"),
        ({"down": torch.zeros(2, 8, 3, 1)}, ValueError, r"got \(2, 8, 3, 1\)"),
        ({"down": torch.zeros(2, 8, 3, 3).half()}, TypeError, "down: expected torch.float32 as x has"),
        ({"down": torch.zeros(2, 8, 9, 9)}, ValueError, "kernel, padding: expected 1 to 7 and 0 or more, got 9 and 1"),
        ({"up": torch.zeros(3, 4)}, ValueError, r"up: expected \(out, 2\) beside down \(2, 8, 3, 3\), got \(3, 4\)"),
        ({"up": torch.zeros(3, 2, dtype=torch.bfloat16)}, TypeError, "up: expected torch.float32 as x has"),
        ({"padding": -1}, ValueError, "padding: expected at least 0, got -1"),
        ({"padding": 1.0}, TypeError, "padding: expected a whole number, got 1.0"),
        ({"down": None}, TypeError, "down: expected a tensor, got NoneType"),
        ({"up": None}, TypeError, "up: expected a tensor, got NoneType"),
        ({"grad": torch.zeros(1, 3, 4, 4, device="meta")}, ValueError, "meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "grad": torch.zeros(1, 3, 4, 4),
        "x": torch.zeros(1, 8, 4, 4),
        "down": torch.zeros(2, 8, 3, 3),
        "up": torch.zeros(3, 2),
        "padding": 1,
    } | change
    with pytest.raises(error, match=message):
        call(**arguments)
