"""The "aten" backend of the LoRA layers on a GPU, differentiable as it stands: one product merges, torch convolves.

A node of the graph that is a Python function takes a GPU's host longer than all of a small layer: 690 us for a forward
and backward pass that launches nothing, beside 155 of a bare convolution's own (H200, torch 2.11; the engine's thread
has to wake up and wait for the interpreter). Here every node is torch's. Beside the op in ops/lora_conv2d.py, which
this stands for where one stage serves a call, a pass saves x and the merged weight, and GELU and SiLU what they are
applied to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast import _native
from lorun_fast.adapters import merged_weight
from lorun_fast.ops import _backends
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.reference.lora import epilogue

DEVICES = ("cuda",)


def serves(op: str, args: tuple) -> bool:
    """Whether calls of a LoRA op with these arguments, whose sixth is the stage of each sample, go this way."""
    x, stage = args[0], args[5]
    device = x.device.type
    if device not in DEVICES or stage is not None:
        return False
    if torch.compiler.is_compiling():  # the compiler fuses them, and does not see through the table
        return _native.WISH in ("auto", "aten")
    return _backends.choose(op, device, args).name == "aten"


def narrowed(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool) -> Tensor:
    """W0 + scale * dW in the weight's dtype, formed in fp32 (fp64); (K, ...) for stacked factors."""
    with torch.autocast(weight.device.type, enabled=False):
        peft = down.ndim - up.ndim == 2
        if not weight.dtype == down.dtype == up.dtype or (peft and transposed):
            return merged_weight(weight, down, up, scale, transposed=transposed)
        # A product in 16 bits is summed in fp32, the base added, and rounded once.
        last = peft and is_channels_last(weight)
        if last:
            weight, down = weight.movedim(1, -1), down.movedim(-3, -1)
        shape = weight.shape
        rows, factor = weight.reshape(up.shape[-2], -1), down.flatten(-3) if peft else down
        if up.ndim == 3:
            out = torch.baddbmm(rows.expand(up.shape[0], -1, -1), up, factor, alpha=scale).view(-1, *shape)
        else:
            out = torch.addmm(rows, up, factor, alpha=scale).view(shape)
        return out.movedim(-1, -3) if last else out


def _operands(x: Tensor, weight, bias, down, up, scale: float, transposed: bool):
    dtype = narrowed(x)
    if down is not None:
        weight = merge(weight, down, up, scale, transposed)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, stage: None,
    residual: Tensor | None, scale: float, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, activation: str | None, transposed: bool, output_padding: Sequence[int],
) -> Tensor:  # fmt: skip
    """Arguments of the op lora_conv2d."""
    x, weight, bias = _operands(x, weight, bias, down, up, scale, transposed)
    if transposed:
        y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return epilogue(y, activation, residual)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, stage: None, residual: Tensor | None,
    scale: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """Arguments of the op lora_linear."""
    x, weight, bias = _operands(x, weight, bias, down, up, scale, False)
    return epilogue(F.linear(x, weight, bias), activation, residual)
