"""The blur and downsample ops through the real FFT: the better choice for large kernels, on any device.

Split the image into its s*s phases x_ab = x[a::s, b::s]. Each measurement sums s*s circular convolutions on the small
grid, so with one small FFT per phase

    F y = sum_ab K_ab F x_ab,    F x_ab = conj(K_ab) F y for the adjoint,    F A A^T F^-1 = diag(sum_ab |K_ab|^2),

and nothing is folded or thrown away. conj(K_ab) is the transform of the phases of A^T delta, the kernel laid around
pixel (0, 0). Arguments and results as in reference/blur_downsample.py.

conj_physical throughout: in an op that runs below AOTDispatcher, torch 2.13 takes a lazily conjugated tensor for a
plain one, and the result is silently wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fft import irfft2, rfft2

from lorun_fast.reference._step_size import per_channel


def _split(x: Tensor, scale: int) -> Tensor:
    """(N, C, H, W) -> (N, C, s*s, H/s, W/s), the phases."""
    if scale == 1:
        return x[:, :, None]
    return F.pixel_unshuffle(x, scale).unflatten(1, (x.shape[1], scale * scale))


def _join(phases: Tensor, scale: int) -> Tensor:
    """The inverse of :func:`_split`."""
    return F.pixel_shuffle(phases.flatten(1, 2), scale) if scale > 1 else phases[:, :, 0]


def wrap(t: Tensor, origin: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Sums the periods of ``t`` over its last two dimensions; t[..., 0, 0] lies at pixel -origin of the period."""
    for dim, start, length in ((-2, origin[0], size[0]), (-1, origin[1], size[1])):
        t = t.movedim(dim, -1)
        before = -start % length
        t = F.pad(t, (before, -(t.shape[-1] + before) % length)).unflatten(-1, (-1, length)).sum(-2)
        t = t.movedim(-1, dim)
    return t.contiguous()


def transfer(kernel: Tensor, scale: int, size: tuple[int, int]) -> Tensor:
    """K_ab on the grid of an image of ``size``: (1 or N, 1, s*s, H/s, W/(2s) + 1), complex."""
    kernel = kernel[None] if kernel.ndim == 2 else kernel
    kh, kw = kernel.shape[-2:]
    around = wrap(kernel.flip(1, 2), (kh - 1 - kh // 2, kw - 1 - kw // 2), size)
    return rfft2(_split(around[:, None], scale)).conj_physical()


def gram_spectrum(kernel: Tensor, scale: int, size: tuple[int, int]) -> Tensor:
    """The eigenvalues of A A^T on images of ``size``: (1 or N, 1, H/s, W/(2s) + 1), one half-plane of frequencies."""
    return transfer(kernel, scale, size).abs().square().sum(2)


def blur_downsample_fft(x: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """y = A x."""
    n, c, h, w = x.shape
    size = (h // scale, w // scale)
    if n * c == 0:
        return x.new_empty((n, c, *size))
    spectrum = (transfer(kernel, scale, (h, w)) * rfft2(_split(x.to(kernel.dtype), scale))).sum(2)
    return irfft2(spectrum, s=size).to(x.dtype).contiguous()


def blur_downsample_fft_adjoint(y: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """x = A^T y."""
    n, c, h, w = y.shape
    if n * c == 0:
        return y.new_empty((n, c, h * scale, w * scale))
    spectrum = transfer(kernel, scale, (h * scale, w * scale)).conj_physical() * rfft2(y.to(kernel.dtype))[:, :, None]
    return _join(irfft2(spectrum, s=(h, w)), scale).to(y.dtype)


def blur_downsample_fft_descend(x: Tensor, residual: Tensor, kernel: Tensor, rho: Tensor, scale: int) -> Tensor:
    """x - rho * A^T residual."""
    gradient = blur_downsample_fft_adjoint(residual, kernel, scale)
    return (x.to(kernel.dtype) - per_channel(rho) * gradient).to(x.dtype).contiguous()


def blur_downsample_fft_step(x: Tensor, y: Tensor, kernel: Tensor, rho: Tensor, scale: int) -> Tensor:
    """x - rho * A^T (A x - y); the residual stays in the Fourier domain."""
    n, c, h, w = x.shape
    if n * c == 0:
        return x.new_empty(x.shape)
    k = transfer(kernel, scale, (h, w))
    wide = x.to(kernel.dtype)
    residual = (k * rfft2(_split(wide, scale))).sum(2, keepdim=True) - rfft2(y)[:, :, None]
    gradient = _join(irfft2(k.conj_physical() * residual, s=(h // scale, w // scale)), scale)
    return (wide - per_channel(rho) * gradient).to(x.dtype).contiguous()


def blur_downsample_fft_grad_kernel(x: Tensor, y: Tensor, kh: int, kw: int, scale: int, per_sample: bool) -> Tensor:
    """The gradient of <A x, y> for the kernel: the correlation of each phase with y, read where the kernel lies."""
    n, c, h, w = y.shape
    if n * c == 0:
        return y.new_zeros((n, kh, kw) if per_sample else (kh, kw))
    spectrum = rfft2(_split(x.to(y.dtype), scale)) * rfft2(y)[:, :, None].conj_physical()
    spectrum = spectrum.sum(1, keepdim=True) if per_sample else spectrum.sum((0, 1), keepdim=True)
    around = _join(irfft2(spectrum, s=(h, w)), scale)[:, 0]
    for dim, k in ((1, kh), (2, kw)):
        offsets = k // 2 - torch.arange(k, device=y.device)
        around = around.index_select(dim, offsets % around.shape[dim])
    return around if per_sample else around[0]


def blur_downsample_prox(x: Tensor, y: Tensor, kernel: Tensor, mu: Tensor, scale: int) -> Tensor:
    """argmin_v ||A v - y||^2 / 2 + mu ||v - x||^2 / 2 = x + A^T (A A^T + mu)^-1 (y - A x). mu (1,) or (N, C).

    A A^T is a circular convolution on y's grid: its inverse is one division per frequency.
    """
    n, c, h, w = x.shape
    if n * c == 0:
        return x.new_empty(x.shape)
    k = transfer(kernel, scale, (h, w))
    wide = x.to(kernel.dtype)
    power = gram_spectrum(kernel, scale, (h, w))
    dual = (rfft2(y) - (k * rfft2(_split(wide, scale))).sum(2)) / (power + per_channel(mu))
    change = _join(irfft2(k.conj_physical() * dual[:, :, None], s=(h // scale, w // scale)), scale)
    return (wide + change).to(x.dtype).contiguous()
