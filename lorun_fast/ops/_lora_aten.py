"""The "aten" backend of the LoRA layers: merge, then torch's own convolution or product.

What it does beyond the definition: one convolution per distinct stage of a batch on the CPU, no gradient of the
whole weight where the factors' own are cheaper, and activations in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorun_fast.adapters import merged_weight
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.reference import lora as reference

aten = torch.ops.aten

_IN_PLACE = {
    None: lambda y: y,
    "relu": torch.relu_,
    "leaky_relu": lambda y: torch.nn.functional.leaky_relu_(y, 0.01),
    "gelu": torch.nn.functional.gelu,
    "silu": lambda y: torch.nn.functional.silu(y, inplace=True),
}


def _merge(weight: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool, dtype: torch.dtype) -> Tensor:
    return merged_weight(weight, down, up, scale, transposed=transposed).to(dtype)


def _finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    y = _IN_PLACE[activation](y)
    return y if residual is None else y.add_(residual)


def _groups(stage: Tensor) -> list[tuple[int, Tensor]]:
    """(stage, indices of its samples) for the distinct stages of a batch. Reads the stages: for the CPU."""
    return [(k, (stage == k).nonzero()[:, 0]) for k in stage.unique().tolist()]


def _by_stage(x: Tensor, stage: Tensor, one: Callable[[Tensor, int], Tensor]) -> Tensor:
    """one(samples, stage) for each distinct stage, put together in the batch's order."""
    groups = _groups(stage)
    if len(groups) == 1:
        return one(x, groups[0][0])
    y = None
    for k, index in groups:
        part = one(x[index], k)
        if y is None:
            y = torch.empty((x.shape[0], *part.shape[1:]), dtype=part.dtype, memory_format=_format(part))
        y[index] = part
    return one(x, 0) if y is None else y  # an empty batch has no stage


def _format(t: Tensor) -> torch.memory_format:
    last = t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def conv2d(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    if stage is not None and x.device.type != "cpu":
        # The distinct stages are not known without waiting for the device: one grouped convolution.
        return reference.lora_conv2d(
            x, weight, bias, down, up, scale=scale, stage=stage, stride=stride, padding=padding, dilation=dilation,
            groups=groups, activation=activation, residual=residual, transposed=transposed,
            output_padding=output_padding,
        )  # fmt: skip
    bias = None if bias is None else bias.to(x.dtype)

    def one(samples: Tensor, k: int | None) -> Tensor:
        d, u = (down, up) if k is None else (down[k], up[k])
        w = _merge(weight, d, u, scale, transposed, x.dtype)
        return aten.convolution(samples, w, bias, stride, padding, dilation, transposed, output_padding, groups)

    y = one(x, None) if stage is None else _by_stage(x, stage, one)
    return _finish(y, activation, residual)


# On the CPU in fp32 the weight gradient of a channels_last convolution takes 2 to 2.5 times that of a contiguous one on
# large images, copies included, and the same on small ones (32 and 64 channels; 256 against 12 to 96 pixels a side).
_LARGE_IMAGE = 2**15


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    large = x.shape[2] * x.shape[3] >= _LARGE_IMAGE
    if large and x.device.type == "cpu" and x.dtype == torch.float32:
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    return aten.convolution_backward(grad, x, weight, None, *geometry, [False, True, False])[1]


_POINTWISE = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def _over_pixels(a: Tensor, b: Tensor) -> Tensor:
    """sum_nhw a[n, i, h, w] b[n, j, h, w], without a copy in either layout."""
    if is_channels_last(a):
        return a.permute(0, 2, 3, 1).reshape(-1, a.shape[1]).mT @ b.permute(0, 2, 3, 1).reshape(-1, b.shape[1])
    return torch.bmm(a.flatten(2), b.flatten(2).mT).sum(0)


def _conv2d_backward_one(
    grad, x, weight, down, up, scale, stride, padding, dilation, groups, transposed, output_padding, mask
):
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    factors = mask[3] or mask[4]
    low_rank = factors and down.ndim == 4 and not mask[1]
    whole = mask[1] or (factors and not low_rank)
    found: list[Tensor | None] = [None] * 5
    # The factors first: what they need for a while is gone before x's gradient is there.
    if low_rank:
        # conv(x, dW) = up applied to t = conv(x, down): r channels stand for out of them.
        narrow_down, narrow_up = down.to(x.dtype), up.to(x.dtype)
        if mask[3]:
            s = aten.convolution(grad, narrow_up.mT.contiguous()[:, :, None, None], None, *_POINTWISE)
            grad_down = aten.convolution_backward(s, x, narrow_down, None, *geometry, [False, True, False])[1]
            found[3] = scale * grad_down.to(down.dtype)
            del s
        if mask[4]:
            t = aten.convolution(x, narrow_down, None, *geometry)
            found[4] = scale * _over_pixels(grad, t).to(up.dtype)
            del t
    w = _merge(weight, down, up, scale, transposed, x.dtype) if mask[0] or whole else None
    if whole:
        grad_w = _weight_gradient(grad, x, w, geometry)
        found[3], found[4] = reference.to_factors(grad_w, weight, down, up, scale, transposed)
        found[1] = grad_w.to(weight.dtype)
    if mask[0]:
        found[0] = aten.convolution_backward(grad, x, w, None, *geometry, [True, False, False])[0]
    return found


def conv2d_backward(
    grad, x, weight, bias, down, up, stage, output, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding, mask,
):  # fmt: skip
    if stage is not None and x.device.type != "cpu":
        return reference.lora_conv2d_backward(
            grad, x, weight, bias, down, up, stage, output, scale, stride, padding, dilation, groups, activation,
            transposed, output_padding, mask,
        )  # fmt: skip
    rest = (scale, stride, padding, dilation, groups, transposed, output_padding)
    if activation is not None:
        if output is None:
            output = conv2d(x, weight, bias, down, up, stage, None, *rest[:5], None, *rest[5:])
        grad = reference.activation_backward(grad, activation, output)
    if stage is None:
        found = _conv2d_backward_one(grad, x, weight, down, up, *rest, mask)
    else:
        found = _sum_stages(grad, x, weight, down, up, stage, mask, _conv2d_backward_one, rest)
    if mask[2]:
        found[2] = grad.sum((0, 2, 3)).to(bias.dtype)
    return [found[i] for i in range(5) if mask[i]]


def _sum_stages(grad, x, weight, down, up, stage, mask, one, rest) -> list[Tensor | None]:
    """The gradients of a batch from those of each distinct stage's samples."""
    found = [
        torch.empty_like(x) if mask[0] else None,
        torch.zeros_like(weight) if mask[1] else None,
        None,
        torch.zeros_like(down) if mask[3] else None,
        torch.zeros_like(up) if mask[4] else None,
    ]
    for k, index in _groups(stage):
        part = one(grad[index], x[index], weight, down[k], up[k], *rest, mask)
        if mask[0]:
            found[0][index] = part[0]
        if mask[1]:
            found[1] += part[1]
        if mask[3]:
            found[3][k] = part[3]
        if mask[4]:
            found[4][k] = part[4]
    return found


def linear(x, weight, bias, down, up, stage, residual, scale, activation):
    if stage is not None and x.device.type != "cpu":
        return reference.lora_linear(
            x, weight, bias, down, up, scale=scale, stage=stage, activation=activation, residual=residual
        )
    bias = None if bias is None else bias.to(x.dtype)

    def one(samples: Tensor, k: int | None) -> Tensor:
        d, u = (down, up) if k is None else (down[k], up[k])
        return torch.nn.functional.linear(samples, _merge(weight, d, u, scale, False, x.dtype), bias)

    y = one(x, None) if stage is None else _by_stage(x, stage, one)
    return _finish(y, activation, residual)


def _linear_backward_one(grad, x, weight, down, up, scale, mask):
    rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    found: list[Tensor | None] = [None] * 5
    if mask[0]:
        found[0] = grad @ _merge(weight, down, up, scale, False, x.dtype)
    if mask[1]:
        grad_w = rows.mT @ columns
        found[1] = grad_w.to(weight.dtype)
        found[3], found[4] = reference.to_factors(grad_w, weight, down, up, scale)
        return found
    narrow_down, narrow_up = down.to(x.dtype), up.to(x.dtype)
    if mask[3]:
        found[3] = scale * ((rows @ narrow_up).mT @ columns).to(down.dtype)
    if mask[4]:
        found[4] = scale * (rows.mT @ (columns @ narrow_down.mT)).to(up.dtype)
    return found


def linear_backward(grad, x, weight, bias, down, up, stage, output, scale, activation, mask):
    if stage is not None and x.device.type != "cpu":
        return reference.lora_linear_backward(grad, x, weight, bias, down, up, stage, output, scale, activation, mask)
    if activation is not None:
        if output is None:
            output = linear(x, weight, bias, down, up, stage, None, scale, None)
        grad = reference.activation_backward(grad, activation, output)
    if stage is None:
        found = _linear_backward_one(grad, x, weight, down, up, scale, mask)
    else:
        found = _sum_stages(grad, x, weight, down, up, stage, mask, _linear_backward_one, (scale,))
    if mask[2]:
        found[2] = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
    return [found[i] for i in range(5) if mask[i]]
