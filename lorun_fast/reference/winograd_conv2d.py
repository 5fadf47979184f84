"""3x3 convolution by minimal filtering F(4x4, 3x3) in plain PyTorch, and its gradients, written out.

Winograd's algorithm as Lavin and Gray give it (arXiv 1509.09308): of every 4 x 4 tile of the result,

    y = A^T (sum over channels of U * B^T d B) A,    U = G w G^T,

with the 6 x 6 tile d of the image around it. Points 0, 1, -1, 2, -2 and infinity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.reference._wide import wide

TILE, SPAN, POINTS = 4, 6, 36

# Rows: A^T, B^T and G.
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def _matrix(rows: tuple, like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def winograd_weight(weight: Tensor, adjoint: bool = False) -> Tensor:
    """U of (out, in, 3, 3), as (36, in, out): in float64, rounded once. adjoint: of the convolution's transpose."""
    if adjoint:
        weight = weight.flip(2, 3).transpose(0, 1)
    out, channels = weight.shape[:2]
    exact = weight.double().permute(2, 3, 1, 0)
    g = _matrix(_G, exact)
    rows = (g @ exact.reshape(3, -1)).reshape(SPAN, 3, -1)
    return (g @ rows).reshape(POINTS, channels, out).to(wide(weight).dtype)


def winograd_weight_backward(grad: Tensor, adjoint: bool = False) -> Tensor:
    """The gradient for the weight (out, in, 3, 3) from that of U, (36, in, out)."""
    _, channels, out = grad.shape
    exact = grad.double().reshape(SPAN, SPAN, channels, out)
    g = _matrix(_G, exact)
    found = torch.einsum("ia,ijco,jb->ocab", g, exact, g).to(grad.dtype)
    return found.transpose(0, 1).flip(2, 3) if adjoint else found


def _cells(length: int) -> int:
    return -(-length // TILE)


def _image_points(x: Tensor) -> Tensor:
    """B^T d B of every tile, (6, 6, N, in, tile rows, tile columns)."""
    rows, columns = _cells(x.shape[2]), _cells(x.shape[3])
    padded = F.pad(x, (1, TILE * columns + 1 - x.shape[3], 1, TILE * rows + 1 - x.shape[2]))
    b = _matrix(_B, x)
    return torch.einsum("ia,ncrsab,jb->ijncrs", b, padded.unfold(2, SPAN, TILE).unfold(3, SPAN, TILE), b)


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, residual: Tensor | None) -> Tensor:
    """act(conv(x) + bias) + residual of x (N, in, H, W), with U = ``weight`` (36, in, out). Channels innermost.

    16 bits are computed in fp32 and rounded once.
    """
    points = weight.reshape(SPAN, SPAN, *weight.shape[1:])
    products = torch.einsum("ijncrs,ijco->ijnors", _image_points(wide(x)), points)
    a = _matrix(_A, products)
    y = torch.einsum("ai,ijnors,bj->nrasbo", a, products, a)
    y = y.flatten(3, 4).flatten(1, 2)[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)
    if bias is not None:
        y = y + bias[:, None, None]
    if relu:
        y = F.relu(y)
    if residual is not None:
        y = y + residual
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def winograd_block(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """x + conv(relu(conv(x) + first_bias)) + second_bias + residual."""
    added = wide(x) if residual is None else wide(x) + residual
    return winograd_conv2d(winograd_conv2d(x, first, first_bias, True, None), second, second_bias, False, added)


def _gradient_points(grad: Tensor) -> Tensor:
    """A g A^T of every tile, (6, 6, N, out, tile rows, tile columns)."""
    height, width = grad.shape[2:]
    rows, columns = _cells(height), _cells(width)
    whole = F.pad(grad, (0, TILE * columns - width, 0, TILE * rows - height))
    a = _matrix(_A, grad)
    tiles = whole.unflatten(3, (columns, TILE)).unflatten(2, (rows, TILE))
    return torch.einsum("ai,norasb,bj->ijnors", a, tiles, a)


def _points_gradient(grad_points: Tensor, x: Tensor) -> Tensor:
    """The gradient of U, (36, in, out)."""
    return torch.einsum("ijncrs,ijnors->ijco", _image_points(x), grad_points).flatten(0, 1)


def winograd_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of w, (out, in, 3, 3), of a convolution of x whose result has this gradient; out lies innermost."""
    points = _points_gradient(_gradient_points(wide(grad)), wide(x))
    return winograd_weight_backward(points).permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def winograd_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for x and U of the convolution alone."""
    height, width = x.shape[2:]
    rows, columns = _cells(height), _cells(width)
    products = _gradient_points(wide(grad))
    b = _matrix(_B, products)
    grad_weight = _points_gradient(products, wide(x))
    points = torch.einsum("ijnors,ijco->ijncrs", products, weight.reshape(SPAN, SPAN, *weight.shape[1:]))
    overlapping = torch.einsum("ia,ijncrs,jb->ncabrs", b, points, b)
    size = (TILE * rows + 2, TILE * columns + 2)
    grad_x = F.fold(overlapping.flatten(4).flatten(1, 3), size, SPAN, stride=TILE)
    return grad_x[:, :, 1 : height + 1, 1 : width + 1].to(x.dtype), grad_weight
