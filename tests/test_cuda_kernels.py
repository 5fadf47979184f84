"""The CUDA kernels against the definitions in float64, twice over: marked ``gpu`` on a device, and on every machine
with the same sources compiled for the CPU, each thread of a block a fiber (cuda_on_cpu/). The second shows that
indices, barriers and arithmetic are right; that they are fast, and that nvcc agrees, only the first can."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_on_cpu import build
from hypothesis import given, settings
from hypothesis import strategies as st

import lorun_fast as lf
from lorun_fast.ops._library import SCHEMAS
from lorun_fast.reference import block_cs as block_reference
from lorun_fast.reference import blur_downsample as blur_reference
from lorun_fast.reference import cassi as cassi_reference
from lorun_fast.reference import fused_conv2d as fused_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPS = {
    "block_cs": ("block_cs", "block_cs_adjoint", "block_cs_step", "block_cs_step_residual", "block_cs_grad_phi"),
    "blur_downsample": tuple(
        f"blur_downsample{suffix}" for suffix in ("", "_adjoint", "_descend", "_step", "_grad_kernel")
    ),
    "cassi": ("cassi", "cassi_adjoint", "cassi_step", "cassi_grad_mask", "cassi_prox_weight"),
    "fused_conv2d": ("fused_conv2d",),
}


def placed(t: torch.Tensor, device: str) -> torch.Tensor:
    """A copy that lies there as here: .to() closes gaps between rows and moves what is off 16 bytes back onto them."""
    storage = t.new_empty(0).set_(t.untyped_storage())
    return storage.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


class Kernels:
    """Calls an op where its CUDA kernel runs; results come back to the CPU."""

    def __init__(self, device: str, namespace):
        self.device, self.namespace = device, namespace

    def __call__(self, name: str, *arguments):
        there = [placed(a, self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        out = getattr(self.namespace, name)(*there)
        return [t.cpu() for t in out] if isinstance(out, (tuple, list)) else out.cpu()


def gpu_kernels() -> Kernels:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    missing = [
        op
        for names in OPS.values()
        for op in names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lorun_fast::{op}", "CUDA")
    ]
    assert not missing, f"no CUDA kernel is built for {missing}"
    return Kernels("cuda", torch.ops.lorun_fast)


@pytest.fixture(scope="module", params=["on the CPU", pytest.param("on a GPU", marks=pytest.mark.gpu)])
def kernels(request) -> Kernels:
    if request.param == "on a GPU":
        return gpu_kernels()
    mine = [op for names in OPS.values() for op in names]
    return Kernels("cpu", build.load({op: SCHEMAS[op] for op in mine}))


@pytest.fixture(autouse=True)
def _poisoned():
    """Fills what torch allocates with NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(got: torch.Tensor, want: torch.Tensor, terms: int) -> None:
    """One rounding to the storage dtype, after sums of ``terms`` products of unit size in the accumulation dtype."""
    wide = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    storage = torch.finfo(got.dtype).eps
    assert got.shape == want.shape and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=storage / 2 + 8 * wide, atol=(8 + terms) * wide)


_SEEDS = itertools.count()


def draw(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(next(_SEEDS))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_cassi(kernels, n, bands, height, width, step, per_band, dtype, layout=lambda t: t, per_sample=False):
    wide = wide_of(dtype)
    measured = width + step * (bands - 1)
    x, y = layout(draw(n, bands, height, width, dtype=dtype)), draw(n, height, measured, dtype=wide)
    own = (n, bands if per_band else 1) if per_sample else (bands,) if per_band else ()
    mask = torch.rand((*own, height, width), dtype=wide)
    rho, weight = torch.rand(n, bands, dtype=wide), torch.rand(1, height, measured, dtype=wide)
    x64, y64, m64 = x.double(), y.double(), mask.double()
    close(kernels("cassi", x, mask, step), cassi_reference.cassi(x64, m64, step), bands)
    low = y.to(dtype)
    want = cassi_reference.cassi_adjoint(low.double(), m64, bands, step)
    close(kernels("cassi_adjoint", low, mask, bands, step), want, 1)
    for arguments in [
        (x, y, mask, rho, weight, step, True),
        (x, None, mask, rho[:, :1], None, step, True),
        (x, y, mask, torch.rand(1, dtype=wide), draw(n, height, measured, dtype=wide), step, False),
    ]:
        got = kernels("cassi_step", *arguments)
        exact = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
        for a, b in zip(got, cassi_reference.cassi_step(*exact), strict=True):
            close(a, b, 8 * bands)
    want = cassi_reference.cassi_grad_mask(x64, y64, step, per_band, per_sample)
    close(kernels("cassi_grad_mask", x, y, step, per_band, per_sample), want, 8 * n * bands)
    mask[..., ::3] = 0  # leaves pixels that no band reaches
    mu = torch.rand(n, dtype=wide)
    want = cassi_reference.cassi_prox_weight(mask.double(), mu.double(), bands, step)
    found = kernels("cassi_prox_weight", mask, mu, bands, step)
    assert found.dtype == wide
    close((found / want).to(wide), torch.ones_like(want), bands + 4)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The same values one element off 16 bytes, rows apart."""
    out = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)[..., 1:-2]
    return out.copy_(t)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


CASSI_SHAPES = [
    # n, bands, height, width, step
    (2, 28, 2, 256, 2),  # warps that all bands have values under, and warps at the borders
    (1, 28, 1, 640, 2),  # rows cut into tiles
    (1, 28, 2, 660, 3),
    (2, 20, 2, 200, 2),  # band counts between those that kernels are made for
    (1, 31, 2, 130, 4),
    (1, 32, 2, 256, 2),  # as many bands as are kept
    (1, 33, 2, 256, 2),  # more
    (1, 40, 2, 300, 2),
    (1, 28, 2, 255, 1),  # no pairs
    (1, 12, 2, 101, 2),
    (1, 5, 2, 64, 1),
    (1, 4, 1, 2048, 5),
    (1, 3, 1, 16, 0),
    (1, 28, 1, 256, 0),
    (1, 1, 1, 1, 2),
    (2, 7, 3, 1, 1),  # narrower than the shift
    (1, 28, 2, 40, 2),
    (1, 2, 1, 8, 1000),  # a gap between the bands
    (1, 600, 1, 8, 1),
    (1, 400, 1, 72, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASSI_SHAPES)
def test_cassi(kernels, shape, dtype):
    check_cassi(kernels, *shape, False, dtype)
    if shape[1] * shape[3] < 9000:
        check_cassi(kernels, *shape, True, dtype)
        check_cassi(kernels, *shape, False, dtype, per_sample=True)


@pytest.mark.parametrize("layout", [sliced, channels_last])
def test_cassi_layouts(kernels, layout):
    check_cassi(kernels, 2, 6, 3, 32, 2, True, torch.float32, layout)
    check_cassi(kernels, 2, 6, 3, 32, 2, False, torch.bfloat16, layout)
    check_cassi(kernels, 1, 28, 2, 130, 2, False, torch.float32, layout)


def test_cassi_without_columns(kernels):
    x, mask = torch.empty(2, 3, 4, 0), torch.empty(4, 0)
    assert torch.equal(kernels("cassi", x, mask, 2), torch.zeros(2, 4, 4))
    y = draw(2, 4, 4, dtype=torch.float32)
    z, residual = kernels("cassi_step", x, y, mask, torch.ones(1), None, 2, True)
    assert z.shape == x.shape and torch.equal(residual, -y)


def test_cassi_reads_a_view_of_a_mask(kernels):
    mask = torch.rand(7, 2, 33)[1:, :, 1:]
    x = draw(1, 6, 2, 32, dtype=torch.float32)
    close(kernels("cassi", x, mask, 2), cassi_reference.cassi(x.double(), mask.double(), 2), 6)
    flat = torch.rand(65)[1:].view(2, 32)  # dense, one element off 16 bytes
    close(kernels("cassi", x, flat, 2), cassi_reference.cassi(x.double(), flat.double(), 2), 6)
    low = draw(1, 2, 42, dtype=torch.float32)
    want = cassi_reference.cassi_adjoint(low.double(), flat.double(), 6, 2)
    close(kernels("cassi_adjoint", low, flat, 6, 2), want, 1)


def off_by_one(t: torch.Tensor) -> torch.Tensor:
    """The same values, dense, one element off 16 bytes."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("which", ["y", "weight", "mask", "x"])
def test_cassi_step_with_an_argument_between_pairs(kernels, which):
    x, y, weight = draw(2, 5, 2, 84, dtype=torch.float32), draw(2, 2, 92, dtype=torch.float32), torch.rand(2, 2, 92)
    arguments = {"x": x, "y": y, "mask": torch.rand(2, 84), "rho": torch.rand(2, 5), "weight": weight}
    arguments[which] = off_by_one(arguments[which])
    want = cassi_reference.cassi_step(*(a.double() for a in arguments.values()), 2, True)
    for a, b in zip(kernels("cassi_step", *arguments.values(), 2, True), want, strict=True):
        close(a, b, 40)


def test_cassi_does_not_depend_on_batch_mates(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        x, y, rho = draw(9, 28, 2, 96, dtype=dtype), draw(9, 2, 150, dtype=torch.float32), torch.rand(9, 28)
        weight, calls = torch.rand(9, 2, 150), []
        for mask in (torch.rand(28, 2, 96), torch.rand(9, 28, 2, 96)):
            calls += [
                ("cassi", x, mask, 2),
                ("cassi_step", x, y, mask, rho, weight, 2, True),
                ("cassi_adjoint", y.to(dtype), mask, 28, 2),
                ("cassi_prox_weight", mask, rho[:, 0].contiguous(), 28, 2),
            ]
        for name, *arguments in calls:
            one = [a[-1:] if isinstance(a, torch.Tensor) and a.shape[0] == 9 else a for a in arguments]
            alone, together = kernels(name, *one), kernels(name, *arguments)
            pairs = zip(alone, together, strict=True) if isinstance(alone, list) else [(alone, together)]
            assert all(torch.equal(a, b[-1:]) for a, b in pairs), name


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 2),
    bands=st.one_of(st.integers(1, 9), st.integers(10, 40)),
    height=st.integers(1, 3),
    width=st.one_of(st.integers(1, 80), st.sampled_from([16, 24, 32, 64, 400])),
    step=st.integers(0, 9),
    per_band=st.booleans(),
    per_sample=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_cassi_random_shapes(kernels, n, bands, height, width, step, per_band, per_sample, dtype):
    check_cassi(kernels, n, bands, height, width, step, per_band, dtype, per_sample=per_sample)


def check_blur(kernels, n, channels, height, width, kh, kw, scale, per_sample, dtype, layout=lambda t: t):
    """Sizes are the measurement's."""
    wide = wide_of(dtype)
    x = layout(draw(n, channels, height * scale, width * scale, dtype=dtype))
    y = layout(draw(n, channels, height, width, dtype=wide))
    kernel = draw(*((n, kh, kw) if per_sample else (kh, kw)), dtype=wide) / (kh * kw) ** 0.5
    rho = torch.rand(n, channels, dtype=wide)
    x64, y64, k64 = x.double(), y.double(), kernel.double()
    terms = 8 * (kh + kw)
    close(kernels("blur_downsample", x, kernel, scale), blur_reference.blur_downsample(x64, k64, scale), terms)
    low = y.to(dtype)
    want = blur_reference.blur_downsample_adjoint(low.double(), k64, scale)
    close(kernels("blur_downsample_adjoint", low, kernel, scale), want, terms)
    want = blur_reference.blur_downsample_descend(x64, y64, k64, rho.double(), scale)
    close(kernels("blur_downsample_descend", x, y, kernel, rho, scale), want, terms)
    for r in (rho, rho.new_full((1,), 0.7)):
        want = blur_reference.blur_downsample_step(x64, y64, k64, r.double(), scale)
        close(kernels("blur_downsample_step", x, y, kernel, r, scale), want, 4 * terms)
    want = blur_reference.blur_downsample_grad_kernel(x64, y64, kh, kw, scale, per_sample)
    got = kernels("blur_downsample_grad_kernel", x, y, kh, kw, scale, per_sample)
    close(got, want, 8 * (n * channels * height * width + 1))


BLUR_SHAPES = [
    # n, channels, height, width, kh, kw, scale
    (2, 2, 12, 20, 25, 25, 3),
    (1, 1, 40, 70, 5, 7, 1),  # several tiles each way
    (1, 1, 3, 130, 4, 6, 2),  # an even kernel
    (1, 2, 9, 9, 67, 67, 1),  # taps in several parts; wraps many times
    (1, 1, 5, 6, 67, 67, 4),
    (1, 1, 2, 3, 1, 1, 5),  # most phases have no tap
    (1, 1, 1, 1, 3, 3, 2),
    (2, 1, 4, 3, 2, 160, 1),  # taps across in several parts
    (2, 1, 34, 3, 9, 1, 2),
    (3, 3, 9, 5, 3, 4, 2),  # enough planes for a block to take all phases
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BLUR_SHAPES)
def test_blur_downsample(kernels, shape, dtype):
    check_blur(kernels, *shape, shape[0] > 1, dtype)


def test_blur_downsample_does_not_depend_on_batch_mates(kernels):
    for scale in (1, 3):
        x, kernel = draw(400, 1, 9 * scale, 5 * scale, dtype=torch.float32), draw(5, 4, dtype=torch.float32)
        alone, together = (kernels("blur_downsample", x[:n], kernel, scale) for n in (1, 400))
        assert torch.equal(alone, together[:1])


@pytest.mark.parametrize("layout", [sliced, channels_last])
def test_blur_downsample_layouts(kernels, layout):
    check_blur(kernels, 2, 3, 5, 6, 5, 4, 2, True, torch.float32, layout)
    check_blur(kernels, 2, 3, 5, 6, 5, 4, 2, False, torch.bfloat16, layout)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 2),
    channels=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 20),
    kh=st.integers(1, 9),
    kw=st.integers(1, 14),
    scale=st.integers(1, 5),
    per_sample=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_blur_downsample_random_shapes(kernels, n, channels, height, width, kh, kw, scale, per_sample, dtype):
    check_blur(kernels, n, channels, height, width, kh, kw, scale, per_sample, dtype)


def test_blur_downsample_says_what_it_can_count(kernels):
    """Kernels count in 32 bits. Images of one value, all others the same: nothing here takes memory."""

    def refused(message, name, *arguments):
        with pytest.raises(RuntimeError, match=message):
            kernels(name, *arguments)

    one, tap, far = torch.zeros(1), torch.ones(1, 1), 2**15
    high, wide = one.expand(1, 1, 2 * far * far, far), one.expand(1, 1, far, 4 * far * far)
    for image, size in ((high, "2147483648x32768"), (wide, "32768x4294967296")):
        message = f", x: expected at most 2\\^30 - 1 rows and columns on CUDA, got {size}"
        refused(message, "blur_downsample", image, tap, far)
    large = one.expand(1, 1, 2 * far, 2 * far)
    refused("scale: expected at most 32768 on CUDA, got 65536", "blur_downsample", large, tap, 2 * far)
    x = one.expand(1, 1, 4, 4)
    for taps, times, planes in (((2**29, 1), 1, 1), ((2**16, 2**15), 1, 1), ((1, 1), 2**31, 2**31)):
        many = x.expand(times, -1, -1, -1)
        message = f", kernel, x: expected fewer than 2\\^31 taps and planes .* got {taps[0]}x{taps[1]} and {planes}"
        refused(message, "blur_downsample_grad_kernel", many, many, *taps, 1, False)


def check_block_cs(kernels, n, block, m, height, width, dtype, layout=lambda t: t):
    wide = wide_of(dtype)
    x, phi = layout(draw(n, 1, height, width, dtype=dtype)), draw(m, block * block, dtype=wide) / block
    rows, cols = -(-height // block), -(-width // block)
    y, rho = layout(draw(n, m, rows, cols, dtype=wide)), torch.rand(n, 1, dtype=wide)
    x64, y64, p64 = x.double(), y.double(), phi.double()
    # bf16 and fp16 images: factors are kept to 16 bits, well below what the result is rounded to, but not below a
    # result near zero: 2^-16 of each of the m products, or block * block shorter ones, that cancelled.
    terms = 8 * (block + m) if dtype in (torch.float32, torch.float64) else 100 * (block + m)
    close(kernels("block_cs", x, phi, block), block_reference.block_cs(x64, p64, block), terms)
    low = y.to(dtype)
    want = block_reference.block_cs_adjoint(low.double(), p64, block, height, width)
    close(kernels("block_cs_adjoint", low, phi, block, height, width), want, terms)
    for r in (rho, rho.new_full((1,), 0.7)):
        want = block_reference.block_cs_step(x64, y64, p64, r.double(), block)
        close(kernels("block_cs_step", x, y, phi, r, block), want, 4 * terms)
    wants = block_reference.block_cs_step_residual(x64, y64, p64, r.double(), block)
    for got, want in zip(kernels("block_cs_step_residual", x, y, phi, r, block), wants, strict=True):
        close(got, want, 4 * terms)
    want = block_reference.block_cs_grad_phi(x64, y64, block)
    close(kernels("block_cs_grad_phi", x, y, block), want, terms * (1 + n * rows * cols))


BLOCK_SHAPES = [
    # n, block, m, height, width
    (2, 8, 16, 24, 20),
    (1, 16, 70, 40, 130),  # several tiles each way
    (1, 17, 10, 17, 18),
    (3, 1, 2, 2, 5),
    (1, 4, 3, 1, 1),
    (1, 32, 36, 64, 128),  # whole chunks of 16 bytes everywhere, more steps than the ring has places
    (16, 16, 64, 64, 64),  # large tiles
    (2, 16, 21, 40, 56),  # whole chunks, blocks that end outside
    (1, 24, 9, 48, 50),  # Phi in whole chunks, the image not
    (1, 1, 2, 24, 24),  # the gradient for Phi in parts
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BLOCK_SHAPES)
def test_block_cs(kernels, shape, dtype):
    check_block_cs(kernels, *shape, dtype)


@pytest.mark.parametrize("layout", [sliced, channels_last])
def test_block_cs_layouts(kernels, layout):
    check_block_cs(kernels, 2, 4, 5, 9, 10, torch.float32, layout)
    check_block_cs(kernels, 2, 4, 5, 9, 10, torch.bfloat16, layout)
    check_block_cs(kernels, 2, 16, 5, 32, 64, torch.float16, layout)


def block_cs_results(kernels, x, y, phi, rho, block):
    """Forward, adjoint, step and residual."""
    height, width = x.shape[2:]
    return [
        kernels("block_cs", x, phi, block),
        kernels("block_cs_adjoint", y.to(x.dtype), phi, block, height, width),
        *kernels("block_cs_step_residual", x, y, phi, rho, block),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_cs_does_not_depend_on_batch_mates(kernels, dtype):
    n, wide = 400 if kernels.device == "cuda" else 16, wide_of(dtype)  # enough for large tiles; one image takes small
    x, phi = draw(n, 1, 64, 64, dtype=dtype), draw(64, 256, dtype=wide)
    y, rho = draw(n, 64, 4, 4, dtype=wide), torch.rand(n, 1, dtype=wide)
    alone = block_cs_results(kernels, x[:1], y[:1], phi, rho[:1], 16)
    for one, all_ in zip(alone, block_cs_results(kernels, x, y, phi, rho, 16), strict=True):
        assert torch.equal(one, all_[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_cs_does_not_depend_on_where_memory_lies(kernels, dtype):
    """Whole chunks of 16 bytes, or value by value: the same sums."""
    wide = wide_of(dtype)
    x, phi = draw(2, 1, 40, 48, dtype=dtype), draw(21, 256, dtype=wide)
    y, rho = draw(2, 21, 3, 3, dtype=wide), torch.rand(1, dtype=wide)
    off = phi.new_empty(phi.numel() + 1)[1:].view(phi.shape).copy_(phi)  # dense, one element off 16 bytes
    want = [*block_cs_results(kernels, x, y, phi, rho, 16), kernels("block_cs_grad_phi", x, y, 16)]
    got = [*block_cs_results(kernels, sliced(x), y, off, rho, 16), kernels("block_cs_grad_phi", sliced(x), y, 16)]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def block_cs_errors(kernels, x, y, phi, block):
    """What a float32 forward, adjoint and gradient are off, each beside the sums of its products' sizes, in float64."""
    height, width = x.shape[2:]
    calls = [("block_cs", (x, phi), (block,)), ("block_cs_adjoint", (y, phi), (block, height, width))]
    for name, factors, sizes in [*calls, ("block_cs_grad_phi", (x, y), (block,))]:
        reference, wide = getattr(block_reference, name), [f.double() for f in factors]
        exact, terms = reference(*wide, *sizes), reference(*(f.abs() for f in wide), *sizes)
        yield (kernels(name, *factors, *sizes).double() - exact).abs(), exact, terms


@pytest.mark.parametrize("signs", [lambda t: t, torch.abs], ids=["any signs", "no cancellation"])
@pytest.mark.parametrize("n", [1, 16])  # small tiles and large ones
def test_block_cs_in_float32_is_not_tf32(kernels, n, signs):
    """Sums 1024 deep. tf32 alone is off by 3e-4, two of the three products by 2e-4."""
    x, y = signs(draw(n, 1, 64, 64, dtype=torch.float32)), signs(draw(n, 64, 2, 2, dtype=torch.float32))
    phi = signs(draw(64, 1024, dtype=torch.float32)) / 32
    for error, exact, _ in block_cs_errors(kernels, x, y, phi, 32):
        assert error.norm() < 4e-7 * exact.norm()
    x, y = signs(draw(n, 1, 32, 32, dtype=torch.float32)), signs(draw(n, 1024, 2, 2, dtype=torch.float32))
    for error, exact, _ in block_cs_errors(kernels, x, y, signs(draw(1024, 256, dtype=torch.float32)) / 32, 16):
        assert error.norm() < 4e-7 * exact.norm()


def test_block_cs_in_float32_of_numbers_of_any_size(kernels):
    """1e-20 to 1e20, products 1e-35 to 1e35: 2^-21 of each product may go, little more of their sum."""

    def sized(most, *shape):
        return (draw(*shape) * 10 ** (most * (2 * torch.rand(shape, dtype=torch.float64) - 1))).float()

    for most_x, most_phi in [(20, 15), (15, 20), (0, 20), (20, 0)]:
        x, y, phi = sized(most_x, 2, 1, 20, 35), sized(most_x, 2, 21, 2, 3), sized(most_phi, 21, 256)
        for error, _, terms in itertools.islice(block_cs_errors(kernels, x, y, phi, 16), 2):
            assert (error <= 2**-20 * terms).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_cs_of_what_is_not_finite(kernels, dtype, value):
    """It reaches the results that it is a part of, as it is or as NaN, and no other."""
    x, phi = draw(2, 1, 32, 48, dtype=dtype), draw(21, 256, dtype=wide_of(dtype))
    y = draw(2, 21, 2, 3, dtype=dtype)
    clean = [kernels("block_cs", x, phi, 16), kernels("block_cs_adjoint", y, phi, 16, 32, 48)]
    x[1, 0, 20, 7] = y[0, 20, 1, 2] = value
    measured, image = kernels("block_cs", x, phi, 16), kernels("block_cs_adjoint", y, phi, 16, 32, 48)
    hit = torch.zeros_like(measured, dtype=torch.bool)
    hit[1, :, 1, 0] = True
    assert torch.equal(~measured.isfinite(), hit) and torch.equal(measured[~hit], clean[0][~hit])
    hit = torch.zeros_like(image, dtype=torch.bool)
    hit[0, 0, 16:, 32:] = True
    assert torch.equal(~image.isfinite(), hit) and torch.equal(image[~hit], clean[1][~hit])


def test_block_cs_of_nothing(kernels):
    phi, rho = draw(3, 16, dtype=torch.float32), torch.ones(1)
    assert kernels("block_cs", torch.empty(2, 1, 0, 8), phi, 4).shape == (2, 3, 0, 2)
    assert kernels("block_cs_step", torch.empty(0, 1, 8, 8), torch.empty(0, 3, 2, 2), phi, rho, 4).shape == (0, 1, 8, 8)
    assert torch.equal(
        kernels("block_cs_grad_phi", torch.empty(0, 1, 8, 8), torch.empty(0, 3, 2, 2), 4), torch.zeros(3, 16)
    )
    nothing, x = torch.empty(0, 16), draw(1, 1, 6, 8, dtype=torch.float32)  # no measurements
    assert torch.equal(kernels("block_cs_adjoint", torch.empty(1, 0, 2, 2), nothing, 4, 6, 8), torch.zeros(1, 1, 6, 8))
    assert torch.equal(kernels("block_cs_step", x, torch.empty(1, 0, 2, 2), nothing, rho, 4), x)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 3),
    block=st.integers(1, 7),
    m=st.integers(1, 9),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
)
def test_block_cs_random_shapes(kernels, n, block, m, height, width, dtype):
    check_block_cs(kernels, n, block, m, height, width, dtype)


def test_results_are_bitwise_repeatable(kernels):
    x, y, mask = draw(2, 5, 3, 40, dtype=torch.float32), draw(2, 3, 48, dtype=torch.float32), torch.rand(3, 40)
    calls = [("cassi_step", x, y, mask, torch.rand(1), None, 2, True), ("cassi_grad_mask", x, y, 2, False)]
    image, kernel = draw(2, 2, 12, 16, dtype=torch.float32), draw(5, 5, dtype=torch.float32)
    low = draw(2, 2, 6, 8, dtype=torch.float32)
    calls += [("blur_downsample_step", image, low, kernel, torch.rand(1), 2)]
    calls += [("blur_downsample_grad_kernel", image, low, 5, 5, 2, False)]
    phi, blocks = draw(3, 16, dtype=torch.float32), draw(2, 3, 2, 3, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        calls += [("block_cs_step", draw(2, 1, 8, 9, dtype=dtype), blocks, phi, torch.rand(1), 4)]
    for name, *arguments in calls:
        first, second = kernels(name, *arguments), kernels(name, *arguments)
        pairs = zip(first, second, strict=True) if isinstance(first, list) else [(first, second)]
        assert all(torch.equal(a, b) for a, b in pairs), name


def operators():
    """(operator, image) of each kind."""
    return [
        (lf.BlockCS.gaussian(0.25, 8, learn=True), draw(2, 1, 20, 24, dtype=torch.float32)),
        (lf.BlurDownsample(torch.rand(5, 5), 2, learn=True, method="direct"), draw(2, 3, 12, 16, dtype=torch.float32)),
        (lf.CASSI(torch.rand(6, 32), bands=5, learn=True), draw(2, 5, 6, 32, dtype=torch.float32)),
    ]


@pytest.mark.gpu
def test_operators_and_their_gradients_on_a_gpu():
    gpu_kernels()
    for op, x in operators():
        results = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
            placed = op.to(device, dtype)
            placed.zero_grad()
            image = x.to(device, dtype).requires_grad_()
            rho = torch.tensor(0.3, device=device, dtype=dtype, requires_grad=True)
            out = placed.gradient_step(image, placed(image.detach() + 1).detach(), rho)
            out.square().sum().backward()
            # Copies: moving the module to the next device moves its parameters' gradients in place.
            results.append([out, image.grad, rho.grad, *(p.grad.clone() for p in placed.parameters())])
        for exact, got in zip(*results, strict=True):
            scale = exact.abs().max().item()
            torch.testing.assert_close(got.cpu().double(), exact, rtol=0, atol=1e-4 * scale)  # sums that cancel


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream_and_in_a_graph():
    gpu_kernels()
    for op, x in operators():
        op, x = op.cuda().requires_grad_(False), x.cuda()
        y, rho = op(x), torch.tensor(0.3, device="cuda")
        want = op.gradient_step(x, y, rho)
        static, side = x.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # A long wait on this stream only: a kernel on another one would read what is about to be overwritten.
            late = torch.full_like(x, torch.nan)
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            got = op.gradient_step(late, y, rho)
            op.gradient_step(static, y, rho)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(got, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op.gradient_step(static, y, rho)
        static.copy_(2 * x)
        rho.fill_(0.6)  # read on the device
        graph.replay()
        assert torch.equal(captured, op.gradient_step(2 * x, y, 0.6))


@pytest.mark.gpu
def test_kernels_run_on_their_tensors_device():
    gpu_kernels()
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for op, x in operators():
        want = op(x)
        with torch.cuda.device(0):
            got = op.to("cuda:1")(x.to("cuda:1"))
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


# samples, channels in and out, height, width. The line of pixels, a tile of it, the ring and who shares it out are what
# these shapes are for: less than a tile, rows that begin anywhere in one, every number of output channels a block can
# have, several turns of the ring, strips of a wide image, more blocks than tiles.
CONVOLUTIONS = [
    (1, 16, 16, 1, 1),
    (3, 16, 48, 5, 7),
    (2, 32, 32, 9, 13),
    (1, 64, 64, 20, 40),
    (2, 96, 96, 6, 9),
    (1, 128, 128, 6, 10),
    (1, 48, 80, 30, 33),
    (1, 128, 16, 3, 40),
    (1, 64, 64, 3, 700),
    (2, 16, 32, 70, 65),
    (0, 16, 16, 4, 4),
]


@pytest.fixture
def convolution(kernels):
    if kernels.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return kernels


def last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("dtype", "beside", "relu"),
    [
        (torch.bfloat16, (True, True), True),
        (torch.bfloat16, (False, False), False),
        (torch.float16, (True, False), True),
    ],
)
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_fused_conv2d(convolution, shape, beside, relu, dtype):
    n, channels, out, height, width = shape
    x, weight = draw(n, channels, height, width, dtype=dtype), draw(out, channels, 3, 3, dtype=dtype)
    bias = draw(out, dtype=dtype) if beside[0] else None
    residual = draw(n, out, height, width, dtype=dtype) if beside[1] else None
    got = convolution("fused_conv2d", last(x), last(weight), bias, residual, relu)
    wide = [t if t is None else t.double() for t in (x, weight, bias, residual)]
    assert got.is_contiguous(memory_format=torch.channels_last) and got.shape == (n, out, height, width)
    close(got.contiguous(), fused_reference.fused_conv2d(*wide, relu), 9 * channels)
    again = convolution("fused_conv2d", last(x), last(weight), bias, residual, relu)
    assert torch.equal(got, again)


def test_fused_conv2d_does_not_depend_on_where_memory_lies(convolution):
    x, weight = draw(3, 32, 9, 11, dtype=torch.bfloat16), draw(16, 32, 3, 3, dtype=torch.bfloat16)
    bias, residual = draw(16, dtype=torch.bfloat16), draw(3, 16, 9, 11, dtype=torch.bfloat16)
    want = convolution("fused_conv2d", last(x), last(weight), bias, residual, False)
    off = last(draw(3, 33, 9, 12, dtype=torch.bfloat16))[:, 1:, :, :11]  # rows apart, two bytes off
    off.copy_(x)
    for image, kernel, other in ((x, weight, residual), (off, weight, residual[:, :, :, :].flip(3).flip(3))):
        assert torch.equal(convolution("fused_conv2d", image, kernel, bias, other, False), want)
    alone = convolution("fused_conv2d", last(x[1:2]), last(weight), bias, last(residual[1:2]), False)
    assert torch.equal(alone, want[1:2])


def test_fused_conv2d_keeps_what_is_not_finite(convolution):
    """A NaN or infinity reaches the nine pixels around it and no other; ReLU lets NaN through."""
    x, weight = torch.zeros(1, 16, 6, 8), torch.ones(16, 16, 3, 3)
    x[0, 3, 0, 0], x[0, 5, 4, 5] = float("inf"), float("nan")
    got = convolution("fused_conv2d", last(x.bfloat16()), last(weight.bfloat16()), None, None, True)
    want = torch.zeros(1, 16, 6, 8)
    want[:, :, :2, :2], want[:, :, 3:6, 4:7] = float("inf"), float("nan")
    torch.testing.assert_close(got.float(), want, equal_nan=True)


def test_fused_conv2d_says_what_it_expects(convolution):
    x, weight = draw(1, 16, 4, 4, dtype=torch.bfloat16), draw(16, 16, 3, 3, dtype=torch.bfloat16)
    for change, message in (
        ({0: draw(1, 12, 4, 4, dtype=torch.bfloat16), 1: draw(16, 12, 3, 3, dtype=torch.bfloat16)}, "multiples of 16"),
        ({0: x.float(), 1: weight.float()}, "bfloat16 or float16"),
        ({1: weight.half()}, "dtype of x"),
        ({2: draw(8, dtype=torch.bfloat16)}, "bias: expected shape"),
        ({3: draw(1, 16, 4, 5, dtype=torch.bfloat16)}, "residual: expected shape"),
        ({0: draw(1, 4096, 1, 1, dtype=torch.bfloat16), 1: draw(16, 4096, 3, 3, dtype=torch.bfloat16)}, "room"),
    ):
        given = [x, weight, None, None, False]
        for i, value in change.items():
            given[i] = value
        with pytest.raises(RuntimeError, match=message):
            convolution("fused_conv2d", *given)
