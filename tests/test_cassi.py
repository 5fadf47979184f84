"""CASSI's ops: values, adjointness, derivatives, layouts, tracing, errors."""

from __future__ import annotations

import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from variants_help import check_under, lesser_variants

import lorun_fast as lf
from benchmarks.harness.machine import cache_bytes
from lorun_fast import _native
from lorun_fast.reference import cassi as reference

OPS = torch.ops.lorun_fast
F = lf.functional

# (N, L, H, W, step): one band, one pixel, no dispersion, width below the shift, rows that reach less than a vector
# beyond the shift of a pair of bands, vector tails, the usual band count.
SHAPES = [
    (1, 1, 1, 1, 0),
    (2, 1, 3, 5, 2),
    (1, 3, 1, 1, 1),
    (2, 4, 3, 7, 0),
    (2, 5, 2, 3, 4),
    (1, 4, 3, 16, 1),
    (1, 9, 4, 12, 1),
    (1, 9, 4, 20, 2),
    (3, 3, 4, 37, 2),
    (1, 28, 3, 70, 2),
    (1, 29, 3, 101, 2),  # four bands share accesses, with 16 lanes too
]


# Of a mask: whether each band, and each sample, has its own.
FORMS = {
    "(H, W)": (False, False),
    "(L, H, W)": (True, False),
    "(N, 1, H, W)": (False, True),
    "(N, L, H, W)": (True, True),
}


def draw(shape, form="(H, W)", dtype=torch.float64, seed=0):
    """x, y and mask of one problem."""
    n, bands, height, width, step = shape
    per_band, per_sample = FORMS[form]
    own = (n, bands if per_band else 1) if per_sample else (bands,) if per_band else ()
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, bands, height, width, generator=g, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.randn(n, height, width + step * (bands - 1), generator=g, dtype=torch.float64).to(wide)
    mask = torch.rand(*own, height, width, generator=g, dtype=torch.float64).to(wide)
    return x, y, mask


def dense(mask, bands, step):
    """Phi as a matrix, (H*W', L*H*W), or one per sample, written from the formula alone."""
    if mask.ndim == 4:
        return torch.stack([dense(one if one.shape[0] > 1 else one[0], bands, step) for one in mask])
    height, width = mask.shape[-2:]
    wide = width + step * (bands - 1)
    phi = torch.zeros(height, wide, bands, height, width, dtype=mask.dtype)
    for c in range(bands):
        for i in range(height):
            for j in range(width):
                phi[i, j + c * step, c, i, j] = mask[i, j] if mask.ndim == 2 else mask[c, i, j]
    return phi.reshape(height * wide, bands * height * width)


def apply_dense(phi, t, shape):
    return torch.einsum("...j,...ij->...i", t.flatten(1), phi).reshape(t.shape[0], *shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[:-2])
def test_equals_the_dense_matrix(shape, form):
    x, y, mask = draw(shape, form)
    _, bands, _, _, step = shape
    phi = dense(mask, bands, step)
    forward = apply_dense(phi, x, y.shape[1:])
    torch.testing.assert_close(F.cassi(x, mask, step=step), forward, rtol=1e-13, atol=1e-13)
    adjoint = apply_dense(phi.mT, y, x.shape[1:])
    torch.testing.assert_close(F.cassi_adjoint(y, mask, bands=bands, step=step), adjoint, rtol=1e-13, atol=1e-13)
    gradient = apply_dense(phi.mT, forward - y, x.shape[1:])
    torch.testing.assert_close(F.cassi_step(x, y, mask, 0.3, step=step), x - 0.3 * gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_adjointness(shape, form):
    x, y, mask = draw(shape, form)
    left = (F.cassi(x, mask, step=shape[4]) * y).sum()
    right = (x * F.cassi_adjoint(y, mask, bands=shape[1], step=shape[4])).sum()
    scale = x.norm() * y.norm()
    assert abs(left - right) <= 1e-12 * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[:-2])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_prox_solves_its_normal_equations(shape, form, mu):
    x, y, mask = draw(shape, form)
    mask.view(-1)[:: max(2, mask.numel() // 3)] = 0  # leaves detector columns that nothing reaches
    _, bands, _, _, step = shape
    phi = dense(mask, bands, step)
    got = F.cassi_prox(x, y, mask, mu, step=step)
    gram = phi.mT @ phi + mu * torch.eye(phi.shape[-1], dtype=phi.dtype)
    rhs = apply_dense(phi.mT, y, x.shape[1:]) + mu * x
    if mu:
        # One by one: in a batch, LU by two threads of MKL is wrong now and then.
        systems = zip(gram.expand(x.shape[0], -1, -1), rhs.flatten(1), strict=True)
        want = torch.stack([torch.linalg.solve(matrix, right) for matrix, right in systems])
    else:  # the limit mu -> 0: the nearest v with Phi v = y wherever some band reaches
        want = x + apply_dense(torch.linalg.pinv(phi), y - apply_dense(phi, x, y.shape[1:]), x.shape[1:])
    torch.testing.assert_close(got, want.reshape(x.shape), rtol=1e-9, atol=1e-9)


def test_prox_per_sample():
    shape = (3, 4, 3, 7, 2)
    x, y, mask = draw(shape)
    mu = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = F.cassi_prox(x, y, mask, mu[:, None, None, None], step=2)
    for i in range(3):
        alone = F.cassi_prox(x[i : i + 1], y[i : i + 1], mask, float(mu[i]), step=2)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(together[0], F.cassi_prox(x, y, mask, 10.0, step=2)[0])


@pytest.mark.parametrize("form", FORMS)
def test_step_sizes_broadcast(form):
    x, y, mask = draw((2, 3, 2, 9, 2), form)
    phi = dense(mask, 3, 2)
    gradient = apply_dense(phi.mT, apply_dense(phi, x, y.shape[1:]) - y, x.shape[1:])
    for shape in [(), (1,), (2, 1, 1, 1), (3, 1, 1), (1, 3, 1, 1), (2, 3, 1, 1)]:
        rho = torch.rand(shape, dtype=torch.float64) + 0.5
        want = x - rho * gradient
        torch.testing.assert_close(F.cassi_step(x, y, mask, rho, step=2), want, rtol=1e-13, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 3),
    bands=st.integers(1, 9),
    height=st.integers(1, 5),
    width=st.integers(1, 80),
    step=st.integers(0, 7),
    form=st.sampled_from(list(FORMS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@example(n=2, bands=9, height=4, width=20, step=2, form="(H, W)", dtype=torch.float32, seed=0)
@example(n=2, bands=9, height=4, width=20, step=2, form="(H, W)", dtype=torch.bfloat16, seed=0)
@example(n=2, bands=9, height=4, width=12, step=1, form="(N, L, H, W)", dtype=torch.float64, seed=0)
def test_random_shapes_against_the_reference(n, bands, height, width, step, form, dtype, seed):
    x, y, mask = draw((n, bands, height, width, step), form, dtype, seed)
    xd, yd, md = x.double(), y.double(), mask.double()
    rho = torch.rand(n, bands, dtype=mask.dtype)
    weight = torch.rand(n, *y.shape[1:], dtype=mask.dtype)
    got = [
        OPS.cassi(x, mask, step),
        OPS.cassi_adjoint(y.to(dtype), mask, bands, step),
        *OPS.cassi_step(x, y, mask, rho, weight, step, True),
        OPS.cassi_step(x, None, mask, rho[:, :1].contiguous(), None, step, False)[0],
        OPS.cassi_grad_mask(x, y, step, *FORMS[form]),
        OPS.cassi_prox_weight(mask, rho[:, 0].abs() + 0.1, bands, step),
    ]
    want = [
        reference.cassi(xd, md, step),
        reference.cassi_adjoint(y.to(dtype).double(), md, bands, step),
        *reference.cassi_step(xd, yd, md, rho.double(), weight.double(), step, True),
        reference.cassi_step(xd, None, md, rho.double()[:, :1], None, step, False)[0],
        reference.cassi_grad_mask(xd, yd, step, *FORMS[form]),
        reference.cassi_prox_weight(md, rho[:, 0].double().abs() + 0.1, bands, step),
    ]
    narrow = [dtype, dtype, dtype, mask.dtype, dtype, mask.dtype, mask.dtype]
    for a, b, expected in zip(got, want, narrow, strict=True):
        assert a.dtype == expected and a.is_contiguous()
        # Sums of up to 9 bands and 3 samples in the accumulation dtype, then one rounding to the storage dtype.
        eps = torch.finfo(expected).eps / 2 + 30 * torch.finfo(mask.dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=40 * torch.finfo(mask.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_to_the_storage_dtype(dtype):
    # 28 ones on top of 4096 vanish in a sum kept in bf16 or fp16.
    x = torch.ones(1, 28, 1, 40, dtype=dtype)
    x[:, 0] = 4096
    mask = torch.ones(1, 40)
    y = torch.zeros(1, 1, 40)
    _, residual = OPS.cassi_step(x, y, mask, torch.ones(1), None, 0, True)
    assert residual.dtype == torch.float32
    assert (residual == 4096 + 27).all()


GRADIENTS = [(2, 3, 2, 4, 2), (1, 2, 1, 3, 0), (2, 1, 2, 2, 3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", GRADIENTS)
def test_gradients(shape, form):
    n, bands, _, _, step = shape
    x, y, mask = (t.requires_grad_() for t in draw(shape, form))
    mu = torch.rand(n, 1, 1, 1, dtype=torch.float64).add_(0.3).requires_grad_()
    cases = [
        (lambda x, m: F.cassi(x, m, step=step), (x, mask)),
        (lambda y, m: F.cassi_adjoint(y, m, bands=bands, step=step), (y, mask)),
        (lambda x, y, m, mu: F.cassi_prox(x, y, m, mu, step=step), (x, y, mask, mu)),
        (lambda x, y: OPS.cassi_grad_mask(x, y, step, *FORMS[form]), (x, y)),
        (lambda m, mu: OPS.cassi_prox_weight(m, mu.flatten(), bands, step), (mask, mu)),
    ]
    for rho in [mu[0], mu, torch.rand(1, bands, 1, 1, dtype=torch.float64).requires_grad_()]:
        cases.append((lambda x, y, m, r: F.cassi_step(x, y, m, r, step=step), (x, y, mask, rho)))
    for f, inputs in cases:
        assert gradcheck(f, inputs)
        assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_of_both_outputs(keep):
    x, y, mask = (t.requires_grad_() for t in draw((2, 3, 2, 4, 1)))
    weight = torch.rand(1, 2, 6, dtype=torch.float64).requires_grad_()
    rho = torch.tensor([0.7], dtype=torch.float64).requires_grad_()

    def f(x, y, m, r, w):
        z, residual = OPS.cassi_step(x, y, m, r, w, 1, keep)
        return (z, residual) if keep else z

    assert gradcheck(f, (x, y, mask, rho, weight))
    assert gradgradcheck(f, (x, y, mask, rho, weight))
    if keep:  # gradcheck takes outputs one by one; here both have a gradient at once
        assert gradcheck(lambda *inputs: torch.cat([t.flatten() for t in f(*inputs)]), (x, y, mask, rho, weight))


def test_gradients_with_bf16_images_stay_accurate():
    shape = (2, 6, 4, 21, 2)
    x, y, mask = draw(shape, dtype=torch.bfloat16)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    wide = []
    for cast in (lambda t: t, lambda t: t.double()):
        leaves = [cast(t).clone().requires_grad_() for t in (x, y, mask, torch.tensor(0.4))]
        F.cassi_step(*leaves, step=2).backward(cast(g))
        assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
        wide.append([leaf.grad.double() for leaf in leaves])
    torch.testing.assert_close(wide[0][0], wide[1][0], rtol=2**-8, atol=1e-5)
    for low, high in zip(wide[0][1:], wide[1][1:], strict=True):
        torch.testing.assert_close(low, high, rtol=1e-4, atol=1e-4)


def test_a_frozen_mask_saves_no_image():
    x, y, mask = draw((2, 4, 3, 40, 2))
    rho = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        F.cassi_step(x, y, mask, rho, step=2)
    assert saved and max(saved) == y.numel()


def variants(t):
    """The same values in other memory layouts."""
    n = t.ndim
    wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
    wide[..., 2:-1] = t
    rows = t.new_zeros(*t.shape[:-2], 2 * t.shape[-2], t.shape[-1])
    rows[..., ::2, :] = t
    yield t.contiguous()
    yield wide[..., 2:-1]
    yield rows[..., ::2, :]
    yield t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if n == 4:
        yield t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_layouts_agree_and_fake_strides_are_real(form, dtype):
    x, y, mask = draw((2, 4, 3, 21, 2), form, dtype)
    rho = torch.rand(2, 4)
    weight = torch.rand_like(y)

    def results(x, y, mask, rho, weight):
        return [
            OPS.cassi(x, mask, 2),
            OPS.cassi_adjoint(y, mask, 4, 2),
            *OPS.cassi_step(x, y, mask, rho, weight, 2, True),
            *OPS.cassi_step(x, None, mask, rho[:, :1], None, 2, False),
            OPS.cassi_grad_mask(x, y, 2, *FORMS[form]),
            OPS.cassi_prox_weight(mask, rho[:, 0], 4, 2),
        ]

    want = results(x, y, mask, rho, weight)
    layouts = (
        [(a, y, mask) for a in variants(x)] + [(x, b, mask) for b in variants(y)] + [(x, y, m) for m in variants(mask)]
    )
    for inputs in layouts:
        inputs = (*inputs, rho.mT.contiguous().mT, next(iter(variants(weight))))
        real = results(*inputs)
        with FakeTensorMode() as mode:
            fake = results(*(mode.from_tensor(t) for t in inputs))
        for a, b, c in zip(real, want, fake, strict=True):
            assert torch.equal(a, b)
            assert (a.shape, a.stride(), a.dtype) == (c.shape, c.stride(), c.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    for form, grad in [("(H, W)", True), ("(L, H, W)", False), ("(N, 1, H, W)", True), ("(N, L, H, W)", False)]:
        x, y, mask = draw((2, 3, 2, 5, 2), form, dtype)
        rho, weight = torch.rand(1, dtype=mask.dtype), torch.rand(1, *y.shape[1:], dtype=mask.dtype)
        for t in (x, y, mask, rho, weight):
            t.requires_grad_(grad)
        table = torch.rand(2, 3, dtype=mask.dtype)
        opcheck(OPS.cassi, (x, mask, 2))
        opcheck(OPS.cassi_adjoint, (y.detach().to(dtype), mask, 3, 2))
        opcheck(OPS.cassi_step, (x, y, mask, rho, weight, 2, True))
        opcheck(OPS.cassi_step, (x, None, mask, table, None, 2, False))
        opcheck(OPS.cassi_grad_mask, (x, y, 2, *FORMS[form]))
        opcheck(OPS.cassi_prox_weight, (mask, table[:, 0].contiguous(), 3, 2))


def test_compiles_in_one_graph_for_any_size():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def network(x, y, mask, rho):
        z = F.cassi_step(x, y, mask, rho, step=2)
        return F.cassi_prox(z, F.cassi(z, mask, step=2) + y, mask, 0.5, step=2)

    for shape, form in [
        ((2, 3, 4, 9, 2), "(H, W)"),
        ((1, 5, 3, 20, 2), "(H, W)"),
        ((2, 3, 4, 9, 2), "(N, 1, H, W)"),
        ((3, 4, 3, 20, 2), "(N, L, H, W)"),
    ]:
        x, y, mask = draw(shape, form)
        results = []
        for f in (network, network._torchdynamo_orig_callable):
            leaves = [t.clone().requires_grad_() for t in (x, y, mask, torch.tensor(0.4, dtype=torch.float64))]
            out = f(*leaves)
            out.square().sum().backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_empty_batch():
    x, y, mask = draw((0, 3, 2, 5, 2))
    assert F.cassi(x, mask, step=2).shape == (0, 2, 9)
    assert F.cassi_adjoint(y, mask, bands=3, step=2).shape == (0, 3, 2, 5)
    assert F.cassi_step(x, y, mask, torch.rand(0, 1, 1, 1).double(), step=2).shape == x.shape
    assert F.cassi_prox(x, y, mask, 1.0, step=2).shape == x.shape
    assert F.cassi_prox(x, y, mask, torch.rand(0, 1, 1, 1).double(), step=2).shape == x.shape
    assert torch.equal(OPS.cassi_grad_mask(x, y, 2, True), torch.zeros(3, 2, 5, dtype=torch.float64))
    assert F.cassi_step(x, y, mask.expand(0, 1, 2, 5), 0.3, step=2).shape == x.shape
    assert OPS.cassi_grad_mask(x, y, 2, True, True).shape == (0, 3, 2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_written(poisoned, shape, dtype):
    for form in FORMS:
        x, y, mask = draw(shape, form, dtype)
        outputs = [
            OPS.cassi(x, mask, shape[4]),
            OPS.cassi_adjoint(y.to(dtype), mask, shape[1], shape[4]),
            *OPS.cassi_step(x, y, mask, torch.rand(1, dtype=mask.dtype), None, shape[4], True),
            OPS.cassi_grad_mask(x, y, shape[4], *FORMS[form]),
            OPS.cassi_prox_weight(mask, torch.ones(shape[0], dtype=mask.dtype), shape[1], shape[4]),
        ]
        assert all(t.isfinite().all() for t in outputs)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_independent_of_batch_mates_and_thread_count(threads, form, dtype):
    shape = (3, 6, 37, 83, 2)
    x, y, mask = draw(shape, form, dtype)

    def results(x, y, mask):
        return [
            OPS.cassi(x, mask, 2),
            OPS.cassi_adjoint(y, mask, 6, 2),
            F.cassi_step(x, y, mask, 0.3, step=2),
            F.cassi_prox(x, y.to(mask.dtype), mask, 0.3, step=2),
        ]

    threads(2)
    together = results(x, y, mask)
    gradient = OPS.cassi_grad_mask(x, y, 2, *FORMS[form])
    threads(1)
    for i in range(3):
        own = mask[i : i + 1] if mask.ndim == 4 else mask
        for all_, one in zip(together, results(x[i : i + 1], y[i : i + 1], own), strict=True):
            assert torch.equal(all_[i : i + 1], one)
        if mask.ndim == 4:  # as does a sample with a mask of its own, handed over as the mask of all
            assert torch.equal(
                together[2][i : i + 1],
                F.cassi_step(x[i : i + 1], y[i : i + 1], own[0, 0] if own.shape[1] == 1 else own[0], 0.3, step=2),
            )
    assert torch.equal(gradient, OPS.cassi_grad_mask(x, y, 2, *FORMS[form]))


VARIANT_SCRIPT = """
from lorun_fast.reference import cassi as reference
for n, bands, height, width, step in shapes:
    for dtype, wide, close in dtypes(single=dict(rtol=1e-4, atol=1e-5), narrow=dict(rtol=1e-2, atol=1e-4)):
        x = torch.randn(n, bands, height, width).to(dtype)
        y = torch.randn(n, height, width + step * (bands - 1)).to(wide)
        mask, rho, weight = torch.rand(height, width).to(wide), torch.rand(n, bands).to(wide), torch.rand_like(y)
        each = torch.rand(n, 1, height, width).to(wide)
        calls = (
            ("cassi", (x, mask, step)),
            ("cassi_adjoint", (y.to(dtype), mask, bands, step)),
            ("cassi_step", (x, y, mask, rho, weight, step, True)),
            ("cassi_grad_mask", (x, y, step, True)),
            ("cassi_grad_mask", (x, y, step, False, True)),
            ("cassi_prox_weight", (mask, rho[:, 0].contiguous(), bands, step)),
            ("cassi_prox_weight", (each, rho[:, 0].contiguous(), bands, step)),
            ("cassi_step", (x, y, each, rho, weight, step, True)),
        )
        compare(reference, calls, close)
        # Neither the sum over bands nor z depends on where in memory the image lies.
        after = (-width - 3) % 16  # the rows of all bands aligned alike
        elsewhere = F.pad(x, (3, after))[..., 3 : 3 + width]
        step_of = torch.ops.lorun_fast.cassi_step
        for got, want in zip(step_of(elsewhere, *calls[2][1][1:]), step_of(*calls[2][1]), strict=True):
            assert torch.equal(got, want), (n, bands, height, width, step, dtype)
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    # Rows narrower than a vector, bands that share accesses by two to four and one that is left over, ragged ends.
    shapes = [(1, 3, 2, 3, 1), (2, 5, 3, 37, 2), (1, 9, 2, 70, 1), (1, 4, 3, 33, 0), (1, 3, 2, 20, 7), (1, 5, 4, 6, 2)]
    check_under(variant, VARIANT_SCRIPT, shapes=[*SHAPES, *shapes])


@pytest.mark.parametrize(
    ("height", "dtype"),
    [(128, torch.float32), (127, torch.float32), (128, torch.bfloat16)],  # bands aligned alike, and not
)
def test_results_past_the_caches_are_the_same(height, dtype):
    """What is larger than half of the last-level cache is written past all of them; one sample alone is not."""
    bands, width = 28, 253
    sample = bands * height * width * dtype.itemsize
    n = cache_bytes(torch.device("cpu")) // 2 // sample + 1
    x, mask = torch.rand(1, bands, height, width).to(dtype).repeat(n, 1, 1, 1), torch.rand(height, width)
    y = torch.rand(1, height, width + 2 * (bands - 1)).repeat(n, 1, 1)
    for whole, one in (
        (F.cassi_step(x, y, mask, 0.3, step=2), F.cassi_step(x[:1], y[:1], mask, 0.3, step=2)),
        *[[F.cassi_adjoint(t, mask, bands=bands, step=2) for t in (y.to(dtype), y[:1].to(dtype))]],
    ):
        assert all(torch.equal(t, one[0]) for t in whole)


def test_two_threads_at_once():
    problems = [draw((2, 5, 31, 64 + i, 2), ("(H, W)", "(N, L, H, W)")[i], torch.float32, i) for i in range(2)]
    want = [F.cassi_step(*problem, 0.3, step=2) for problem in problems]
    wrong = []

    def work(i):
        for _ in range(30):
            if not torch.equal(F.cassi_step(*problems[i], 0.3, step=2), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")
def test_a_shift_that_64_bits_do_not_hold():
    x, mask = torch.rand(1, 5, 2, 20), torch.rand(2, 20)  # 4 * 2**62 columns would be none
    for call in (
        lambda step: F.cassi(x, mask, step=step),
        lambda step: OPS.cassi_adjoint(torch.rand(1, 2, 20), mask, 5, step),
        lambda step: OPS.cassi_step(x, None, mask, torch.ones(1), None, step, False),
        lambda step: OPS.cassi_grad_mask(x, torch.rand(1, 2, 20), step, False),
        lambda step: OPS.cassi_prox_weight(mask, torch.ones(1), 5, step),
    ):
        with pytest.raises(RuntimeError, match=r"step: expected 0 to .* beside 5 bands"):
            call(2**62)


def test_errors_say_what_was_expected_and_what_came():
    x, y, mask = draw((2, 3, 4, 5, 2), dtype=torch.float32)
    raises = [
        (ValueError, r"x: expected \(N, L, H, W\), got shape \(3, 4, 5\)", lambda: F.cassi(x[0], mask, step=2)),
        (ValueError, r"expected \(N, L, 4, 4\) .* got shape \(2, 3, 4, 5\)", lambda: F.cassi(x, mask[:, 1:], step=2)),
        (
            ValueError,
            r"mask: .* for 3 bands, .*got shape \(2, 4, 5\)",
            lambda: F.cassi(x, mask.expand(2, 4, 5), step=2),
        ),
        (
            ValueError,
            r"mask: .* or one per sample, \(N, 1 or 3, H, W\), got shape \(2, 2, 4, 5\)",
            lambda: F.cassi(x, mask.expand(2, 2, 4, 5), step=2),
        ),
        (
            ValueError,
            "mask: expected one per sample, 2 of them, got 1",
            lambda: F.cassi_step(x, y, mask[None, None], 1.0, step=2),
        ),
        (
            ValueError,
            "mask: expected one per sample, 2 of them, got 3",
            lambda: F.cassi_adjoint(y, mask.expand(3, 1, 4, 5), bands=3, step=2),
        ),
        (ValueError, "step: expected at least 0, got -1", lambda: F.cassi(x, mask, step=-1)),
        (ValueError, "bands: expected at least 1, got 0", lambda: F.cassi_adjoint(y, mask, bands=0, step=2)),
        (ValueError, r"y: expected \(N, 4, 9\)", lambda: F.cassi_adjoint(y[..., 1:], mask, bands=3, step=2)),
        (ValueError, r"y: expected \(N, 4, 9\)", lambda: F.cassi_step(x, y[..., 1:], mask, 1.0, step=2)),
        (ValueError, "y: expected 2 samples like x, got 1", lambda: F.cassi_step(x, y[:1], mask, 1.0, step=2)),
        (TypeError, "mask: expected torch.float32 beside", lambda: F.cassi(x, mask.double(), step=2)),
        (TypeError, "x: expected float32, float64", lambda: F.cassi(x.long(), mask, step=2)),
        (ValueError, "mu: expected at least 0, got -1", lambda: F.cassi_prox(x, y, mask, -1, step=2)),
        (
            ValueError,
            r"mu: expected .*\(2, 3, 1, 1\)",
            lambda: F.cassi_prox(x, y, mask, torch.ones(2, 3, 1, 1), step=2),
        ),
        (ValueError, r"rho: expected .*got shape \(3\)", lambda: F.cassi_step(x, y, mask, torch.ones(3), step=2)),
    ]
    for kind, message, call in raises:
        with pytest.raises(kind, match=message):
            call()
