"""The merged weights of all layers and stages in one op. Definition: reference/lora.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorun_fast.ops import _backends
from lorun_fast.ops._checks import STORAGE_DTYPES
from lorun_fast.ops._library import define
from lorun_fast.ops.lora import check_factors
from lorun_fast.reference import lora as reference


def _check(weights, downs, ups, scales, transposed, dtype=None) -> None:
    counts = [len(t) for t in (weights, downs, ups, scales, transposed)]
    if len(set(counts)) != 1:
        raise ValueError(f"weights, downs, ups, scales, transposed: expected lists of one length, got {counts}")
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    for index, (weight, down, up, flipped) in enumerate(zip(weights, downs, ups, transposed, strict=True)):
        try:
            # A grouped layer's factors tell its groups: loralib's down has in*k columns beside in//groups in weight.
            check_factors(weight, down, up, stacked=True, groups=_groups(weight, down, flipped), transposed=flipped)
            for name, t in (("weight", weight), ("down", down), ("up", up)):
                if t.dtype not in STORAGE_DTYPES:
                    raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {t.dtype}")
                if t.device != weights[0].device:
                    raise ValueError(f"{name} is on {t.device}, but the first weight is on {weights[0].device}")
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
    weights, downs, ups = saved[:n], saved[n : 2 * n], saved[2 * n :]
    grads = [
        torch.zeros((u.shape[0], *w.shape), dtype=w.dtype, device=w.device) if g is None else g
        for g, w, u in zip(grads, weights, ups, strict=True)
    ]
    found = reference.lora_merge_backward(grads, weights, downs, ups, ctx.scales, ctx.transposed)
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
    n = len(weights)
    scales = [float(scales)] * n if isinstance(scales, int | float) else [float(s) for s in scales]
    transposed = [transposed] * n if isinstance(transposed, bool) else list(transposed)
    _check(weights, downs, ups, scales, transposed, dtype)
    return _op(list(weights), list(downs), list(ups), scales, transposed, dtype, channels_last) if n else []
