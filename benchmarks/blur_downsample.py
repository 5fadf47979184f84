"""Blur and downsample: the gradient step, A and its adjoint."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness import optional
from benchmarks.harness.registry import FORWARD, OURS, OVERHEAD, WARM, Problem, Unavailable, Work, case, size
from lorun_fast.reference import blur_downsample as reference


def _inputs(
    dtype, device, n: int, channels: int, height: int, width: int, k: int, scale: int, per_sample: bool
) -> dict[str, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kernel = torch.rand((n, k, k) if per_sample else (k, k), device=device, dtype=wide)
    return {
        "x": torch.rand(n, channels, height, width, device=device).to(dtype),
        "y": torch.rand(n, channels, height // scale, width // scale, device=device, dtype=wide),
        "kernel": kernel / kernel.sum((-2, -1), keepdim=True),
        "rho": torch.tensor([0.8], device=device, dtype=wide),
    }


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _flops(x: Tensor, y: Tensor, kernel: Tensor, times: int) -> float:
    """Operations of ``times`` applications of A or its adjoint, in the cheaper of the two ways known.

    Direct: a multiplication and an addition per tap and measurement. FFT: one real transform of the image each
    (5/2 P log2 P), a complex product per bin, and a transform of the measurement.
    """
    taps = kernel.shape[-2] * kernel.shape[-1]
    direct = 2 * taps * y.numel()
    planes = x.shape[0] * x.shape[1]

    def transform(t: Tensor) -> float:
        pixels = t.shape[2] * t.shape[3]
        return planes * 2.5 * pixels * math.log2(max(pixels, 2))

    return times * min(direct, transform(x) + transform(y) + 3 * x.numel())


TINY = size("1x1x16x16 k5 s2", quick=True, regimes=(WARM, OVERHEAD), n=1, channels=1, height=16, width=16, k=5, scale=2)


@case(
    "blur_downsample.step",
    suite="ops",
    sizes=[
        size("1x3x288x480 k25 s3", compiled=True, n=1, channels=3, height=288, width=480, k=25, scale=3),
        size("1x3x288x480 k7 s2", n=1, channels=3, height=288, width=480, k=7, scale=2),
        size("1x1x256x256 k67 s4", modes=(FORWARD,), n=1, channels=1, height=256, width=256, k=67, scale=4),
        size("1x3x288x480 k15 s1", modes=(FORWARD,), n=1, channels=3, height=288, width=480, k=15, scale=1),
        size("8x3x96x96 k25 s3 each", n=8, channels=3, height=96, width=96, k=25, scale=3, per_sample=True),
        size(
            "16x3x288x480 k25 s3", dtypes=("fp32", "bf16"), devices=("cuda",),
            n=16, channels=3, height=288, width=480, k=25, scale=3,
        ),
        TINY,
    ],
)  # fmt: skip
def step(dtype, device, *, n, channels, height, width, k, scale, per_sample=False) -> Problem:
    """z = x - rho A^T (A x - y), differentiated for x and rho: a known kernel, a learned step size."""
    inputs = _inputs(dtype, device, n, channels, height, width, k, scale, per_sample)
    x, y, kernel = inputs["x"], inputs["y"], inputs["kernel"]

    def definition(x, y, kernel, rho) -> Tensor:
        residual = reference.blur_downsample(x, kernel, scale) - y
        return x - rho * reference.blur_downsample_adjoint(residual, kernel, scale)

    return Problem(
        inputs,
        definition,
        forward=Work(_nbytes(x, x, y, kernel), _flops(x, y, kernel, 2)),
        # Backward is one more step, on the gradient; rho's comes from the residual that the forward pass kept.
        train=Work(_nbytes(x, x, x, x, y, y, y, kernel), _flops(x, y, kernel, 4)),
        wrt=("x", "rho"),
    )


class Direct:
    """A and its adjoint as strided and transposed convolutions of a circularly padded image."""

    def __init__(self, p: Problem, scale: int):
        self.scale = scale
        n, channels = p.x.shape[:2]
        kernel = p.kernel.detach().to(p.x.dtype)
        self.kh, self.kw = kernel.shape[-2:]
        # (after, before) per axis: how far the kernel reaches beyond a pixel.
        self.before = (self.kh - 1 - self.kh // 2, self.kw - 1 - self.kw // 2)
        self.after = (self.kh // 2, self.kw // 2)
        if max(self.kh, self.kw) > min(p.x.shape[2:]):
            raise Unavailable("circular padding needs a kernel no larger than the image")
        if kernel.ndim == 2:
            # Planes as samples: faster than one group per plane, and the same thing.
            self.lead, self.groups = (n * channels, 1), 1
            self.kernel = kernel[None, None]
        else:
            self.lead, self.groups = (1, n * channels), n * channels
            self.kernel = kernel.repeat_interleave(channels, 0)[:, None]
        self.flipped = self.kernel.flip(-2, -1).contiguous()
        self.images = (n, channels)

    def planes(self, t: Tensor) -> Tensor:
        return t.reshape(*self.lead, *t.shape[2:])

    def unplane(self, t: Tensor) -> Tensor:
        return t.reshape(*self.images, *t.shape[2:])

    def pad(self, t: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
        return F.pad(self.planes(t), (before[1], after[1], before[0], after[0]), mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        extended = self.pad(x, self.before, self.after)
        y = F.conv2d(extended, self.flipped, stride=self.scale, groups=self.groups)
        return self.unplane(y[..., : x.shape[2] // self.scale, : x.shape[3] // self.scale])

    def adjoint(self, y: Tensor) -> Tensor:
        spread = F.conv_transpose2d(self.planes(y), self.flipped, stride=self.scale, groups=self.groups)
        for dim, before, length in (
            (2, self.before[0], y.shape[2] * self.scale),
            (3, self.before[1], y.shape[3] * self.scale),
        ):
            spread = _wrap(spread, dim, before, length)
        return self.unplane(spread)


def _wrap(t: Tensor, dim: int, before: int, length: int) -> Tensor:
    """Folds what lies outside [before, before + length) along ``dim`` back in, one period at most on each side."""
    beyond = t.shape[dim] - before - length
    if beyond < 0:
        pad = [0, 0] * (t.ndim - 1 - dim) + [0, -beyond]
        t, beyond = F.pad(t, pad), 0
    body = t.narrow(dim, before, length)
    head = t.narrow(dim, before + length, beyond)
    tail = t.narrow(dim, 0, before)
    middle = body.narrow(dim, beyond, length - beyond - before)
    return torch.cat(
        [body.narrow(dim, 0, beyond) + head, middle, body.narrow(dim, length - before, before) + tail], dim
    )


class BlurThenSubsample(Direct):
    """A as it is usually written: blur the whole image, keep every s-th pixel; the adjoint inserts zeros."""

    def forward(self, x: Tensor) -> Tensor:
        blurred = F.conv2d(self.pad(x, self.before, self.after), self.flipped, groups=self.groups)
        return self.unplane(blurred)[..., :: self.scale, :: self.scale]

    def adjoint(self, y: Tensor) -> Tensor:
        spread = y.new_zeros(*y.shape[:2], y.shape[2] * self.scale, y.shape[3] * self.scale)
        spread[..., :: self.scale, :: self.scale] = y
        return self.unplane(F.conv2d(self.pad(spread, self.after, self.before), self.kernel, groups=self.groups))


class RealFFT:
    """A and its adjoint as products of half spectra; the kernel's transform is taken once, untimed."""

    def __init__(self, p: Problem, scale: int):
        self.scale, self.size = scale, tuple(p.x.shape[2:])
        if p.x.dtype not in (torch.float32, torch.float64):
            raise Unavailable("the FFT takes fp32 and fp64")
        kernel = p.kernel.detach()
        self.kernel = torch.fft.rfft2(self._on_grid(kernel))
        if kernel.ndim == 3:
            self.kernel = self.kernel[:, None]
        self.conjugate = self.kernel.conj().resolve_conj()

    def _on_grid(self, kernel: Tensor) -> Tensor:
        kh, kw = kernel.shape[-2:]
        grid = kernel.new_zeros(*kernel.shape[:-2], *self.size)
        rows = (torch.arange(kh, device=kernel.device) - kh // 2) % self.size[0]
        cols = (torch.arange(kw, device=kernel.device) - kw // 2) % self.size[1]
        flat = (rows[:, None] * self.size[1] + cols).flatten()
        return grid.flatten(-2).index_add(-1, flat, kernel.flatten(-2)).view_as(grid)

    def forward(self, x: Tensor) -> Tensor:
        blurred = torch.fft.irfft2(torch.fft.rfft2(x) * self.kernel, s=self.size)
        return blurred[..., :: self.scale, :: self.scale]

    def adjoint(self, y: Tensor) -> Tensor:
        spread = y.new_zeros(*y.shape[:2], *self.size)
        spread[..., :: self.scale, :: self.scale] = y
        return torch.fft.irfft2(torch.fft.rfft2(spread) * self.conjugate, s=self.size)


class FoldedFFT(RealFFT):
    """The FFT form that works on the small grid where it can: subsampling sums s x s aliases of the spectrum,
    zero insertion repeats it, so neither needs a transform of its own at full size."""

    def _complete(self, half: Tensor, width: int) -> Tensor:
        """A half spectrum (..., H, W//2 + 1) of a real image, completed to all W columns."""
        mirrored = half[..., 1 : (width + 1) // 2].conj().flip(-1)
        mirrored = torch.cat([mirrored[..., :1, :], mirrored[..., 1:, :].flip(-2)], -2)
        return torch.cat([half, mirrored], -1)

    def fold(self, half: Tensor) -> Tensor:
        """Half spectrum of the image -> half spectrum of the image subsampled by s."""
        (height, width), s = self.size, self.scale
        rows = half.unflatten(-2, (s, height // s)).mean(-3)
        columns = self._complete(rows, width).unflatten(-1, (s, width // s)).mean(-2)
        return columns[..., : width // s // 2 + 1]

    def unfold(self, small: Tensor) -> Tensor:
        """Half spectrum of a measurement -> half spectrum of the image with zeros between its pixels."""
        width, s = self.size[1], self.scale
        full = self._complete(small, width // s)
        return full.repeat(*(1,) * (full.ndim - 2), s, s)[..., : width // 2 + 1]

    def forward(self, x: Tensor) -> Tensor:
        small = self.fold(torch.fft.rfft2(x) * self.kernel)
        return torch.fft.irfft2(small, s=(self.size[0] // self.scale, self.size[1] // self.scale))

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.irfft2(self.unfold(torch.fft.rfft2(y)) * self.conjugate, s=self.size)

    def step(self, x: Tensor, y_spectrum: Tensor, rho: Tensor) -> Tensor:
        """The whole gradient step with one transform of the image each way."""
        residual = self.fold(torch.fft.rfft2(x) * self.kernel) - y_spectrum
        return x - rho * torch.fft.irfft2(self.unfold(residual) * self.conjugate, s=self.size)


def _step_with(form: Callable[[Problem, int], Direct | RealFFT]) -> Callable[[Problem], Callable[[], Tensor]]:
    def build(p: Problem) -> Callable[[], Tensor]:
        operator = form(p, p.args["scale"])
        y = p.y.to(p.x.dtype)
        return lambda: p.x - p.rho.to(p.x.dtype) * operator.adjoint(operator.forward(p.x) - y)

    return build


@step.contender("lorun_fast", kind=OURS, ops=("blur_downsample_step",), graphed=True)
def _(p: Problem):
    op = lf.BlurDownsample(p.kernel, p.args["scale"])
    return lambda: op.gradient_step(p.x, p.y, p.rho)


step.contender("strided convolution", compiled=True, graphed=True)(_step_with(Direct))
step.contender("blur, then subsample", compiled=True, graphed=True)(_step_with(BlurThenSubsample))
step.contender("real FFT", graphed=True)(_step_with(RealFFT))


@step.contender("real FFT, folded spectra", graphed=True)
def _(p: Problem):
    """The measurement's spectrum is taken once, untimed: it stays the same through all stages."""
    operator = FoldedFFT(p, p.args["scale"])
    spectrum = torch.fft.rfft2(p.y)
    return lambda: operator.step(p.x, spectrum, p.rho)


def _deepinv(p: Problem):
    if p.kernel.ndim == 3:
        raise Unavailable("one kernel for the batch only")
    return optional.package("deepinv").physics.Downsampling(
        img_size=tuple(p.x.shape[1:]), filter=p.kernel.detach()[None, None], factor=p.args["scale"],
        padding="circular", device=p.x.device,
    )  # fmt: skip


@step.contender("deepinv")
def _(p: Problem):
    physics = _deepinv(p)
    return lambda: p.x - p.rho * physics.A_adjoint(physics.A(p.x) - p.y)


HALVES = [size("1x3x288x480 k25 s3", n=1, channels=3, height=288, width=480, k=25, scale=3), TINY]


def _half_inputs(dtype, device, n, channels, height, width, k, scale) -> tuple[dict[str, Tensor], Work, Work]:
    inputs = _inputs(dtype, device, n, channels, height, width, k, scale, False)
    x, y, kernel = inputs["x"], inputs["y"], inputs["kernel"]
    once = Work(_nbytes(x, y, kernel), _flops(x, y, kernel, 1))
    return inputs, once, Work(2 * once.bytes, 2 * once.flops)


@case("blur_downsample.forward", suite="ops", sizes=HALVES)
def forward(dtype, device, *, n, channels, height, width, k, scale) -> Problem:
    """y = A x."""
    inputs, once, twice = _half_inputs(dtype, device, n, channels, height, width, k, scale)
    return Problem(
        inputs, lambda x, y, kernel, rho: reference.blur_downsample(x, kernel, scale), once, twice, wrt=("x",)
    )


@case("blur_downsample.adjoint", suite="ops", sizes=HALVES)
def adjoint(dtype, device, *, n, channels, height, width, k, scale) -> Problem:
    """x = A^T y."""
    inputs, once, twice = _half_inputs(dtype, device, n, channels, height, width, k, scale)
    return Problem(
        inputs, lambda x, y, kernel, rho: reference.blur_downsample_adjoint(y, kernel, scale), once, twice, wrt=("y",)
    )


@forward.contender("lorun_fast", kind=OURS, ops=("blur_downsample",))
def _(p: Problem):
    op = lf.BlurDownsample(p.kernel, p.args["scale"])
    return lambda: op(p.x)


@adjoint.contender("lorun_fast", kind=OURS, ops=("blur_downsample_adjoint",))
def _(p: Problem):
    op = lf.BlurDownsample(p.kernel, p.args["scale"])
    return lambda: op.adjoint(p.y)


for name, form in (
    ("strided convolution", Direct),
    ("blur, then subsample", BlurThenSubsample),
    ("real FFT", RealFFT),
    ("real FFT, folded spectra", FoldedFFT),
):

    @forward.contender(name)
    def _(p: Problem, form=form):
        operator = form(p, p.args["scale"])
        return lambda: operator.forward(p.x)

    @adjoint.contender(name)
    def _(p: Problem, form=form):
        operator = form(p, p.args["scale"])
        return lambda: operator.adjoint(p.y)


@forward.contender("deepinv")
def _(p: Problem):
    physics = _deepinv(p)
    return lambda: physics.A(p.x)


@adjoint.contender("deepinv")
def _(p: Problem):
    physics = _deepinv(p)
    return lambda: physics.A_adjoint(p.y)
