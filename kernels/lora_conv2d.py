"""LoRA convolution, forward, in one launch.

What it computes (the form of :mod:`lorun_fast.adapters` called peft; r = 0 is a plain or merged convolution)

    u[m, r]  =  sum_{kh, kw, c}  x[m at (kh, kw), c] * down[r, c, kh, kw]
    y[m, o]  =  act( sum_{kh, kw, c} x[m at (kh, kw), c] * W[o, c, kh, kw]
                     +  scale * sum_r u[m, r] * up[o, r]  +  bias[o] )  +  residual[m, o]

over the output pixels m = (n, p, q); x at (kh, kw) is pixel (p*stride + kh*dilation - padding, ...), zero outside.
With one stage per sample, down and up (peft) or W (merged weights of every stage, r = 0) are those of stage[n].

Bytes and operations. Memory: x once, y once, the weights. Arithmetic: 2 * pixels * O * C * k^2, and R / O of that for
the adapter, R being r padded to 16. Below C = 41 (3 x 3, bf16, H200) memory is the limit, above it the tensor cores.

Two ways to tile, because between memory and tensor cores lies the cache:

``taps``  A program computes BH x BW pixels and BO channels, and reads its patch of x again for each of the k^2 taps,
          and all weights, from L2: k^2 * (pixels*C + pixels/BM * O*C) elements in all. Base and low-rank product
          use the same loaded tile. Any kernel size, stride, dilation and width.
``rows``  (3 x 3 and 5 x 5, stride 1, C and O at most 64.) The weights of all taps stay in shared memory, merged there
          with the adapter in fp32 before the first pixel: the low-rank product costs nothing per pixel. A program
          walks down a strip BW wide; a row of x, read at k horizontal offsets, serves the k output rows that it
          touches, held in k accumulators that move up by one each row. x leaves L2 k times instead of k^2 times,
          and the weights once per strip instead of once per patch.

Where the channels suit a descriptor (a multiple of 16 bytes per pixel), x arrives by bulk-tensor copies, which supply
the zero padding; elsewhere (28 or 31 channels) by masked loads as wide as the alignment allows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorun_fast.kernels import configs
from lorun_fast.kernels._device import activate, add_row, load_patch, stage_of
from lorun_fast.kernels._geometry import Geometry, Layout, ceil_div, next_power, tap_major, together
from lorun_fast.kernels._launch import COUNTS, PLANS, Launch, Plan, Slot, slots


@triton.jit
def _tap(
    x, weight, down, acc, low, n, h, w, tap, c0, o0, H, W, x_n, x_h,
    XP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr, TAPS: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    R: tl.constexpr, BASE: tl.constexpr, LOW: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tap and BC channels of accumulate_taps."""
    tile = load_patch(x, n, h, w, c0, H, W, x_n, x_h, XP, C, SH, SW, BH, BW, BC, DESC)
    c = (c0 + tl.arange(0, BC))[:, None]
    if BASE:
        o = (o0 + tl.arange(0, BO))[None, :]
        base = tl.load(weight + (o * TAPS + tap) * C + c, mask=(o < O) & (c < C), other=0.0)
        acc = tl.dot(tile, base.to(tile.dtype), acc, input_precision=PRECISION)
    if LOW:
        r = tl.arange(0, R)[None, :]
        factor = tl.load(down + (r * TAPS + tap) * C + c, mask=(r < RANK) & (c < C), other=0.0)
        low = tl.dot(tile, factor.to(tile.dtype), low, input_precision=PRECISION)
    return acc, low


@triton.jit
def accumulate_taps(
    x, weight, down, acc, low, n, h0, w0, o0, H, W, x_n, x_h,
    XP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, R: tl.constexpr,
    BASE: tl.constexpr, LOW: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (BH*BW, BO) += x * W if BASE, low (BH*BW, R) += x * down if LOW, for the patch whose first tap is (h0, w0).

    The innermost loop is the one Triton pipelines: over channel blocks, or over kw where one block holds all channels.
    Nothing is flattened over (kh, kw, channels): Triton has miscompiled that loop at 8 warps.
    """
    for kh in tl.static_range(KH):
        if C <= BC:
            for kw in range(KW):
                acc, low = _tap(
                    x, weight, down, acc, low, n, h0 + kh * DH, w0 + kw * DW, kh * KW + kw, 0, o0, H, W, x_n, x_h,
                    XP, C, O, RANK, KH * KW, SH, SW, BH, BW, BC, BO, R, BASE, LOW, DESC, PRECISION,
                )  # fmt: skip
        else:
            for kw in tl.static_range(KW):
                for c0 in range(0, C, BC):
                    acc, low = _tap(
                        x, weight, down, acc, low, n, h0 + kh * DH, w0 + kw * DW, kh * KW + kw, c0, o0, H, W, x_n, x_h,
                        XP, C, O, RANK, KH * KW, SH, SW, BH, BW, BC, BO, R, BASE, LOW, DESC, PRECISION,
                    )  # fmt: skip
    return acc, low


@triton.jit
def finish(
    acc, bias, other, n, p, q, o, inside, other_n, other_h, OP: tl.constexpr, O: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The epilogue: act(acc + bias), and OTHER: + residual.

    acc (BM, BO) fp32; p, q (BM,) pixels; o (BO,) channels; other: the residual, (N, P, Q, O).
    """
    if BIAS:
        acc += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    if OTHER:
        at = other + n.to(tl.int64) * other_n + (p * other_h + q * OP)[:, None] + o[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def lora_conv2d_taps(
    x, weight, bias, down, up, stage, other, y, H, W, P, Q, patches, across,
    x_n, x_h, other_n, other_h, y_n, y_h, scale,
    XP: tl.constexpr, OP: tl.constexpr, YP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr,
    STAGES: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    OTHER: tl.constexpr, MIXED: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    R: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One patch of BH x BW pixels and BO channels. Blocks of channels are neighbours, so that they share x in L2."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (O + BO - 1) // BO
    o0 = pid % blocks * BO
    patch = pid // blocks % patches
    n = pid // (blocks * patches)
    p0 = patch // across * BH
    q0 = patch % across * BW
    poison = 0.0
    if MIXED:
        k, poison = stage_of(stage, n, STAGES)
        if RANK == 0:
            weight += k.to(tl.int64) * (O * KH * KW * C)
        else:
            down += k * (RANK * KH * KW * C)
            up += k * (O * RANK)
    acc = tl.zeros((BH * BW, BO), tl.float32)
    low = tl.zeros((BH * BW, R), tl.float32)
    acc, low = accumulate_taps(
        x, weight, down, acc, low, n, p0 * SH - PH, q0 * SW - PW, o0, H, W, x_n, x_h, XP, C, O, RANK, KH, KW, SH, SW,
        DH, DW, BH, BW, BC, BO, R, True, RANK > 0, DESC, PRECISION,
    )  # fmt: skip
    o = o0 + tl.arange(0, BO)
    if RANK > 0:
        r = tl.arange(0, R)[:, None]
        factor = tl.load(up + o[None, :] * RANK + r, mask=(o < O)[None, :] & (r < RANK), other=0.0)
        low = (low * scale).to(y.dtype.element_ty)
        acc = tl.dot(low, factor.to(low.dtype), acc, input_precision=PRECISION)
    if MIXED:
        acc += poison
    m = tl.arange(0, BH * BW)
    p = p0 + m // BW
    q = q0 + m % BW
    inside = ((p < P) & (q < Q))[:, None] & (o < O)[None, :]
    acc = finish(acc, bias, other, n, p, q, o, inside, other_n, other_h, OP, O, ACT, BIAS, OTHER)
    at = y + n.to(tl.int64) * y_n + (p * y_h + q * YP)[:, None] + o[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def convolve_strip(
    x, weight, bias, left, right, other, y, n, strip, part, poison, H, W, P, Q, ROWS,
    x_n, x_h, other_n, other_h, y_n, y_h, scale,
    XP: tl.constexpr, OP: tl.constexpr, YP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr,
    W_IN: tl.constexpr, W_OUT: tl.constexpr, W_TAP: tl.constexpr, L_IN: tl.constexpr, L_R: tl.constexpr,
    L_TAP: tl.constexpr, R_OUT: tl.constexpr, R_R: tl.constexpr, R_TAP: tl.constexpr, FLIP: tl.constexpr,
    K: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr, MIXED: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, R: tl.constexpr, DESC: tl.constexpr,
    PRECISION: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Rows p0, p0 + DH, ... (ROWS of them) of one strip of BW columns.

    left (in, r) and right (r, out) are the factors of one tap's update, whose strides say which of them is tap-wise:
    down and up going forward, up and down going back (FLIP turns the taps round).
    """
    q0 = strip * BW
    p0 = part % DH + part // DH * ROWS * DH
    c = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BO)
    inside_w = (c < C) & (o < O)[None, :]
    r = tl.arange(0, R)
    inside_l = (c < C) & (r < RANK)[None, :]
    inside_r = (r < RANK)[:, None] & (o < O)[None, :]
    weights = ()
    for t in tl.static_range(K * K):
        tap = K * K - 1 - t if FLIP else t
        merged = tl.load(weight + c * W_IN + o[None, :] * W_OUT + tap * W_TAP, mask=inside_w, other=0.0).to(tl.float32)
        if RANK > 0:
            a = tl.load(left + c * L_IN + r[None, :] * L_R + tap * L_TAP, mask=inside_l, other=0.0)
            b = tl.load(right + r[:, None] * R_R + o[None, :] * R_OUT + tap * R_TAP, mask=inside_r, other=0.0)
            merged += scale * tl.dot(a, b, input_precision=MERGE)
        weights = weights + (merged.to(y.dtype.element_ty),)
    accs = ()
    for _ in tl.static_range(K):
        accs = accs + (tl.zeros((BW, BO), tl.float32),)
    q = q0 + tl.arange(0, BW)
    for i in range(ROWS + K - 1):
        accs = add_row(
            accs, x, weights, n, p0 - PH + i * DH, q0 - PW, H, W, x_n, x_h, XP, C, K, DW, BW, BC, DESC, PRECISION
        )  # fmt: skip
        # This row of x was the last of accs[0]'s output row; every other accumulator moves up by one.
        done = accs[0]
        accs = accs[1:] + (tl.zeros((BW, BO), tl.float32),)
        p = p0 + (i - (K - 1)) * DH + tl.zeros((BW,), tl.int32)
        inside = ((p >= p0) & (p < P) & (q < Q))[:, None] & (o < O)[None, :]
        if MIXED:
            done += poison
        done = finish(done, bias, other, n, p, q, o, inside, other_n, other_h, OP, O, ACT, BIAS, OTHER)
        at = y + n.to(tl.int64) * y_n + (p * y_h + q * YP)[:, None] + o[None, :]
        tl.store(at, done.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def lora_conv2d_rows(
    x, weight, bias, down, up, stage, other, y, H, W, P, Q, ROWS, strips, parts,
    x_n, x_h, other_n, other_h, y_n, y_h, scale,
    XP: tl.constexpr, OP: tl.constexpr, YP: tl.constexpr, C: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr,
    STAGES: tl.constexpr, K: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr, MIXED: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, R: tl.constexpr, DESC: tl.constexpr,
    PRECISION: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """One strip of BW columns and ROWS rows, DH apart, of one sample."""
    pid = tl.program_id(0)
    strip = pid % strips
    part = pid // strips % parts
    n = pid // (strips * parts)
    poison = 0.0
    if MIXED:
        k, poison = stage_of(stage, n, STAGES)
        if RANK == 0:
            weight += k.to(tl.int64) * (O * K * K * C)
        else:
            down += k * (RANK * K * K * C)
            up += k * (O * RANK)
    convolve_strip(
        x, weight, bias, down, up, other, y, n, strip, part, poison, H, W, P, Q, ROWS,
        x_n, x_h, other_n, other_h, y_n, y_h, scale, XP, OP, YP, C, O, RANK,
        1, K * K * C, C, 1, K * K * C, C, RANK, 1, 0, False, K, PH, PW, DH, DW,
        ACT, BIAS, OTHER, MIXED, BW, BC, BO, R, DESC, PRECISION, MERGE,
    )  # fmt: skip


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """How tl.dot multiplies: fp32 strictly unless tf32 is asked for; 16-bit types have one way only."""
    return "tf32" if tf32 or dtype != torch.float32 else "ieee"


def merge_precision(factors: torch.dtype | None, dtype: torch.dtype) -> str:
    """How the update is formed: exactly for 16-bit factors, to 21 bits where it is rounded to 16-bit weights after."""
    if factors != torch.float32:
        return "tf32"
    return "ieee" if dtype == torch.float32 else "tf32x3"


def image_argument(name: str, image: Layout, block: tuple[int, ...], describe: bool) -> tuple[Slot, bool]:
    """(what the kernel reads an image through, whether that is a descriptor)."""
    if describe and image.describable:
        return Slot(name, (list(image.shape), list(image.strides), [1, *block])), True
    return Slot(name), False


class Signature(NamedTuple):
    """What decides the launches of a call, apart from images beside x: what plans are kept under."""

    x: Layout
    device: torch.device
    weight: tuple[int, ...]  # the shape
    bias: torch.dtype | None
    factors: torch.dtype | None  # None without an adapter; so is rank 0
    rank: int
    stages: int
    mixed: bool  # one stage per sample
    stride: int | tuple[int, int]
    padding: int | tuple[int, int] | str
    dilation: int | tuple[int, int]
    activation: str | None
    tf32: bool
    tile: configs.Tile | configs.BackwardTile | None

    @property
    def geometry(self) -> Geometry:
        n, h, w, c = self.x.shape
        return Geometry.of((n, c, h, w), self.weight, self.stride, self.padding, self.dilation)

    def arrange(self, **outputs: Layout | None) -> tuple[Geometry, list[Layout | None]]:
        """(geometry, x and the output-sized images): rows of pixels where these do not interact, if all can be."""
        g, images = self.geometry, [self.x, *outputs.values()]
        for name, image in outputs.items():
            if image is not None and image.shape != (g.n, g.p, g.q, g.o):
                n, p, q, o = image.shape
                raise ValueError(f"{name}: expected {(g.n, g.o, g.p, g.q)}, got {(n, o, p, q)}")
        if g.plain and all(image is None or image.in_a_row for image in images):
            return g.flat(), [None if image is None else image.flat() for image in images]
        return g, images


def read(
    x, weight, bias, down, up, scale, stage, stride, padding, dilation, activation, tf32, tile
) -> tuple[dict[str, Tensor | float | None], Signature]:
    """(what the kernels read, by its name there and in the layout they want; the signature)."""
    stages, mixed, rank, factors = 1, isinstance(stage, Tensor), 0, None
    if mixed:
        stage, stages = stage.contiguous(), (weight if weight.ndim == 5 else down).shape[0]
    elif stage is not None and weight.ndim == 5:
        weight = weight[stage]
    elif stage is not None and down is not None:
        down, up = down[stage], up[stage]
    if down is not None:
        rank, factors = up.shape[-1], down.dtype
        down, up = tap_major(down), up.contiguous()
        if up.dtype != factors:
            up = up.to(factors)
    x = together(x)
    values = {
        "x": x, "weight": tap_major(weight), "bias": bias, "down": down, "up": up, "stage": stage if mixed else None,
        "scale": float(scale),
    }  # fmt: skip
    return values, Signature(
        Layout.of(x), x.device, weight.shape, None if bias is None else bias.dtype, factors, rank, stages, mixed,
        stride, padding, dilation, activation, tf32, tile,
    )  # fmt: skip


@functools.lru_cache(PLANS)
def plan(s: Signature, residual: Layout | None = None, out: Layout | None = None) -> Plan:
    """The launch that writes y: as ``out`` lies, else a new tensor (N, P, Q, O)."""
    g, new = s.geometry, {}
    if out is None:
        out = Layout.new((g.n, g.p, g.q, g.o), s.x.dtype)
        new["y"] = out.shape, out.dtype
    elif out.strides[3] != 1 and g.o != 1:
        s_n, s_h, s_w, s_c = out.strides
        raise ValueError(f"out: expected channels that lie together, got strides {(s_n, s_c, s_h, s_w)}")
    g, (x, residual, y) = s.arrange(residual=residual, out=out)
    tile = s.tile or configs.forward(g, x.dtype, configs.architecture(s.device), s.rank, s.mixed, s.activation)
    strip = tile.rows is not None
    x_slot, described = image_argument(
        "x", x, (1 if strip else tile.bh, tile.bw, tile.bc), tile.descriptors and g.stride == (1, 1)
    )
    beside = y if residual is None else residual
    args = slots("weight", "bias", "down", "up", "stage", "y", "scale") | {
        "x": x_slot, "other": None if residual is None else Slot("residual"), "H": g.h, "W": g.w, "P": g.p, "Q": g.q,
        "x_n": x.strides[0], "x_h": x.strides[1], "other_n": beside.strides[0], "other_h": beside.strides[1],
        "y_n": y.strides[0], "y_h": y.strides[1],
    }  # fmt: skip
    constants = {
        "XP": x.strides[2], "OP": beside.strides[2], "YP": y.strides[2], "C": g.c, "O": g.o, "RANK": s.rank,
        "STAGES": s.stages, "PH": g.padding[0], "PW": g.padding[1], "DH": g.dilation[0], "DW": g.dilation[1],
        "ACT": s.activation, "BIAS": s.bias is not None, "OTHER": residual is not None,
        "MIXED": s.mixed, "BW": tile.bw, "BC": tile.bc, "BO": tile.bo, "R": next_power(s.rank or 1),
        "DESC": described, "PRECISION": precision(x.dtype, s.tf32),
    }  # fmt: skip
    if strip:
        strips = ceil_div(g.q, tile.bw)
        rows, parts = configs.strip_parts(g.p, g.n * strips, g.dilation[0], tile.rows)
        args |= {"ROWS": rows, "strips": strips, "parts": parts}
        constants |= {"K": g.kernel[0], "MERGE": merge_precision(s.factors, x.dtype)}
        kernel, programs = lora_conv2d_rows, g.n * strips * parts
    else:
        across, down = ceil_div(g.q, tile.bw), ceil_div(g.p, tile.bh)
        args |= {"patches": across * down, "across": across}
        constants |= {"KH": g.kernel[0], "KW": g.kernel[1], "SH": g.stride[0], "SW": g.stride[1], "BH": tile.bh}
        kernel, programs = lora_conv2d_taps, g.n * across * down * ceil_div(g.o, tile.bo)
    return Plan([Launch(kernel, programs, args, constants, tile.warps, tile.stages)], new)


def forward(
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
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tf32: bool = False,
    tile: configs.Tile | None = None,
) -> Tensor:
    """act(conv2d(x, W + scale * dW) + bias) + residual, (N, out, P, Q) in channels_last.

    x: (N, in, H, W), bf16, fp16 or fp32; read in place where its channels lie together, whatever the other strides.
    weight: (out, in, kh, kw); or (K, out, in, kh, kw), merged weights of every stage, with down = up = None.
    down: (r, in, kh, kw), up: (out, r), with a leading axis K exactly when ``stage`` is given. Any float dtype.
    stage: None, an int, or an int tensor (N,) on x's device, one stage per sample. A sample whose stage is out of range
        becomes NaN: the device cannot raise.
    out: (N, out, P, Q) with channels together, written instead of a new tensor. residual: as the result.
    tf32: let fp32 products round to tf32. tile: instead of the shipped one (configs.py).
    """
    values, signature = read(
        x, weight, bias, down, up, scale, stage, stride, padding, dilation, activation, tf32, tile
    )  # fmt: skip
    if residual is not None:
        values["residual"] = residual = together(residual)
    values["y"] = out
    beside, into = (None if t is None else Layout.of(t) for t in (residual, out))
    plan(signature, beside, into).run(values)
    return values["y"].permute(0, 3, 1, 2) if out is None else out
