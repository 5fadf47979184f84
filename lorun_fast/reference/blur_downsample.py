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


def _period(t: Tensor, dim: int, before: int, after: int) -> Tensor:
    """The periodic ``t`` from ``before`` its start to ``after`` its end; negative numbers take off."""
    length = t.shape[dim]
    index = torch.arange(-before, length + after, device=t.device)
    return t.index_select(dim, index % index.new_full((), length))  # a tensor: ONNX knows no remainder by a symbol


def extend(x: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """The part of the periodic image that the strided, "valid" correlation with the flipped kernel reads."""
    for dim, k in ((2, kernel.shape[-2]), (3, kernel.shape[-1])):
        x = _period(x, dim, k - 1 - k // 2, k // 2 + 1 - scale)
    return x


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
    # Every measurement of the periodic y that reaches the image, and where the image begins in what they spread to.
    periodic, starts, missing = y.to(kernel.dtype), [], []
    for dim, k in ((2, kernel.shape[-2]), (3, kernel.shape[-1])):
        origin = k - 1 - k // 2
        before, after = k // 2 // scale, (scale - 1 + origin) // scale
        periodic = _period(periodic, dim, before, after)
        starts.append(before * scale + origin)
        missing.append(max(0, origin + scale - after * scale - k))
    planes, weight, groups = _planes(periodic, kernel)
    x = F.conv_transpose2d(planes, weight, stride=scale, output_padding=missing, groups=groups)
    x = x.narrow(2, starts[0], h * scale).narrow(3, starts[1], w * scale)
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
        rows = []
        for u in reversed(range(kh)):
            lines = extended[:, :, u : u + (h - 1) * scale + 1 : scale].unfold(3, kw, scale)
            rows.append(torch.einsum("ncijv,ncij->nv", lines, y).flip(1))
        kernel = torch.stack(rows, 1)
    return kernel if per_sample else kernel.sum(0)
