"""The exact proximal step of blur and downsampling in real arithmetic, by matrices of cosines and sines.

For programs that go where there is no FFT and no complex number; elsewhere reference/blur_downsample_fft.py is faster.
A and A^T are direct sums. A A^T is a circular convolution on y's grid by a symmetric kernel: its eigenvalues are real,
and the transforms around the division are products with two matrices a side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorun_fast.reference._step_size import per_channel
from lorun_fast.reference.blur_downsample import blur_downsample, blur_downsample_adjoint


def _waves(frequencies: Tensor, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi f p / length, (frequencies, positions)."""
    # Turns are taken off while the products are whole numbers: fp32 would round the angles of large images.
    products = frequencies[:, None] * positions
    angles = (products % products.new_full((), length)).to(dtype) * (2 * math.pi) / length
    return angles.cos(), angles.sin()


def _half(length: int, device: torch.device) -> Tensor:
    """The frequencies that tell a real line's others."""
    return torch.arange(length // 2 + 1, device=device)


def gram_spectrum(kernel: Tensor, scale: int, size: tuple[int, int]) -> Tensor:
    """The eigenvalues of A A^T where y is of ``size``: (1 or N, 1, h, w // 2 + 1).

    The mean of the kernel's power at the s*s frequencies of the image that sampling makes one.
    """
    kernel = kernel[None] if kernel.ndim == 2 else kernel
    (h, w), (kh, kw) = size, kernel.shape[1:]
    copies = w * torch.arange(scale, device=kernel.device)[:, None]
    frequencies = torch.arange(scale * h, device=kernel.device), (copies + _half(w, kernel.device)).flatten()
    taps = (torch.arange(k, device=kernel.device) for k in (kh, kw))
    (cos_h, sin_h), (cos_w, sin_w) = (
        _waves(f, u, scale * length, kernel.dtype) for f, u, length in zip(frequencies, taps, (h, w), strict=True)
    )
    even, odd = kernel @ cos_w.mT, kernel @ sin_w.mT
    power = (cos_h @ even - sin_h @ odd).square() + (sin_h @ even + cos_h @ odd).square()
    return power.reshape(-1, scale, h, scale, w // 2 + 1).mean((1, 3))[:, None]


def divide(t: Tensor, spectrum: Tensor) -> Tensor:
    """F^-1 (F t / spectrum) of t (N, C, h, w) and a real spectrum (1 or N, 1 or C, h, w // 2 + 1)."""
    h, w = t.shape[2:]
    rows, half = torch.arange(h, device=t.device), _half(w, t.device)
    cos_h, sin_h = _waves(rows, rows, h, t.dtype)
    cos_w, sin_w = _waves(half, torch.arange(w, device=t.device), w, t.dtype)
    even, odd = t @ cos_w.mT, t @ sin_w.mT
    real = (cos_h @ even - sin_h @ odd) / spectrum
    imaginary = (sin_h @ even + cos_h @ odd) / spectrum  # of the conjugate
    # The other half's frequencies add the same, except those that are their own mirror image.
    twice = torch.where((half == 0) | (2 * half == w), 1, 2).to(t.dtype)[:, None] / (h * w)
    even, odd = (cos_h @ real + sin_h @ imaginary), (cos_h @ imaginary - sin_h @ real)
    return even @ (twice * cos_w) + odd @ (twice * sin_w)


def blur_downsample_prox(x: Tensor, y: Tensor, kernel: Tensor, mu: Tensor, scale: int) -> Tensor:
    """As reference/blur_downsample_fft.py's."""
    n, c, _, _ = x.shape
    if n * c == 0:
        return x.new_empty(x.shape)
    wide = x.to(kernel.dtype)
    residual = y - blur_downsample(wide, kernel, scale)
    spectrum = gram_spectrum(kernel, scale, y.shape[2:]) + per_channel(mu)
    return (wide + blur_downsample_adjoint(divide(residual, spectrum), kernel, scale)).to(x.dtype).contiguous()
