"""Single-disperser CASSI in plain PyTorch: the definition that every other implementation must match.

A coded aperture multiplies each band of x (N, L, H, W), a disperser moves band c by c*step columns to the right,
and the detector adds the bands up:

    y[n, i, j] = sum_c mask_c[i, j - c*step] * x[n, c, i, j - c*step]        y (N, H, W + step*(L-1))

The mask is (H, W), the same for all bands, or (L, H, W); or each sample has its own, (N, 1, H, W) or (N, L, H, W).
Accumulation is in the mask's dtype (fp32, or fp64); results carry the dtype of the image or measurement passed in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.reference._step_size import per_channel


def cassi(x: Tensor, mask: Tensor, step: int) -> Tensor:
    """y = Phi x. x (N, L, H, W) -> (N, H, W + step*(L-1))."""
    n, bands, height, width = x.shape
    coded = x.to(mask.dtype) * mask
    y = coded.new_zeros((n, height, width + step * (bands - 1)))
    for c in range(bands):
        y[..., c * step : c * step + width] += coded[:, c]
    return y.to(x.dtype)


def cassi_adjoint(y: Tensor, mask: Tensor, bands: int, step: int) -> Tensor:
    """x = Phi^T y. y (N, H, W + step*(L-1)) -> (N, L, H, W)."""
    width = mask.shape[-1]
    wide = y.to(mask.dtype)
    x = torch.stack([wide[..., c * step : c * step + width] for c in range(bands)], 1)
    return (x * mask).contiguous().to(y.dtype)


def cassi_step(
    x: Tensor, y: Tensor | None, mask: Tensor, rho: Tensor, weight: Tensor | None, step: int, keep_residual: bool
) -> tuple[Tensor, Tensor]:
    """z = x - rho * Phi^T (weight * (Phi x - y)), and the residual Phi x - y.

    y: None stands for zeros. rho: (1,), (N, 1) or (N, L). weight: (1 or N, H, W + step*(L-1)); None stands for ones.
    Returns z in x's dtype, and the residual in the mask's, or an empty tensor (0,) unless ``keep_residual``.
    """
    wide = x.to(mask.dtype)
    residual = cassi(wide, mask, step)
    if y is not None:
        residual = residual - y
    weighted = residual if weight is None else weight * residual
    z = wide - per_channel(rho) * cassi_adjoint(weighted, mask, x.shape[1], step)
    return z.contiguous().to(x.dtype), residual if keep_residual else residual.new_empty((0,))


def cassi_prox_weight(mask: Tensor, mu: Tensor, bands: int, step: int) -> Tensor:
    """1 / (mu + Phi_s), Phi_s = sum_c mask_c^2 the diagonal of Phi Phi^T, its zeros set to 1. mu (N,) -> (N, H, W')."""
    as_image = mask.expand(*mask.shape[:-3], bands, *mask.shape[-2:])
    diagonal = cassi(as_image if mask.ndim == 4 else as_image[None], mask, step)
    return 1 / (mu[:, None, None] + torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal))


def cassi_grad_mask(x: Tensor, y: Tensor, step: int, per_band: bool, per_sample: bool = False) -> Tensor:
    """The gradient of <Phi x, y> for the mask, in y's dtype and the mask's shape.

    (H, W), summed over samples and bands; per_band (L, H, W); per_sample (N, 1, H, W); both (N, L, H, W).
    """
    bands, width = x.shape[1], x.shape[3]
    windows = torch.stack([y[..., c * step : c * step + width] for c in range(bands)], 1)
    grad = (x.to(y.dtype) * windows).contiguous()
    if not per_sample:
        grad = grad.sum(0)
    return grad if per_band else grad.sum(-3, keepdim=per_sample)
