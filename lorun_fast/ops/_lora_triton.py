"""The "triton" backend of the LoRA layers: lorun_fast.kernels on CUDA.

Nothing here imports Triton until a call is served. A backend says why it cannot run (``missing``) or serve one call
(``supports``); what it serves follows the table of each op, or LORUN_BACKEND=triton.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from lorun_fast.kernels import unavailable
from lorun_fast.ops import _backends, _lora_aten
from lorun_fast.ops._backends import Backend

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _missing() -> str | None:
    return unavailable() or None


def _tf32() -> bool:
    """Whether fp32 products may round: PyTorch's switch for matrix products, which is off unless asked for."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


_HERE = contextlib.nullcontext()


def _on(x: Tensor):
    """Makes x's GPU the current one, which it mostly is; the interpreter runs on the CPU."""
    return _HERE if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)


def _dtypes_reason(*tensors: Tensor | None) -> str | None:
    for t in tensors:
        if t is not None and t.dtype not in _DTYPES:
            return f"no kernel for {t.dtype}"
    return None


def _conv_reason(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
) -> str | None:  # fmt: skip
    if transposed:
        return "no kernel for transposed convolutions"
    if groups != 1:
        return f"no kernel for groups={groups}"
    if not x.numel():
        return "no kernel for empty images"
    if max(x[0].numel(), weight.shape[0] * x.shape[2] * x.shape[3]) >= 2**31:
        return "one image has 2^31 elements or more"
    return _dtypes_reason(x, weight, bias, down, up, residual)


def _is_peft(down: Tensor, stage: Tensor | None) -> bool:
    return down.ndim - (stage is not None) == 4


def _merged(weight: Tensor, down: Tensor, up: Tensor, scale: float, stage: Tensor | None, dtype) -> Tensor:
    """(K, ...) merged weights if stage is a tensor, else (...); tap-major, as the kernels read them."""
    from lorun_fast.kernels import lora_merge
    from lorun_fast.reference.lora import empty_merged

    lead = () if stage is None else (down.shape[0],)
    downs, ups = (down, up) if lead else (down[None], up[None])
    out = empty_merged(weight, ups.shape[0], dtype, True)
    lora_merge.forward([weight], [downs], [ups], [scale], [out])
    return out if lead else out[0]


def _beside(x: Tensor, stage: Tensor | None) -> Tensor | None:
    """stage where the kernels can read it: callers may give stages that lie on the CPU."""
    return None if stage is None else stage.to(x.device)


def _operands(x, weight, down, up, stage, scale):
    """(weight, down, up) for the kernels: the loralib form is merged first, one small launch."""
    if down is None:
        return weight.to(x.dtype), None, None
    if _is_peft(down, stage):
        return weight, down, up
    return _merged(weight, down, up, scale, stage, x.dtype), None, None


def conv2d(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    from lorun_fast.kernels import lora_conv2d

    with _on(x):
        weight, down, up = _operands(x, weight, down, up, stage, scale)
        return lora_conv2d.forward(
            x, weight, bias, down, up, scale=scale, stage=_beside(x, stage), stride=tuple(stride),
            padding=tuple(padding), dilation=tuple(dilation), activation=activation, residual=residual, tf32=_tf32(),
        )  # fmt: skip


def conv2d_backward(
    grad, x, weight, bias, down, up, stage, output, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding, mask,
):  # fmt: skip
    whole = down is None  # then the kernels give the weight's gradient where they give the merged one's otherwise
    if mask[1] and not whole:
        return _lora_aten.conv2d_backward(
            grad, x, weight, bias, down, up, stage, output, scale, stride, padding, dilation, groups, activation,
            transposed, output_padding, mask,
        )  # fmt: skip
    from lorun_fast.kernels import lora_conv2d_backward
    from lorun_fast.reference.lora import to_factors

    with _on(x):
        base, kernel_down, kernel_up = _operands(x, weight, down, up, stage, scale)
        dx, d_down, d_up, d_bias = lora_conv2d_backward.backward(
            grad, x, base, bias, kernel_down, kernel_up, scale=scale, stage=_beside(x, stage), stride=tuple(stride),
            padding=tuple(padding), dilation=tuple(dilation), activation=activation, output=output,
            need=(mask[0], mask[1] or mask[3] or mask[4], mask[2]), tf32=_tf32(),
        )  # fmt: skip
    d_weight = None
    if d_down is not None and whole:
        d_weight = d_down.to(weight.dtype)
    elif d_down is not None and kernel_down is None:
        d_down, d_up = to_factors(d_down, weight, down, up, scale)
    found = (dx, d_weight, d_bias, d_down, d_up)
    return [found[i] for i in range(5) if mask[i]]


def _linear_reason(x, weight, bias, down, up, stage, residual, scale, activation) -> str | None:
    if not x.numel():
        return "no kernel for empty inputs"
    if x.numel() // x.shape[-1] * max(x.shape[-1], weight.shape[0]) >= 2**31:
        return "the input or the result has 2^31 elements or more"
    return _dtypes_reason(x, weight, bias, down, up, residual)


def linear(x, weight, bias, down, up, stage, residual, scale, activation):
    from lorun_fast.kernels import lora_linear

    with _on(x):
        return lora_linear.forward(
            x, weight, bias, down, up, scale=scale, stage=_beside(x, stage), activation=activation, residual=residual,
            tf32=_tf32(),
        )  # fmt: skip


def linear_backward(grad, x, weight, bias, down, up, stage, output, scale, activation, mask):
    if mask[1]:
        return _lora_aten.linear_backward(grad, x, weight, bias, down, up, stage, output, scale, activation, mask)
    from lorun_fast.kernels import lora_linear

    with _on(x):
        dx, d_down, d_up, d_bias = lora_linear.backward(
            grad, x, weight, bias, down, up, scale=scale, stage=_beside(x, stage), activation=activation, output=output,
            need=(mask[0], mask[3] or mask[4], mask[2]), tf32=_tf32(),
        )  # fmt: skip
    found = (dx, None, d_bias, d_down, d_up)
    return [found[i] for i in range(5) if mask[i]]


def _merge_reason(weights, downs, ups, scales, transposed, dtype, channels_last) -> str | None:
    for weight, down, up, flipped in zip(weights, downs, ups, transposed, strict=True):
        if flipped and down.ndim == 5:
            return "no kernel for the peft form of transposed convolutions"
        reason = _dtypes_reason(weight, down, up)
        if reason:
            return reason
    return None if dtype is None or dtype in _DTYPES else f"no kernel for {dtype}"


def merge(weights, downs, ups, scales, transposed, dtype, channels_last):
    from lorun_fast.kernels import lora_merge
    from lorun_fast.reference.lora import empty_merged

    outs = [
        empty_merged(w, u.shape[0], w.dtype if dtype is None else dtype, channels_last)
        for w, u in zip(weights, ups, strict=True)
    ]
    with _on(weights[0]):
        lora_merge.forward(weights, downs, ups, scales, outs)
    return outs


# The tables of the three ops say where this backend goes first; LORUN_BACKEND=triton puts it before them.
for _op, _backend in {
    "lora_conv2d": Backend("triton", ("cuda",), conv2d, conv2d_backward, _missing, _conv_reason),
    "lora_linear": Backend("triton", ("cuda",), linear, linear_backward, _missing, _linear_reason),
    "lora_merge": Backend("triton", ("cuda",), merge, None, _missing, _merge_reason),
}.items():
    _backends.register(_op, _backend)
