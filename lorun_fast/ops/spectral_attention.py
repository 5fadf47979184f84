"""Attention across the channels of an image, and the ReLU of a feed-forward part beside it, as one op.

Definition: reference/spectral_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.ops._checks import (
    as_dtype,
    check_image,
    check_same_device,
    check_tensor,
    parameter_dtype,
    shape_of,
    whole,
)
from lorun_fast.ops._library import define
from lorun_fast.reference import spectral_attention as reference


def _check(qkv: Tensor, temperature: Tensor, hidden: int) -> None:
    layout = f"(N, pixels, 3 C + {hidden})"
    check_image("qkv", qkv, 3, layout)
    if temperature.ndim != 1 or temperature.shape[0] < 1:
        raise ValueError(f"temperature: expected (heads,), got shape {shape_of(temperature)}")
    if temperature.dtype != parameter_dtype(qkv.dtype):
        raise TypeError(
            f"temperature: expected {parameter_dtype(qkv.dtype)} for qkv in {qkv.dtype}, got {temperature.dtype}"
        )
    heads = temperature.shape[0]
    if hidden < 0 or qkv.shape[2] <= hidden or (qkv.shape[2] - hidden) % (3 * heads):
        raise ValueError(f"qkv: expected {layout} with C a multiple of {heads} heads, got shape {shape_of(qkv)}")
    check_same_device(("qkv", qkv), ("temperature", temperature))


def _fake(qkv, temperature, hidden):
    _check(qkv, temperature, hidden)
    return qkv.new_empty((*qkv.shape[:2], (qkv.shape[2] - hidden) // 3 + hidden))


def _fake_backward(grad, qkv, temperature, hidden):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(temperature)


def _setup(ctx, inputs, output):
    qkv, temperature, ctx.hidden = inputs
    ctx.save_for_backward(qkv, temperature)


def _backward(ctx, grad):
    of_qkv, of_temperature = _backward_op(grad, *ctx.saved_tensors, ctx.hidden)
    needed = ctx.needs_input_grad
    return of_qkv if needed[0] else None, of_temperature if needed[1] else None, None


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.hidden = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_backward(ctx, for_qkv, for_temperature):
    """By autograd of the definition: seldom wanted, and then with what else is plain PyTorch."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        found = reference.spectral_attention_backward(*leaves, ctx.hidden)
    gradients = torch.autograd.grad(found, leaves, (for_qkv, for_temperature))
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)), None)


def _products(qkv, temperature, hidden) -> int:
    """Operations of one product of all pixels with a matrix for each head."""
    n, pixels, width = qkv
    channels = (width - hidden) // 3
    return 2 * n * pixels * channels * (channels // temperature[0])


def _flops(qkv, temperature, hidden, **_) -> int:
    return 2 * _products(qkv, temperature, hidden)


def _backward_flops(grad, qkv, temperature, hidden, **_) -> int:
    return 4 * _products(qkv, temperature, hidden)


_op = define(
    "spectral_attention(Tensor qkv, Tensor temperature, int hidden) -> Tensor",
    reference=reference.spectral_attention,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    direct=True,
    flops=_flops,
)
_backward_op = define(
    "spectral_attention_backward(Tensor grad, Tensor qkv, Tensor temperature, int hidden) -> (Tensor, Tensor)",
    reference=reference.spectral_attention_backward,
    fake=_fake_backward,
    backward=_backward_of_backward,
    setup_context=_setup_backward,
    direct=True,
    flops=_backward_flops,
)


def spectral_attention(qkv: Tensor, temperature: Tensor, *, hidden: int = 0) -> Tensor:
    """Attention across the channels of an image: every channel becomes a mixture of those of its head.

    qkv: (N, pixels, 3 C + hidden), dense without a copy: q, k and v, C channels each in heads of equal size, and
        ``hidden`` more. temperature: (heads,) or (heads, 1, 1).
    Returns (N, pixels, C + hidden) in qkv's dtype: A v with A = softmax_j(temperature * cos(q_i, k_j)), the cosine of
    channels i and j of one head over all pixels, then the ReLU of the hidden values, as a feed-forward layer beside the
    attention takes it. With hidden = 0 it is the attention of Restormer (arXiv 2111.09881), and with q and k exchanged
    that of MST (2111.07910), whose cost is linear in the number of pixels. Sums in fp32 (fp64 for fp64).
    On a CPU one op, whose gradient is another, differentiable once more; on a GPU, and in an exported program, torch's
    own ops. Raises ValueError or TypeError naming the argument that does not fit.
    """
    check_tensor("qkv", qkv)
    check_tensor("temperature", temperature)
    if not temperature.is_floating_point():
        raise TypeError(f"temperature: expected floating-point values, got {temperature.dtype}")
    temperature = as_dtype(temperature, parameter_dtype(qkv.dtype)).flatten()
    hidden = whole("hidden", hidden, 0)
    _check(qkv, temperature, hidden)
    if qkv.device.type != "cpu" or torch.compiler.is_exporting():  # a program may go where this package is not
        return reference.spectral_attention(qkv, temperature, hidden)
    return _op(qkv, temperature, hidden)
