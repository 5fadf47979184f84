"""Block compressive sensing: the ops against an explicit matrix, and the operator around them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants_help import check_under, lesser_variants

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.functional import block_cs, block_cs_adjoint, block_cs_step
from lorun_fast.reference import block_cs as reference

OPS = torch.ops.lorun_fast


def explicit_matrix(phi: torch.Tensor, b: int, height: int, width: int) -> torch.Tensor:
    """The whole operator as (m * rows * cols, H * W), filled entry by entry from the definition."""
    m, rows, cols = phi.shape[0], -(-height // b), -(-width // b)
    matrix = torch.zeros(m, rows, cols, height, width, dtype=phi.dtype)
    for i in range(height):
        for j in range(width):
            matrix[:, i // b, j // b, i, j] = phi[:, (i % b) * b + j % b]
    return matrix.reshape(m * rows * cols, height * width)


def case(n=2, b=4, m=5, height=7, width=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, height, width, generator=g, dtype=torch.float64).to(dtype)
    phi = torch.randn(m, b * b, generator=g, dtype=torch.float64)
    phi = phi if dtype == torch.float64 else phi.float()
    y = torch.randn(n, m, -(-height // b), -(-width // b), generator=g, dtype=torch.float64).to(phi.dtype)
    return x, y, phi


SIZES = [(7, 9), (8, 8), (1, 1), (3, 17), (4, 12)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_forward_adjoint_and_step_against_the_explicit_matrix(height, width):
    x, y, phi = case(height=height, width=width)
    matrix = explicit_matrix(phi, 4, height, width)
    flat = x.reshape(2, -1, 1)
    torch.testing.assert_close(block_cs(x, phi, block_size=4).reshape(2, -1, 1), matrix @ flat)
    adjoint = block_cs_adjoint(y, phi, block_size=4, size=(height, width))
    torch.testing.assert_close(adjoint.reshape(2, -1, 1), matrix.T @ y.reshape(2, -1, 1))
    rho = torch.tensor([0.3, 1.7], dtype=torch.float64).reshape(2, 1, 1, 1)
    step = block_cs_step(x, y, phi, rho, block_size=4)
    expected = flat - rho[:, :, :, 0] * (matrix.T @ (matrix @ flat - y.reshape(2, -1, 1)))
    torch.testing.assert_close(step.reshape(2, -1, 1), expected)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 3), b=st.integers(1, 6), m=st.integers(1, 8), height=st.integers(1, 20), width=st.integers(1, 20)
)
def test_adjointness_of_any_shape(n, b, m, height, width):
    x, y, phi = case(n, b, m, height, width)
    left = (block_cs(x, phi, block_size=b) * y).sum()
    right = (x * block_cs_adjoint(y, phi, block_size=b, size=(height, width))).sum()
    scale = x.norm() * y.norm() * phi.norm()
    assert abs(left - right) <= 1e-12 * scale


@pytest.fixture(scope="module")
def poisoned():
    """Fills what torch allocates with NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 3),
    b=st.sampled_from([1, 2, 3, 7, 8, 16, 33]),
    m=st.integers(1, 40),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_random_shapes_against_the_reference(poisoned, n, b, m, height, width, layout, dtype):
    x, y, phi = case(n, b, m, height, width, dtype)
    phi, rho = phi / b, torch.rand(n, 1, dtype=phi.dtype)
    if layout == "channels_last":
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    elif layout == "sliced":
        x, y = (torch.cat([t, t], 3)[:, :, :, 1 : 1 + t.shape[3]] for t in (x, y))
    low = y.to(dtype)
    xd, yd, pd, rd = x.double(), y.double(), phi.double(), rho.double()
    pairs = [
        (OPS.block_cs(x, phi, b), reference.block_cs(xd, pd, b)),
        (
            OPS.block_cs_adjoint(low, phi, b, height, width),
            reference.block_cs_adjoint(low.double(), pd, b, height, width),
        ),
        (OPS.block_cs_step(x, y, phi, rho, b), reference.block_cs_step(xd, yd, pd, rd, b)),
        *zip(
            OPS.block_cs_step_residual(x, y, phi, rho, b),
            reference.block_cs_step_residual(xd, yd, pd, rd, b),
            strict=True,
        ),
        (OPS.block_cs_grad_phi(x, y, b), reference.block_cs_grad_phi(xd, yd, b)),
    ]
    for got, want in pairs:
        assert got.is_contiguous() and got.shape == want.shape
        wide = torch.finfo(phi.dtype).eps
        # The largest sums are of b^2 products of unit size (here divided by b), and of all blocks for Phi's gradient:
        # these may cancel, so that the result does not tell how large they were.
        blocks = y.shape[0] * y.shape[2] * y.shape[3]
        bound = 8 * (b + m + blocks**0.5) * wide * (1 + want.abs().max() if want.numel() else 1)
        assert ((got.double() - want).abs() <= torch.finfo(got.dtype).eps * want.abs() + bound).all()


VARIANT_SCRIPT = """
from lorun_fast.reference import block_cs as reference
for n, b, m, height, width in cases:
    for dtype, wide, close in dtypes(single=dict(rtol=1e-4, atol=1e-4), narrow=dict(rtol=1e-2, atol=1e-3)):
        x, phi = torch.randn(n, 1, height, width).to(dtype), torch.randn(m, b * b).to(wide) / b
        y, rho = torch.randn(n, m, -(-height // b), -(-width // b)).to(wide), torch.rand(n, 1).to(wide)
        calls = (
            ("block_cs", (x, phi, b)),
            ("block_cs_adjoint", (y.to(dtype), phi, b, height, width)),
            ("block_cs_step", (x, y, phi, rho, b)),
            ("block_cs_step_residual", (x, y, phi, rho, b)),
            ("block_cs_grad_phi", (x, y, b)),
        )
        compare(reference, calls, close)
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    # (N, B, m, H, W): fewer pixels than a vector's lanes, tails of every kind, sums longer than one visit of a tile.
    cases = [(1, 1, 1, 3, 4), (2, 3, 5, 7, 11), (1, 7, 13, 30, 40), (1, 8, 300, 20, 17), (3, 16, 9, 33, 70)]
    check_under(variant, VARIANT_SCRIPT, cases=cases)


def test_two_threads_at_once():
    problems = [case(2, 8, 16, 70 + 8 * i, 41, torch.float32) for i in range(2)]
    want = [block_cs_step(*problem, 0.3, block_size=8) for problem in problems]
    wrong = []

    def work(i):
        for _ in range(30):
            if not torch.equal(block_cs_step(*problems[i], 0.3, block_size=8), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_keeps_dtype_and_accumulates_wide(dtype):
    x, y, phi = case(b=8, m=16, height=24, width=20, dtype=dtype)
    wide = (x.double(), y.double(), phi.double())
    results = {
        "forward": (block_cs(x, phi, block_size=8), block_cs(wide[0], wide[2], block_size=8)),
        "step": (block_cs_step(x, y, phi, 0.5, block_size=8), block_cs_step(*wide, 0.5, block_size=8)),
    }
    eps = torch.finfo(dtype).eps
    for name, (got, truth) in results.items():
        assert got.dtype == dtype, name
        # One rounding of the result to its storage type, and fp32 accumulation before it.
        bound = eps * truth.abs() + 64 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert ((got.double() - truth).abs() <= bound).all(), name


@pytest.mark.parametrize("scalar_rho", [True, False])
def test_gradients(scalar_rho):
    x, y, phi = case(n=2, b=3, m=2, height=4, width=5)
    rho = torch.tensor(0.7, dtype=torch.float64) if scalar_rho else torch.tensor([[0.7], [1.2]], dtype=torch.float64)
    rho = rho if scalar_rho else rho[:, :, None, None]
    leaves = [t.clone().requires_grad_() for t in (x, y, phi, rho)]

    def step(x, y, phi, rho):
        return block_cs_step(x, y, phi, rho, block_size=3)

    def both(x, y, phi, rho):
        return OPS.block_cs_step_residual(x, y, phi, rho.reshape(-1, 1) if rho.ndim else rho.view(1), 3)

    for f in (
        step,
        lambda x, y, phi, rho: OPS.block_cs_step(x, y, phi, rho.reshape(-1, 1) if rho.ndim else rho.view(1), 3),
        both,
        lambda *inputs: torch.cat([t.flatten() for t in both(*inputs)]),  # with a gradient for both at once
    ):
        assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(step, leaves)
    fixed = leaves[2].detach()
    assert torch.autograd.gradcheck(lambda x, y, rho: step(x, y, fixed, rho), (leaves[0], leaves[1], leaves[3]))
    assert torch.autograd.gradcheck(lambda x, y: step(x, y, fixed, 0.7), leaves[:2])
    assert torch.autograd.gradcheck(lambda x, phi: block_cs(x, phi, block_size=3), (leaves[0], leaves[2]))
    assert torch.autograd.gradcheck(lambda y, p: block_cs_adjoint(y, p, block_size=3, size=(4, 5)), leaves[1:3])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(layout, dtype):
    x, y, phi = case(dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.cat([x, x], 3)[:, :, :, 1 : 1 + x.shape[3]]
        y = torch.cat([y, y], 1)[:, : y.shape[1]]
    rho = torch.full((1,), 0.5, dtype=phi.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, y, phi, rho)]
    torch.library.opcheck(OPS.block_cs.default, (leaves[0], leaves[2], 4))
    torch.library.opcheck(OPS.block_cs_adjoint.default, (leaves[1], leaves[2], 4, 7, 9))
    torch.library.opcheck(OPS.block_cs_step.default, (*leaves, 4))
    torch.library.opcheck(OPS.block_cs_step_residual.default, (*leaves, 4))
    torch.library.opcheck(OPS.block_cs_grad_phi.default, (leaves[0], leaves[1], 4))
    for op, arguments in (
        (OPS.block_cs, (x, phi, 4)),
        (OPS.block_cs_adjoint, (y, phi, 4, 7, 9)),
        (OPS.block_cs_step, (x, y, phi, rho, 4)),
    ):
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
        real = op(*arguments)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_compiles_without_graph_breaks(graph_counter):
    x, _, phi = case()
    op = lf.BlockCS(phi, 4)

    def f(x, rho):
        return op.gradient_step(op.initial(op(x), x.shape[-2:]), op(x), rho)

    compiled = torch.compile(f, fullgraph=True, backend=graph_counter)
    for rho in (torch.tensor(0.5), torch.tensor(0.25)):
        torch.testing.assert_close(compiled(x, rho), f(x, rho))
    assert graph_counter.graphs == 1


def test_non_contiguous_input_gives_the_same_result():
    x, y, phi = case()
    rows = torch.stack([x, x + 1], -1)[..., 0]
    assert not rows.is_contiguous()
    torch.testing.assert_close(block_cs(rows, phi, block_size=4), block_cs(x, phi, block_size=4))
    torch.testing.assert_close(
        block_cs_step(rows, y, phi.T.contiguous().T, 0.5, block_size=4), block_cs_step(x, y, phi, 0.5, block_size=4)
    )


def test_gaussian_phi_has_orthonormal_rows_and_depends_on_the_seed_alone():
    op = lf.BlockCS.gaussian(0.25, 16, seed=3)
    assert op.phi.shape == (64, 256)
    torch.testing.assert_close(op.phi @ op.phi.T, torch.eye(64), atol=1e-5, rtol=0)
    assert torch.equal(op.phi, lf.BlockCS.gaussian(0.25, 16, seed=3).phi)
    assert not torch.equal(op.phi, lf.BlockCS.gaussian(0.25, 16, seed=4).phi)
    assert abs(op.phi.mean()) < 0.01
    assert op.ratio == 0.25
    # The signs that a QR decomposition leaves open are such that R's diagonal is positive.
    draw = torch.randn(256, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert ((op.phi.double() @ draw).diagonal() > 0).all()
    assert [len(lf.BlockCS.gaussian(ratio, 4).phi) for ratio in (0.01, 0.09, 0.1, 1.0)] == [1, 1, 2, 16]


def test_norm_is_the_largest_singular_value():
    _, _, phi = case()
    expected = torch.linalg.svdvals(explicit_matrix(phi, 4, 8, 12))[0]
    torch.testing.assert_close(lf.BlockCS(phi, 4).norm(), expected)


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("size", [(8, 4), (7, 10), (3, 2)])
@pytest.mark.parametrize("mu", [0.3, torch.tensor([0.2, 5.0], dtype=torch.float64)], ids=["shared", "each"])
def test_prox_against_a_dense_solve(orthonormal, size, mu):
    op = lf.BlockCS.gaussian(0.5, 4, dtype=torch.float64)
    op = op if orthonormal else lf.BlockCS(torch.randn(8, 16, dtype=torch.float64), 4)
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    y = torch.randn_like(op(x))
    a = explicit_matrix(op.phi, 4, *size)
    got = op.prox(x, y, mu)
    for i in range(2):
        weight = mu if isinstance(mu, float) else mu[i]
        right = a.T @ y[i].reshape(-1) + weight * x[i].reshape(-1)
        expected = torch.linalg.solve(a.T @ a + weight * torch.eye(len(right), dtype=torch.float64), right)
        torch.testing.assert_close(got[i].reshape(-1), expected)


@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_gradients_of_prox(size):
    op = lf.BlockCS.gaussian(0.4, 4, dtype=torch.float64, learn=True)  # orthonormal, but not on the way from there
    x = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
    y = torch.randn_like(op(x)).requires_grad_()
    mu = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def prox(x, y, mu, _):
        return op.prox(x, y, mu)

    assert torch.autograd.gradcheck(prox, (x, y, mu, op.phi))
    assert torch.autograd.gradgradcheck(prox, (x, y, mu, op.phi))


def test_prox_in_fp32_and_16_bits():
    torch.manual_seed(0)
    op = lf.BlockCS(torch.randn(64, 256) / 16, 16)
    exact, x = lf.BlockCS(op.phi.double(), 16), torch.rand(2, 1, 32, 48)
    y = op(torch.rand(2, 1, 32, 48))
    for mu in (1e-5, 1e-3, 0.1, 10.0):
        want = exact.prox(x.double(), y.double(), mu)
        torch.testing.assert_close(op.prox(x, y, mu).double(), want, rtol=0, atol=5e-6)
    assert torch.equal(op.prox(x.bfloat16(), y, 0.1), op.prox(x.bfloat16().float(), y, 0.1).bfloat16())


def test_prox_of_an_impossible_weight_is_nan():
    op, x = lf.BlockCS(torch.randn(4, 16), 4), torch.rand(2, 1, 8, 8)
    v = op.prox(x, op(x), torch.tensor([0.5, -1e4]))
    assert v[0].isfinite().all() and v[1].isnan().all()


def test_half_and_bfloat16_leave_phi_wide():
    op = lf.BlockCS.gaussian(0.25, 4).half()
    assert op.phi.dtype == torch.float32
    assert op.double().phi.dtype == torch.float64


def test_no_measurements():
    phi = torch.zeros(0, 16, requires_grad=True)
    y = block_cs(torch.rand(2, 1, 8, 8), phi, block_size=4)
    (grad,) = torch.autograd.grad(y.sum(), phi)
    assert y.shape == (2, 0, 2, 2) and grad.shape == phi.shape


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
def test_a_block_whose_pixels_nobody_can_count():
    with pytest.raises(RuntimeError, match="block_size: expected 1 to 1048576, got 4294967296"):
        OPS.block_cs(torch.rand(1, 1, 4, 4), torch.zeros(3, 0), 2**32)


def test_empty_batch():
    op = lf.BlockCS.gaussian(0.25, 4)
    x = torch.empty(0, 1, 6, 6)
    assert op(x).shape == (0, 4, 2, 2)
    assert op.gradient_step(x, op(x), 1.0).shape == x.shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op, x, y: op(x[:, 0]), ValueError, r"x: expected \(N, 1, H, W\), got shape"),
        (lambda op, x, y: op(x.expand(-1, 3, -1, -1)), ValueError, "x: expected one channel"),
        (
            lambda op, x, y: op(x.long()),
            TypeError,
            "x: expected float32, float64, bfloat16 or float16, got torch.int64",
        ),
        (lambda op, x, y: op.adjoint(y[:, :3]), ValueError, r"y: expected \(N, 4, 2, 2\) for a 8x8 image"),
        (lambda op, x, y: op.gradient_step(x, y[:1], 1.0), ValueError, "y: expected 2 samples like x, got 1"),
        (lambda op, x, y: op.gradient_step(x, y, torch.ones(3)), ValueError, "rho: expected a number, a 0-d tensor"),
        (lambda op, x, y: op.gradient_step(x, y, torch.tensor(1)), TypeError, "rho: expected a floating-point tensor"),
        (lambda op, x, y: lf.BlockCS(op.phi, 5), ValueError, r"phi: expected \(m, 25\) for block_size=5"),
        (lambda op, x, y: lf.BlockCS(op.phi * float("nan"), 4), ValueError, "phi: expected finite values"),
        (lambda op, x, y: lf.BlockCS("phi", 4), TypeError, "phi: expected a tensor or an array of numbers, got str"),
        (lambda op, x, y: lf.BlockCS.gaussian(25, 4), ValueError, r"ratio: expected a fraction in \(0, 1\], got 25"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    op = lf.BlockCS.gaussian(0.25, 4)
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(error, match=message):
        call(op, x, op(x))


def test_numpy_phi():
    phi = np.random.default_rng(0).standard_normal((3, 16))
    op = lf.BlockCS(phi, 4)
    assert op.phi.dtype == torch.float64
    assert op(torch.rand(1, 1, 8, 8)).dtype == torch.float32


def test_what_lies_in_work_space_costs_nothing():
    """Subnormal numbers of an earlier call, where a last tile is not full: arithmetic on them takes far longer."""
    op = lf.BlockCS.gaussian(0.25)
    one, eight = torch.ones(1, 256, 1, 1), torch.ones(8, 256, 1, 1)

    def seconds():
        start = time.perf_counter()
        op.adjoint(one)
        return time.perf_counter() - start

    def least(left):
        found = []
        for _ in range(20):
            op.adjoint(left)
            found.append(seconds())
        return min(found)

    op.adjoint(eight)
    assert least(eight * 1e-40) < 5 * least(eight)
