"""Block compressive sensing in plain PyTorch: the definition that every other implementation must match.

An image is cut into B x B blocks from the upper left, zero-padded at the right and at the bottom, and each
block, row-major as a vector of B*B values, is multiplied by the same matrix Phi (m, B*B).
Accumulation is in Phi's dtype (fp32, or fp64); results carry the dtype of the image or measurement passed in.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lorun_fast.reference._step_size import per_channel


def to_blocks(x: Tensor, block_size: int) -> Tensor:
    """(N, 1, H, W) -> (N, ceil(H/B), ceil(W/B), B*B), zero-padded at the right and at the bottom."""
    n, _, h, w = x.shape
    b = block_size
    x = F.pad(x[:, 0], (0, -w % b, 0, -h % b))
    rows, cols = x.shape[1] // b, x.shape[2] // b
    return x.reshape(n, rows, b, cols, b).permute(0, 1, 3, 2, 4).reshape(n, rows, cols, b * b)


def from_blocks(blocks: Tensor, block_size: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`to_blocks`, cropped to (N, 1, height, width)."""
    n, rows, cols, _ = blocks.shape
    b = block_size
    x = blocks.reshape(n, rows, cols, b, b).permute(0, 1, 3, 2, 4).reshape(n, 1, rows * b, cols * b)
    return x[:, :, :height, :width].contiguous()


def block_cs(x: Tensor, phi: Tensor, block_size: int) -> Tensor:
    """y = Phi x. x (N, 1, H, W), phi (m, B*B) -> (N, m, ceil(H/B), ceil(W/B))."""
    y = to_blocks(x.to(phi.dtype), block_size) @ phi.mT
    return y.permute(0, 3, 1, 2).contiguous().to(x.dtype)


def block_cs_adjoint(y: Tensor, phi: Tensor, block_size: int, height: int, width: int) -> Tensor:
    """x = Phi^T y, cropped. y (N, m, rows, cols) -> (N, 1, height, width)."""
    blocks = y.to(phi.dtype).permute(0, 2, 3, 1) @ phi
    return from_blocks(blocks, block_size, height, width).to(y.dtype)


def block_cs_step(x: Tensor, y: Tensor, phi: Tensor, rho: Tensor, block_size: int) -> Tensor:
    """z = x - rho * Phi^T (Phi x - y). rho (1,) or (N, 1)."""
    wide = x.to(phi.dtype)
    residual = block_cs(wide, phi, block_size) - y
    gradient = block_cs_adjoint(residual, phi, block_size, x.shape[2], x.shape[3])
    return (wide - per_channel(rho) * gradient).to(x.dtype)


def block_cs_step_residual(x: Tensor, y: Tensor, phi: Tensor, rho: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The step, and the residual Phi x - y in phi's dtype."""
    residual = (block_cs(x.to(phi.dtype), phi, block_size) - y).contiguous()
    return block_cs_step(x, y, phi, rho, block_size), residual


def block_cs_grad_phi(x: Tensor, y: Tensor, block_size: int) -> Tensor:
    """Sum over samples and blocks of y_block (outer) x_block: the gradient of <Phi x, y> for Phi, (m, B*B)."""
    blocks = to_blocks(x.to(y.dtype), block_size).flatten(0, 2)
    return y.permute(0, 2, 3, 1).flatten(0, 2).mT @ blocks
