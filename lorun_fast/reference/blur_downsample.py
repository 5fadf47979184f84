"""Blur and downsample in plain PyTorch: the definition that every other implementation must match.

y[i, j] = sum_uv k[u, v] x[(i*s + kh//2 - u) mod H, (j*s + kw//2 - v) mod W]

A circular true convolution whose samples start at the upper left: scipy.ndimage.convolve(x, k, mode="wrap")[::s, ::s].
The kernel is (kh, kw) for the whole batch or (N, kh, kw), one per sample, in fp32 (fp64 beside fp64 images);
accumulation is in the kernel's dtype, results carry the dtype of the image or measurement passed in.
A is the operator on images of y's size times s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.reference._step_size import per_channel


def extend(x: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """The part of the periodic image that the strided, "valid" correlation with the flipped kernel reads."""
    for dim, k in ((2, kernel.shape[-2]), (3, kernel.shape[-1])):
        length = x.shape[dim]
        index = torch.arange(k // 2 - k + 1, length - scale + k // 2 + 1, device=x.device)
        x = x.index_select(dim, index % length)
    return x


def wrap(t: Tensor, origin: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Sums the periods of ``t`` over its last two dimensions; t[..., 0, 0] lies at pixel -origin of the period."""
    for dim, start, length in ((-2, origin[0], size[0]), (-1, origin[1], size[1])):
        t = t.movedim(dim, -1)
        before = -start % length
        t = F.pad(t, (before, -(t.shape[-1] + before) % length)).unflatten(-1, (-1, length)).sum(-2)
        t = t.movedim(-1, dim)
    return t.contiguous()


def _planes(t: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, int]:
    """(planes, weight, groups): what a convolution takes to blur each plane of ``t`` with its sample's kernel."""
    weight = kernel.flip(-2, -1)
    if kernel.ndim == 2:
        return t.flatten(0, 1)[:, None], weight[None, None], 1
    return t.flatten(0, 1)[None], weight.repeat_interleave(t.shape[1], 0)[:, None], t.shape[0] * t.shape[1]


def blur_downsample(x: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """y = A x. x (N, C, H, W) -> (N, C, H/s, W/s)."""
    n, c, h, w = x.shape
    if n * c == 0:
        return x.new_empty((n, c, h // scale, w // scale))
    planes, weight, groups = _planes(extend(x.to(kernel.dtype), kernel, scale), kernel)
    return F.conv2d(planes, weight, stride=scale, groups=groups).reshape(n, c, h // scale, w // scale).to(x.dtype)


def blur_downsample_adjoint(y: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """x = A^T y. y (N, C, h, w) -> (N, C, h*s, w*s)."""
    n, c, h, w = y.shape
    if n * c == 0:
        return y.new_empty((n, c, h * scale, w * scale))
    planes, weight, groups = _planes(y.to(kernel.dtype), kernel)
    spread = F.conv_transpose2d(planes, weight, stride=scale, groups=groups)
    kh, kw = kernel.shape[-2:]
    x = wrap(spread, (kh - 1 - kh // 2, kw - 1 - kw // 2), (h * scale, w * scale))
    return x.reshape(n, c, h * scale, w * scale).to(y.dtype)


def blur_downsample_descend(x: Tensor, residual: Tensor, kernel: Tensor, rho: Tensor, scale: int) -> Tensor:
    """x - rho * A^T residual. rho (1,) or (N, C)."""
    gradient = blur_downsample_adjoint(residual, kernel, scale)
    return (x.to(kernel.dtype) - per_channel(rho) * gradient).to(x.dtype).contiguous()


def blur_downsample_step(x: Tensor, y: Tensor, kernel: Tensor, rho: Tensor, scale: int) -> Tensor:
    """x - rho * A^T (A x - y). rho (1,) or (N, C)."""
    residual = blur_downsample(x.to(kernel.dtype), kernel, scale) - y
    return blur_downsample_descend(x, residual, kernel, rho, scale)


def blur_downsample_grad_kernel(x: Tensor, y: Tensor, kh: int, kw: int, scale: int, per_sample: bool) -> Tensor:
    """The gradient of <A x, y> for the kernel: sum_cij y[i, j] x[i*s + kh//2 - u, j*s + kw//2 - v], in y's dtype.

    Returns (N, kh, kw) if ``per_sample``, else their sum, (kh, kw).
    """
    n, c, h, _ = y.shape
    kernel = y.new_zeros((n, kh, kw))
    if n * c > 0:
        extended = extend(x.to(y.dtype), kernel, scale)
        for u in range(kh):
            lines = extended[:, :, u : u + (h - 1) * scale + 1 : scale].unfold(3, kw, scale)
            kernel[:, kh - 1 - u] = torch.einsum("ncijv,ncij->nv", lines, y).flip(1)
    return kernel if per_sample else kernel.sum(0)
