"""Adapter algebra: the rank rule, the factor shapes and the weight update of each form. No modules, no state.

Two forms, named after the libraries that introduced them for convolutions:

``loralib``  down (r*k, in*k), up (out//groups*k, r*k);  dW = (up @ down).view(weight.shape). Square kernels.
             A transposed convolution uses the same factors and the same view on its (in, out//groups, k, k) weight.
``peft``     a k x k convolution to r channels, then a 1 x 1:  down (r, in, kh, kw), up (out, r);
             dW[o, i] = sum_r up[o, r] * down[r, i].  groups == 1. For a transposed convolution down is
             (in, r, kh, kw), the weight of the transposed convolution to r channels.

For a linear layer both forms are down (r, in), up (out, r), dW = up @ down; for a convolution of one or three axes both
are that of ``peft``, down (r, in//groups, *kernel), with groups called ``loralib``. A transposed one of these has
down (r, out//groups, *kernel) and up (in, r): a 1 x 1 to r channels, then a transposed convolution.
Factors may carry one more leading axis, the stages; the update then carries it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from lorun_fast.reference._wide import without_autocast

FORMS = ("loralib", "peft")


def rank(in_features: int, out_features: int, gamma: float) -> int:
    """r = ceil(min(in, out) * gamma / 100), at least 1 (arXiv 2602.18697); gamma above 0 and up to 100."""
    if not isinstance(gamma, Real) or not gamma > 0:
        raise ValueError(f"gamma: expected a positive percentage, got {gamma!r}")
    if gamma > 100:
        raise ValueError(f"gamma: expected at most 100, a rank of min(in, out), beyond which none is low, got {gamma}")
    # The small slack keeps 250 * 64.4 / 100 = 161.00000000000003 at rank 161.
    return max(1, math.ceil(min(in_features, out_features) * gamma / 100 - 1e-9))


def check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")


def factor_shapes(
    weight_shape: Sequence[int], r: int, form: str, *, groups: int = 1, transposed: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (down, up) for one stage of a layer with this weight.

    weight_shape: (out, in) of a linear layer, (out, in//groups, *kernel) of a convolution with one to three axes, or
        (in, out//groups, *kernel) of a transposed one.
    Raises ValueError for what the form cannot express.
    """
    check_form(form)
    if r < 1:
        raise ValueError(f"rank: expected at least 1, got {r}")
    if len(weight_shape) == 2:
        out, in_ = weight_shape
        return (r, in_), (out, r)
    if len(weight_shape) not in (3, 4, 5):
        raise ValueError(f"weight: expected 2 to 5 dimensions, got shape {tuple(weight_shape)}")
    if form == "peft" and groups != 1:
        raise ValueError(f"form 'peft' cannot express groups={groups}: use form='loralib' or leave the layer out")
    if len(weight_shape) != 4:
        return (r, *weight_shape[1:]), (weight_shape[0], r)
    a, b, kh, kw = weight_shape
    in_, out = (a, b * groups) if transposed else (b * groups, a)
    if form == "peft":
        return ((in_, r, kh, kw) if transposed else (r, in_, kh, kw)), (out, r)
    if kh != kw:
        raise ValueError(f"form 'loralib' needs a square kernel, got {kh}x{kw}: use form='peft' or leave the layer out")
    return (r * kh, in_ * kh), (out // groups * kh, r * kh)


def delta(down: Tensor, up: Tensor, weight_shape: Sequence[int], *, transposed: bool = False) -> Tensor:
    """The weight update dW of these factors, without the scale: (*weight_shape), or (K, *weight_shape) if stacked.

    The form is read off the factors: a ``peft`` convolution's ``down`` has as many dimensions as the weight (one more
    stacked), a ``loralib`` one's has two (three stacked).
    """
    stacked = up.ndim == 3
    lead = (up.shape[0],) if stacked else ()
    if down.ndim - len(lead) > 2:
        if transposed:  # down (in, r, kh, kw), up (out, r) -> (in, out, kh, kw)
            product = up.unsqueeze(-3) @ down.flatten(-2)
        else:  # down (r, in, kh, kw), up (out, r) -> (out, in, kh, kw)
            product = up @ down.flatten(len(lead) + 1)
    else:
        product = up @ down
    return product.reshape(*lead, *weight_shape)


def delta_backward(grad: Tensor, down: Tensor, up: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """The gradients of (down, up) from the gradient of :func:`delta`'s result, (*weight_shape) or (K, *weight_shape).

    All three in one dtype; the results have the factors' shapes.
    """
    lead = up.ndim - 2
    if down.ndim - lead == 4 and transposed:
        taps = down.flatten(-2)  # (in, r, taps), beside grad (in, out, taps)
        grad = grad.flatten(-2)
        grad_down = up.mT.unsqueeze(-3) @ grad
        return grad_down.reshape(down.shape), (grad @ taps.mT).sum(-3)
    rows = down.flatten(lead + 1)
    grad = grad.reshape(*up.shape[:-1], rows.shape[-1])
    return (up.mT @ grad).reshape(down.shape), grad @ rows.mT


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0, *, transposed: bool = False) -> Tensor:
    """W0 + scale * dW, computed in fp32 (fp64 for fp64 weights) whatever autocast says, in the weight's dtype."""
    with without_autocast(weight):
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        update = delta(down.to(wide), up.to(wide), weight.shape, transposed=transposed)
        return torch.add(weight.to(wide), update, alpha=scale).to(weight.dtype)
