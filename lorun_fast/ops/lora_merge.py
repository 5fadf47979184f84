"""The merged weights of all layers and stages in one op. Definition: reference/lora.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorun_fast.ops import _backends
from lorun_fast.ops._checks import STORAGE_DTYPES, check_flag, finite
from lorun_fast.ops._direct import below_autograd
from lorun_fast.ops._library import define, once
from lorun_fast.ops.lora import check_factors, check_floating
from lorun_fast.reference import lora as reference


def _check(weights, downs, ups, scales, transposed, dtype=None) -> None:
    counts = [len(t) for t in (weights, downs, ups, scales, transposed)]
    if len(set(counts)) != 1:
        raise ValueError(f"weights, downs, ups, scales, transposed: expected lists of one length, got {counts}")
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    for index, (weight, down, up, flipped) in enumerate(zip(weights, downs, ups, transposed, strict=True)):
        try:
            for name, t in (("weight", weight), ("down", down), ("up", up)):
                check_floating(name, t)
                if t.device != weights[0].device:
                    raise ValueError(f"{name} is on {t.device}, but the first weight is on {weights[0].device}")
            # A grouped layer's factors tell its groups: loralib's down has in*k columns beside in//groups in weight.
            check_factors(weight, down, up, stacked=True, groups=_groups(weight, down, flipped), transposed=flipped)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {index}: {error}") from None


def _groups(weight: Tensor, down: Tensor, transposed: bool) -> int:
    if weight.ndim != 4 or down.ndim != 3 or transposed:
        return 1  # the factors of a transposed convolution, (r*k, in*k) and (out//groups*k, r*k), fit any groups
    return max(1, down.shape[2] // max(1, weight.shape[2] * weight.shape[1]))


def _fake(weights, downs, ups, scales, transposed, dtype, channels_last):
    _check(weights, downs, ups, scales, transposed, dtype)
    return [
        reference.empty_merged(w, u.shape[0], w.dtype if dtype is None else dtype, channels_last)
        for w, u in zip(weights, ups, strict=True)
    ]


def _merge(weights, downs, ups, scales, transposed, dtype, channels_last):
    args = (weights, downs, ups, scales, transposed, dtype, channels_last)
    device = weights[0].device.type if weights else "cpu"
    return _backends.choose("lora_merge", device, args).forward(*args)


def _setup(ctx, inputs, output):
    weights, downs, ups, ctx.scales, ctx.transposed, _, _ = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *downs, *ups)


def _backward(ctx, grads):
    saved, n = ctx.saved_tensors, ctx.count
    found = reference.lora_merge_backward(
        grads, saved[:n], saved[n : 2 * n], saved[2 * n :], ctx.scales, ctx.transposed
    )
    return (*found, None, None, None, None)


_op = define(
    "lora_merge(Tensor[] weights, Tensor[] downs, Tensor[] ups, float[] scales, bool[] transposed, "
    "ScalarType? dtype, bool? channels_last) -> Tensor[]",
    reference=_merge,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
_backends.register("lora_merge", _backends.Backend("reference", ("cpu", "cuda"), reference.lora_merge))


def _fake_stage(weights, downs, ups, scales, transposed, stage):
    _check(weights, downs, ups, scales, transposed)
    return [torch.empty_like(w, memory_format=torch.preserve_format) for w in weights]


def _merge_stage(weights, downs, ups, scales, transposed, stage):
    one = ([factor[stage : stage + 1] for factor in factors] for factors in (downs, ups))
    return [t[0] for t in _op(weights, *one, scales, transposed, None, None)]


def _setup_stage(ctx, inputs, output):
    weights, downs, ups, ctx.scales, ctx.transposed, ctx.stage = inputs
    ctx.wanted = [t.requires_grad for t in weights]
    ctx.save_for_backward(*downs, *ups)


def _stage_gradients(grads, downs, ups, scales, transposed, stage):
    """What lora_merge_stage_backward gives, in slices: a dozen launches for all layers that are alike on a GPU, where
    each by itself would take as many.
    """
    found = ([None] * len(grads), [None] * len(grads))
    alike: dict[str, list[int]] = {}
    for index, (grad, down, up) in enumerate(zip(grads, downs, ups, strict=True)):
        # In words: sizes that are symbols have no hash.
        kind = (grad.shape, down.shape, grad.dtype, down.dtype, up.dtype, scales[index], transposed[index])
        alike.setdefault(str(kind), []).append(index)
    down_now, up_now = ([t[stage] for t in factors] for factors in (downs, ups))
    for group in alike.values():
        first = group[0]
        grad, down, up = (torch.stack([ts[index] for index in group]) for ts in (grads, down_now, up_now))
        of_stage = reference.to_factors(grad, grads[first], down, up, scales[first], transposed[first])
        for results, factors, own in zip(found, (downs, ups), of_stage, strict=True):
            all_stages = own[:, None]
            if len(factors[first]) > 1:
                all_stages = own.new_zeros((len(group), *factors[first].shape))
                all_stages[:, stage] = own
            for index, one in zip(group, all_stages, strict=True):
                results[index] = one
    return [*found[0], *found[1]]


def _backward_stage(ctx, grads):
    factors, n = ctx.saved_tensors, len(grads)
    came = [index for index, grad in enumerate(grads) if grad is not None]
    lists = [[ts[index] for index in came] for ts in (grads, factors[:n], factors[n:], ctx.scales, ctx.transposed)]
    # On a GPU, and where the gradients are to be differentiated, by torch's ops.
    direct = factors[0].device.type == "cpu" and not torch.is_grad_enabled()
    gradients = _stage_backward_op if direct else _stage_gradients
    of_factors = gradients(*lists, ctx.stage) if came else []
    found = ([None] * n, [None] * n, [None] * n)
    for place, index in enumerate(came):
        found[0][index] = grads[index] if ctx.wanted[index] else None
        found[1][index], found[2][index] = of_factors[place], of_factors[len(came) + place]
    return (*found, None, None, None)


_stage_op = define(
    "lora_merge_stage(Tensor[] weights, Tensor[] downs, Tensor[] ups, float[] scales, bool[] transposed, "
    "SymInt stage) -> Tensor[]",
    reference=_merge_stage,
    fake=_fake_stage,
    backward=_backward_stage,
    setup_context=_setup_stage,
)


def _fake_stage_backward(grads, downs, ups, scales, transposed, stage):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (*downs, *ups)]


_stage_backward_op = define(
    "lora_merge_stage_backward(Tensor[] grads, Tensor[] downs, Tensor[] ups, float[] scales, bool[] transposed, "
    "SymInt stage) -> Tensor[]",
    reference=reference.lora_merge_stage_backward,
    fake=_fake_stage_backward,
    **once("lora_merge_stage"),
)


class _Stage(torch.autograd.Function):
    """The same in eager mode, without the dispatcher's way to a Python formula: for a hundred tensors and more."""

    @staticmethod
    def forward(ctx, scales, transposed, stage, *tensors):
        ctx.set_materialize_grads(False)
        n = len(scales)
        inputs = (tensors[:n], tensors[n : 2 * n], tensors[2 * n :], scales, transposed, stage)
        _setup_stage(ctx, inputs, None)
        with below_autograd():
            return tuple(_stage_op(*map(list, inputs[:5]), stage))

    @staticmethod
    def backward(ctx, *grads):
        weights, downs, ups, *_ = _backward_stage(ctx, grads)
        return (None, None, None, *weights, *downs, *ups)


def lora_merge_stage(
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    stage: int,
) -> list[Tensor]:
    """W0 + scale * dW of one stage of many layers, as :func:`lora_merge` forms it, for layers that are checked."""
    if torch.compiler.is_compiling():
        return _stage_op(list(weights), list(downs), list(ups), list(scales), list(transposed), stage)
    return list(_Stage.apply(scales, transposed, stage, *weights, *downs, *ups))


def lora_merge(
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    scales: float | Sequence[float] = 1.0,
    transposed: bool | Sequence[bool] = False,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
) -> list[Tensor]:
    """W0 + scale * dW of all stages of many layers, in one call.

    weights: one per layer: (out, in), (out, in//groups, kh, kw), or (in, out//groups, kh, kw) if transposed.
    downs, ups: their factors, stacked: a leading axis K, then one form of :mod:`lorun_fast.adapters`.
    scales, transposed: one for all layers, or one per layer.
    dtype: of the result; None keeps each weight's. channels_last: layout of the merged convolution weights; None
        keeps each weight's.
    Returns a list of (K, *weight.shape). Formed in fp32 (fp64 for fp64 weights) and rounded once. Differentiable in
    weights, downs and ups. Raises ValueError or TypeError naming the layer and the argument that does not fit.
    """
    for name, value in (("weights", weights), ("downs", downs), ("ups", ups)):
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    check_flag("channels_last", channels_last)
    n = len(weights)
    scales = [finite("scales", s) for s in (scales if isinstance(scales, list | tuple) else [scales] * n)]
    transposed = list(transposed) if isinstance(transposed, list | tuple) else [transposed] * n
    if not all(isinstance(flipped, bool) for flipped in transposed):
        raise TypeError(f"transposed: expected True or False, or one of them per layer, got {transposed!r}")
    _check(weights, downs, ups, scales, transposed, dtype)
    return _op(list(weights), list(downs), list(ups), scales, transposed, dtype, channels_last) if n else []
