"""The gradients of a convolution's low-rank factors, stride 1, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from lorun_fast.reference._wide import wide
from lorun_fast.reference.packed_weight_gradient import packed_weight_gradient


def _over_pixels(a: Tensor, b: Tensor) -> Tensor:
    """sum_nhw a[n, i, h, w] b[n, j, h, w]."""
    return torch.einsum("nihw,njhw->ij", a, b)


def _mixed(image: Tensor, factor: Tensor) -> Tensor:
    """Every pixel's channels times a matrix: (N, j, H, W) from (N, i, H, W) and (i, j)."""
    return torch.einsum("nihw,ij->njhw", image, factor)


def packed_factor_gradients(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Gradients of down (r, in, k, k) and up (out, r) of y = conv(x, W + up . down) from y's, ``grad``.

    In fp32, or fp64 beside fp64.
    """
    grad, x, down, up = (wide(t) for t in (grad, x, down, up))
    s, t = _mixed(grad, up), conv2d(x, down, padding=padding)
    return packed_weight_gradient(s, x, down.shape[2], padding), _over_pixels(grad, t)


def packed_factor_gradients_backward(
    of_down: Tensor, of_up: Tensor, grad: Tensor, x: Tensor, down: Tensor, up: Tensor, padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for ``grad``, ``x``, ``down`` and ``up`` from those of both results."""
    grad, x, down, up = (wide(t) for t in (grad, x, down, up))
    s, t = _mixed(grad, up), conv2d(x, down, padding=padding)
    for_s, for_t = conv2d(x, of_down, padding=padding), _mixed(grad, of_up)
    return (
        _mixed(for_s, up.mT) + _mixed(t, of_up.mT),
        conv_transpose2d(s, of_down, padding=padding) + conv_transpose2d(for_t, down, padding=padding),
        packed_weight_gradient(for_t, x, down.shape[2], padding),
        _over_pixels(grad, for_s),
    )
