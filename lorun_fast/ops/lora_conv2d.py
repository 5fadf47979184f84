"""A convolution with a low-rank update of its weight, as one op. Definition: reference/lora.py.

The stage of a whole call is an index into the stacked factors, taken before the op; one stage per sample is an
argument of it. The op saves x for the backward pass, and its own result only where the activation's gradient is read
off its sign; the merged weight is formed again there.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.ops import _backends, _flops, _lora_aten, _lora_autograd
from lorun_fast.ops._backends import Backend, Row, narrow_by_fast_loops
from lorun_fast.ops._checks import finite, shape_of, whole
from lorun_fast.ops._library import define, once
from lorun_fast.ops.lora import (
    at_stage,
    check_epilogue,
    check_factors,
    check_floating,
    check_given_stages,
    check_stage,
    check_tensors,
    check_update,
    in_place,
    laid_out,
    layout_of,
    per_sample,
    under_autocast,
    wanted,
)
from lorun_fast.reference import lora as reference


def _channels(weight: Tensor, groups: int, transposed: bool) -> tuple[int, int]:
    """(in, out)."""
    a, b = weight.shape[:2]
    return (a, b * groups) if transposed else (b * groups, a)


def _output_shape(x, weight, stride, padding, dilation, groups, transposed, output_padding) -> list[int]:
    shape = [x.shape[0], _channels(weight, groups, transposed)[1]]
    for i in range(2):
        size, reach = x.shape[2 + i], dilation[i] * (weight.shape[2 + i] - 1)
        if transposed:
            shape.append((size - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i] + 1)
        else:
            shape.append((size + 2 * padding[i] - reach - 1) // stride[i] + 1)
    return shape


def _check(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
) -> None:  # fmt: skip
    if weight.ndim != 4 or x.ndim != 4 or x.shape[1] != _channels(weight, groups, transposed)[0]:
        want = _channels(weight, groups, transposed)[0] if weight.ndim == 4 else "in"
        raise ValueError(
            f"x: expected (N, {want}, H, W) for weight {shape_of(weight)} and groups={groups}, got {shape_of(x)}"
        )
    check_tensors(x, weight=weight, bias=bias, down=down, up=up, residual=residual)
    check_update(weight, down, up, stage, x.shape[0], groups=groups, transposed=transposed)
    shape = _output_shape(x, weight, stride, padding, dilation, groups, transposed, output_padding)
    _check_fits(x, weight, shape)
    check_epilogue(activation, bias, residual, shape, shape[1])


def _check_fits(x: Tensor, weight: Tensor, shape: Sequence[int]) -> None:
    """shape: the result's."""
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"x: expected an image that the kernel fits into, got {shape_of(x)} for {shape_of(weight)}")


_FITTING: set[tuple] = set()


def _check_once(tensors: tuple, args: tuple) -> None:
    """_check. What has passed is known again by all that it reads of its arguments, in a tenth of the time."""
    if torch.compiler.is_compiling():
        return _check(*tensors, *args)
    try:
        key = (args[1:], *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        if key in _FITTING:
            return None
    except (AttributeError, TypeError):  # something is no tensor, or a size is a symbol
        return _check(*tensors, *args)
    _check(*tensors, *args)
    if len(_FITTING) >= 1024:
        _FITTING.clear()
    _FITTING.add(key)
    return None


def _fake(x, weight, *args):
    _check(x, weight, *args)
    _, _, _, _, _, _, stride, padding, dilation, groups, _, transposed, output_padding = args
    shape = _output_shape(x, weight, stride, padding, dilation, groups, transposed, output_padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x, weight))


def forward(x, weight, bias, down, up, stage, *args):
    """The op by the backend that the table or LORUN_BACKEND names; its arguments."""
    if stage is not None and not x.shape[0]:
        stage, down, up = None, down[0], up[0]  # any will do
    if stage is not None:
        check_given_stages(stage, up.shape[0])
    args = (x, weight, bias, down, up, stage, *args)
    y = _backends.choose("lora_conv2d", x.device.type, args).forward(*args)
    return y.contiguous(memory_format=layout_of(x, weight))


def _fake_backward(grad, x, weight, bias, down, up, *args):
    return [torch.empty_like(t) for t in wanted(args[-1], (x, weight, bias, down, up))]


def backward(grad, x, weight, bias, down, up, stage, output, *args):
    """The backward op likewise; the gradients that its mask asks for."""
    like = wanted(args[-1], (x, weight, bias, down, up))
    if not x.shape[0]:
        return [torch.zeros_like(t) for t in like]
    call = (x, weight, bias, down, up, stage, None, *args[:-1])
    backend = _backends.choose("lora_conv2d", x.device.type, call)
    return laid_out(backend.backward(grad, x, weight, bias, down, up, stage, output, *args), like)


def _setup(ctx, inputs, output):
    x, weight, bias, down, up, stage, residual, *ctx.args = inputs
    activation = ctx.args[5]
    keep = output if activation in reference.SIGN_TELLS and residual is None else None
    ctx.save_for_backward(x, weight, bias, down, up, stage, keep)


def _backward(ctx, grad):
    mask = list(ctx.needs_input_grad[:5])
    found = [None] * 5
    if any(mask):
        found = in_place(mask, _conv_backward(grad, *ctx.saved_tensors, *ctx.args, mask))
    # stage, residual, and the eight arguments that are not tensors
    return (*found, None, grad if ctx.needs_input_grad[6] else None, *[None] * len(ctx.args))


def flops(x, weight, bias, down, up, stage, residual, *args, out_shape, **_) -> int:
    return _flops.convolution(x, weight, out_shape, transposed=args[6])


def backward_flops(grad, x, weight, bias, down, up, stage, output, *args, **_) -> int:
    """One convolution for the image, and one for the weight and its factors, unless those have their own: peft's."""
    *_, transposed, _, mask = args
    one = _flops.convolution(x, weight, grad, transposed)
    factors, lead = mask[3] + mask[4], stage is not None
    if not factors or mask[1] or len(down) - lead != 4:
        return one * (mask[0] + (mask[1] or factors > 0))
    return one * mask[0] + factors * _flops.narrow(x, down[lead:], up[lead:], grad, transposed)


_ARGUMENTS = (
    "float scale, int[] stride, int[] padding, int[] dilation, int groups, str? activation, bool transposed, "
    "int[] output_padding"
)
_conv = define(
    "lora_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, Tensor? stage, Tensor? residual, "
    f"{_ARGUMENTS}) -> Tensor",
    reference=forward,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    autocast=under_autocast,
    direct=True,
    python=True,
    flops=flops,
)
_conv_backward = define(
    "lora_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, Tensor? stage, "
    f"Tensor? output, {_ARGUMENTS}, bool[] mask) -> Tensor[]",
    reference=backward,
    fake=_fake_backward,
    **once("lora_conv2d"),
    direct=True,
    python=True,
    flops=backward_flops,
)


def _reference(
    x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, transposed,
    output_padding,
):  # fmt: skip
    return reference.lora_conv2d(
        x, weight, bias, down, up, scale=scale, stage=stage, stride=stride, padding=padding, dilation=dilation,
        groups=groups, activation=activation, residual=residual, transposed=transposed, output_padding=output_padding,
    )  # fmt: skip


_backends.register("lora_conv2d", Backend("reference", ("cpu", "cuda"), _reference, reference.lora_conv2d_backward))
_backends.register("lora_conv2d", Backend("aten", ("cpu", "cuda"), _lora_aten.conv2d, _lora_aten.conv2d_backward))
_backends.TABLE["lora_conv2d", "cpu"] = (
    Row("packed", "bf16, channels_last: 0.7 to 1.06 of aten's time in forward and backward on 32 sizes, AMX"),
    Row(
        "winograd",
        "16 bits, 3 x 3, channels_last: 0.78 (peft) and 0.66 (loralib) of aten's time in forward and backward, Zen 4; "
        "in fp32 when asked for, since a fresh network would equal the tied one to rounding only",
        narrow_by_fast_loops,
        usual=False,
    ),
    Row("aten", "at least as fast as the definition on every size"),
)


def _a_stage_per_sample(*args) -> bool:
    return args[5] is not None


_backends.TABLE["lora_conv2d", "cuda"] = (
    Row("triton", "a stage per sample: 0.3 to 0.8 of aten's time, H200", _a_stage_per_sample),
    Row(
        "aten", "one stage: torch's differentiable ops on the merged weight; in large batches the kernel's forward pass"
    ),
)


def _call(*args) -> Tensor:
    """The op, or on a GPU torch's differentiable ops in its place."""
    if _lora_autograd.serves("lora_conv2d", args):
        return _lora_autograd.conv2d(*args)
    return _conv(*args)


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, ...]:
    if type(value) is int and value >= least:  # at every call of the op
        return value, value
    try:
        pair = (value, value) if isinstance(value, int) else tuple(operator.index(v) for v in value)
        error = ValueError
    except TypeError:
        pair, error = (), TypeError
    if len(pair) != 2 or any(v < least for v in pair):
        raise error(f"{name}: expected one or two whole numbers of at least {least}, got {value!r}")
    return pair


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]):
    """(x, padding) for padding="same": what is left over on one side is padded beforehand, at the right and bottom."""
    if any(s != 1 for s in stride):
        raise ValueError(f"padding: expected numbers with stride {tuple(stride)}, got 'same'")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [t // 2 for t in total]


def check_channels(x: Tensor, layer) -> None:
    """Raises unless x is a batch of images with a layer's channels."""
    if x.ndim != 4 or x.shape[1] != layer.in_channels:
        raise ValueError(f"x: expected (N, {layer.in_channels}, H, W), got {shape_of(x)}")


def check_images(x: Tensor, layer) -> None:
    """Raises unless x is a batch of images that a layer takes, around which it has padded unless by zeros."""
    check_channels(x, layer)
    if layer.transposed or layer.padding == "same":
        return
    padding = layer.padding if layer.padding_mode == "zeros" and layer.padding != "valid" else (0, 0)
    geometry = (layer.stride, padding, layer.dilation, layer.groups, False, None)
    _check_fits(x, layer.weight, _output_shape(x, layer.weight, *geometry))


def of_layer(
    x: Tensor, layer, stage: int | Tensor, padding, output_padding=None, *, merged: Tensor | None = None
) -> Tensor:
    """The op with the geometry and the stacked factors of a layer, whose constructor has checked them.

    merged: the stage's weight, in place of base and factors.
    """
    check_floating("x", x)
    if x.ndim == 3 and not per_sample(stage):
        return of_layer(x[None], layer, stage, padding, output_padding, merged=merged)[0]
    if padding == "same":
        x, padding = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
    elif padding == "valid":
        padding = 0
    weight, down, up, stage = layer.operands(stage, merged)
    check_channels(x, layer)
    try:
        return _call(
            x, weight, layer.bias, down, up, stage, None, layer.scale, layer.stride,
            (padding, padding) if isinstance(padding, int) else padding, layer.dilation, layer.groups, None,
            layer.transposed, layer.output_padding if output_padding is None else output_padding,
        )  # fmt: skip
    except RuntimeError:
        check_images(x, layer)
        raise


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    scale: float = 1.0,
    stage: int | Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(conv2d(x, W0 + scale * dW) + bias) + residual.

    x: (N, in, H, W). weight: (out, in//groups, kh, kw). bias: (out,) or None.
    down, up: one form of :mod:`lorun_fast.adapters`; with a leading axis K exactly when ``stage`` is given.
    stage: an int, or an int64 tensor: (N,), one stage per sample; 0-d, one of all, read on its device.
    activation: None, "relu", "leaky_relu" (slope 0.01), "gelu" (exact) or "silu". residual: the output's shape.

    The update is formed in fp32 (fp64 for fp64 weights) and the merged weight rounded once, to x's dtype, which is
    also the result's. The result is in channels_last where x or the weight is, and in 16 bits on a CPU where x has one
    channel, which is in both layouts. Differentiable once, in every tensor; a frozen weight costs no gradient of its
    own. Backward keeps x, and the result under "relu" or "leaky_relu" without residual; other activations repeat the
    convolution.
    Raises ValueError, TypeError or IndexError naming the argument that does not fit.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and x.ndim == weight.ndim == 4):
        check_floating("x", x)
        check_floating("weight", weight)
        raise ValueError(f"x, weight: expected four axes each, got {shape_of(x)} and {shape_of(weight)}")
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if padding == "same":
        x, padding = pad_same(x, weight.shape[2:], stride, dilation)
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding: expected whole numbers, 'same' or 'valid', got {padding!r}")
        padding = 0
    padding = _pair("padding", padding, 0)
    groups = whole("groups", groups, 1)
    scale = finite("scale", scale)
    args = (scale, stride, padding, dilation, groups, activation, False, (0, 0))
    if stage is not None and not per_sample(stage):
        check_factors(weight, down, up, stacked=True, groups=groups)
        check_stage(stage, up.shape[0], x.shape[0])
        down, up, stage = at_stage(down, stage), at_stage(up, stage), None
    tensors = (x, weight, bias, down, up, stage, residual)
    _check_once(tensors, args)
    return _call(*tensors, *args)
