"""The "aten" backend of the LoRA layers on a GPU, differentiable as it stands: one product merges, torch convolves.

A node of the graph that is a Python function takes a GPU's host longer than all of a small layer: 690 us for a forward
and backward pass that launches nothing, beside 155 of a bare convolution's own (H200, torch 2.11; the engine's thread
has to wake up and wait for the interpreter). Here every node is torch's, also where the forward pass is a kernel's.
Beside the op in ops/lora_conv2d.py, which this stands for where one stage serves a call, a pass saves x and the merged
weight, and GELU and SiLU what they are applied to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorun_fast import _native
from lorun_fast.adapters import merged_weight
from lorun_fast.ops import _backends, fused_conv2d
from lorun_fast.ops._checks import as_dtype
from lorun_fast.ops._direct import transforms_active
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.reference.lora import epilogue

DEVICES = ("cuda",)
# Values of a batch from which the kernel's gain on the GPU is worth its launch from Python.
_LARGE_BATCH = 2**25
_PLAIN = (Tensor, torch.nn.Parameter)
_CONVOLUTION, _RELU = torch.ops.aten.convolution.default, torch.ops.aten.relu_.default


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
    """The dtype to compute in: autocast's where it is on. The meta device has none."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool) -> Tensor:
    """W0 + scale * dW in the weight's dtype, formed in fp32 (fp64); (K, ...) for stacked factors."""
    if torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            return _merge(weight, down, up, scale, transposed)
    return _merge(weight, down, up, scale, transposed)


def _merge(weight: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool) -> Tensor:
    peft = down.ndim - up.ndim == 2
    if not weight.dtype == down.dtype == up.dtype or (peft and transposed):
        return merged_weight(weight, down, up, scale, transposed=transposed)
    # A product in 16 bits is summed in fp32, the base added, and rounded once.
    last, stacked = peft and is_channels_last(weight), up.ndim == 3
    if last:
        weight, down = weight.permute(0, 2, 3, 1), down.permute(*((0, 1, 3, 4, 2) if stacked else (0, 2, 3, 1)))
    shape = weight.shape
    rows, factor = weight.reshape(up.shape[-2], -1), down.flatten(-3) if peft else down
    if stacked:
        out = torch.baddbmm(rows.expand(up.shape[0], -1, -1), up, factor, alpha=scale).view(-1, *shape)
    else:
        out = torch.addmm(rows, up, factor, alpha=scale).view(shape)
    if last:
        return out.permute(*((0, 1, 4, 2, 3) if stacked else (0, 3, 1, 2)))
    return out


def _operands(x: Tensor, weight, bias, down, up, scale: float, transposed: bool) -> tuple[Tensor | None, ...]:
    """(x, the merged weight, bias) in the dtype to compute in."""
    dtype = narrowed(x)
    if down is not None:
        weight = merge(weight, down, up, scale, transposed)
    if bias is not None:
        bias = as_dtype(bias, dtype)
    return as_dtype(x, dtype), as_dtype(weight, dtype), bias


class _Kernel(TorchDispatchMode):
    """On while torch convolves x: the value is act(conv(x, weight) + bias) in one pass by one of our kernels.

    A mode is asked below autograd, which has recorded torch's own node by then. Its gradients are torch's too: the
    kernels' of 64 channels take 710 us, cuDNN's 350.
    """

    def __init__(self, x: Tensor, activation: str | None):
        self.x, self.y, self.activation = x, None, activation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap __torch_dispatch__; nothing is compiled while the mode is on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _CONVOLUTION and args[0] is self.x:
            self.y = _by_kernel(*args[:6], self.activation)
            return self.y
        if func is _RELU and args[0] is self.y:
            return self.y  # the kernel applied it
        return func(*args, **(kwargs or {}))  # of hooks for saved tensors


def _by_kernel(x, weight, bias, stride, padding, dilation, activation) -> Tensor:
    if tuple(stride) == tuple(padding) == tuple(dilation) == (1, 1) and fused_conv2d.serves(x, weight):
        return torch.ops.lorun_fast.fused_conv2d.default(x, weight, bias, None, activation == "relu")
    call = (x, weight, bias, None, None, None, None, 1.0, stride, padding, dilation, 1, activation, False, None)
    return _backends.BACKENDS["lora_conv2d"]["triton"].forward(*call)


def _kernel_pays(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, activation: str | None) -> bool:
    """Whether a kernel is to compute act(conv(x, weight) + bias).

    On an H200, 16 x 256 x 256 px in bf16, 64 channels: 165 us (Triton's 240) where cuDNN and a pass for the bias take
    340, cuDNN and ReLU 236; 32 channels 64 us where cuDNN alone takes 98.
    """
    if x.numel() < _LARGE_BATCH or groups != 1 or activation not in (None, "relu"):
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or not is_channels_last(x):
        return False
    if bias is None and activation is None and max(weight.shape[:2]) > 32:
        return False
    if torch.compiler.is_compiling() or transforms_active() or _native.WISH != "auto":
        return False
    # Other modes, and subclasses, are to see the convolution.
    if torch._C._len_torch_dispatch_stack() or type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return False
    indexed = max(weight.shape[:2]) * x.shape[2] * x.shape[3] < 2**31
    return indexed and _backends.BACKENDS["lora_conv2d"]["triton"].missing() is None


def _recorded(x, weight, bias, stride, padding, dilation, activation: str | None) -> Tensor:
    """act(conv(x, weight) + bias) by the kernel, its graph nodes torch's; act is ReLU or nothing."""
    learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (learns and torch.is_grad_enabled()):
        return _by_kernel(x, weight, bias, stride, padding, dilation, activation)
    # Not by "with", which keeps flags of the whole process that threads would leave on for one another.
    torch._C._push_on_torch_dispatch_stack(_Kernel(x, activation))
    try:
        y = torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), 1)
        return y if activation is None else torch.relu_(y)
    finally:
        torch._C._pop_torch_dispatch_stack(None)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, stage: None,
    residual: Tensor | None, scale: float, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, activation: str | None, transposed: bool, output_padding: Sequence[int],
) -> Tensor:  # fmt: skip
    """Arguments of the op lora_conv2d."""
    x, weight, bias = _operands(x, weight, bias, down, up, scale, transposed)
    if transposed:
        y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    elif _kernel_pays(x, weight, bias, groups, activation):
        y, activation = _recorded(x, weight, bias, stride, padding, dilation, activation), None
    else:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y if activation is residual is None else epilogue(y, activation, residual)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, stage: None, residual: Tensor | None,
    scale: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """Arguments of the op lora_linear."""
    x, weight, bias = _operands(x, weight, bias, down, up, scale, False)
    return epilogue(F.linear(x, weight, bias), activation, residual)
