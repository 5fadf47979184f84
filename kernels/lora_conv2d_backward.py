"""LoRA convolution, backward with a frozen base: at most three launches; x is kept, and y where its sign is enough.

With pre = conv(x, W) + scale * up u + bias, y = act(pre) + residual and the gradient dy of y

    g          =  dy * act'(pre)                    from y's sign (ReLU, LeakyReLU), else pre is computed again
    t[m, r]    =  scale * sum_o g[m, o] * up[o, r]
    dx         =  g against W, transposed  +  t against down, transposed
    d up[o,r]  =  scale * sum_m g[m, o] * u[m, r]
    d down     =  sum_m t[m, r] * x[m at (kh, kw), c]
    d bias     =  sum_m g[m, :]

1. ``output_side``: u again, g and t, and partial sums of d up and d bias; as ``output_rows``, which walks down strips,
   where these are all there is to compute and strips can.
2. ``input_side``: two roles in one grid. The first programs write dx (patches, or strips as in the forward pass where
   its rows kernel fits); the rest add up d down: each owns a group of taps and a block of channels, and walks over
   patches of x, reading t at the group's shifted pixels: a patch of x is loaded once per group, not once per tap.
3. ``reduce_parts``: sums the partial results in a fixed order. No atomics: the same bits at every run.

The gradient of W is never formed in the peft form. In units of the base convolution, with R = r padded to 16: forward
1 + R/O, dx 1 + R/O, u R/O, d down R/O; merged weights and autograd take 3. With merged weights (r = 0, the loralib
form) step 2 forms d W instead, per stage, and two small products take it apart.

Partial sums belong to one sample, so that samples of one batch may be at different stages: step 3 adds up those of
a stage.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorun_fast.kernels import configs
from lorun_fast.kernels._device import SIGN_TELLS, add_row, back_through, derivative, load_patch, stage_of
from lorun_fast.kernels._geometry import Layout, ceil_div, next_power, together
from lorun_fast.kernels._launch import COUNTS, PLANS, Launch, Plan, Slot, register_options, slots
from lorun_fast.kernels.lora_conv2d import (
    Signature,
    accumulate_taps,
    convolve_strip,
    image_argument,
    merge_precision,
    precision,
    read,
)


@triton.jit(do_not_specialize=COUNTS)
def output_side(
    x, weight, bias, down, up, stage, dy, y, g, t, part_up, part_bias, H, W, P, Q, patches, across, splits,
    x_n, x_h, dy_n, dy_h, y_n, y_h, scale,
    XP: tl.constexpr, DYP: tl.constexpr, YP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr,
    STAGES: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, ACT: tl.constexpr, KNOWN: tl.constexpr,
    BIAS: tl.constexpr, MIXED: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    R: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every ``splits``-th patch of one sample: g (if ACT), t (if RANK), and this program's part of d up and d bias.

    KNOWN: y, the forward result without a residual, tells act'; otherwise the convolution is computed again.
    """
    pid = tl.program_id(0)
    split = pid % splits
    n = pid // splits
    blocks: tl.constexpr = (O + BO - 1) // BO
    again: tl.constexpr = ACT is not None and not KNOWN
    dtype = dy.dtype.element_ty
    poison = 0.0
    if MIXED:
        k, poison = stage_of(stage, n, STAGES)
        if RANK == 0:
            weight += k.to(tl.int64) * (O * KH * KW * C)
        else:
            down += k * (RANK * KH * KW * C)
            up += k * (O * RANK)
    r = tl.arange(0, R)
    m = tl.arange(0, BH * BW)
    up_sum = tl.zeros((BO, R), tl.float32)
    bias_sum = tl.zeros((BO,), tl.float32)
    for patch in range(split, patches, splits):
        p = patch // across * BH + m // BW
        q = patch % across * BW + m % BW
        inside = ((p < P) & (q < Q))[:, None]
        low = tl.zeros((BH * BW, R), tl.float32)
        back = tl.zeros((BH * BW, R), tl.float32)
        if RANK > 0 and (not again or blocks > 1):
            unused = tl.zeros((BH * BW, BO), tl.float32)
            unused, low = accumulate_taps(
                x, weight, down, unused, low, n, patch // across * BH * SH - PH, patch % across * BW * SW - PW, 0,
                H, W, x_n, x_h, XP, C, O, RANK, KH, KW, SH, SW, DH, DW, BH, BW, BC, BO, R, False, True, DESC, PRECISION,
            )  # fmt: skip
        for b in range(blocks):
            o = b * BO + tl.arange(0, BO)
            owned = inside & (o < O)[None, :]
            at = dy + n.to(tl.int64) * dy_n + (p * dy_h + q * DYP)[:, None] + o[None, :]
            grad = tl.load(at, mask=owned, other=0.0)
            used = (o < O)[:, None] & (r < RANK)[None, :]
            if RANK > 0:
                factor = tl.load(up + o[:, None] * RANK + r[None, :], mask=used, other=0.0).to(dtype)
            if again:
                acc = tl.zeros((BH * BW, BO), tl.float32)
                acc, low = accumulate_taps(
                    x, weight, down, acc, low, n, patch // across * BH * SH - PH, patch % across * BW * SW - PW, b * BO,
                    H, W, x_n, x_h, XP, C, O, RANK, KH, KW, SH, SW, DH, DW, BH, BW, BC, BO, R, True,
                    RANK > 0 and blocks == 1, DESC, PRECISION,
                )  # fmt: skip
                if RANK > 0:
                    acc = tl.dot((low * scale).to(dtype), tl.trans(factor), acc, input_precision=PRECISION)
                if BIAS:
                    acc += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
                grad = (grad.to(tl.float32) * derivative(acc, ACT)).to(dtype)
            elif KNOWN:
                at = y + n.to(tl.int64) * y_n + (p * y_h + q * YP)[:, None] + o[None, :]
                grad = back_through(grad, tl.load(at, mask=owned, other=0.0), ACT)
            if ACT is not None:
                tl.store(g + n.to(tl.int64) * P * Q * O + ((p * Q + q) * O)[:, None] + o[None, :], grad, mask=owned)
            if RANK > 0:
                back = tl.dot(grad, factor, back, input_precision=PRECISION)
            if blocks == 1:
                if RANK > 0:
                    up_sum = tl.dot(tl.trans(grad), low.to(dtype), up_sum, input_precision=PRECISION)
                bias_sum += tl.sum(grad.to(tl.float32), 0)
            else:
                # The sums of all channel blocks do not fit registers: they live in this program's own part, in L2.
                later = patch > split
                if RANK > 0:
                    at = part_up + pid * (O * RANK) + o[:, None] * RANK + r[None, :]
                    so_far = tl.load(at, mask=used & later, other=0.0)
                    piece = tl.dot(tl.trans(grad), low.to(dtype), so_far, input_precision=PRECISION)
                    tl.store(at, piece, mask=used)
                at = part_bias + pid * O + o
                so_far = tl.load(at, mask=(o < O) & later, other=0.0)
                tl.store(at, so_far + tl.sum(grad.to(tl.float32), 0), mask=o < O)
                tl.debug_barrier()
        if RANK > 0:
            at = t + n.to(tl.int64) * P * Q * R + ((p * Q + q) * R)[:, None] + r[None, :]
            tl.store(at, (back * scale + poison).to(dtype), mask=inside)
    if blocks == 1:
        o = tl.arange(0, BO)
        if RANK > 0:
            at = part_up + pid * (O * RANK) + o[:, None] * RANK + r[None, :]
            tl.store(at, up_sum, mask=(o < O)[:, None] & (r < RANK)[None, :])
        tl.store(part_bias + pid * O + o, bias_sum, mask=o < O)


@triton.jit(do_not_specialize=COUNTS)
def output_rows(
    x, down, up, stage, dy, y, g, t, part_up, part_bias, H, W, P, Q, ROWS, strips, parts,
    x_n, x_h, dy_n, dy_h, y_n, y_h, scale,
    XP: tl.constexpr, DYP: tl.constexpr, YP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr,
    STAGES: tl.constexpr, K: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ACT: tl.constexpr, KNOWN: tl.constexpr, MIXED: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    BO: tl.constexpr, R: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output_side by strips, where no convolution is computed again: u as lora_conv2d_rows computes its result.

    A row of x, read at K offsets, serves the K rows of u that it touches, so that x leaves L2 K times instead of K * K
    times. A row of u is complete K - 1 rows of x later, and meets its row of dy then.
    """
    pid = tl.program_id(0)
    q0 = pid % strips * BW
    part = pid // strips % parts
    n = pid // (strips * parts)
    p0 = part % DH + part // DH * ROWS * DH
    dtype = dy.dtype.element_ty
    poison = 0.0
    if MIXED:
        k, poison = stage_of(stage, n, STAGES)
        down += k * (RANK * K * K * C)
        up += k * (O * RANK)
    c = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BO)
    r = tl.arange(0, R)
    used = (o < O)[:, None] & (r < RANK)[None, :]
    downs = ()
    for tap in tl.static_range(K * K):
        factor = tl.load(down + (r[None, :] * (K * K) + tap) * C + c, mask=(c < C) & (r < RANK)[None, :], other=0.0)
        downs = downs + (factor.to(dtype),)
    factor = tl.load(up + o[:, None] * RANK + r[None, :], mask=used, other=0.0).to(dtype)
    lows = ()
    for _ in tl.static_range(K):
        lows = lows + (tl.zeros((BW, R), tl.float32),)
    up_sum = tl.zeros((BO, R), tl.float32)
    bias_sum = tl.zeros((BO,), tl.float32)
    q = q0 + tl.arange(0, BW)
    for i in range(ROWS + K - 1):
        lows = add_row(
            lows, x, downs, n, p0 - PH + i * DH, q0 - PW, H, W, x_n, x_h, XP, C, K, DW, BW, BC, DESC, PRECISION
        )  # fmt: skip
        low = lows[0]
        lows = lows[1:] + (tl.zeros((BW, R), tl.float32),)
        p = p0 + (i - (K - 1)) * DH + tl.zeros((BW,), tl.int32)
        inside = ((p >= p0) & (p < P) & (q < Q))[:, None]
        owned = inside & (o < O)[None, :]
        grad = tl.load(dy + n.to(tl.int64) * dy_n + (p * dy_h + q * DYP)[:, None] + o[None, :], mask=owned, other=0.0)
        if KNOWN:
            at = y + n.to(tl.int64) * y_n + (p * y_h + q * YP)[:, None] + o[None, :]
            grad = back_through(grad, tl.load(at, mask=owned, other=0.0), ACT)
        if ACT is not None:
            tl.store(g + n.to(tl.int64) * P * Q * O + ((p * Q + q) * O)[:, None] + o[None, :], grad, mask=owned)
        back = tl.dot(grad, factor, tl.zeros((BW, R), tl.float32), input_precision=PRECISION)
        up_sum = tl.dot(tl.trans(grad), low.to(dtype), up_sum, input_precision=PRECISION)
        bias_sum += tl.sum(grad.to(tl.float32), 0)
        at = t + n.to(tl.int64) * P * Q * R + ((p * Q + q) * R)[:, None] + r[None, :]
        tl.store(at, (back * scale + poison).to(dtype), mask=inside)
    tl.store(part_up + pid * (O * RANK) + o[:, None] * RANK + r[None, :], up_sum, mask=used)
    tl.store(part_bias + pid * O + o, bias_sum, mask=o < O)


@triton.jit
def _back_tap(
    g, weight, acc, n, p0, q0, tap, o0, c0, P, Q, g_n, g_h,
    GP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    BC: tl.constexpr, BO: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (BM, BC) += g (BM, BO) * W[o, tap, c]; with down for W, t for g."""
    tile = load_patch(g, n, p0, q0, o0, P, Q, g_n, g_h, GP, O, 1, 1, BH, BW, BO, DESC)
    o = (o0 + tl.arange(0, BO))[:, None]
    c = (c0 + tl.arange(0, BC))[None, :]
    w = tl.load(weight + (o * TAPS + tap) * C + c, mask=(o < O) & (c < C), other=0.0)
    return tl.dot(tile, w.to(tile.dtype), acc, input_precision=PRECISION)


@triton.jit
def image_patch(
    g, t, weight, down, dx, n, patch, phase, c0, poison, H, W, P, Q, across, g_n, g_h, dx_n, dx_h,
    GP: tl.constexpr, DXP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    R: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx for BH x BW pixels of one stride phase: those that the same taps reach, so that no product is with zero."""
    i0 = patch // across * BH
    j0 = patch % across * BW
    a = phase // SW
    b = phase % SW
    acc = tl.zeros((BH * BW, BC), tl.float32)
    for kh in tl.static_range(KH):
        if SH * SW == 1 and O <= BO:
            for kw in range(KW):
                acc = _back_tap(
                    g, weight, acc, n, i0 + PH - kh * DH, j0 + PW - kw * DW, kh * KW + kw, 0, c0, P, Q, g_n, g_h,
                    GP, C, O, KH * KW, BH, BW, BC, BO, DESC, PRECISION,
                )  # fmt: skip
                if RANK > 0:
                    acc = _back_tap(
                        t, down, acc, n, i0 + PH - kh * DH, j0 + PW - kw * DW, kh * KW + kw, 0, c0, P, Q, P * Q * R,
                        Q * R, R, C, RANK, KH * KW, BH, BW, BC, R, False, PRECISION,
                    )  # fmt: skip
        else:
            for kw in tl.static_range(KW):
                up_h = a + PH - kh * DH
                up_w = b + PW - kw * DW
                if up_h % SH == 0 and up_w % SW == 0:
                    p0 = i0 + up_h // SH
                    q0 = j0 + up_w // SW
                    for o0 in range(0, O, BO):
                        acc = _back_tap(
                            g, weight, acc, n, p0, q0, kh * KW + kw, o0, c0, P, Q, g_n, g_h,
                            GP, C, O, KH * KW, BH, BW, BC, BO, DESC, PRECISION,
                        )  # fmt: skip
                    if RANK > 0:
                        acc = _back_tap(
                            t, down, acc, n, p0, q0, kh * KW + kw, 0, c0, P, Q, P * Q * R, Q * R,
                            R, C, RANK, KH * KW, BH, BW, BC, R, False, PRECISION,
                        )  # fmt: skip
    acc += poison
    m = tl.arange(0, BH * BW)
    h = (i0 + m // BW) * SH + a
    w = (j0 + m % BW) * SW + b
    c = c0 + tl.arange(0, BC)
    at = dx + n.to(tl.int64) * dx_n + (h * dx_h + w * DXP)[:, None] + c[None, :]
    tl.store(at, acc.to(dx.dtype.element_ty), mask=((h < H) & (w < W))[:, None] & (c < C)[None, :])


@triton.jit
def factor_part(
    x, t, part, n, index, group, c0, r0, patches, across, splits, H, W, P, Q, x_n, x_h, t_n, t_h,
    XP: tl.constexpr, TP: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    R: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part[index, tap, r, c] = sum of t[shifted by tap, r] * x[., c] over every ``splits``-th patch of x, for G taps.

    t: (N, P, Q, .) with RANK channels that count, from r0 on; WIDTH: rows of r in ``part``.
    """
    j = tl.arange(0, G * R)
    tap = group * G + j // R
    r = r0 + j % R
    reach_h = PH - tap // KW * DH
    reach_w = PW - tap % KW * DW
    real = (tap < KH * KW) & (r < RANK)
    m = tl.arange(0, BH * BW)
    acc = tl.zeros((G * R, BC), tl.float32)
    for patch in range(index % splits, patches, splits):
        h0 = patch // across * BH
        w0 = patch % across * BW
        tile = load_patch(x, n, h0, w0, c0, H, W, x_n, x_h, XP, C, 1, 1, BH, BW, BC, DESC)
        up_h = (h0 + m // BW)[:, None] + reach_h[None, :]
        up_w = (w0 + m % BW)[:, None] + reach_w[None, :]
        p = up_h // SH
        q = up_w // SW
        met = real[None, :] & (up_h >= 0) & (up_w >= 0) & (p < P) & (q < Q)
        if SH * SW > 1:
            met = met & (up_h % SH == 0) & (up_w % SW == 0)
        shifted = tl.load(t + n.to(tl.int64) * t_n + p * t_h + q * TP + r[None, :], mask=met, other=0.0)
        acc = tl.dot(tl.trans(shifted), tile, acc, input_precision=PRECISION)
    c = c0 + tl.arange(0, BC)
    at = part + index.to(tl.int64) * (KH * KW * WIDTH * C) + ((tap * WIDTH + r) * C)[:, None] + c[None, :]
    tl.store(at, acc, mask=real[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def input_side(
    x, g, t, weight, down, up, stage, dx, source, part, H, W, P, Q, image_programs, patches, across,
    ROWS, strips, parts, factor_patches, factor_across, splits,
    x_n, x_h, g_n, g_h, dx_n, dx_h, source_n, source_h, scale,
    XP: tl.constexpr, GP: tl.constexpr, DXP: tl.constexpr, SP: tl.constexpr, C: tl.constexpr, O: tl.constexpr,
    RANK: tl.constexpr, FACTOR: tl.constexpr, STAGES: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MIXED: tl.constexpr, STRIPS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    BO: tl.constexpr, R: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, FC: tl.constexpr, FR: tl.constexpr,
    G: tl.constexpr, DESC: tl.constexpr, FDESC: tl.constexpr, PRECISION: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """dx in the first ``image_programs`` programs, the partial d down (or d W) in the others.

    source: what d down is contracted from, t or g, (N, P, Q, FACTOR channels).
    """
    pid = tl.program_id(0)
    taps: tl.constexpr = KH * KW
    if pid < image_programs:
        poison = 0.0
        cblocks: tl.constexpr = (C + BC - 1) // BC
        if STRIPS:
            n = pid // (strips * parts)
        else:
            n = pid // (patches * SH * SW * cblocks)
        if MIXED:
            k, poison = stage_of(stage, n, STAGES)
            if RANK == 0:
                weight += k.to(tl.int64) * (O * taps * C)
            else:
                down += k * (RANK * taps * C)
                up += k * (O * RANK)
        if STRIPS:
            convolve_strip(
                g, weight, up, up, down, g, dx, n, pid % strips, pid // strips % parts, poison, P, Q, H, W, ROWS,
                g_n, g_h, g_n, g_h, dx_n, dx_h, scale, GP, GP, DXP, O, C, RANK,
                taps * C, 1, C, RANK, 1, 0, 1, taps * C, C, True, KH, DH * (KH - 1) - PH, DW * (KW - 1) - PW, DH, DW,
                None, False, False, MIXED, BW, BO, BC, R, DESC, PRECISION, MERGE,
            )  # fmt: skip
        else:
            c0 = pid % cblocks * BC
            phase = pid // cblocks % (SH * SW)
            patch = pid // (cblocks * SH * SW) % patches
            image_patch(
                g, t, weight, down, dx, n, patch, phase, c0, poison, H, W, P, Q, across, g_n, g_h, dx_n, dx_h,
                GP, DXP, C, O, RANK, KH, KW, SH, SW, PH, PW, DH, DW, BH, BW, BC, BO, R, DESC, PRECISION,
            )  # fmt: skip
    else:
        cell = pid - image_programs
        fblocks: tl.constexpr = (C + FC - 1) // FC
        rblocks: tl.constexpr = (FACTOR + FR - 1) // FR
        groups: tl.constexpr = (taps + G - 1) // G
        c0 = cell % fblocks * FC
        r0 = cell // fblocks % rblocks * FR
        group = cell // (fblocks * rblocks) % groups
        index = cell // (fblocks * rblocks * groups)
        factor_part(
            x, source, part, index // splits, index, group, c0, r0, factor_patches, factor_across, splits, H, W, P, Q,
            x_n, x_h, source_n, source_h, XP, SP, C, FACTOR, FACTOR, KH, KW, SH, SW, PH, PW, DH, DW, G, FH, FW, FC, FR,
            FDESC, PRECISION,
        )  # fmt: skip


@triton.jit
def sum_parts(part, stage, k, chosen, e, size, count, splits, MIXED: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr):
    """(BE,): the elements e of ``part`` (count, size), added over the entries that belong to stage k, in order."""
    total = tl.zeros((BE,), tl.float32)
    if MIXED or k == chosen:
        for j0 in range(0, count, BJ):
            j = j0 + tl.arange(0, BJ)
            use = j < count
            if MIXED:
                use = use & (tl.load(stage + j // splits, mask=use, other=-1).to(tl.int32) == k)
            at = part + j[:, None].to(tl.int64) * size + e[None, :]
            total += tl.sum(tl.load(at, mask=use[:, None] & (e < size)[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=COUNTS)
def reduce_parts(
    part_down, part_up, part_bias, stage, d_down, d_up, d_bias, chosen, N, down_splits, up_splits, scale,
    C: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, FACTOR: tl.constexpr, RANK: tl.constexpr,
    DOWN: tl.constexpr, UP: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, MIXED: tl.constexpr,
    BJ: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """d down (or d W) (STAGES, FACTOR, C, TAPS), d up (STAGES, O, RANK), d bias (O,): one block of BE elements each."""
    pid = tl.program_id(0)
    down_size: tl.constexpr = TAPS * FACTOR * C
    down_blocks: tl.constexpr = (down_size + BE - 1) // BE if DOWN else 0
    up_blocks: tl.constexpr = (O * RANK + BE - 1) // BE if UP else 0
    if pid < STAGES * down_blocks:
        if DOWN:
            k = pid // down_blocks
            e = pid % down_blocks * BE + tl.arange(0, BE)
            total = sum_parts(part_down, stage, k, chosen, e, down_size, N * down_splits, down_splits, MIXED, BJ, BE)
            c = e % C
            r = e // C % FACTOR
            at = d_down + k * down_size + (r * C + c) * TAPS + e // (C * FACTOR)
            tl.store(at, total.to(d_down.dtype.element_ty), mask=e < down_size)
    elif pid < STAGES * (down_blocks + up_blocks):
        if UP:
            cell = pid - STAGES * down_blocks
            k = cell // up_blocks
            e = cell % up_blocks * BE + tl.arange(0, BE)
            total = sum_parts(part_up, stage, k, chosen, e, O * RANK, N * up_splits, up_splits, MIXED, BJ, BE)
            tl.store(d_up + k * (O * RANK) + e, (total * scale).to(d_up.dtype.element_ty), mask=e < O * RANK)
    else:
        if BIAS:
            e = (pid - STAGES * (down_blocks + up_blocks)) * BE + tl.arange(0, BE)
            total = sum_parts(part_bias, stage, 0, 0, e, O, N * up_splits, up_splits, False, BJ, BE)
            tl.store(d_bias + e, total.to(d_bias.dtype.element_ty), mask=e < O)


def _splits(programs: int, n: int, patches: int) -> int:
    """Programs per sample that share its patches: ``programs`` in all, at least one patch each."""
    return max(1, min(patches, programs // n))


@functools.lru_cache(PLANS)
def plan(
    s: Signature, dy: Layout, output: Layout | None, need: tuple[bool, bool, bool], stages: int,
    d_down: tuple[tuple[int, ...], torch.dtype], d_up: tuple[tuple[int, ...], torch.dtype] | None,
) -> Plan:  # fmt: skip
    """The launches for dx, the factors (d W where there are none) and d bias, as ``need`` says, which are new tensors.

    output: where its sign tells the derivative. stages: the length of the gradients' leading axis. d_down (or d W's)
    and d_up: shape and dtype. ``chosen`` among the values is the stage of an int call.
    """
    g, (x, dy, output) = s.arrange(dy=dy, output=output)
    rank, activation, dtype = s.rank, s.activation, s.x.dtype
    tile = s.tile or configs.backward(g, dtype, configs.architecture(s.device), rank, s.mixed, activation)
    need_x, need_factors, need_bias = need
    block = next_power(rank or 1)
    launches: list[Launch] = []
    new: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def make(name: str, *shape: int, dtype: torch.dtype = dtype) -> Slot:
        new[name] = shape, dtype
        return Slot(name)

    geometry = {
        "C": g.c, "O": g.o, "RANK": rank, "STAGES": s.stages, "KH": g.kernel[0], "KW": g.kernel[1], "SH": g.stride[0],
        "SW": g.stride[1], "PH": g.padding[0], "PW": g.padding[1], "DH": g.dilation[0], "DW": g.dilation[1],
        "MIXED": s.mixed, "R": block, "PRECISION": precision(dtype, s.tf32),
    }  # fmt: skip
    sizes = slots("down", "up", "stage", "scale") | {
        "H": g.h, "W": g.w, "P": g.p, "Q": g.q, "x_n": x.strides[0], "x_h": x.strides[1],
    }  # fmt: skip
    grad, grad_slot = dy, Slot("dy")
    low = part_up = part_bias = None
    up_splits = 1
    if activation is not None or need_bias or (rank and (need_x or need_factors)):
        known = output is not None
        strips_serve = tile.strip is not None and rank > 0 and (activation is None or known)
        one = tile.strip if strips_serve else tile.output
        across = ceil_div(g.q, one.bw)
        if strips_serve:
            rows, parts = configs.strip_parts(g.p, g.n * across, g.dilation[0], one.rows)
            up_splits = across * parts
            split = {"ROWS": rows, "strips": across, "parts": parts}
        else:
            patches = across * ceil_div(g.p, one.bh)
            up_splits = _splits(tile.programs, g.n, patches)
            split = {"patches": patches, "across": across, "splits": up_splits}
        x_slot, described = image_argument(
            "x", x, (one.bh, one.bw, one.bc), one.descriptors and g.stride == (1, 1)
        )  # fmt: skip
        if activation is not None:
            grad = Layout.new((g.n, g.p, g.q, g.o), dtype)
            grad_slot = make("g", *grad.shape)
        if rank:
            low = make("t", g.n, g.p, g.q, block)
            part_up = make("part_up", g.n * up_splits, g.o, rank, dtype=torch.float32)
        part_bias = make("part_bias", g.n * up_splits, g.o, dtype=torch.float32)
        beside = output if known else dy
        args = sizes | split | {
            "x": x_slot, "dy": Slot("dy"), "y": Slot("y") if known else None, "g": grad_slot, "t": low,
            "part_up": part_up, "part_bias": part_bias, "dy_n": dy.strides[0], "dy_h": dy.strides[1],
            "y_n": beside.strides[0], "y_h": beside.strides[1],
        }  # fmt: skip
        constants = geometry | {
            "XP": x.strides[2], "DYP": dy.strides[2], "YP": beside.strides[2], "ACT": activation, "KNOWN": known,
            "BW": one.bw, "BC": one.bc, "BO": one.bo, "DESC": described,
        }  # fmt: skip
        if strips_serve:
            constants = {name: constants[name] for name in output_rows.arg_names if name in constants}
            constants["K"] = g.kernel[0]
            kernel = output_rows
        else:
            args |= slots("weight", "bias")
            constants |= {"BIAS": s.bias is not None, "BH": one.bh}
            kernel = output_side
        options = {"maxnreg": one.registers} if one.registers else register_options(dtype)
        launches.append(Launch(kernel, g.n * up_splits, args, constants, one.warps, one.stages, options))

    part_down = None
    down_splits = 1
    if need_x or need_factors:
        image, strip = tile.image, tile.image.rows is not None
        rows = strips = parts = across = patches = 1
        if strip:
            strips = ceil_div(g.w, image.bw)
            rows, parts = configs.strip_parts(g.h, g.n * strips, g.dilation[0], image.rows)
            image_programs = g.n * strips * parts
        else:
            across = ceil_div(ceil_div(g.w, g.stride[1]), image.bw)
            patches = across * ceil_div(ceil_div(g.h, g.stride[0]), image.bh)
            image_programs = g.n * patches * g.stride[0] * g.stride[1] * ceil_div(g.c, image.bc)
        # Without a gradient of x some tensor stands where it would be written.
        dx, dx_slot = dy, Slot("dy")
        if need_x:
            dx, dx_slot = Layout.new((g.n, g.h, g.w, g.c), dtype), make("dx", *s.x.shape)
        else:
            image_programs = 0
        source, source_slot, width = grad, grad_slot, g.o
        if rank:
            source, source_slot, width = Layout.new((g.n, g.p, g.q, block), dtype), low, rank
        f = tile.factor
        f_rows = f.rows if rank == 0 else block
        f_across = ceil_div(g.w, f.bw)
        f_patches = f_across * ceil_div(g.h, f.bh)
        cells = ceil_div(g.c, f.bc) * ceil_div(width, f_rows) * ceil_div(g.taps, f.group)
        factor_programs = 0
        if need_factors:
            down_splits = _splits(ceil_div(tile.programs, cells), g.n, f_patches)
            part_down = make("part_down", g.n * down_splits, g.taps, width, g.c, dtype=torch.float32)
            factor_programs = g.n * down_splits * cells
        g_slot, described = image_argument(
            grad_slot.name, grad, (1 if strip else image.bh, image.bw, image.bo), image.descriptors
        )
        x_slot, x_described = image_argument("x", x, (f.bh, f.bw, f.bc), image.descriptors)
        args = sizes | slots("weight") | {
            "x": x_slot, "g": g_slot, "t": low, "dx": dx_slot, "source": source_slot,
            "part": part_bias if part_down is None else part_down, "image_programs": image_programs,
            "patches": patches, "across": across, "ROWS": rows, "strips": strips, "parts": parts,
            "factor_patches": f_patches, "factor_across": f_across, "splits": down_splits, "g_n": grad.strides[0],
            "g_h": grad.strides[1], "dx_n": dx.strides[0], "dx_h": dx.strides[1], "source_n": source.strides[0],
            "source_h": source.strides[1],
        }  # fmt: skip
        constants = geometry | {
            "XP": x.strides[2], "GP": grad.strides[2], "DXP": dx.strides[2], "SP": source.strides[2], "FACTOR": width,
            "STRIPS": strip, "BH": image.bh, "BW": image.bw, "BC": image.bc, "BO": image.bo, "FH": f.bh, "FW": f.bw,
            "FC": f.bc, "FR": f_rows, "G": f.group, "DESC": described, "FDESC": x_described,
            "MERGE": merge_precision(s.factors, dtype),
        }  # fmt: skip
        programs = image_programs + factor_programs
        options = register_options(dtype)
        launches.append(Launch(input_side, programs, args, constants, image.warps, image.stages, options))

    if need_factors or need_bias:
        lead = stages
        width = rank or g.o
        block_e = 64
        blocks = 0
        down_slot = up_slot = bias_slot = None
        if need_factors:
            down_slot = make("d_down", *d_down[0], dtype=d_down[1])
            blocks += lead * ceil_div(g.taps * width * g.c, block_e)
            if rank:
                up_slot = make("d_up", *d_up[0], dtype=d_up[1])
                blocks += lead * ceil_div(g.o * rank, block_e)
        if need_bias:
            bias_slot = make("d_bias", g.o, dtype=s.bias or dtype)
            blocks += ceil_div(g.o, block_e)
        args = slots("stage", "chosen", "scale") | {
            "part_down": part_down, "part_up": part_up, "part_bias": part_bias, "d_down": down_slot, "d_up": up_slot,
            "d_bias": bias_slot, "N": g.n, "down_splits": down_splits, "up_splits": up_splits,
        }  # fmt: skip
        constants = {
            "C": g.c, "O": g.o, "TAPS": g.taps, "FACTOR": width, "RANK": rank, "DOWN": need_factors,
            "UP": up_slot is not None, "BIAS": need_bias, "STAGES": lead, "MIXED": s.mixed, "BJ": 64, "BE": block_e,
        }  # fmt: skip
        launches.append(Launch(reduce_parts, blocks, args, constants, 4, 1))
    return Plan(launches, new)


def backward(
    dy: Tensor,
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
    activation: str | None = None,
    output: Tensor | None = None,
    need: tuple[bool, bool, bool] = (True, True, False),
    tf32: bool = False,
    tile: configs.BackwardTile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, d down, d up, d bias) of lora_conv2d.forward for the gradient dy of its result; the base weight has none.

    Arguments as there; the residual's gradient is dy itself. output: the forward result, where there was no residual;
    with it ReLU and LeakyReLU take their derivative from its sign, and no convolution is computed again. need: which
    of (dx, both factors, bias) to compute; the others are None. d down and d up have the shapes of down and up, leading
    axis included, zero at stages that took no part. With down = up = None, d down is the gradient of ``weight``, shaped
    like it, and d up is None.
    """
    factors = weight if down is None else down
    d_down, d_up = (None if t is None else (t.shape, t.dtype) for t in (factors, up))
    values, signature = read(
        x, weight, bias, down, up, scale, stage, stride, padding, dilation, activation, tf32, tile
    )  # fmt: skip
    known = together(output) if output is not None and activation in SIGN_TELLS else None
    values |= {"dy": together(dy), "y": known, "chosen": stage if isinstance(stage, int) else 0}
    found = plan(
        signature, Layout.of(values["dy"]), None if known is None else Layout.of(known), need,
        1 if stage is None else factors.shape[0], d_down, d_up,
    )  # fmt: skip
    found.run(values)
    dx = values.get("dx")
    dx = None if dx is None else dx.permute(0, 3, 1, 2)
    return dx, values.get("d_down"), values.get("d_up"), values.get("d_bias")
