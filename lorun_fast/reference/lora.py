"""LoRA layers in plain PyTorch: merge, then one convolution or product; and their gradients, written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.adapters import delta_backward, merged_weight

aten = torch.ops.aten

ACTIVATIONS = {
    None: lambda t: t,
    "relu": F.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.01),
    "gelu": F.gelu,
    "silu": F.silu,
}

# grad, what the activation was applied to -> the gradient before it
_ACTIVATIONS_BACKWARD = {
    None: lambda grad, before: grad,
    "relu": lambda grad, before: aten.threshold_backward(grad, before, 0),
    "leaky_relu": lambda grad, before: aten.leaky_relu_backward(grad, before, 0.01, False),
    "gelu": aten.gelu_backward,
    "silu": aten.silu_backward,
}
# Their result has the sign of what they were applied to, which is all that their gradient needs.
SIGN_TELLS = ("relu", "leaky_relu")


def lora_merge(weights, downs, ups, scales, transposed, dtype=None, channels_last=None) -> list[Tensor]:
    """W0 + scale * dW of every stage of every layer: lists in, a list of (K, *weight.shape) out.

    Formed in fp32 (fp64 for fp64 weights) and rounded once, to ``dtype`` or the weight's own. Convolution weights
    are laid out as the weight is, or as ``channels_last`` says, each stage by itself.
    """
    merged = []
    for weight, down, up, scale, flipped in zip(weights, downs, ups, scales, transposed, strict=True):
        target = weight.dtype if dtype is None else dtype
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        stacked = merged_weight(weight.to(wide), down, up, scale, transposed=flipped).to(target)
        out = empty_merged(weight, up.shape[0], target, channels_last)
        merged.append(out.copy_(stacked))
    return merged


def empty_merged(weight: Tensor, stages: int, dtype: torch.dtype, channels_last: bool | None) -> Tensor:
    """Room for (K, *weight.shape), every stage a dense weight in the wanted layout."""
    shape = (stages, *weight.shape)
    if channels_last is None:
        channels_last = (
            weight.ndim == 4 and weight.shape[1] > 1 and weight.stride(1) == 1 and not weight.is_contiguous()
        )
    if not channels_last or weight.ndim != 4:
        return torch.empty(shape, dtype=dtype, device=weight.device)
    k, a, b, kh, kw = shape
    return torch.empty((k, a, kh, kw, b), dtype=dtype, device=weight.device).permute(0, 1, 4, 2, 3)


def lora_merge_backward(grads, weights, downs, ups, scales, transposed) -> tuple[list, list, list]:
    """Gradients of (weights, downs, ups) from those of the merged weights, each in its tensor's dtype."""
    results = ([], [], [])
    for grad, weight, down, up, scale, flipped in zip(grads, weights, downs, ups, scales, transposed, strict=True):
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad = grad.to(wide)
        grad_down, grad_up = delta_backward(grad, down.to(wide), up.to(wide), transposed=flipped)
        for found, value, like in zip(
            results, (grad.sum(0), scale * grad_down, scale * grad_up), (weight, down, up), strict=True
        ):
            found.append(value.to(like.dtype))
    return results


def lora_merge_stage(weights, downs, ups, scales, transposed, stage: int) -> list[Tensor]:
    """One stage of :func:`lora_merge`, (*weight.shape) each, in the weight's dtype and layout."""
    one = ([factor[stage : stage + 1] for factor in factors] for factors in (downs, ups))
    return [t[0] for t in lora_merge(weights, *one, scales, transposed)]


def lora_merge_stage_backward(grads, downs, ups, scales, transposed, stage: int) -> list[Tensor]:
    """Gradients of all downs, then of all ups, from those of :func:`lora_merge_stage`: zeros at the other stages."""
    found = ([], [])
    for grad, down, up, scale, flipped in zip(grads, downs, ups, scales, transposed, strict=True):
        own = to_factors(grad, grad, down[stage], up[stage], scale, flipped)
        for results, one in zip(found, own, strict=True):
            results.append(F.pad(one[None], (*[0, 0] * one.ndim, stage, len(up) - 1 - stage)))
    return [*found[0], *found[1]]


def stage_weight(
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    stage: int | Tensor | None,
    transposed: bool = False,
) -> Tensor:
    """W0 + scale * dW of one stage, or (N, *weight.shape) for a stage per sample; without factors the weight itself."""
    if down is None:
        return weight
    if stage is not None:
        down, up = down[stage], up[stage]
    return merged_weight(weight, down, up, scale, transposed=transposed)


def epilogue(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.to(y.dtype)


def conv2d_per_sample(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    """A convolution whose weight differs per sample: x (N, C, H, W), weight (N, out, C/groups, kh, kw)."""
    n, out = weight.shape[:2]
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, stride, padding, dilation, groups * n)
    y = y.reshape(n, out, *y.shape[2:])
    return y if bias is None else y + bias[:, None, None].to(y.dtype)


def conv_transpose2d_per_sample(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, output_padding, groups: int, dilation
) -> Tensor:
    """A transposed convolution whose weight differs per sample: weight (N, C, out/groups, kh, kw)."""
    n = weight.shape[0]
    y = F.conv_transpose2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(0, 1),
        None,
        stride,
        padding,
        output_padding,
        groups * n,
        dilation,
    )
    y = y.reshape(n, -1, *y.shape[2:])
    return y if bias is None else y + bias[:, None, None].to(y.dtype)


def conv_per_sample(conv, groups: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv, of torch's with its geometry but for groups, with one weight per sample: x (N, C, ...), weight (N, ...)."""
    n = weight.shape[0]
    y = conv(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), groups=groups * n)
    y = y.reshape(n, -1, *y.shape[2:])
    return y if bias is None else y + bias.reshape(-1, *(1,) * (y.ndim - 2)).to(y.dtype)


def linear_per_sample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight differs per sample: x (N, ..., in), weight (N, out, in)."""
    n = x.shape[0]
    y = torch.bmm(x.reshape(n, -1, x.shape[-1]), weight.mT.to(x.dtype))
    y = y.reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + bias.to(y.dtype)


def lora_conv2d(
    x, weight, bias, down, up, *, scale=1.0, stage=None, stride=1, padding=0, dilation=1, groups=1,
    activation=None, residual=None, transposed=False, output_padding=0,
):  # fmt: skip
    """act(conv(x, W0 + scale * dW) + bias) + residual, with the merged weight rounded to x's dtype."""
    w = stage_weight(weight, down, up, scale, stage, transposed).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if transposed:
        conv = conv_transpose2d_per_sample if w.ndim == 5 else F.conv_transpose2d
        y = conv(x, w, bias, stride, padding, output_padding, groups, dilation)
    else:
        conv = conv2d_per_sample if w.ndim == 5 else F.conv2d
        y = conv(x, w, bias, stride, padding, dilation, groups)
    return epilogue(y, activation, residual)


def lora_residual_block(x, first, second, *, scales=(1.0, 1.0), stage=None, residual=None):
    """x + conv2(relu(conv1(x))) + residual; first, second: (weight, bias, down, up) of kernels of odd sizes."""
    y = x
    for (weight, bias, down, up), scale, activation in zip((first, second), scales, ("relu", None), strict=True):
        padding = [size // 2 for size in weight.shape[2:]]
        y = lora_conv2d(
            y, weight, bias, down, up, scale=scale, stage=stage, padding=padding, activation=activation,
            residual=None if activation else x,
        )  # fmt: skip
    return y if residual is None else y + residual.to(y.dtype)


def lora_linear(x, weight, bias, down, up, *, scale=1.0, stage=None, activation=None, residual=None):
    """act(x (W0 + scale * dW)^T + bias) + residual, with the merged weight rounded to x's dtype."""
    w = stage_weight(weight, down, up, scale, stage).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    linear = linear_per_sample if w.ndim == 3 else F.linear
    return epilogue(linear(x, w, bias), activation, residual)


def activation_backward(grad: Tensor, activation: str | None, before: Tensor | None) -> Tensor:
    """The gradient before the activation. before: what it was applied to, or anything with its sign (SIGN_TELLS)."""
    return _ACTIVATIONS_BACKWARD[activation](grad, before)


def to_factors(grad_weight: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool = False):
    """(grad_down, grad_up) in the factors' dtypes from the gradient of the merged weight; all may be stacked."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grad_down, grad_up = delta_backward(grad_weight.to(wide), down.to(wide), up.to(wide), transposed=transposed)
    found = (grad_down, grad_up) if scale == 1 else (scale * grad_down, scale * grad_up)
    return found[0].to(down.dtype), found[1].to(up.dtype)


def lora_conv2d_backward(
    grad, x, weight, bias, down, up, stage, output, scale, stride, padding, dilation, groups, activation,
    transposed, output_padding, mask,
):  # fmt: skip
    """Gradients of (x, weight, bias, down, up), those that ``mask`` asks for, by way of the whole weight's gradient.

    output: the result of the forward pass where its sign tells the activation's gradient, else None.
    """
    per_sample = stage is not None
    w = stage_weight(weight, down, up, scale, stage, transposed).to(x.dtype)
    if activation is not None and output is None:
        output = lora_conv2d(
            x, weight, bias, down, up, scale=scale, stage=stage, stride=stride, padding=padding, dilation=dilation,
            groups=groups, transposed=transposed, output_padding=output_padding,
        )  # fmt: skip
    grad = activation_backward(grad, activation, output)
    n = x.shape[0] if per_sample else 1
    folded = [t.reshape(t.shape[0] // n, -1, *t.shape[2:]) if per_sample else t for t in (grad, x)]
    grad_x, grad_w, _ = aten.convolution_backward(
        *folded, w.flatten(0, 1) if per_sample else w, None, stride, padding, dilation, transposed,
        output_padding, groups * n, [mask[0], mask[1] or mask[3] or mask[4], False],
    )  # fmt: skip
    found = {}
    if mask[0]:
        found[0] = grad_x.reshape(x.shape)
    if mask[2]:
        found[2] = grad.sum((0, 2, 3)).to(bias.dtype)
    if grad_w is not None:
        grad_w = grad_w.reshape(w.shape)
        found |= _weight_gradients(grad_w, weight, down, up, stage, scale, transposed)
    return [found[i] for i in range(5) if mask[i]]


def lora_linear_backward(grad, x, weight, bias, down, up, stage, output, scale, activation, mask):
    """As :func:`lora_conv2d_backward`."""
    w = stage_weight(weight, down, up, scale, stage).to(x.dtype)
    if activation is not None and output is None:
        output = lora_linear(x, weight, bias, down, up, scale=scale, stage=stage)
    grad = activation_backward(grad, activation, output)
    n = x.shape[0] if stage is not None else 1
    rows, columns = grad.reshape(n, -1, grad.shape[-1]), x.reshape(n, -1, x.shape[-1])
    found = {}
    if mask[0]:
        found[0] = (rows @ w).reshape(x.shape)
    if mask[2]:
        found[2] = rows.sum((0, 1)).to(bias.dtype)
    if mask[1] or mask[3] or mask[4]:
        found |= _weight_gradients((rows.mT @ columns).reshape(w.shape), weight, down, up, stage, scale, False)
    return [found[i] for i in range(5) if mask[i]]


def _weight_gradients(grad_w, weight, down, up, stage, scale, transposed) -> dict[int, Tensor]:
    """{1: grad_weight, 3: grad_down, 4: grad_up} from the gradient of the merged weight, (N, ...) per sample."""
    if down is None:
        return {1: grad_w.to(weight.dtype)}
    if stage is None:
        grad_down, grad_up = to_factors(grad_w, weight, down, up, scale, transposed)
        return {1: grad_w.to(weight.dtype), 3: grad_down, 4: grad_up}
    by_sample = to_factors(grad_w, weight, down[stage], up[stage], scale, transposed)
    rows = stage.to(grad_w.device)  # indexing takes stages on the CPU beside factors on a GPU, adding does not
    summed = [torch.zeros_like(t).index_add(0, rows, g) for t, g in zip((down, up), by_sample, strict=True)]
    return {1: grad_w.sum(0).to(weight.dtype), 3: summed[0], 4: summed[1]}
