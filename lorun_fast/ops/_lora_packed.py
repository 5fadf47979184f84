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
from lorun_fast.ops.packed_conv2d import MAX_KERNEL, packed_block, packed_conv2d, packed_weight, weight_op
from lorun_fast.ops.packed_factor_gradients import MAX_RANK, packed_factor_gradients
from lorun_fast.ops.packed_weight_gradient import packed_weight_gradient

aten = torch.ops.aten


def supports(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
) -> str | None:  # fmt: skip
    height, width = weight.shape[2:]
    if transposed or groups != 1 or height != width or height > MAX_KERNEL:
        return f"its kernel is square, at most {MAX_KERNEL} x {MAX_KERNEL}, not transposed, of one group"
    if list(dilation) != [1, 1] or stride[0] != stride[1] or padding[0] != padding[1]:
        return "its dilation is 1, its strides and paddings are the same"
    if x.dtype != torch.bfloat16 or not is_channels_last(x):
        return "x is bfloat16 in channels_last"
    if min(x.shape[2:]) + 2 * padding[0] < height:
        return "the kernel fits the image"
    return None


def _tiles(weight: Tensor, down: Tensor | None, up: Tensor | None, scale: float, adjoint: bool = False) -> Tensor:
    """The merged weight, packed, in one call: a dozen of torch's would take a tenth of a layer's time."""
    return weight_op(weight, down, up, scale, torch.bfloat16, adjoint)


def conv2d(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    # The op adds in fp32: the bias stays as it is.
    bias = None if bias is None else bias.float()
    geometry = {"out": weight.shape[0], "kernel": weight.shape[2], "stride": stride[0], "padding": padding[0]}

    def convolve(samples: Tensor, layer: tuple, **finishing) -> Tensor:
        return packed_conv2d(samples, _tiles(*layer), bias, **geometry, **finishing)

    return _lora_aten.conv2d_by(convolve, x, weight, down, up, stage, residual, scale, activation)


def _convolution(x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    (stride, _), (padding, _) = geometry[:2]
    out, _, kernel, _ = weight.shape
    return packed_conv2d(x, packed_weight(weight), out=out, kernel=kernel, stride=stride, padding=padding)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    stride, padding = geometry[0][0], geometry[1][0]
    if stride != 1:
        return _lora_aten.weight_gradient(grad, x, weight, geometry)
    return packed_weight_gradient(grad, x, kernel=weight.shape[2], padding=padding)


def _factor_gradients(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, geometry: tuple):
    stride, padding = geometry[0][0], geometry[1][0]
    if stride != 1 or down.shape[0] > MAX_RANK:
        return None
    return packed_factor_gradients(grad, x, down, up, padding=padding)


def _image_gradient(grad: Tensor, x: Tensor, layer: tuple, geometry: tuple) -> Tensor:
    stride, padding = geometry[0][0], geometry[1][0]
    _, channels, kernel, _ = layer[0].shape
    around = kernel - 1 - padding
    if stride != 1 or around < 0:
        return _lora_aten.image_gradient(grad, x, layer, geometry)
    return packed_conv2d(grad, _tiles(*layer, adjoint=True), out=channels, kernel=kernel, padding=around)


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
    return packed_block(
        x, *tiles, first_bias=biases[0], second_bias=biases[1], middle=first[0].shape[0],
        residual=None if residual is None else residual.to(x.dtype),
    )  # fmt: skip


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, adjoint: bool = False, **finishing) -> Tensor:
    bias = None if bias is None else bias.float()
    out, tiles = weight.shape[1 if adjoint else 0], packed_weight(weight, adjoint=adjoint)
    return packed_conv2d(x, tiles, bias, out=out, kernel=3, padding=1, **finishing)


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
    Backend("packed", ("cpu",), block, lora_residual_block.backward_by(_convolve, _WAY), missing, block_supports),
)
