"""Numbers as tensors of one element, made once: on CUDA that saves an allocation and a kernel at every call."""

from __future__ import annotations

import torch
from torch import Tensor

# So many, of 512 bytes each on CUDA, and then from the beginning.
MOST = 64
_KEPT: dict[tuple, Tensor] = {}

_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


def _make(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device=device)


def _records(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.full((1,), value), not to be written to: the same tensor for the same value where that is safe.

    Raises TypeError for what is no number.
    """
    # Tracing, modes and transforms want to see a tensor being made, or make one of their own kind. Zero has two signs,
    # which compare equal.
    if (
        torch.compiler.is_compiling()
        or type(value) not in (float, int)
        or not value
        or _functorch_active()
        or _dispatch_modes()
    ):
        return _make(value, dtype, device)
    if device.type == "cpu":
        place = None
    elif device.type == "cuda":
        # What fills it runs on the current stream, so only this stream is sure to find it filled. A stream that records
        # a graph makes its own: it lies in the graph's memory and is filled at replay. (Stream 0 records none.)
        place = device.index, torch._C._cuda_getCurrentRawStream(device.index)
        if place[1] and _records(device):
            return _make(value, dtype, device)
    else:
        return _make(value, dtype, device)
    key = value, dtype, place
    kept = _KEPT.get(key)
    if kept is not None:
        return kept
    # Under inference mode too an ordinary tensor: a later call may save it for its backward pass.
    with torch.inference_mode(False):
        made = _make(value, dtype, device)
    if len(_KEPT) >= MOST:
        _KEPT.clear()
    # Of two threads' tensors one is kept, and no NaN, which would never be found.
    return _KEPT.setdefault(key, made) if value == value else made
