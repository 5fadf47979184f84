"""Blur and downsample: definition, ops, autograd and the operator, each method against scipy and the reference."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants_help import check_under, lesser_variants

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.functional import (
    blur_downsample,
    blur_downsample_adjoint,
    blur_downsample_prox,
    blur_downsample_step,
)
from lorun_fast.operators.blur_downsample import _peak_power
from lorun_fast.ops import _blur_downsample_cost
from lorun_fast.ops._blur_downsample_cost import prefer_fft
from lorun_fast.reference import blur_downsample as reference

METHODS = ("direct", "fft")
# (H, W, kh, kw, scale): odd, even and mixed kernels, larger than the image, fewer taps than the scale, one pixel.
CASES = [
    (12, 18, 5, 5, 3),
    (12, 18, 4, 6, 3),
    (16, 8, 7, 2, 2),
    (8, 12, 31, 20, 2),
    (8, 8, 2, 3, 4),
    (4, 8, 1, 1, 4),
    (7, 5, 8, 9, 1),
    (1, 1, 3, 4, 1),
    (3, 3, 3, 3, 3),
    (27, 150, 25, 25, 3),
]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(case, samples=2, channels=3, per_sample=False, dtype=torch.float64):
    """(x, y, kernel, scale) of one case; the kernel sums to about one in absolute value."""
    h, w, kh, kw, s = case
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kernel = draw(samples, kh, kw, seed=1) if per_sample else draw(kh, kw, seed=1)
    kernel = kernel / (kh * kw) ** 0.5
    x = draw(samples, channels, h, w, seed=2, dtype=dtype)
    y = draw(samples, channels, h // s, w // s, seed=3, dtype=wide)
    return x, y, kernel.to(wide), s


def by_scipy(x, kernel, s):
    kernels = kernel.expand(x.shape[0], *kernel.shape[-2:])
    planes = [
        [scipy.ndimage.convolve(p.numpy(), k.numpy(), mode="wrap")[::s, ::s] for p in sample]
        for sample, k in zip(x, kernels, strict=True)
    ]
    return torch.from_numpy(np.array(planes)).reshape(*x.shape[:2], x.shape[2] // s, x.shape[3] // s)


@pytest.fixture(autouse=True)
def one_thread():
    """For thousands of calls on tiny tensors: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_reference_is_scipys_wrapped_convolution(case, per_sample):
    x, _, kernel, s = problem(case, per_sample=per_sample)
    torch.testing.assert_close(reference.blur_downsample(x, kernel, s), by_scipy(x, kernel, s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_ops_are_the_reference(case, method, per_sample, poisoned):
    x, y, kernel, s = problem(case, per_sample=per_sample)
    rho = draw(2, 3, 1, 1, seed=4)
    close = dict(rtol=1e-11, atol=1e-12)
    forward = blur_downsample(x, kernel, scale=s, method=method)
    torch.testing.assert_close(forward, reference.blur_downsample(x, kernel, s), **close)
    adjoint = blur_downsample_adjoint(y, kernel, scale=s, method=method)
    torch.testing.assert_close(adjoint, reference.blur_downsample_adjoint(y, kernel, s), **close)
    step = blur_downsample_step(x, y, kernel, rho, scale=s, method=method)
    want = x - rho * reference.blur_downsample_adjoint(forward - y, kernel, s)
    torch.testing.assert_close(step, want, **close)
    one = blur_downsample_step(x, y, kernel, 0.7, scale=s, method=method)
    torch.testing.assert_close(one, x + (step - x) * 0.7 / rho, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_adjoint_and_kernel_gradient_fit_the_forward(case, method, per_sample):
    x, y, kernel, s = problem(case, per_sample=per_sample)
    forward = blur_downsample(x, kernel, scale=s, method=method)
    inner = (forward * y).sum()
    size = forward.norm() * y.norm()
    assert abs(inner - (x * blur_downsample_adjoint(y, kernel, scale=s, method=method)).sum()) <= 1e-12 * size
    kernel.requires_grad_()
    (grad,) = torch.autograd.grad((blur_downsample(x, kernel, scale=s, method=method) * y).sum(), kernel)
    assert abs(inner - (kernel * grad).sum()) <= 1e-12 * size
    want = reference.blur_downsample_grad_kernel(x, y, *kernel.shape[-2:], s, per_sample)
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 3), c=st.integers(1, 3), rows=st.integers(1, 21), cols=st.integers(1, 90), kh=st.integers(1, 19),
    kw=st.integers(1, 19), s=st.integers(1, 4), per_sample=st.booleans(), method=st.sampled_from(METHODS),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "expanded"]),
)  # fmt: skip
def test_any_shape(n, c, rows, cols, kh, kw, s, per_sample, method, layout):
    x = arranged(draw(n, c, rows * s, cols * s), layout)
    y = arranged(draw(n, c, rows, cols, seed=1), layout)
    kernel = draw(n, kh, kw, seed=2) if per_sample else draw(kh, kw, seed=2)
    rho = draw(n, c, 1, 1, seed=3)
    close = dict(rtol=1e-10, atol=1e-10)
    forward = reference.blur_downsample(x, kernel, s)
    torch.testing.assert_close(blur_downsample(x, kernel, scale=s, method=method), forward, **close)
    adjoint = reference.blur_downsample_adjoint(y, kernel, s)
    torch.testing.assert_close(blur_downsample_adjoint(y, kernel, scale=s, method=method), adjoint, **close)
    step = x - rho * reference.blur_downsample_adjoint(forward - y, kernel, s)
    torch.testing.assert_close(blur_downsample_step(x, y, kernel, rho, scale=s, method=method), step, **close)
    name = "blur_downsample_grad_kernel" if method == "direct" else "blur_downsample_fft_grad_kernel"
    grad = getattr(torch.ops.lorun_fast, name)(x, y, kh, kw, s, per_sample)
    torch.testing.assert_close(grad, reference.blur_downsample_grad_kernel(x, y, kh, kw, s, per_sample), **close)


def arranged(x, layout):
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.cat([x, x + 1], -1)[:, :, :, : x.shape[-1]]
    if layout == "expanded":
        return x[:1, :, :1].expand(x.shape) if x.shape[0] else x
    return x


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_dtypes_are_those_of_the_fake(dtype, method, layout):
    x, y, kernel, s = problem((12, 18, 5, 4, 3), dtype=dtype)
    x = arranged(x, layout)
    mode = torch._subclasses.FakeTensorMode()
    for fn, args in (
        (blur_downsample, (x, kernel)),
        (blur_downsample_adjoint, (arranged(y.to(dtype), layout), kernel)),
        (blur_downsample_step, (x, y, kernel, 0.5)),
        (blur_downsample_prox, (x, y, kernel, 0.5)),
    ):
        real = fn(*args, scale=s) if fn is blur_downsample_prox else fn(*args, scale=s, method=method)
        with mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = fn(*fakes, scale=s) if fn is blur_downsample_prox else fn(*fakes, scale=s, method=method)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert real.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_pytorchs(dtype, method):
    x, y, kernel, s = problem((30, 150, 25, 25, 3), dtype=dtype)
    wide_x, wide_y, wide_k = x.double(), y.double(), kernel.double()
    small = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for ours, torchs, truth in (
        (
            blur_downsample(x, kernel, scale=s, method=method),
            reference.blur_downsample(x, kernel, s),
            reference.blur_downsample(wide_x, wide_k, s),
        ),
        (
            blur_downsample_adjoint(y.to(dtype), kernel, scale=s, method=method),
            reference.blur_downsample_adjoint(y.to(dtype), kernel, s),
            reference.blur_downsample_adjoint(y.to(dtype).double(), wide_k, s),
        ),
        (
            blur_downsample_step(x, y, kernel, 0.9, scale=s, method=method),
            reference.blur_downsample_step(x, y, kernel, torch.tensor([0.9]), s),
            reference.blur_downsample_step(wide_x, wide_y, wide_k, torch.tensor([0.9], dtype=torch.float64), s),
        ),
    ):
        error = (ours.double() - truth).abs()
        allowed = 2 * (torchs.double() - truth).abs().max() + small * truth.abs().mean()
        assert error.max() <= allowed
    name = "blur_downsample_grad_kernel" if method == "direct" else "blur_downsample_fft_grad_kernel"
    grad = getattr(torch.ops.lorun_fast, name)(x, y, 25, 25, s, False)
    torchs = reference.blur_downsample_grad_kernel(x, y, 25, 25, s, False)
    truth = reference.blur_downsample_grad_kernel(wide_x, wide_y, 25, 25, s, False)
    assert (grad - truth).abs().max() <= 2 * (torchs - truth).abs().max() + 1e-6 * truth.abs().mean()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method, per_sample):
    x, y, kernel, s = problem((4, 4, 3, 2, 2), samples=2, channels=2, per_sample=per_sample)
    rho = draw(2, 2, 1, 1, seed=4)
    for t in (x, y, kernel, rho):
        t.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x, k: blur_downsample(x, k, scale=s, method=method), (x, kernel))
    assert check(lambda y, k: blur_downsample_adjoint(y, k, scale=s, method=method), (y, kernel))
    assert check(lambda *a: blur_downsample_step(*a, scale=s, method=method), (x, y, kernel, rho))
    assert check(lambda *a: blur_downsample_step(*a, scale=s, method=method), (x, y, kernel, rho.detach()[0, 0, 0, 0]))
    assert check(lambda x, y, k, mu: blur_downsample_prox(x, y, k, mu.square() + 0.1, scale=s), (x, y, kernel, rho))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_gradients(method):
    x, y, kernel, s = problem((2, 4, 3, 2, 2), samples=1, channels=2, per_sample=True)
    rho = draw(1, 2, 1, 1, seed=4)
    for t in (x, y, kernel, rho):
        t.requires_grad_()
    check = torch.autograd.gradgradcheck
    assert check(lambda x, k: blur_downsample(x, k, scale=s, method=method), (x, kernel))
    assert check(lambda *a: blur_downsample_step(*a, scale=s, method=method), (x, y, kernel, rho))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", ["blur_downsample", "blur_downsample_fft"])
def test_opcheck(name, per_sample):
    x, y, kernel, s = problem((6, 9, 4, 3, 3), channels=2, per_sample=per_sample, dtype=torch.float32)
    rho = torch.tensor([0.5])
    ops = torch.ops.lorun_fast
    for t in (x, y, kernel, rho):
        t.requires_grad_()
    for suffix, args in (
        ("", (x, kernel, s)),
        ("_adjoint", (y, kernel, s)),
        ("_descend", (x, y, kernel, rho, s)),
        ("_step", (x, y, kernel, rho, s)),
        ("_grad_kernel", (x, y, 4, 3, s, per_sample)),
    ):
        torch.library.opcheck(getattr(ops, name + suffix).default, args)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_whole(method):
    x, y, kernel, s = problem((12, 18, 5, 4, 3), dtype=torch.float32)
    op = lf.BlurDownsample(kernel, s, learn=True, method=method)
    rho = torch.tensor(0.4, requires_grad=True)

    def network(x, y):
        return op.gradient_step(op.adjoint(op(x)) + op.initial(y), y, rho)

    x.requires_grad_()
    wanted = network(x, y)
    want = torch.autograd.grad(wanted.square().sum(), (x, rho, op.kernel))
    got = torch.compile(network, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (x, rho, op.kernel)), want)


@pytest.mark.slow
def test_inductor_compiles_step_and_prox():
    x, y, kernel, s = problem((12, 18, 5, 4, 3), dtype=torch.float32)
    op = lf.BlurDownsample(kernel, s)

    def both(x, y):
        return op.prox(op.gradient_step(x, y, 0.3).relu(), y, 0.2)

    torch.testing.assert_close(torch.compile(both, fullgraph=True)(x, y), both(x, y))


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method):
    kernel = torch.ones(3, 3)
    x, y = torch.empty(0, 3, 4, 6), torch.empty(0, 3, 2, 3)
    for k in (kernel, torch.empty(0, 3, 3)):
        assert blur_downsample(x, k, scale=2, method=method).shape == y.shape
        assert blur_downsample_adjoint(y, k, scale=2, method=method).shape == x.shape
        assert blur_downsample_step(x, y, k, 1.0, scale=2, method=method).shape == x.shape
        assert blur_downsample_prox(x, y, k, 1.0, scale=2).shape == x.shape
    kernel.requires_grad_()
    blur_downsample(x, kernel, scale=2, method=method).sum().backward()
    assert kernel.grad.eq(0).all()


def test_direct_method_is_bitwise_independent_of_batch_mates_and_threads():
    x, y, kernel, s = problem((60, 90, 9, 8, 3), samples=3, per_sample=True, dtype=torch.float32)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(
                (
                    blur_downsample(x, kernel, scale=s, method="direct"),
                    blur_downsample_adjoint(y, kernel, scale=s, method="direct"),
                    blur_downsample_step(x, y, kernel, 0.5, scale=s, method="direct"),
                    torch.ops.lorun_fast.blur_downsample_grad_kernel(x, y, 9, 8, s, True),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))
    alone = (
        blur_downsample(x[1:2], kernel[1], scale=s, method="direct"),
        blur_downsample_adjoint(y[1:2], kernel[1], scale=s, method="direct"),
        blur_downsample_step(x[1:2], y[1:2], kernel[1], 0.5, scale=s, method="direct"),
        torch.ops.lorun_fast.blur_downsample_grad_kernel(x[1:2], y[1:2], 9, 8, s, True),
    )
    assert all(torch.equal(a[1:2], b) for a, b in zip(seen[0], alone, strict=True))


def test_planes_in_several_tiles_and_flights():
    """More measured columns than a tile takes, and more planes than are in flight at a time."""
    x, y, kernel, s = problem((300, 700, 6, 7, 1), samples=1, channels=3)
    rho = draw(1, 3, 1, 1, seed=4)
    for op, args in (
        (blur_downsample, (x, kernel)),
        (blur_downsample_adjoint, (y, kernel)),
        (blur_downsample_step, (x, y, kernel, rho)),
    ):
        direct, fft = (op(*args, scale=s, method=method) for method in METHODS)
        torch.testing.assert_close(direct, fft, rtol=1e-11, atol=1e-11)
    ops = torch.ops.lorun_fast
    direct, fft = (
        f(x, y, 6, 7, s, False) for f in (ops.blur_downsample_grad_kernel, ops.blur_downsample_fft_grad_kernel)
    )
    torch.testing.assert_close(direct, fft, rtol=1e-9, atol=1e-9)


VARIANT_SCRIPT = """
from lorun_fast.reference import blur_downsample as reference
for h, w, kh, kw, s in cases:
    for dtype, wide, close in dtypes(single=dict(rtol=1e-4, atol=1e-5), narrow=dict(rtol=1e-2, atol=1e-2)):
        x, y = torch.randn(2, 2, h, w).to(dtype), torch.randn(2, 2, h // s, w // s, dtype=wide)
        k, rho = torch.randn(2, kh, kw, dtype=wide) / (kh * kw) ** 0.5, torch.tensor([0.5], dtype=wide)
        calls = (
            ("blur_downsample", (x, k, s)),
            ("blur_downsample_adjoint", (y.to(dtype), k, s)),
            ("blur_downsample_descend", (x, y, k, rho, s)),
            ("blur_downsample_step", (x, y, k, rho, s)),
            ("blur_downsample_grad_kernel", (x, y, kh, kw, s, True)),
        )
        compare(reference, calls, close)
"""


@lesser_variants
def test_lesser_cpu_variants(variant):
    cases = [(12, 54, 5, 8, 3), (8, 10, 9, 20, 2), (15, 5, 1, 2, 5)]
    check_under(variant, VARIANT_SCRIPT, cases=cases)


def test_auto_takes_the_cheaper_method():
    def method(size, k, s, planes=3, kernels=1):
        fft = prefer_fft(planes, kernels, size, size, k, k, s, "cpu")
        return "fft" if fft else "direct"

    if _native.available():
        assert [method(240, k, 1) for k in (5, 15, 67)] == ["direct", "direct", "fft"]
        assert [method(240, 25, s) for s in (2, 3, 4)] == ["direct"] * 3
        assert method(24, 67, 3) == "direct"
    else:
        assert method(240, 15, 1) == "fft"
    x, kernel = draw(1, 1, 64, 64), draw(67, 67, seed=1)
    assert prefer_fft(1, 1, 64, 64, 67, 67, 1, "cpu")
    auto = blur_downsample(x, kernel, scale=1)
    assert torch.equal(auto, blur_downsample(x, kernel, scale=1, method="fft"))
    torch.testing.assert_close(auto, blur_downsample(x, kernel, scale=1, method="direct"))


def test_a_kernel_per_image_makes_the_fft_method_dearer(monkeypatch):
    """Eight images: the FFT of one kernel pays, that of eight does not."""
    monkeypatch.setitem(_blur_downsample_cost._COMPILED, "cpu", True)
    x, kernels = draw(8, 1, 64, 64), draw(8, 27, 27, seed=1)
    for kernel, method, other in ((kernels[0], "fft", "direct"), (kernels, "direct", "fft")):
        auto = blur_downsample(x, kernel, scale=1)
        assert torch.equal(auto, blur_downsample(x, kernel, scale=1, method=method))
        assert not torch.equal(auto, blur_downsample(x, kernel, scale=1, method=other))


@pytest.mark.parametrize(
    ("planes", "kernels", "height", "width", "taps", "scale", "direct_us", "fft_us"),
    [
        (3, 1, 288, 480, 25, 3, 24.7, 66.3),
        (48, 1, 288, 480, 25, 3, 222, 265),
        (3, 1, 288, 480, 25, 1, 57.2, 67.3),
        (24, 8, 96, 96, 25, 2, 25.1, 60.0),
        (48, 1, 96, 96, 25, 4, 30.4, 62.3),
        (3, 1, 288, 480, 15, 2, 23.4, 66.6),
        (12, 1, 288, 480, 25, 2, 89.2, 119),
        (192, 1, 96, 96, 25, 3, 70.9, 104),
    ],
)
def test_a_gpu_takes_what_was_measured_to_be_faster(
    planes, kernels, height, width, taps, scale, direct_us, fft_us, monkeypatch
):
    """Steps on an H200, in CUDA graphs; nine times the taps, which the FFT hardly notices, turn the choice round."""
    monkeypatch.setitem(_blur_downsample_cost._COMPILED, "cuda", True)
    assert prefer_fft(planes, kernels, height, width, taps, taps, scale, "cuda") == (fft_us < direct_us)
    assert prefer_fft(planes, kernels, height, width, 3 * taps, 3 * taps, scale, "cuda")


def test_another_device_is_taken_for_a_cpu_without_the_extension():
    assert prefer_fft(3, 1, 288, 480, 25, 25, 3, "mps") and not prefer_fft(3, 1, 288, 480, 1, 1, 3, "mps")


@pytest.mark.parametrize("method", METHODS)
def test_two_threads_at_once(method):
    problems = [problem(case, dtype=torch.float32) for case in ((24, 36, 7, 7, 3), (24, 36, 6, 5, 2))]
    want = [blur_downsample_step(x, y, k, 0.5, scale=s, method=method) for x, y, k, s in problems]
    wrong = []

    def run(index):
        x, y, k, s = problems[index]
        for _ in range(20):
            if not torch.equal(blur_downsample_step(x, y, k, 0.5, scale=s, method=method), want[index]):
                wrong.append(index)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_rejects_what_does_not_fit():
    x, kernel = torch.zeros(2, 3, 6, 9), torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"divisible by scale=2 and not 0, got 6x9"):
        blur_downsample(x, kernel, scale=2)
    with pytest.raises(ValueError, match=r"got 0x9"):
        blur_downsample(x[:, :, :0], kernel, scale=3)
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\), got shape \(3, 6, 9\)"):
        blur_downsample(x[0], kernel, scale=3)
    with pytest.raises(ValueError, match=r"scale: expected an integer of at least 1, got 0"):
        blur_downsample(x, kernel, scale=0)
    with pytest.raises(ValueError, match=r"one per sample, 2 of them, got 3"):
        blur_downsample(x, torch.ones(3, 3, 3), scale=3)
    with pytest.raises(ValueError, match=r"one per sample, 2 of them, got 3"):
        lf.BlurDownsample(torch.ones(3, 3, 3), scale=3).initial(x)
    with pytest.raises(ValueError, match=r"expected \(kh, kw\) or \(N, kh, kw\), got shape \(9\)"):
        blur_downsample(x, torch.ones(9), scale=3)
    with pytest.raises(TypeError, match=r"expected torch.float64 beside torch.float64, got torch.float32"):
        blur_downsample(x.double(), kernel, scale=3)
    with pytest.raises(TypeError, match=r"got torch.int64"):
        blur_downsample(x.long(), kernel, scale=3)
    with pytest.raises(ValueError, match=r"expected one of 'auto', 'direct', 'fft', got 'fast'"):
        blur_downsample(x, kernel, scale=3, method="fast")
    with pytest.raises(ValueError, match=r"y: expected \(2, 3, 2, 3\) for x of shape \(2, 3, 6, 9\) at scale=3"):
        blur_downsample_step(x, torch.zeros(2, 3, 2, 2), kernel, 1.0, scale=3)
    with pytest.raises(ValueError, match=r"rho: expected .* got shape \(4\)"):
        blur_downsample_step(x, torch.zeros(2, 3, 2, 3), kernel, torch.ones(4), scale=3)
    with pytest.raises(ValueError, match=r"mu: expected a positive number, got 0"):
        blur_downsample_prox(x, torch.zeros(2, 3, 2, 3), kernel, 0, scale=3)
    with pytest.raises(ValueError, match=r"kernel is on meta, but x is on cpu"):
        blur_downsample(x, kernel.to("meta"), scale=3)
    with pytest.raises(ValueError, match=r"at least one row and one column"):
        blur_downsample_adjoint(x[:, :, :0], kernel, scale=3)


def test_operator_calls_the_ops():
    x, y, kernel, s = problem((12, 18, 5, 4, 3), per_sample=True)
    op = lf.BlurDownsample(kernel.numpy(), s)
    torch.testing.assert_close(op(x), by_scipy(x, kernel, s))
    torch.testing.assert_close(op.adjoint(y, size=(12, 18)), reference.blur_downsample_adjoint(y, kernel, s))
    want = x - 0.3 * op.adjoint(op(x) - y)
    torch.testing.assert_close(op.gradient_step(x, y, 0.3), want)
    assert op.task == "sr"
    assert op.image_size(y) == (12, 18)
    with pytest.raises(ValueError, match=r"size: expected \(12, 18\)"):
        op.adjoint(y, size=(12, 17))


def test_operator_is_rebuilt_from_its_config():
    for learn in (False, True):
        op = lf.BlurDownsample(torch.rand(2, 5, 4), 2, learn=learn, method="fft")
        again = lf.BlurDownsample.from_config(op.config(), op.state_dict())
        assert torch.equal(again.kernel, op.kernel)
        assert again.config() == op.config() == {"scale": 2, "learn": learn, "method": "fft"}
        assert len(list(again.parameters())) == int(learn)
        assert repr(again) == repr(op)


def test_operator_keeps_its_kernel_wide():
    op = lf.BlurDownsample([[0.25, 0.5, 0.25]], 2)
    assert op.bfloat16().kernel.dtype == op.half().kernel.dtype == torch.float32
    assert op(torch.ones(1, 1, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert op(torch.ones(1, 1, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_operator_rejects_bad_kernels():
    with pytest.raises(ValueError, match="finite"):
        lf.BlurDownsample([[float("nan")]], 2)
    with pytest.raises(ValueError, match=r"2-D or 3-D"):
        lf.BlurDownsample(torch.ones(5), 2)
    with pytest.raises(ValueError, match="scale"):
        lf.BlurDownsample(torch.ones(5, 5), 0)
    with pytest.raises(ValueError, match="scale"):
        lf.BlurDownsample(torch.ones(5, 5), 1.5)
    with pytest.raises(ValueError, match="method"):
        lf.BlurDownsample(torch.ones(5, 5), 1, method="slow")


def dense_matrix(op, h, w):
    return torch.stack([op(e.reshape(1, 1, h, w)).flatten() for e in torch.eye(h * w, dtype=torch.float64)], 1)


@pytest.mark.parametrize("case", [(8, 12, 5, 4, 2), (6, 9, 3, 11, 3), (4, 8, 2, 3, 4), (5, 6, 3, 3, 1)])
def test_norm_and_prox_against_the_dense_matrix(case):
    x, y, kernel, s = problem(case, samples=2, channels=2, per_sample=True)
    op = lf.BlurDownsample(kernel, s)
    mu = draw(2, 2, 1, 1, seed=5).square() + 0.1
    got = op.prox(x, y, mu)
    largest = []
    for n in range(2):
        a = dense_matrix(lf.BlurDownsample(kernel[n], s), *case[:2])
        largest.append(torch.linalg.matrix_norm(a, 2))
        for c in range(2):
            left = a.mT @ a + mu[n, c, 0, 0] * torch.eye(a.shape[1], dtype=a.dtype)
            want = torch.linalg.solve(left, a.mT @ y[n, c].flatten() + mu[n, c, 0, 0] * x[n, c].flatten())
            torch.testing.assert_close(got[n, c].flatten(), want, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(op.norm(case[:2]), max(largest), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(op.prox(x, y, 0.5), op.prox(x, y, torch.full((2, 2, 1, 1), 0.5)))


def test_prox_in_single_precision_and_bf16_storage():
    x, y, kernel, s = problem((24, 36, 7, 6, 3), dtype=torch.float32)
    op = lf.BlurDownsample(kernel, s)
    want = op.prox(x.double(), y.double(), 0.05)
    torch.testing.assert_close(op.prox(x, y, 0.05).double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(op.prox(x.bfloat16(), y, 0.05).double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("s", [1, 2, 3])
def test_norm_bounds_every_size_and_is_reached(s):
    kernel = draw(6, 5, seed=3)
    op = lf.BlurDownsample(kernel, s)
    sizes = [op.norm((s * n, s * n)).item() for n in (7, 30, 128, 331)]
    assert max(sizes) <= op.norm().item() * (1 + 1e-9)
    assert max(sizes) >= op.norm().item() * 0.999
    assert lf.BlurDownsample(torch.full((9, 9), 1 / 81), 1).norm().item() == pytest.approx(1, abs=1e-6)
    several = lf.BlurDownsample(torch.stack([kernel, 3 * kernel]), s)
    assert several.norm().item() == pytest.approx(3 * op.norm().item())
    (grad,) = torch.autograd.grad(_peak_power(kernel.requires_grad_()[None], s), kernel)
    along = draw(6, 5, seed=4)
    with torch.no_grad():
        ahead, behind = (_peak_power((kernel + t * along)[None], s) for t in (1e-5, -1e-5))
    torch.testing.assert_close((ahead - behind) / 2e-5, (grad * along).sum()[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("s", [1, 2, 3, 4])
def test_initial_is_not_shifted(s):
    """A smooth image, blurred by a centred kernel and started, registers with itself to 1e-3 of a pixel."""
    h, w = 120, 96
    rows, cols = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(w, dtype=torch.float64)
    waves = [(1, 2, 0.3), (3, -1, 1.0), (2, 3, 2.0)]
    image = sum(torch.cos(2 * torch.pi * (a * rows / h + b * cols / w) + p) for a, b, p in waves)
    profile = torch.exp(-((torch.arange(15, dtype=torch.float64) - 7) ** 2) / 8)
    op = lf.BlurDownsample(torch.outer(profile, profile) / profile.sum() ** 2, s)
    start = op.initial(op(image[None, None]))[0, 0]
    turned = torch.fft.fft2(start) * torch.fft.fft2(image).conj()
    for a, b, _ in waves:
        assert abs(torch.angle(turned[a, b]).item()) < 2 * np.pi * 1e-3 / max(h, w)
    assert (start - image).abs().max() < 0.2 * image.abs().max()


def test_initial_interpolates_and_reproduces_parabolas():
    y = draw(2, 3, 8, 10)
    op = lf.BlurDownsample([[1.0]], 3)
    start = op.initial(y)
    torch.testing.assert_close(start[:, :, ::3, ::3], y)
    ramp = torch.arange(10, dtype=torch.float64).expand(1, 1, 8, 10)
    fine = torch.arange(30, dtype=torch.float64).div(3)
    torch.testing.assert_close(op.initial(ramp.square())[0, 0, 0, 6:20], fine.square()[6:20])
    assert op.initial(y.bfloat16()).dtype == torch.bfloat16
    assert op.initial(y[:0]).shape == (0, 3, 24, 30)
