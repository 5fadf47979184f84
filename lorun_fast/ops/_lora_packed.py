"""The "packed" backend of lora_conv2d: bf16 convolutions of training by matrix tiles (AMX), on CPUs.

Forward pass and both gradients, as the "aten" backend arranges them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops import _lora_aten, lora_residual_block
from lorun_fast.ops._backends import Backend, register
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.ops.packed_conv2d import MAX_KERNEL, as_cells, block_op, conv_op, weight_op
from lorun_fast.ops.packed_factor_gradients import MAX_RANK, packed_factor_gradients
from lorun_fast.ops.packed_weight_gradient import gradient_op
from lorun_fast.reference.packed_conv2d import CHANNELS

aten = torch.ops.aten


def supports(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
) -> str | None:  # fmt: skip
    height, width = weight.shape[2:]
    if groups != 1 or height != width or height > MAX_KERNEL:
        return f"its kernel is square, at most {MAX_KERNEL} x {MAX_KERNEL}, of one group"
    if list(dilation) != [1, 1] or stride[0] != stride[1] or padding[0] != padding[1]:
        return "its dilation is 1, its strides and paddings are the same"
    if transposed and (not _in_cells(weight, stride, padding, output_padding) or not _can_spread(weight)):
        return f"a transposed kernel is its stride, without padding, with rows in multiples of {CHANNELS} channels"
    if x.dtype != torch.bfloat16 or not (is_channels_last(x) or x.shape[1] == 1):
        return "x is bfloat16 in channels_last, or of one channel"
    if not transposed and min(x.shape[2:]) + 2 * padding[0] < height:
        return "the kernel fits the image"
    return None


def _in_cells(weight: Tensor, stride, padding, output_padding) -> bool:
    """Whether a kernel is its stride: every pixel of the larger image then meets one of the smaller, once."""
    return stride[0] == weight.shape[2] > 1 and padding[0] == 0 and list(output_padding) == [0, 0]


def _whole(large: Tensor, size: int) -> bool:
    return all(length % size == 0 for length in large.shape[2:])


def _can_spread(weight: Tensor) -> bool:
    _, large, size, _ = weight.shape
    return size * large % CHANNELS == 0


# The ops themselves, below: what they would check of their arguments has been checked of the layer's.


def _convolved(
    x: Tensor, tiles: Tensor, bias: Tensor | None = None, *, out: int, kernel: int, stride: int = 1, padding: int = 0,
    shuffle: int = 1, activation: str | None = None, residual: Tensor | None = None, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return conv_op(x, tiles, bias, residual, out, kernel, stride, padding, shuffle, activation == "relu", gate)


def _tiles(
    weight: Tensor, down: Tensor | None = None, up: Tensor | None = None, scale: float = 1.0, adjoint: bool = False
) -> Tensor:
    """The merged weight, packed, in one call: a dozen of torch's would take a tenth of a layer's time."""
    return weight_op(weight, down, up, scale, torch.bfloat16, adjoint)


def _spread(small: Tensor, weight: Tensor, bias: Tensor | None = None, **finishing) -> Tensor:
    """The transposed convolution in cells with weight (small channels, large channels, s, s)."""
    size, cells = weight.shape[2], as_cells(weight)
    bias = None if bias is None else bias.repeat(size * size)
    return _convolved(small, _tiles(cells), bias, out=len(cells), kernel=1, shuffle=size, **finishing)


def _cell_gradient(small: Tensor, large: Tensor, size: int) -> Tensor:
    """Of a weight (small channels, large channels, s, s), from both images: a product for each row of a cell."""
    n, channels, height, width = large.shape
    rows = large.permute(0, 2, 3, 1).reshape(n, height // size, size, width // size, size * channels)
    found = [gradient_op(small, rows[:, :, a].permute(0, 3, 1, 2), 1, 0) for a in range(size)]
    return torch.stack(found, 1).view(-1, size, size, channels).permute(0, 3, 1, 2)


def conv2d(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    # The op adds in fp32: the bias stays as it is.
    bias = None if bias is None else bias.float()
    geometry = {"out": weight.shape[0], "kernel": weight.shape[2], "stride": stride[0], "padding": padding[0]}

    def convolve(samples: Tensor, layer: tuple, **finishing) -> Tensor:
        if transposed:
            return _spread(samples, _lora_aten.merge(*layer, True, x.dtype), bias, **finishing)
        return _convolved(samples, _tiles(*layer), bias, **geometry, **finishing)

    return _lora_aten.conv2d_by(convolve, x, weight, down, up, stage, residual, scale, activation)


def _convolution(x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    (stride, _), (padding, _), _, transposed, output_padding, _ = geometry
    if transposed:
        fits = _in_cells(weight, *geometry[:2], output_padding) and _can_spread(weight)
        return _spread(x, weight) if fits else _lora_aten.convolution(x, weight, geometry)
    out, _, kernel, _ = weight.shape
    return _convolved(x, _tiles(weight), out=out, kernel=kernel, stride=stride, padding=padding)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    (stride, _), (padding, _), _, transposed, output_padding, _ = geometry
    size = weight.shape[2]
    if _in_cells(weight, *geometry[:2], output_padding):
        small, large = (x, grad) if transposed else (grad, x)
        if _whole(large, size):
            return _cell_gradient(small, large, size)
    if stride != 1 or transposed:
        return _lora_aten.weight_gradient(grad, x, weight, geometry)
    return gradient_op(grad, x, size, padding)


def _factor_gradients(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, geometry: tuple):
    (stride, _), (padding, _), _, transposed, *_ = geometry
    if stride != 1 or transposed or down.shape[0] > MAX_RANK:
        return None
    return packed_factor_gradients(grad, x, down, up, padding=padding)


def _image_gradient(grad: Tensor, x: Tensor, layer: tuple, geometry: tuple) -> Tensor:
    (stride, _), (padding, _), _, transposed, output_padding, _ = geometry
    weight = layer[0]
    _, channels, kernel, _ = weight.shape
    around = kernel - 1 - padding
    if transposed:  # only in cells, see supports()
        tiles = _tiles(_lora_aten.merge(*layer, True, x.dtype))
        return _convolved(grad, tiles, out=len(weight), kernel=kernel, stride=stride)
    if _in_cells(weight, *geometry[:2], output_padding) and _can_spread(weight) and _whole(x, kernel):
        return _spread(grad, _lora_aten.merge(*layer, False, x.dtype))
    if stride != 1 or around < 0:
        return _lora_aten.image_gradient(grad, x, layer, geometry)
    return _convolved(grad, _tiles(*layer, adjoint=True), out=channels, kernel=kernel, padding=around)


def block_supports(*args) -> str | None:
    x, first, second, (stage, residual, *scales) = lora_residual_block.parts(args)
    if stage is not None or any(layer[0].shape[2:] != (3, 3) for layer in (first, second)):
        return "its kernels are 3 x 3, its batch of one stage"
    return supports(*lora_residual_block.calls(x, first, second, stage, residual, scales)[0])


def block(*args) -> Tensor:
    x, first, second, (_, residual, *scales) = lora_residual_block.parts(args)
    layers = zip((first, second), scales, strict=True)
    tiles = [_tiles(weight, down, up, scale) for (weight, _, down, up), scale in layers]
    biases = [None if bias is None else bias.float() for _, bias, *_ in (first, second)]
    residual = None if residual is None else residual.to(x.dtype)
    return block_op(x, tiles[0], biases[0], tiles[1], biases[1], residual, first[0].shape[0])


def _convolve(x: Tensor, layer: tuple, bias: Tensor | None = None, *, adjoint: bool = False, **finishing) -> Tensor:
    bias = None if bias is None else bias.float()
    out = layer[0].shape[1 if adjoint else 0]
    return _convolved(x, _tiles(*layer, adjoint=adjoint), bias, out=out, kernel=3, padding=1, **finishing)


def missing() -> str | None:
    if not _native.available():
        return _native.reason()
    return None if _native.has_tiles() else "this CPU has no AMX, or LORUN_CPU turns it off"


_WAY = _lora_aten.Way(_convolution, _image_gradient, _weight_gradient, _factor_gradients)
register(
    "lora_conv2d",
    Backend(
        "packed",
        ("cpu",),
        conv2d,
        partial(_lora_aten.conv2d_backward, forward=conv2d, way=_WAY),
        missing=missing,
        supports=supports,
    ),
)
register(
    "lora_residual_block",
    Backend(
        "packed",
        ("cpu",),
        block,
        lora_residual_block.backward_by(_convolve, _WAY, lambda x, *layer: layer),
        missing,
        block_supports,
    ),
)
