"""Between channels outermost and channels innermost on a CPU, and to another dtype on the way.

torch copies value by value where strides differ. Definition: reference/relayout.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast import _native
from lorun_fast.ops._checks import STORAGE_DTYPES, check_image
from lorun_fast.ops._direct import transforms_active
from lorun_fast.ops._library import define
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.reference import relayout as reference

LEAST_CHANNELS = 8
"""Fewer are copied as fast by torch,"""
LEAST_VALUES = 2**15
"""and fewer values before the op has begun."""

_FORMATS = (torch.contiguous_format, torch.channels_last)


def _check(x: Tensor, dtype: torch.dtype) -> None:
    check_image("x", x, 4, "(N, C, H, W)")
    if dtype not in STORAGE_DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")


def _fake(x, channels_last, dtype):
    _check(x, dtype)
    n, channels, height, width = x.shape
    if channels_last:
        return x.new_empty((n, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    return x.new_empty(x.shape, dtype=dtype)


def _setup(ctx, inputs, output):
    x, ctx.channels_last, _ = inputs
    ctx.dtype = x.dtype


def _backward(ctx, grad):
    return relayout(grad, _FORMATS[not ctx.channels_last], ctx.dtype), None, None


_op = define(
    "relayout(Tensor x, bool channels_last, ScalarType dtype) -> Tensor",
    reference=reference.relayout,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
)


def _served(x: Tensor, last: bool, dtype: torch.dtype) -> bool:
    """Whether the op is to copy: values move, none of them twice, and nobody is to see through it."""
    return (
        not torch.compiler.is_compiling()
        and not transforms_active()
        and x.device.type == "cpu"
        and x.shape[1] >= LEAST_CHANNELS
        and x.numel() >= LEAST_VALUES
        and (x.is_contiguous() if last else is_channels_last(x))
        and (x.dtype == dtype or (torch.float32 in (x.dtype, dtype) and torch.float64 not in (x.dtype, dtype)))
        and _native.available()
    )


def relayout(x: Tensor, memory_format: torch.memory_format, dtype: torch.dtype | None = None) -> Tensor:
    """``x.to(dtype).contiguous(memory_format=memory_format)``, on a CPU in a fraction of the time.

    x: (N, C, H, W), float32, float64, bfloat16 or float16. memory_format: torch.channels_last or
        torch.contiguous_format. dtype: x's own by default.
    Returns x itself where nothing changes. By C++ on a CPU from a dense image of 8 channels and 2^15 values or more in
    the one layout to the other, in its dtype or between fp32 and 16 bits; by torch elsewhere, where it is compiled and
    under torch.func. Differentiable; the gradient comes back in the other layout. Raises ValueError or TypeError naming
    the argument that does not fit.
    """
    dtype = x.dtype if dtype is None and isinstance(x, Tensor) else dtype
    if memory_format not in _FORMATS:
        raise ValueError(f"memory_format: expected {_FORMATS[1]} or {_FORMATS[0]}, got {memory_format!r}")
    _check(x, dtype)
    last = memory_format == torch.channels_last
    return _op(x, last, dtype) if _served(x, last, dtype) else x.to(dtype).contiguous(memory_format=memory_format)
