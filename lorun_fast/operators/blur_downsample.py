"""Blur with a known kernel and downsampling (super-resolution; deblurring at scale 1) as a module."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorun_fast.operators.base import SensingOperator, as_matrix, one_per_sample
from lorun_fast.ops import blur_downsample as ops
from lorun_fast.ops._checks import check_image, pair, parameter_dtype
from lorun_fast.reference._wide import without_autocast
from lorun_fast.reference.blur_downsample_fft import gram_spectrum


class BlurDownsample(SensingOperator):
    """y = A x: circular convolution with a kernel, of which every ``scale``-th row and column is kept.

    kernel: (kh, kw), or (N, kh, kw) for one per sample; fp32 or fp64 tensor or array. Its centre is
        (kh//2, kw//2), its size may be even and may exceed the image. It is used as it is: not normalised.
    scale: s, 1 or more; the sample that is kept is the upper left of each s x s cell.
    learn: make the kernel a trainable parameter instead of a buffer.
    method: "direct" (a sum over the kernel at the kept positions), "fft", or "auto", the faster by a shipped rule
        (docs/operators.md). They agree to rounding.

    Images are (N, C, H, W), H and W divisible by s; measurements (N, C, H/s, W/s). As
    scipy.ndimage.convolve(x, kernel, mode="wrap")[::s, ::s] of every plane; the usual forward model of
    super-resolution with a blur kernel (Zhang et al., "Deep unfolding network for image super-resolution", 2020).

    Raises ValueError for a kernel of another shape, or with NaN or infinite entries, and for a scale below 1.
    """

    task = "sr"

    def __init__(self, kernel: Tensor, scale: int = 1, *, learn: bool = False, method: str = "auto"):
        super().__init__()
        kernel = as_matrix("kernel", kernel, (2, 3))
        if hasattr(scale, "__index__"):
            scale = operator.index(scale)  # NumPy's whole numbers too
        ops.check_scale(scale)
        ops.check_method(method)
        self.scale, self.method = scale, method
        if learn:
            self.kernel = nn.Parameter(kernel.detach().clone().contiguous())
        else:
            self.register_buffer("kernel", kernel.contiguous())

    def extra_repr(self) -> str:
        kh, kw = self.kernel.shape[-2:]
        each = f", one per sample of {self.kernel.shape[0]}" if self.kernel.ndim == 3 else ""
        learned = ", learned" if isinstance(self.kernel, nn.Parameter) else ""
        return f"kernel={kh}x{kw}{each}{learned}, scale={self.scale}, method={self.method!r}"

    def config(self) -> dict:
        return {"scale": self.scale, "learn": isinstance(self.kernel, nn.Parameter), "method": self.method}

    @classmethod
    def from_config(cls, config: dict, state: dict[str, Tensor]) -> BlurDownsample:
        return cls(state["kernel"], config["scale"], learn=config["learn"], method=config["method"])

    def image_size(self, y: Tensor, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """y's size times s; a ``size`` that is given must be that."""
        check_image("y", y, 4, "(N, C, h, w)")
        own = (y.shape[-2] * self.scale, y.shape[-1] * self.scale)
        if size is not None and pair(size) != own:
            raise ValueError(f"size: expected {own} for y of shape {tuple(y.shape)} at scale {self.scale}, got {size}")
        return own

    def forward(self, x: Tensor) -> Tensor:
        return ops.blur_downsample(x, self._beside("kernel", x), scale=self.scale, method=self.method)

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None:
            self.image_size(y, size)
        return ops.blur_downsample_adjoint(y, self._beside("kernel", y), scale=self.scale, method=self.method)

    def gradient_step(self, x: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        return ops.blur_downsample_step(x, y, self._beside("kernel", x), rho, scale=self.scale, method=self.method)

    def prox(self, x: Tensor, y: Tensor, mu: float | Tensor) -> Tensor:
        """argmin_v ||A v - y||^2 / 2 + mu ||v - x||^2 / 2, exact, through the FFT (fp32, or fp64 beside fp64 images).

        mu: positive; a number, 0-d, (N,), or broadcastable to (N, C, 1, 1). Differentiable in x, y, mu and the kernel.
        """
        return ops.blur_downsample_prox(x, y, self._beside("kernel", x), one_per_sample(mu), scale=self.scale)

    def initial(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Bicubic upsampling by s (Keys, a = -1/2, circular as A is) onto the grid that A samples.

        A centred kernel blurs pixel p of the image around p, and measurement i keeps the blurred pixel i*s. So the
        start reads y at p/s for pixel p: y[i] stands at pixel i*s again. The usual resize, which aligns the
        corners of the pixels, reads y at (p + 1/2)/s - 1/2 instead; it puts y[i] at i*s + (s-1)/2, and needs a shift
        by (s-1)/2 pixels to undo that.
        """
        self.image_size(y, size)
        ops.check_kernel(self._beside("kernel", y), y.shape[0], y.dtype)
        with without_autocast(y):
            x = y.to(parameter_dtype(y.dtype))
            for dim in (2, 3):
                x = _upsample(x, self.scale, dim)
            return x.to(y.dtype)

    def norm(self, size: tuple[int, int] | None = None) -> Tensor:
        """The largest singular value of A on images of ``size`` = (H, W); without it, the largest over all sizes.

        A A^T is a circular convolution with r = the autocorrelation of the kernel at multiples of s, so its
        eigenvalues are samples of r's transform: at the image's frequencies, or over all frequencies, where the
        largest is searched on a grid and then refined around it. With one kernel per sample, the largest of them.
        """
        kernel = self.kernel.double()
        kernel = kernel[None] if kernel.ndim == 2 else kernel
        if size is not None:
            power = gram_spectrum(kernel, self.scale, tuple(size))
        else:
            power = _peak_power(kernel, self.scale)
        return power.amax().sqrt().to(self.kernel.dtype)


def _keys(t: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, a = -1/2, of -2 <= t <= 2: third-order accurate, interpolating."""
    t = t.abs()
    return torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)


def _upsample(y: Tensor, scale: int, dim: int) -> Tensor:
    """Reads y along ``dim`` at p/s for p = 0, 1, ...; circular."""
    taps = torch.stack([y.roll(-tap, dim) for tap in (-1, 0, 1, 2)], dim + 1)
    # Made on the device: a CUDA graph cannot record a copy from the host.
    at = torch.arange(scale, dtype=torch.float64, device=y.device) / scale
    weights = _keys(at[:, None] - torch.arange(-1, 3, device=y.device)).to(y.dtype)
    return torch.tensordot(taps, weights, ([dim + 1], [1])).movedim(-1, dim + 1).flatten(dim, dim + 1)


def _peak_power(kernel: Tensor, scale: int) -> Tensor:
    """max over all frequencies of sum_ab |K_ab|^2 for each of the kernels (N, kh, kw), (N,).

    K_ab are the transforms of the kernels' s*s phases. A grid of 8 points per tap finds the highest peak, and
    shrinking grids around the best point follow it to the top; the gradient is that of the value at the top.
    """
    kh, kw = kernel.shape[-2:]
    phases = F.pixel_unshuffle(F.pad(kernel, (0, -kw % scale, 0, -kh % scale))[:, None], scale)
    rows, cols = phases.shape[-2:]

    def power(w0: Tensor, w1: Tensor) -> Tensor:
        turn0 = torch.polar(torch.ones_like(w0), w0)[:, :, None] ** torch.arange(rows, device=w0.device)
        turn1 = torch.polar(torch.ones_like(w1), w1)[:, :, None] ** torch.arange(cols, device=w1.device)
        return (turn0[:, None] @ phases.to(turn0.dtype) @ turn1.mT[:, None]).abs().square().sum(1)

    with torch.no_grad():
        grid = (8 * rows, 8 * cols)
        best = torch.fft.rfft2(phases, s=grid).abs().square().sum(1).flatten(1).argmax(1)
        half = grid[1] // 2 + 1
        w0 = best // half * (2 * math.pi / grid[0])
        w1 = best % half * (2 * math.pi / grid[1])
        around = torch.linspace(-1, 1, 9, dtype=kernel.dtype, device=kernel.device)
        for zoom in range(12):
            near0 = w0[:, None] + around * (2 * math.pi / grid[0] / 3**zoom)
            near1 = w1[:, None] + around * (2 * math.pi / grid[1] / 3**zoom)
            best = power(near0, near1).flatten(1).argmax(1)
            w0 = near0.gather(1, (best // 9)[:, None])[:, 0]
            w1 = near1.gather(1, (best % 9)[:, None])[:, 0]
    return power(w0[:, None], w1[:, None])[:, 0, 0]
