"""Convolution with a weight packed for matrix tiles, in plain PyTorch, and its gradients, written out.

A kernel's row covers kernel * in values that lie next to each other with channels innermost: K of a matrix product.
The packed weight is (blocks of 16 channels, kernel rows * steps of 32 values, 16 pairs of values, 16 channels * 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.adapters import merged_weight
from lorun_fast.reference._wide import wide

DEPTH, CHANNELS = 32, 16


def packed_shape(out: int, channels: int, kernel: int) -> tuple[int, int, int, int]:
    """Of the packed weight."""
    return (-(-out // CHANNELS), kernel * -(-kernel * channels // DEPTH), DEPTH // 2, 2 * CHANNELS)


def packed_weight(
    weight: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    adjoint: bool = False,
) -> Tensor:
    """W0 + scale * dW (out, in, k, k) packed, zeros where a tile is not full. adjoint: of the convolution's transpose.

    Formed in fp32 (fp64 for fp64 weights) and rounded once, to dtype or the weight's.
    """
    dtype = dtype or weight.dtype
    if down is not None:
        weight = merged_weight(wide(weight), down, up, scale)
    weight = weight.to(dtype)
    if adjoint:
        weight = weight.flip(2, 3).transpose(0, 1)
    out, channels, kernel, _ = weight.shape
    blocks, steps, _, _ = packed_shape(out, channels, kernel)
    values = weight.permute(2, 3, 1, 0).reshape(kernel, kernel * channels, out)
    values = F.pad(values, (0, blocks * CHANNELS - out, 0, steps // kernel * DEPTH - kernel * channels))
    pairs = values.reshape(steps, DEPTH // 2, 2, blocks, CHANNELS)
    return pairs.permute(3, 0, 1, 4, 2).reshape(blocks, steps, DEPTH // 2, 2 * CHANNELS).contiguous()


def unpacked_weight(packed: Tensor, out: int, channels: int, kernel: int, adjoint: bool = False) -> Tensor:
    """(out, in, k, k) of a packed weight, with ``out`` and ``channels`` those of the convolution that it is of."""
    blocks, steps = packed.shape[:2]
    values = packed.reshape(blocks, steps, DEPTH // 2, CHANNELS, 2).permute(1, 2, 4, 0, 3)
    values = values.reshape(kernel, steps // kernel * DEPTH, blocks * CHANNELS)[:, : kernel * channels, :out]
    weight = values.reshape(kernel, kernel, channels, out).permute(3, 2, 0, 1)
    return weight.transpose(0, 1).flip(2, 3) if adjoint else weight


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: int,
    kernel: int,
    stride: int,
    padding: int,
    shuffle: int,
    relu: bool,
    gate: Tensor | None = None,
) -> Tensor:
    """act(conv(x) + bias) + residual, sums in fp32 and one rounding. Channels innermost.

    shuffle: s > 1 takes the ``out`` channels as (row, column, channel) of s x s cells of the result.
    gate: zeros where its values are not positive, as the gradient of a ReLU that gave them.
    """
    w = unpacked_weight(weight, out, x.shape[1], kernel)
    y = F.conv2d(wide(x), wide(w), bias, stride, padding)
    if shuffle > 1:
        n, _, height, width = y.shape
        cells = y.reshape(n, shuffle, shuffle, -1, height, width).permute(0, 3, 4, 1, 5, 2)
        y = cells.reshape(n, -1, height * shuffle, width * shuffle)
    if relu:
        y = F.relu(y)
    if gate is not None:
        y = torch.where(gate <= 0, 0, y)
    if residual is not None:
        y = y + wide(residual)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def packed_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, out: int, kernel: int, stride: int, padding: int, shuffle: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, the packed weight and the bias of the convolution alone."""
    if shuffle > 1:
        n, _, height, width = grad.shape
        cells = grad.reshape(n, -1, height // shuffle, shuffle, width // shuffle, shuffle)
        grad = cells.permute(0, 3, 5, 1, 2, 4).reshape(n, out, height // shuffle, width // shuffle)
    w = unpacked_weight(weight, out, x.shape[1], kernel)
    grad = wide(grad)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, wide(x), wide(w), None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return grad_x.to(x.dtype), packed_weight(grad_weight.to(weight.dtype)), grad.sum((0, 2, 3))


def packed_block(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    residual: Tensor | None,
    middle: int,
) -> Tensor:
    """x + conv(relu(conv(x) + first_bias)) + second_bias + residual, 3 x 3, ``middle`` channels between."""
    y = packed_conv2d(x, first, first_bias, None, middle, 3, 1, 1, 1, True)
    added = wide(x) if residual is None else wide(x) + wide(residual)
    y = packed_conv2d(wide(y), wide(second), second_bias, added, x.shape[1], 3, 1, 1, 1, False)
    return y.to(x.dtype)
