"""The "aten" backend of the LoRA layers: merge, then torch's own convolution or product.

What it does beyond the definition: one convolution per distinct stage of a batch on the CPU, no gradient of the
whole weight where the factors' own are cheaper, and activations in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorun_fast.adapters import merged_weight
from lorun_fast.ops.lora import innermost, is_channels_last, layout_of
from lorun_fast.reference import lora as reference

aten = torch.ops.aten

_IN_PLACE = {
    None: lambda y: y,
    "relu": torch.relu_,
    "leaky_relu": lambda y: torch.nn.functional.leaky_relu_(y, 0.01),
    "gelu": torch.nn.functional.gelu,
    "silu": lambda y: torch.nn.functional.silu(y, inplace=True),
}


def merge(
    weight: Tensor, down: Tensor | None, up: Tensor | None, scale: float, transposed: bool, dtype: torch.dtype
) -> Tensor:
    if down is None:
        return weight.to(dtype)
    return merged_weight(weight, down, up, scale, transposed=transposed).to(dtype)


def finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    y = _IN_PLACE[activation](y)
    return y if residual is None else y.add_(residual)


def _groups(stage: Tensor) -> list[tuple[int, Tensor]]:
    """(stage, indices of its samples) for the distinct stages of a batch. Reads the stages: for the CPU."""
    return [(k, (stage == k).nonzero()[:, 0]) for k in stage.unique().tolist()]


def by_stage(x: Tensor, stage: Tensor, one: Callable[[Tensor, int], Tensor]) -> Tensor:
    """one(samples, stage) for each distinct stage, put together in the batch's order."""
    groups = _groups(stage)
    if len(groups) == 1:
        return one(x, groups[0][0])
    y = None
    for k, index in groups:
        part = one(x[index], k)
        if y is None:
            like = {"dtype": part.dtype, "device": part.device, "memory_format": _format(part)}
            y = torch.empty((x.shape[0], *part.shape[1:]), **like)
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
    if layout_of(x, weight) == torch.channels_last:
        x = innermost(x)

    def one(samples: Tensor, k: int | None) -> Tensor:
        d, u = (down, up) if k is None else (down[k], up[k])
        w = merge(weight, d, u, scale, transposed, x.dtype)
        return aten.convolution(samples, w, bias, stride, padding, dilation, transposed, output_padding, groups)

    y = one(x, None) if stage is None else by_stage(x, stage, one)
    return finish(y, activation, residual)


def conv2d_by(convolve: Callable, x, weight, down, up, stage, residual, scale, activation):
    """The forward pass by an op that adds the bias, and applies ReLU and the residual before it rounds.

    convolve: takes samples and their layer, (weight, down, up, scale), and where the op is to finish the result
        activation and residual by name.
    """

    def one(samples: Tensor, k: int | None, **finishing) -> Tensor:
        factors = (down, up) if k is None else (down[k], up[k])
        return convolve(samples, (weight, *factors, scale), **finishing)

    if stage is None and activation in (None, "relu"):
        residual = None if residual is None else residual.to(x.dtype)
        return one(x, None, activation=activation, residual=residual)
    y = one(x, None) if stage is None else by_stage(x, stage, one)
    return finish(y, activation, residual)


# Channels innermost, fp32, on a CPU with AVX2: oneDNN's weight gradient takes 2 to 4 times that of these products on
# images of this many values and more (32 and 64 channels at 96 and 256 pixels a side), and about half on smaller ones.
# With AVX-512 it takes half on all of them, and as long with few channels on one side.
_LARGE_IMAGE = 2**18
_PRODUCTS_PAY = torch.backends.cpu.get_cpu_capability() != "AVX512"
# Values of the unfolded gradient at a time, to stay in L2.
_UNFOLDED = 2**18


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    """The gradient of conv(x, weight) for a weight of this shape."""
    stride, padding, dilation, transposed, _, groups = geometry
    products = (
        _PRODUCTS_PAY
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x[0].numel() >= _LARGE_IMAGE
        and is_channels_last(x)
        and not transposed
        and groups == 1
        and all(s == 1 for s in stride)
    )
    if products:
        return _weight_gradient_by_products(grad, x, weight.shape[2:], padding, dilation)
    if x.dtype == torch.bfloat16 and stride[-1] > 1 and grad.shape[-1] == 1 and x.device.type == "cpu":
        # oneDNN leaves this one unwritten where the image is narrower than its stride (torch 2.13).
        x, grad, weight = x.float(), grad.float(), weight.float()
    if weight.shape[0] == 1:  # whose stride may be any number, of which torch's convolution refuses some
        weight = torch.empty_like(weight, memory_format=_format(weight))
    return aten.convolution_backward(grad, x, weight, None, *geometry, [False, True, False])[1]


def _weight_gradient_by_products(grad: Tensor, x: Tensor, kernel, padding, dilation) -> Tensor:
    """Every pixel of x meets kh * kw shifted gradients: a matrix product over pixels, some rows at a time."""
    (kh, kw), (n, out, _, _), (channels, height, width) = kernel, grad.shape, x.shape[1:]
    above = dilation[0] * (kh - 1) - padding[0]
    left = dilation[1] * (kw - 1) - padding[1]
    padded = torch.nn.functional.pad(grad.permute(0, 2, 3, 1), (0, 0, left, left, above, above)).contiguous()
    by_sample, by_row, by_column, _ = padded.stride()
    # unfolded[n, h, w, p, q] = the gradient that tap (kh-1-p, kw-1-q) brings to x[n, h, w]
    unfolded = padded.as_strided(
        (n, height, width, kh, kw, out),
        (by_sample, by_row, by_column, dilation[0] * by_row, dilation[1] * by_column, 1),
    )
    taps = kh * kw * out
    rows = max(1, _UNFOLDED // (width * taps))
    found = x.new_zeros(taps, channels)
    pixels = x.permute(0, 2, 3, 1)
    for i in range(n):
        for top in range(0, height, rows):
            some = slice(top, top + rows)
            found.addmm_(unfolded[i, some].reshape(-1, taps).mT, pixels[i, some].reshape(-1, channels))
    return found.view(kh, kw, out, channels).flip(0, 1).permute(2, 3, 0, 1)


def image_gradient(grad: Tensor, x: Tensor, layer: tuple, geometry: tuple) -> Tensor:
    """The gradient of conv(x, W0 + scale * dW) for x. layer: (weight, down, up, scale)."""
    weight = merge(*layer, geometry[3], x.dtype)
    return aten.convolution_backward(grad, x, weight, None, *geometry, [True, False, False])[0]


def convolution(x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    return aten.convolution(x, weight, None, *geometry)


@dataclass(frozen=True)
class Way:
    """What the backward pass is made of: conv(x, weight), and its gradients for x and for the weight.

    Each takes the geometry of aten.convolution; the gradients get the result's gradient first. image_gradient takes
    the layer, (weight, down, up, scale), and merges it; weight_gradient looks at its weight's shape, dtype and layout
    alone. factor_gradients: those of down and up in one pass, (grad, x, down, up, geometry) in x's dtype; None, the
    function or its result: from the other two.
    """

    convolution: Callable[[Tensor, Tensor, tuple], Tensor] = convolution
    image_gradient: Callable[[Tensor, Tensor, tuple, tuple], Tensor] = image_gradient
    weight_gradient: Callable[[Tensor, Tensor, Tensor, tuple], Tensor] = weight_gradient
    factor_gradients: Callable[..., tuple[Tensor, Tensor] | None] | None = None


_POINTWISE = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def _over_pixels(a: Tensor, b: Tensor) -> Tensor:
    """sum_nhw a[n, i, h, w] b[n, j, h, w], without a copy in either layout."""
    if is_channels_last(a):
        # A product per image row, r by out: one over all pixels takes twice as long, and out by r ten times.
        narrow, wide = (t.permute(0, 2, 3, 1).flatten(0, 1) for t in (b, a))
        return torch.bmm(narrow.mT, wide).sum(0).mT
    return torch.bmm(a.flatten(2), b.flatten(2).mT).sum(0)


def _low_rank_gradients(grad, x, down, up, scale, geometry, mask, way) -> list[Tensor | None]:
    """Those of down and up that are wanted, through t = conv(x, down): r channels stand for out of them."""
    narrow_down, narrow_up = down.to(x.dtype), up.to(x.dtype)
    found: Sequence[Tensor | None] | None = None
    if all(mask) and way.factor_gradients is not None:
        found = way.factor_gradients(grad, x, narrow_down, narrow_up, geometry)
    if found is None:
        found = [None, None]
        if mask[0]:
            s = aten.convolution(grad, narrow_up.mT.contiguous()[:, :, None, None], None, *_POINTWISE)
            found[0] = way.weight_gradient(s, x, narrow_down, geometry)
            del s
        if mask[1]:
            found[1] = _over_pixels(grad, way.convolution(x, narrow_down, geometry))
    return [None if g is None else scale * g.to(t.dtype) for g, t in zip(found, (down, up), strict=True)]


def _conv2d_backward_one(
    grad, x, weight, down, up, scale, stride, padding, dilation, groups, transposed, output_padding, mask,
    way,
):  # fmt: skip
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    factors = mask[3] or mask[4]
    # On a GPU convolutions of r channels take longer than those of all of them.
    low_rank = factors and down.ndim == 4 and not mask[1] and x.device.type == "cpu"
    whole = mask[1] or (factors and not low_rank)
    found: list[Tensor | None] = [None] * 5
    # The factors first: what they need for a while is gone before x's gradient is there.
    if low_rank:
        found[3:] = _low_rank_gradients(grad, x, down, up, scale, geometry, mask[3:], way)
    if whole:
        grad_w = way.weight_gradient(grad, x, torch.empty_like(weight, dtype=x.dtype), geometry)
        if factors:
            found[3], found[4] = reference.to_factors(grad_w, weight, down, up, scale, transposed)
        if mask[1]:
            found[1] = grad_w.to(weight.dtype)
    if mask[0]:
        found[0] = way.image_gradient(grad, x, (weight, down, up, scale), geometry)
    return found


def conv2d_backward(
    grad, x, weight, bias, down, up, stage, output, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding, mask, *, forward=conv2d, way=Way(),
):  # fmt: skip
    """forward: what repeats the forward pass. way: what the rest is made of."""
    if stage is not None and x.device.type != "cpu":
        return reference.lora_conv2d_backward(
            grad, x, weight, bias, down, up, stage, output, scale, stride, padding, dilation, groups, activation,
            transposed, output_padding, mask,
        )  # fmt: skip
    rest = (scale, stride, padding, dilation, groups, transposed, output_padding)
    if activation is not None:
        if output is None:
            output = forward(x, weight, bias, down, up, stage, None, *rest[:5], None, *rest[5:])
        grad = reference.activation_backward(grad, activation, output)
    one = partial(_conv2d_backward_one, way=way)
    if stage is None:
        found = one(grad, x, weight, down, up, *rest, mask)
    else:
        found = _sum_stages(grad, x, weight, down, up, stage, mask, one, rest)
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
        return torch.nn.functional.linear(samples, merge(weight, d, u, scale, False, x.dtype), bias)

    y = one(x, None) if stage is None else by_stage(x, stage, one)
    return finish(y, activation, residual)


def _linear_backward_one(grad, x, weight, down, up, scale, mask):
    rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    found: list[Tensor | None] = [None] * 5
    if mask[0]:
        found[0] = grad @ merge(weight, down, up, scale, False, x.dtype)
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
