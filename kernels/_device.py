"""Device functions shared by the kernels: activations, their derivatives, and reading one patch of an NHWC image."""

from __future__ import annotations

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "leaky_relu":
        x = tl.where(x > 0, x, x * LEAKY_SLOPE)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def derivative(x, ACT: tl.constexpr):
    """d activate(x) / dx; 0 for ReLU and the slope for LeakyReLU at 0, as in PyTorch."""
    if ACT == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "leaky_relu":
        d = tl.where(x > 0, 1.0, LEAKY_SLOPE)
    elif ACT == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "silu":
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    else:
        d = x * 0.0 + 1.0
    return d


# Their result has the sign of what they are applied to, and so tells their derivative.
SIGN_TELLS = ("relu", "leaky_relu")


@triton.jit
def back_through(grad, y, ACT: tl.constexpr):
    """grad * d activate(x) / dx from y = activate(x), for SIGN_TELLS, in grad's dtype."""
    if ACT == "relu":
        below = tl.zeros_like(grad)
    else:
        below = (grad.to(tl.float32) * LEAKY_SLOPE).to(grad.dtype)
    return tl.where(y > 0, grad, below)


@triton.jit
def load_patch(
    image, n, h0, w0, c0, H, W, s_n, s_h,
    PIXEL: tl.constexpr, C: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """(BH*BW, BC): pixels (h0 + i*STEP_H, w0 + j*STEP_W), channels c0 to c0+BC; zero outside the image.

    image: a descriptor of (N, H, W, C) with blocks (1, BH, BW, BC) if DESC, else a pointer to (N, H, W, C) with
    strides s_n, s_h, PIXEL, 1.
    """
    if DESC:
        tile = image.load([n, h0, w0, c0]).reshape(BH * BW, BC)
    else:
        m = tl.arange(0, BH * BW)
        h = h0 + m // BW * STEP_H
        w = w0 + m % BW * STEP_W
        c = c0 + tl.arange(0, BC)
        inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        if C % BC != 0:
            inside = inside & (c < C)[None, :]
        start = image + n.to(tl.int64) * s_n
        tile = tl.load(start + (h * s_h + w * PIXEL)[:, None] + c[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def add_row(
    accs, x, factors, n, h, w0, H, W, x_n, x_h,
    XP: tl.constexpr, C: tl.constexpr, K: tl.constexpr, DW: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """accs, the K rows of the result that row h of x touches, with what it adds to them, read at K offsets.

    factors: (BC, out) of the K * K taps. The first of the rows is complete then.
    """
    for kw in tl.static_range(K):
        tile = load_patch(x, n, h, w0 + kw * DW, 0, H, W, x_n, x_h, XP, C, 1, 1, 1, BW, BC, DESC)
        added = ()
        for j in tl.static_range(K):
            added = added + (tl.dot(tile, factors[(K - 1 - j) * K + kw], accs[j], input_precision=PRECISION),)
        accs = added
    return accs


@triton.jit
def stage_of(stage, n, STAGES: tl.constexpr):
    """(stage of sample n, 0.0), or (0, NaN) for a stage out of range: the sample turns NaN, nothing is read astray."""
    k = tl.load(stage + n).to(tl.int32)
    valid = (k >= 0) & (k < STAGES)
    return tl.where(valid, k, 0), tl.where(valid, 0.0, float("nan"))
