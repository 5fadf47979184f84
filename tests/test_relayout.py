"""Copies between the two layouts of an image, and to another dtype on the way."""

from __future__ import annotations

import pytest
import torch
from threads_help import check_threads
from torch.library import opcheck

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.functional import relayout
from lorun_fast.ops import relayout as ops

op = torch.ops.lorun_fast.relayout.default
needs_native = pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# of x and of the result
PAIRS = [(d, d) for d in DTYPES] + [
    pair for d in DTYPES[2:] for pair in ((torch.float32, d), (d, torch.float32))
]  # fmt: skip
# N, C, H, W: squares of every element's size and what is left of them, more channels and pixels than a tile, few of
# both, none
SHAPES = [
    (1, 8, 8, 8),
    (2, 28, 9, 7),
    (1, 31, 1, 65),
    (3, 9, 5, 26),
    (1, 130, 3, 43),
    (2, 64, 16, 16),
    (1, 280, 1, 1),
    (1, 8, 1, 3),
    (0, 8, 4, 4),
    (1, 16, 0, 4),
]
FORMATS = (torch.contiguous_format, torch.channels_last)
formats = pytest.mark.parametrize("last", [False, True], ids=["to contiguous", "to channels_last"])


def image(shape, dtype=torch.float32, last=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=FORMATS[last])


@pytest.fixture
def calls(record_calls, monkeypatch):
    """Whether the op was asked for: a result alone would not tell. It is, for small images too."""
    monkeypatch.setattr(ops, "LEAST_VALUES", 0)
    return record_calls(ops, "_op")


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "to"), PAIRS, ids=str)
def test_values_and_strides(poisoned, dtype, to, shape, last):
    x = image(shape, dtype, not last)
    y = op(x, last, to)
    assert y.dtype == to and y.shape == x.shape and torch.equal(y, x.to(to))
    _, channels, height, width = shape
    pixel = (height * width * channels, 1, width * channels, channels)
    if y.numel():
        assert y.stride() == (pixel if last else (channels * height * width, height * width, width, 1))
    assert y.data_ptr() != x.data_ptr() or not y.numel()


@formats
def test_special_values_are_rounded_as_torch_rounds(last):
    values = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-45, 65504.0, 65520.0, 3.4e38, 1 + 2**-8]
    x = torch.tensor(values).repeat(8).view(1, 8, 11, 1).contiguous(memory_format=FORMATS[not last])
    for to in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(op(x, last, to), x.to(to), rtol=0, atol=0, equal_nan=True)
        back = op(x.to(to).contiguous(memory_format=FORMATS[not last]), last, torch.float32)
        torch.testing.assert_close(back, x.to(to).float(), rtol=0, atol=0, equal_nan=True)


@formats
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], 3)[:, :, :, ::2],
        lambda x: torch.cat([x, x], 1)[:, 3:12],
        lambda x: x[:1].expand_as(x),
        lambda x: x,
    ],
    ids=["transposed", "strided", "a slice", "expanded", "in that layout already"],
)
def test_the_op_takes_any_strides(strided, last):
    x = strided(image((2, 12, 6, 10), last=last))
    assert torch.equal(op(x, last, torch.bfloat16), x.bfloat16())


@needs_native
@formats
def test_what_the_function_leaves_to_torch(calls, monkeypatch, last):
    wanted, x = FORMATS[last], image((1, 8, 5, 6), last=not last)
    assert relayout(x, wanted).is_contiguous(memory_format=wanted) and len(calls) == 1
    already = image((1, 8, 5, 6), last=last)
    assert relayout(already, wanted) is already and relayout(already, wanted, torch.float32) is already
    assert relayout(already, wanted, torch.bfloat16).dtype == torch.bfloat16
    for other in (image((1, 7, 5, 6), last=not last), torch.cat([x, x], 1)[:, ::2], x.to("meta")):
        y = relayout(other, wanted)
        assert y.is_contiguous(memory_format=wanted) and (y.is_meta or torch.equal(y, other))
    assert relayout(x, wanted, torch.float64).dtype == torch.float64
    assert torch.equal(torch.func.vmap(lambda t: relayout(t, torch.contiguous_format))(x[None]), x[None])
    assert len(calls) == 1
    monkeypatch.setattr(ops, "LEAST_VALUES", x.numel() + 1)
    assert torch.equal(relayout(x, wanted), x) and len(calls) == 1
    # An image that is in both layouts stays as it is.
    one = torch.randn(2, 1, 4, 4)
    assert relayout(one, wanted) is one


@formats
@pytest.mark.parametrize("grad_last", [False, True])
def test_the_gradient_comes_back_in_the_other_layout(calls, last, grad_last):
    x = image((2, 12, 6, 10), last=not last).requires_grad_()
    y = relayout(x, FORMATS[last], torch.bfloat16)
    (grad,) = torch.autograd.grad(y, x, image(x.shape, torch.bfloat16, grad_last))
    assert grad.dtype == torch.float32 and grad.stride() == x.stride()
    assert torch.equal(grad, image(x.shape, torch.bfloat16).float())


@formats
def test_opcheck_and_gradients(last):
    x = image((1, 9, 3, 4), torch.float64, not last).requires_grad_()
    opcheck(op, (x, last, torch.float64))
    opcheck(op, (x.detach().float().requires_grad_(), last, torch.bfloat16))
    assert torch.autograd.gradcheck(lambda t: op(t, last, torch.float64), (x,))
    assert torch.autograd.gradgradcheck(lambda t: op(t, last, torch.float64).square(), (x,))


@formats
def test_compiles_as_one_graph(last):
    x = image((1, 12, 5, 6), last=not last)

    def call(x):
        return relayout(2 * x, FORMATS[last], torch.bfloat16)

    found = torch.compile(call, fullgraph=True)(x)
    assert torch.equal(found, call(x)) and found.stride() == call(x).stride()


@formats
def test_does_not_depend_on_threads(last):
    x = image((3, 28, 40, 41), last=not last)
    check_threads(lambda: op(x, last, torch.bfloat16))


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((torch.ones(8, 4, 4), torch.channels_last), ValueError, "x: expected"),
        ((torch.ones(1, 8, 4, 4, dtype=torch.int32), torch.channels_last), TypeError, "x: expected float32"),
        ((torch.ones(1, 8, 4, 4), torch.channels_last, torch.int8), TypeError, "dtype: expected float32"),
        ((torch.ones(1, 8, 4, 4), torch.preserve_format), ValueError, "memory_format: expected torch.channels_last or"),
        ((torch.ones(1, 8, 4, 4), "channels_last"), ValueError, "memory_format: expected torch.channels_last or"),
        (([1.0], torch.channels_last), TypeError, "x: expected a tensor"),
    ],
)
def test_bad_arguments(args, error, match):
    with pytest.raises(error, match=match):
        relayout(*args)


@needs_native
def test_the_op_refuses_other_pairs_of_dtypes():
    with pytest.raises(RuntimeError, match="expected x's own, or float32 beside"):
        op(torch.ones(1, 8, 4, 4), True, torch.float64)
    with pytest.raises(RuntimeError, match="expected 4 dimensions"):
        op(torch.ones(8, 4, 4), True, torch.float32)


@needs_native
@pytest.mark.parametrize("narrow", [False, True])
def test_a_network_of_many_bands_goes_by_it_both_ways(calls, narrow):
    """And each stage's result is what the operator takes without a copy."""
    net = lf.LoRun(lf.CASSI(torch.ones(8, 12), 9, 1), lf.SpectralTransformer(9, 9, (9, 18), (1, 1)), stages=2).eval()
    net.denoiser.to(torch.bfloat16 if narrow else torch.float32)
    with torch.no_grad():
        found = net(torch.rand(1, 8, 20), return_stages=True)
    assert [call[1] for call in calls] == [True, False] * 2
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in found)
