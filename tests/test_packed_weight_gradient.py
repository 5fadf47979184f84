"""packed_weight_gradient: the weight gradient of a convolution, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
from threads_help import check_threads
from torch.library import opcheck
from variants_help import check_under, lesser_variants

from lorun_fast.functional import packed_weight_gradient
from lorun_fast.reference import packed_weight_gradient as reference

op = torch.ops.lorun_fast.packed_weight_gradient.default

# N, out, in, H, W, kernel, padding: one tile and several, odd numbers of blocks, lines of a block from two columns of
# the kernel, and columns as shifts of either side, up to more than a step has pixels, rows of several steps and steps
# of several rows, results larger and smaller than the image, more rows than are laid out at a time, every number of
# tiles that are multiplied together
CASES = [
    (1, 7, 64, 8, 70, 3, 1),
    (2, 16, 16, 5, 32, 3, 1),
    (2, 31, 28, 5, 40, 3, 1),
    (2, 64, 7, 5, 33, 1, 0),
    (1, 3, 5, 1, 1, 3, 1),
    (3, 20, 40, 30, 7, 5, 2),
    (1, 8, 8, 40, 12, 3, 0),
    (2, 16, 48, 7, 90, 3, 2),
    (1, 3, 3, 6, 6, 2, 0),
    (1, 40, 64, 9, 500, 3, 1),
    (1, 64, 64, 40, 130, 3, 1),
    (1, 32, 20, 9, 37, 5, 2),
    (1, 5, 17, 9, 37, 7, 3),
    (2, 16, 17, 6, 40, 2, 0),
    (1, 16, 16, 5, 40, 3, 3),
    (1, 16, 33, 9, 3, 3, 1),
    (1, 1, 2, 3, 70, 33, 16),
    (1, 20, 9, 3, 40, 1, 0),
    (1, 70, 9, 3, 40, 1, 0),
    (1, 5, 40, 5, 40, 3, 1),
    (2, 4, 64, 5, 40, 3, 1),
    (0, 3, 3, 6, 6, 3, 1),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def problem(case, dtype=torch.bfloat16):
    n, out, channels, height, width, kernel, padding = case
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (n, out, height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1),
        (n, channels, height, width),
    )
    grad, x = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return grad, x, {"kernel": kernel, "padding": padding}


def assert_close(found, grad, x, settings):
    expected = reference.packed_weight_gradient(grad.double(), x.double(), **settings)
    limit = 1e-13 if found.dtype == torch.float64 else 3e-6
    largest = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit * max(1.0, largest))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torchs_gradient(poisoned, dtype, case):
    grad, x, settings = problem(case, dtype)
    found = packed_weight_gradient(grad, x, **settings)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, grad, x, settings)


def test_the_definition_is_autograds():
    grad, x, _ = problem((2, 3, 4, 7, 6, 3, 1), torch.float64)
    weight = torch.zeros(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    (expected,) = torch.autograd.grad(y, weight, grad)
    torch.testing.assert_close(reference.packed_weight_gradient(grad, x, 3, 1), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded", "rows apart"])
def test_any_layout(layout):
    grad, x, settings = problem((2, 5, 8, 10, 13, 3, 1))
    x, grad = (
        {
            "contiguous": t,
            "channels_last": t.contiguous(memory_format=torch.channels_last),
            "strided": torch.cat([t, t], 3)[:, :, :, ::2],
            "expanded": t[:1].expand_as(t),
            "rows apart": torch.stack([t, t.neg()], 3)
            .flatten(2, 3)
            .contiguous(memory_format=torch.channels_last)[:, :, ::2],
        }[layout]
        for t in (x, grad)
    )
    assert_close(packed_weight_gradient(grad, x, **settings), grad, x, settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    grad, x, settings = problem((2, 3, 5, 4, 6, 3, 1), dtype)
    opcheck(op, (grad.requires_grad_(), x.requires_grad_(), *settings.values()))


@pytest.mark.parametrize("case", [(2, 3, 2, 4, 5, 3, 1), (1, 2, 3, 4, 5, 2, 0), (1, 2, 3, 3, 4, 1, 0)])
def test_gradcheck(case):
    grad, x, settings = problem(case, torch.float64)
    assert torch.autograd.gradcheck(op, (grad.requires_grad_(), x.requires_grad_(), *settings.values()))


def test_only_the_wanted_gradient_is_formed():
    tensors = problem((1, 3, 5, 4, 6, 3, 1), torch.float64)[:2]
    for i in range(2):
        leaves = [t.detach().clone() for t in tensors]
        leaves[i].requires_grad_()
        (found,) = torch.autograd.grad(op(*leaves, 3, 1).sum(), leaves[i])
        assert found.shape == leaves[i].shape and found.abs().sum() > 0


def test_adjointness():
    """<G(grad, x), w> = <grad, conv(x, w)>."""
    grad, x, settings = problem((2, 3, 5, 9, 8, 3, 1), torch.float64)
    weight = torch.randn(3, 5, 3, 3, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close((packed_weight_gradient(grad, x, **settings) * weight).sum(), (grad * y).sum())


def test_compiles_as_one_graph():
    grad, x, settings = problem((1, 3, 8, 9, 7, 3, 1))

    def call(grad, x):
        return packed_weight_gradient(2 * grad, x, **settings) + 1

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(grad, x), call(grad, x))


def test_does_not_depend_on_threads():
    grad, x, settings = problem((3, 20, 24, 30, 41, 3, 1))
    check_threads(lambda: packed_weight_gradient(grad, x, **settings))


VARIANTS = """
from lorun_fast.functional import packed_weight_gradient
from lorun_fast.reference import packed_weight_gradient as reference
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    x, grad = torch.randn(2, 9, 6, 37).to(dtype), torch.randn(2, 5, 6, 37).to(dtype)
    found = packed_weight_gradient(grad, x, kernel=3, padding=1)
    expected = reference.packed_weight_gradient(grad.double(), x.double(), 3, 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-4)
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANTS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8, 4, 4)}, ValueError, r"x: expected \(N, in, H, W\), got shape \(8, 4, 4\)"),
        ({"grad": torch.zeros(8, 4, 4)}, ValueError, r"grad: expected \(N, out, H', W'\)"),
        ({"grad": torch.zeros(1, 3, 4, 5)}, ValueError, r"grad: expected shape \(1, out, 4, 4\), got \(1, 3, 4, 5\)"),
        ({"grad": torch.zeros(2, 3, 4, 4)}, ValueError, r"grad: expected shape \(1, out, 4, 4\)"),
        ({"grad": torch.zeros(1, 3, 4, 4).double()}, TypeError, "grad: expected torch.float32 as x has"),
        ({"x": torch.zeros(1, 8, 4, 4).int()}, TypeError, "x: expected float32, float64, bfloat16 or float16"),
        ({"kernel": 0}, ValueError, "kernel: expected at least 1, got 0"),
        ({"kernel": (3, 3)}, TypeError, r"kernel: expected a whole number, got \(3, 3\)"),
        ({"padding": -1}, ValueError, "padding: expected at least 0, got -1"),
        ({"padding": "same"}, TypeError, "padding: expected a whole number, got 'same'"),
        ({"grad": torch.zeros(1, 3, 4, 4, device="meta")}, ValueError, "meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {"grad": torch.zeros(1, 3, 4, 4), "x": torch.zeros(1, 8, 4, 4), "kernel": 3, "padding": 1} | change
    with pytest.raises(error, match=message):
        packed_weight_gradient(arguments.pop("grad"), arguments.pop("x"), **arguments)
