"""A residual block of two convolutions with low-rank updates, as one op that saves only its input.

What lies between the convolutions is computed again in the backward pass: a block then keeps one image for training
instead of two, for one convolution more. Each convolution goes by its own backend (ops/lora_conv2d.py), with ReLU and
the sums in its last step; by matrix tiles the block is one pass over the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorun_fast.ops import _backends, _flops, _lora_aten, lora_conv2d
from lorun_fast.ops._backends import Backend, Row, narrow_by_fast_loops
from lorun_fast.ops._checks import batch_of, check_tensor, finite, shape_of
from lorun_fast.ops._library import define, once
from lorun_fast.ops.lora import (
    at_stage,
    check_epilogue,
    check_factors,
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

_LAYER = ("weight", "bias", "down", "up")
# x, and the four tensors of each layer
_DIFFERENTIABLE = 9


def geometry(weight: Tensor) -> tuple:
    """What ops/lora_conv2d.py takes beside tensors for a convolution that keeps the image's size, but for the scale."""
    height, width = weight.shape[2:]
    return [1, 1], [height // 2, width // 2], [1, 1], 1


def calls(x, first, second, stage, residual, scales) -> tuple[tuple, tuple]:
    """Both layers' arguments of the convolution op; the second's without its image, which is the first's result."""
    ends = (False, [0, 0])
    return (
        (x, *first, stage, None, scales[0], *geometry(first[0]), "relu", *ends),
        (*second, stage, x, scales[1], *geometry(second[0]), None, *ends),
    )


def _check_layer(name: str, x: Tensor, layer: Sequence[Tensor | None], stage: Tensor | None) -> None:
    weight, bias, down, up = layer
    check_tensor(f"{name} weight", weight)
    if weight.ndim != 4 or weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"{name}: expected a weight (out, in, kh, kw) of odd sizes, got {shape_of(weight)}")
    check_tensors(x, **{f"{name} {part}": t for part, t in zip(_LAYER, layer, strict=True)})
    check_update(weight, down, up, stage, x.shape[0])
    check_epilogue(None, bias, None, None, weight.shape[0])


def _check(x, first, second, stage, residual) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, C, H, W), got {shape_of(x)}")
    _check_layer("first", x, first, stage)
    _check_layer("second", x, second, stage)
    middle, channels = first[0].shape[:2]
    if x.shape[1] != channels or second[0].shape[:2] != (channels, middle):
        raise ValueError(
            f"x, first, second: expected (N, C, H, W), a weight (M, C, kh, kw) and one (C, M, kh, kw), "
            f"got {shape_of(x)}, {shape_of(first[0])} and {shape_of(second[0])}"
        )
    check_tensors(x, residual=residual)
    if not (x.shape[2] and x.shape[3]):
        raise ValueError(f"x: expected an image with rows and columns, got {shape_of(x)}")
    check_epilogue(None, None, residual, x.shape, channels)


def parts(args: Sequence) -> tuple:
    """(x, first, second, the rest) of the op's arguments."""
    return args[0], args[1:5], args[5:9], args[9:]


def _fake(*args):
    x, first, second, (stage, residual, *_) = parts(args)
    _check(x, first, second, stage, residual)
    return torch.empty_like(x, memory_format=_layout(x, first, second))


def _layout(x: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]) -> torch.memory_format:
    layout = layout_of(x, first[0])
    return layout if layout == torch.channels_last else layout_of(x, second[0])


def _forward(*args):
    x, first, second, _ = parts(args)
    y = _backends.choose("lora_residual_block", x.device.type, args).forward(*args)
    return y.contiguous(memory_format=_layout(x, first, second))


def by_layers(*args):
    """The convolution op twice."""
    x, first, second, (stage, residual, *scales) = parts(args)
    one, other = calls(x, first, second, stage, residual, scales)
    y = lora_conv2d.forward(lora_conv2d.forward(*one), *other)
    return y if residual is None else y + residual.to(y.dtype)


def _fake_backward(grad, *args):
    return [torch.empty_like(t) for t in wanted(args[-1], args[:_DIFFERENTIABLE])]


def _backward_op(grad, *args):
    *tensors, first_scale, second_scale, mask = args
    like = wanted(mask, tensors[:_DIFFERENTIABLE])
    if not grad.shape[0]:
        return [torch.zeros_like(t) for t in like]
    call = (*tensors, None, first_scale, second_scale)
    backend = _backends.choose("lora_residual_block", grad.device.type, call)
    return laid_out(backend.backward(grad, *args), like)


def by_layers_backward(grad, *args):
    *args, mask = args
    x, first, second, (stage, *scales) = parts(args)
    one, other = calls(x, first, second, stage, None, scales)
    before = any(mask[:5])
    between = lora_conv2d.forward(*one)
    inner, *of_second = _gradients(grad, (between, *other), None, [before, *mask[5:]])
    of_first = _gradients(inner, one, between, mask[:5])
    if mask[0]:
        of_first[0] = of_first[0] + grad
    return wanted(mask, of_first + of_second)


def merged(x: Tensor, weight: Tensor, down: Tensor | None, up: Tensor | None, scale: float) -> Tensor:
    """A layer's weight, in x's dtype."""
    return _lora_aten.merge(weight, down, up, scale, False, x.dtype)


def backward_by(
    convolve: Callable[..., Tensor], way: _lora_aten.Way, weight_of: Callable[..., object] = merged
) -> Callable[..., list[Tensor]]:
    """The backward pass of 3 x 3 layers by an op that finishes its results, for a batch of one stage.

    convolve: (x, weight, bias=None, *, adjoint=False, activation=None, residual=None, gate=None). adjoint: the
        transpose, which takes a gradient back. gate: what a ReLU gave, through which it is then taken back as well.
    way: for the gradients of the layers' own tensors. weight_of: what convolve takes as weight, from merged()'s
        arguments.
    """

    def of_layer(grad: Tensor, x: Tensor, layer, scale: float, mask) -> list[Tensor]:
        given = (None, None, scale, *geometry(layer[0]), None, False, [0, 0], [False, *mask])
        return _lora_aten.conv2d_backward(grad, x, *layer, *given, way=way)

    def backward(grad: Tensor, *args) -> list[Tensor]:
        *args, mask = args
        x, first, second, (_, *scales) = parts(args)
        weights = [
            weight_of(x, w, *factors, scale) for (w, _, *factors), scale in zip((first, second), scales, strict=True)
        ]
        between = convolve(x, weights[0], first[1], activation="relu")
        found = of_layer(grad, between, second, scales[1], mask[5:])
        if any(mask[:5]):
            inner = convolve(grad, weights[1], adjoint=True, gate=between)
            found = of_layer(inner, x, first, scales[0], mask[1:5]) + found
        if mask[0]:
            found.insert(0, convolve(inner, weights[0], adjoint=True, residual=grad))
        return found

    return backward


def _gradients(grad: Tensor | None, call: tuple, output: Tensor | None, mask: Sequence[bool]) -> list[Tensor | None]:
    """Those of one layer's (image, weight, bias, down, up); None for those that the mask leaves out."""
    *tensors, stage, _ = call[:7]
    found = lora_conv2d.backward(grad, *tensors, stage, output, *call[7:], list(mask)) if any(mask) else ()
    return in_place(mask, found)


def _setup(ctx, inputs, output):
    *tensors, _, ctx.first_scale, ctx.second_scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    mask = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    found = [None] * _DIFFERENTIABLE
    if any(mask):
        found = in_place(mask, _block_backward(grad, *ctx.saved_tensors, ctx.first_scale, ctx.second_scale, mask))
    needs_residual = ctx.needs_input_grad[_DIFFERENTIABLE + 1]
    return (*found, None, grad if needs_residual else None, None, None)


def _forward_flops(*args, out_shape, **_) -> int:
    x, first, second, _ = parts(args)
    between = (x[0], first[0][0], *x[2:])
    return _flops.convolution(x, first[0], between) + _flops.convolution(between, second[0], out_shape)


def _backward_flops(grad, *args, **_) -> int:
    *args, mask = args
    x, first, second, (stage, *_) = parts(args)
    between = (x[0], first[0][0], *x[2:])
    rest = (stage, None, False, None)  # no output, not transposed, no output padding
    of_second = lora_conv2d.backward_flops(grad, between, *second, *rest, [any(mask[:5]), *mask[5:]])
    return of_second + lora_conv2d.backward_flops(between, x, *first, *rest, mask[:5])


_TENSORS = (
    "Tensor x, Tensor first, Tensor? first_bias, Tensor? first_down, Tensor? first_up, "
    "Tensor second, Tensor? second_bias, Tensor? second_down, Tensor? second_up, Tensor? stage"
)
_block = define(
    f"lora_residual_block({_TENSORS}, Tensor? residual, float first_scale, float second_scale) -> Tensor",
    reference=_forward,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    autocast=under_autocast,
    direct=True,
    python=True,
    flops=_forward_flops,
)
_block_backward = define(
    f"lora_residual_block_backward(Tensor grad, {_TENSORS}, float first_scale, float second_scale, bool[] mask) "
    "-> Tensor[]",
    reference=_backward_op,
    fake=_fake_backward,
    **once("lora_residual_block"),
    direct=True,
    python=True,
    flops=_backward_flops,
)


def _reference(*args):
    x, first, second, (stage, residual, *scales) = parts(args)
    return reference.lora_residual_block(x, first, second, scales=scales, stage=stage, residual=residual)


_backends.register("lora_residual_block", Backend("reference", ("cpu", "cuda"), _reference, by_layers_backward))
_backends.register("lora_residual_block", Backend("layers", ("cpu", "cuda"), by_layers, by_layers_backward))
for _device in ("cpu", "cuda"):
    _backends.TABLE["lora_residual_block", _device] = (
        Row("packed", "one pass over the image instead of two, AMX"),
        Row(
            "winograd",
            "16 bits: as its convolutions, in one pass",
            narrow_by_fast_loops,
            usual=False,
        ),
        Row("layers", "each convolution by its own backend"),
    )


def fits(layer) -> bool:
    """Whether a LoRAConv2d can be half of a block."""
    same = tuple(k // 2 for k in layer.kernel_size)
    return (
        layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and all(k % 2 for k in layer.kernel_size)
        and layer.padding in ("same", same)
    )


def of_layers(x: Tensor, first, second, stage: int | Tensor, residual: Tensor | None) -> Tensor:
    """The op with the stacked factors of two layers that :func:`fits`."""
    tensors = []
    for layer in (first, second):
        weight, down, up, given = layer.operands(stage, layer.merged_now())
        tensors += [weight, layer.bias, down, up]
    return _block(x, *tensors, given, residual, first.scale, second.scale)


def lora_residual_block(
    x: Tensor,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    *,
    scales: Sequence[float] = (1.0, 1.0),
    stage: int | Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x + conv2(relu(conv1(x))) + residual with conv(x) = conv2d(x, W0 + scale * dW) + bias, padded to keep the size.

    x, residual: (N, C, H, W). first, second: (weight, bias, down, up) of :func:`lora_conv2d`, with weights
    (M, C, kh, kw) and (C, M, kh, kw) of odd sizes. scales: of the two updates. stage: as for :func:`lora_conv2d`.

    Differentiable once, in every tensor. Backward keeps x alone and computes the first convolution again. Raises
    ValueError, TypeError or IndexError naming the argument that does not fit.
    """
    for name, layer in (("first", first), ("second", second)):
        if not isinstance(layer, tuple | list):
            raise TypeError(f"{name}: expected (weight, bias, down, up), got {type(layer).__name__}")
        if len(layer) != len(_LAYER):
            raise ValueError(f"{name}: expected (weight, bias, down, up), got {len(layer)} of them")
    if not isinstance(scales, tuple | list) or len(scales) != 2:
        raise ValueError(f"scales: expected two numbers, got {scales!r}")
    first_scale, second_scale = (finite("scales", scale) for scale in scales)
    batch = batch_of("x", x)
    if stage is not None and not per_sample(stage):
        for layer in (first, second):
            check_factors(layer[0], *layer[2:], stacked=True)
            check_stage(stage, layer[3].shape[0], batch)
        first, second = ((*layer[:2], *(at_stage(factor, stage) for factor in layer[2:])) for layer in (first, second))
        stage = None
    _check(x, first, second, stage, residual)
    return _block(x, *first, *second, stage, residual, first_scale, second_scale)
