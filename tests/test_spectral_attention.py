"""spectral_attention: attention across channels and a ReLU beside it, against autograd of the definition in float64."""

from __future__ import annotations

import pytest
import torch
from threads_help import check_threads
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from variants_help import check_under, lesser_variants

from lorun_fast.functional import spectral_attention
from lorun_fast.reference import spectral_attention as reference

op = torch.ops.lorun_fast.spectral_attention.default
backward_op = torch.ops.lorun_fast.spectral_attention_backward.default

# N, pixels, heads, channels of a head, hidden: one of everything; channels that fill no vector, one, two, and none
# evenly; pixels that fill no tile, several, and several parts of them; nothing
CASES = [
    (1, 1, 1, 1, 0),
    (2, 35, 2, 3, 5),
    (1, 64, 1, 16, 16),
    (1, 700, 2, 28, 112),
    (3, 257, 4, 28, 17),
    (2, 100, 3, 33, 3),
    (1, 20, 1, 48, 1),
    (1, 9000, 1, 5, 0),
    (0, 5, 1, 4, 2),
    (1, 0, 1, 4, 2),
]
CLOSE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def problem(case, dtype=torch.float32):
    """(qkv, temperature, hidden, gradient)"""
    n, pixels, heads, d, hidden = case
    generator = torch.Generator().manual_seed(0)
    draw = {"dtype": torch.float64, "generator": generator}
    qkv = torch.randn(n, pixels, 3 * heads * d + hidden, **draw).to(dtype)
    grad = torch.randn(n, pixels, heads * d + hidden, **draw).to(dtype)
    temperature = 5 * torch.rand(heads, **draw)
    return qkv, temperature.to(dtype if dtype == torch.float64 else torch.float32), hidden, grad


def exact(qkv, temperature, hidden, grad):
    """The result and both gradients of the definition, by autograd in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (qkv, temperature)]
    y = reference.spectral_attention(*leaves, hidden)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.double())


def assert_close(found, expected, limit):
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= limit * max(1e-6, expected.norm().item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", CLOSE)
def test_equals_the_definition(poisoned, dtype, case):
    qkv, temperature, hidden, grad = problem(case, dtype)
    y, of_qkv, of_temperature = exact(qkv, temperature, hidden, grad)
    leaves = [qkv.requires_grad_(), temperature.requires_grad_()]
    found = spectral_attention(*leaves, hidden=hidden)
    gradients = torch.autograd.grad(found, leaves, grad)
    assert found.dtype == gradients[0].dtype == dtype and gradients[1].dtype == temperature.dtype
    assert_close(found.detach(), y, CLOSE[dtype])
    assert_close(gradients[0], of_qkv, CLOSE[dtype])
    assert_close(gradients[1], of_temperature, 1e-12 if dtype == torch.float64 else 3e-6)
    with torch.no_grad():
        assert torch.equal(spectral_attention(*leaves, hidden=hidden), found)


def test_it_is_attention_by_cosine_similarity():
    """In other words than the definition's, and a pixel more does not change how much a channel weighs."""
    qkv, _, _, _ = problem((2, 35, 2, 3, 0), torch.float64)
    temperature = torch.tensor([2.0, 5.0], dtype=torch.float64)
    got = spectral_attention(qkv, temperature.view(2, 1, 1))
    q, k, v = qkv.split(6, -1)
    for n in range(2):
        for head, t in enumerate((2.0, 5.0)):
            own = slice(3 * head, 3 * head + 3)
            cosine = nn.functional.cosine_similarity(q[n, :, own, None], k[n, :, None, own], dim=0)
            torch.testing.assert_close(got[n, :, own], v[n, :, own] @ torch.softmax(t * cosine, dim=1).T)
    torch.testing.assert_close(spectral_attention(torch.cat([qkv, qkv], 1), temperature)[:, :35], got)


def test_it_is_msts_attention_with_q_and_k_exchanged():
    """There the softmax goes over the channels of q, and pixels are innermost."""
    qkv, temperature, _, _ = problem((2, 35, 2, 3, 0), torch.float64)
    q, k, v = (t.mT.unflatten(1, (2, 3)) for t in qkv.split(6, -1))
    q, k = (nn.functional.normalize(t, dim=-1) for t in (q, k))
    expected = ((k @ q.mT * temperature.view(2, 1, 1)).softmax(-1) @ v).flatten(1, 2).mT
    q, k, v = qkv.split(6, -1)
    torch.testing.assert_close(spectral_attention(torch.cat([k, q, v], -1), temperature), expected)


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_backward_definition_is_autograds(dtype):
    """What runs where nothing is built."""
    qkv, temperature, hidden, grad = problem((2, 40, 2, 5, 7), dtype)
    _, *expected = exact(qkv, temperature, hidden, grad)
    for a, b in zip(reference.spectral_attention_backward(grad, qkv, temperature, hidden), expected, strict=True):
        assert_close(a, b, 0.03 if dtype in (torch.bfloat16, torch.float16) else CLOSE[dtype])


def test_bf16_weighs_in_fp32():
    """Products of q and k that bf16 holds, norms and logits that it would round: only the result may be rounded."""
    torch.manual_seed(0)
    nearly_all, some, none = (torch.rand(16, n, 4) < share for n, share in ((512, 0.97), (64, 0.5), (32, 0)))
    q = torch.cat([nearly_all[:, :256], some[:, :32], none], 1)
    k = torch.cat([nearly_all[:, 256:], none, some[:, 32:]], 1)
    qkv = torch.cat([q, k, torch.rand(q.shape)], 2).bfloat16()
    for found in (op(qkv, torch.tensor([200.0]), 0), reference.spectral_attention(qkv, torch.tensor([200.0]), 0)):
        want = reference.spectral_attention(qkv.double(), torch.tensor([200.0]).double(), 0)
        torch.testing.assert_close(found.double(), want, rtol=0, atol=8e-3)


def test_channels_without_light_have_no_direction():
    """Zeros attend evenly, and nothing is divided by their length."""
    qkv, temperature, hidden, grad = problem((1, 50, 1, 6, 2), torch.float64)
    qkv[:, :, 2] = 0
    qkv[:, :, 9] = 0
    y, of_qkv, of_temperature = exact(qkv, temperature, hidden, grad)
    assert_close(y[0, :, 2], qkv[0, :, 12:18].mean(1), 1e-13)
    torch.testing.assert_close(op(qkv, temperature, hidden), y)
    for found in (backward_op, reference.spectral_attention_backward):
        for a, b in zip(found(grad, qkv, temperature, hidden), (of_qkv, of_temperature), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("at", [0, 4, 9, 17])
def test_nan_reaches_what_depends_on_it(at):
    """Of q, k, v and the hidden values of one head; not the other sample."""
    qkv, temperature, hidden, _ = problem((2, 70, 1, 4, 20))
    clean = op(qkv, temperature, hidden)
    qkv[0, 5, at] = torch.nan
    got, want = op(qkv, temperature, hidden), reference.spectral_attention(qkv, temperature, hidden)
    assert got[0].isnan().any() and torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[1], clean[1])


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_any_layout(layout):
    qkv, temperature, hidden, grad = problem((2, 30, 2, 4, 5))
    qkv, grad = (
        {
            "strided": torch.cat([t, t], 2)[:, :, ::2],
            "transposed": t.mT.contiguous().mT,
            "expanded": t[:1].expand_as(t),
        }[layout]
        for t in (qkv, grad)
    )
    temperature = torch.stack([temperature, temperature], 1)[:, 0]
    y, of_qkv, of_temperature = exact(qkv, temperature, hidden, grad)
    assert_close(op(qkv, temperature, hidden), y, 1e-6)
    found = backward_op(grad, qkv, temperature, hidden)
    assert_close(found[0], of_qkv, 1e-6)
    assert_close(found[1], of_temperature, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    qkv, temperature, hidden, grad = problem((2, 7, 2, 3, 4), dtype)
    opcheck(op, (qkv.requires_grad_(), temperature.requires_grad_(), hidden))
    opcheck(backward_op, (grad, qkv.detach(), temperature.detach(), hidden))


def test_gradcheck():
    qkv, temperature, hidden, _ = problem((2, 6, 2, 3, 4), torch.float64)
    leaves = (qkv.requires_grad_(), temperature.requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: spectral_attention(*t, hidden=hidden), leaves)
    # A definition takes the op's place under function transforms, and can be differentiated again.
    jacobian = torch.func.jacrev(lambda t: spectral_attention(qkv.detach(), t, hidden=hidden).sum((0, 1)))
    expected = torch.autograd.functional.jacobian(
        lambda t: reference.spectral_attention(qkv.detach(), t, hidden).sum((0, 1)), temperature
    )
    torch.testing.assert_close(jacobian(temperature.detach()), expected)


def test_without_pixels_nothing_outside_the_sums_is_read(poisoned):
    qkv, temperature, hidden, grad = problem((2, 0, 3, 4, 2))
    for _ in range(20):
        between = [torch.empty(64 * k) for k in range(20)]
        del between
        assert torch.equal(backward_op(grad, qkv, temperature, hidden)[1], torch.zeros(3))


def test_gradgradcheck():
    qkv, temperature, hidden, grad = problem((2, 5, 2, 3, 4), torch.float64)
    leaves = (qkv.requires_grad_(), temperature.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda *t: spectral_attention(*t, hidden=hidden), leaves, grad.requires_grad_())
    for i in range(3):  # each alone
        tensors = [t.detach() for t in (grad, *leaves)]
        tensors[i].requires_grad_()
        assert torch.autograd.gradcheck(lambda *t: backward_op(*t, hidden), tensors)


def test_compiles_as_one_graph():
    qkv, temperature, hidden, _ = problem((2, 33, 2, 4, 5))

    def run(qkv):
        return 2 * spectral_attention(qkv + 1, temperature, hidden=hidden)

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(qkv), run(qkv))


def test_an_exported_program_does_without_this_package():
    class Block(nn.Module):
        def forward(self, qkv):
            return spectral_attention(qkv, torch.ones(2), hidden=5)

    qkv, _, _, _ = problem((1, 33, 2, 4, 5))
    program = torch.export.export(Block(), (qkv,))
    assert "lorun_fast" not in str(program.graph)
    torch.testing.assert_close(program.module()(qkv), Block()(qkv))


def test_under_autocast_it_computes_in_the_dtype_that_it_is_given():
    qkv, temperature, hidden, _ = problem((1, 33, 2, 4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spectral_attention(qkv, temperature, hidden=hidden), op(qkv, temperature, hidden))


def test_does_not_depend_on_threads_or_batch_mates():
    qkv, temperature, hidden, grad = problem((3, 1500, 2, 9, 4))
    check_threads(lambda: (op(qkv, temperature, hidden), *backward_op(grad, qkv, temperature, hidden)))
    assert torch.equal(op(qkv[1:2], temperature, hidden), op(qkv, temperature, hidden)[1:2])


def test_flops():
    """Two products with a d x d matrix for each pixel and head, four backward."""
    qkv, temperature, hidden, _ = problem((2, 10, 3, 4, 5))
    qkv.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = spectral_attention(qkv, temperature, hidden=hidden)
    assert counter.get_total_flops() == 2 * 2 * 2 * 10 * 3 * 4 * 4
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 2 * 10 * 3 * 4 * 4


VARIANTS = """
from lorun_fast.reference import spectral_attention as reference
for dtype, wide, close in dtypes(dict(rtol=1e-5, atol=1e-6), dict(rtol=1e-2, atol=1e-2)):
    for heads, d, hidden in ((2, 28, 30), (1, 3, 1), (2, 9, 12)):
        qkv, grad = (torch.randn(2, 300, k * heads * d + hidden).to(dtype) for k in (3, 1))
        temperature = 4 * torch.rand(heads, dtype=wide)
        got = torch.ops.lorun_fast.spectral_attention(qkv, temperature, hidden)
        want = reference.spectral_attention(qkv.double(), temperature.double(), hidden)
        torch.testing.assert_close(got.double(), want, **close)
        got = torch.ops.lorun_fast.spectral_attention_backward(grad, qkv, temperature, hidden)
        want = reference.spectral_attention_backward(grad.double(), qkv.double(), temperature.double(), hidden)
        for a, b in zip(got, want):
            assert (a.double() - b).norm() <= close["rtol"] * b.norm()
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANTS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(4, 13)}, ValueError, r"qkv: expected \(N, pixels, 3 C \+ 1\).*got shape \(4, 13\)"),
        ({"qkv": torch.zeros(1, 4, 12)}, ValueError, r"C a multiple of 2 heads, got shape \(1, 4, 12\)"),
        ({"qkv": torch.zeros(1, 4, 1)}, ValueError, r"got shape \(1, 4, 1\)"),
        ({"qkv": torch.zeros(1, 4, 13).int()}, TypeError, "qkv: expected float32, float64, bfloat16 or float16"),
        ({"qkv": None}, TypeError, "qkv: expected a tensor, got NoneType"),
        ({"temperature": torch.zeros(0)}, ValueError, r"temperature: expected \(heads,\), got shape \(0\)"),
        ({"temperature": 1.0}, TypeError, "temperature: expected a tensor, got float"),
        ({"temperature": torch.ones(2) > 0}, TypeError, "temperature: expected floating-point values, got torch.bool"),
        ({"temperature": torch.ones(2, device="meta")}, ValueError, "temperature is on meta, but qkv is on cpu"),
        ({"hidden": -1}, ValueError, "hidden: expected at least 0, got -1"),
        ({"hidden": 1.0}, TypeError, "hidden: expected a whole number, got 1.0"),
    ],
)
def test_errors(change, error, message):
    arguments = {"qkv": torch.zeros(1, 4, 13), "temperature": torch.ones(2), "hidden": 1} | change
    with pytest.raises(error, match=message):
        spectral_attention(arguments["qkv"], arguments["temperature"], hidden=arguments["hidden"])


def test_a_direct_call_of_the_op_stays_inside_its_memory():
    qkv, temperature, hidden, grad = problem((1, 5, 2, 3, 1))
    for wrong in (19, -1, 20):
        with pytest.raises((RuntimeError, ValueError)):
            op(qkv, temperature, wrong)
    with pytest.raises(RuntimeError, match="grad"):
        backward_op(grad[:, :4], qkv, temperature, hidden)
    with pytest.raises(RuntimeError, match="grad"):
        backward_op(grad.double(), qkv, temperature, hidden)
    with pytest.raises(RuntimeError, match="temperature"):
        op(qkv, temperature.double(), hidden)
