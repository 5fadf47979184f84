"""Merged weights of all layers and stages in one launch.

What it computes, for every layer l and stage k

    out[l][k]  =  W[l] + scale[l] * dW[l][k]        formed in fp32, rounded once

In both forms of :mod:`lorun_fast.adapters`, and for linear layers, dW is one matrix product seen as the weight:
up (M, q) @ down (q, N) with (M, N, q) = (out, in*kh*kw, r) for peft, (out//groups*k, in*k, r*k) for loralib,
(out, in, r) for a linear layer. Element (m, n) of it is element m*N + n of the weight in its own order.

Bytes and operations. Every stage's weights are written once, W is read once per stage (from L2 after the first): 2
bytes out, 2 in and 2q operations per weight in bf16. The nine stages of a 0.6 M parameter network are 11 MB: 3 us of an
H200's bandwidth, about one launch; what this kernel removes is the other launches, four per layer.

Tiling. A program owns a 32 x 64 block of one layer's product at one stage. Layers differ in shape and live at unrelated
addresses: a table on the device holds a row per layer, and behind the rows the layer of every program. It is copied
once for given addresses and shapes. A copy from the host waits for the device and cannot be recorded in a CUDA graph,
so one layer alone (training merges each at its call, into new memory) takes its row as arguments instead, and so does
each layer while a graph is recorded.
Products are in fp32 on the ordinary cores: exact, and too few to matter.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorun_fast.kernels._geometry import ceil_div
from lorun_fast.kernels._launch import COUNTS, PLANS, Launch, slots

BLOCK_M, BLOCK_N, BLOCK_Q = 32, 64, 16
# One row per layer: addresses, the product's shape, the weight's inner shape, strides of W and of out.
FIELDS = (
    "weight", "down", "up", "out", "first", "m", "n", "q", "stages", "inner", "taps",
    "w_o", "w_i", "w_t", "y_k", "y_o", "y_i", "y_t", "scale",
)  # fmt: skip


@triton.jit
def merge_block(
    weight, down, up, out, scale, cell, M, N, Q, inner, taps, w_o, w_i, w_t, y_k, y_o, y_i, y_t,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Block ``cell`` of one layer: BM x BN of the product at one stage."""
    across = (N + BN - 1) // BN
    blocks = (M + BM - 1) // BM * across
    k = cell // blocks
    m = (cell % blocks // across * BM + tl.arange(0, BM))[:, None]
    n = (cell % blocks % across * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for q0 in range(0, Q, BQ):
        q = q0 + tl.arange(0, BQ)
        a = tl.load(up + k * M * Q + m * Q + q[None, :], mask=(m < M) & (q < Q)[None, :], other=0.0)
        b = tl.load(down + k * Q * N + q[:, None] * N + n, mask=(q < Q)[:, None] & (n < N), other=0.0)
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    flat = m * N + n
    o = flat // (inner * taps)
    i = flat % (inner * taps) // taps
    t = flat % taps
    inside = (m < M) & (n < N)
    base = tl.load(weight + o * w_o + i * w_i + t * w_t, mask=inside, other=0.0)
    at = out + k * y_k + o * y_o + i * y_i + t * y_t
    tl.store(at, (base.to(tl.float32) + scale * acc).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def lora_merge(
    table, owners, FIELDS: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr, OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """One block of one of many layers. WEIGHT, FACTOR, OUT: element types."""
    pid = tl.program_id(0)
    row = table + tl.load(table + owners + pid) * FIELDS
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    down = tl.load(row + 1).to(tl.pointer_type(FACTOR))
    up = tl.load(row + 2).to(tl.pointer_type(FACTOR))
    out = tl.load(row + 3).to(tl.pointer_type(OUT))
    scale = tl.load(row + 18).to(tl.int32).to(tl.float32, bitcast=True)
    merge_block(
        weight, down, up, out, scale, pid - tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7),
        tl.load(row + 9), tl.load(row + 10), tl.load(row + 11), tl.load(row + 12), tl.load(row + 13),
        tl.load(row + 14), tl.load(row + 15), tl.load(row + 16), tl.load(row + 17), BM, BN, BQ,
    )  # fmt: skip


@triton.jit(do_not_specialize=FIELDS[5:-1])
def lora_merge_one(
    weight, down, up, out, scale, m, n, q, inner, taps, w_o, w_i, w_t, y_k, y_o, y_i, y_t,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """One block of the only layer, which needs no table."""
    merge_block(
        weight, down, up, out, scale, tl.program_id(0), m, n, q, inner, taps, w_o, w_i, w_t, y_k, y_o, y_i, y_t,
        BM, BN, BQ,
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Layer(NamedTuple):
    """One layer's tensors. weight: (out, in) or (a, b, kh, kw). down, up: stacked, contiguous. out: (K, ...)."""

    weight: Tensor
    down: Tensor
    up: Tensor
    out: Tensor
    scale: float

    def form(self) -> tuple:
        """What _numbers() and _direct() depend on."""
        w, y = self.weight, self.out
        return w.shape, w.stride(), self.up.shape, y.shape, y.stride()

    def row(self, first: int, numbers: tuple[int, ...]) -> list[int]:
        pointers = [t.data_ptr() for t in self[:4]]
        scale = struct.unpack("<i", struct.pack("<f", self.scale))[0]
        return [*pointers, first, *numbers, scale]


@functools.lru_cache(PLANS)
def _numbers(weight, w, up, out, y) -> tuple[tuple[int, ...], int]:
    """(the fields from m to y_t, programs) of a layer whose weight, up and out have these shapes and strides."""
    m, q = up[-2:]
    n = weight.numel() // m
    strides = []
    for size, stride, lead in ((weight, w, 0), (out, y, 1)):
        # The taps of one channel are equally spaced in every layout that convolutions use.
        strides += [*stride[lead : lead + 2], stride[-1] if len(size) - lead == 4 else 1]
    numbers = m, n, q, out[0], weight[1], weight[2:].numel(), *strides[:3], y[0], *strides[3:]
    return numbers, out[0] * ceil_div(m, BLOCK_M) * ceil_div(n, BLOCK_N)


@functools.lru_cache(maxsize=64)
def _table(rows: tuple[int, ...], programs: tuple[int, ...], device: torch.device) -> Tensor:
    """The table on the device. Equal numbers describe equal memory, so it may be kept."""
    owners = [index for index, count in enumerate(programs) for _ in range(count)]
    return torch.tensor([*rows, *owners], dtype=torch.int64).to(device)


_BLOCKS = {"BM": BLOCK_M, "BN": BLOCK_N, "BQ": BLOCK_Q}


def launches(layers: Sequence[Layer], recording: bool = False) -> list[Launch]:
    """What merges layers that share device, weight, factor and output dtypes. recording: into a CUDA graph."""
    if recording or len(layers) == 1:
        return [_direct(*layer.form()).over(layer._asdict()) for layer in layers]
    rows, programs = [], []
    for layer in layers:
        numbers, count = _numbers(*layer.form())
        rows += layer.row(sum(programs), numbers)
        programs.append(count)
    one = layers[0]
    args = {"table": _table(tuple(rows), tuple(programs), one.out.device), "owners": len(rows)}
    types = {"WEIGHT": _TYPES[one.weight.dtype], "FACTOR": _TYPES[one.down.dtype], "OUT": _TYPES[one.out.dtype]}
    return [Launch(lora_merge, sum(programs), args, {"FIELDS": len(FIELDS)} | types | _BLOCKS, 4, 1)]


@functools.lru_cache(PLANS)
def _direct(*form) -> Launch:
    """The launch for one layer of this form, over a Layer's fields."""
    numbers, programs = _numbers(*form)
    args = slots(*Layer._fields) | dict(zip(FIELDS[5:-1], numbers, strict=True))
    del args["stages"]  # of the table only
    return Launch(lora_merge_one, programs, args, _BLOCKS, 4, 1)


def regular(t: Tensor, lead: int = 0) -> bool:
    """Whether the taps of one channel are equally spaced, so that three strides describe the weight."""
    return t.ndim - lead != 4 or t.shape[-2] == 1 or t.stride(-2) == t.shape[-1] * t.stride(-1)


def forward(
    weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float],
    outs: Sequence[Tensor],
) -> None:  # fmt: skip
    """Writes W + scale * dW of every stage of every layer into ``outs``, (K, *weight.shape) each.

    One launch where all layers share their dtypes, else one per combination of (weight, factors, out) dtypes; one per
    layer while a CUDA graph is recorded.
    Not for the peft form of transposed convolutions, whose update is no single product.
    """
    groups: dict[tuple, list[Layer]] = {}
    for weight, down, up, scale, out in zip(weights, downs, ups, scales, outs, strict=True):
        weight = weight if regular(weight) else weight.contiguous()
        if not regular(out, 1):
            raise ValueError(f"out: expected equally spaced taps, got strides {out.stride()}")
        layer = Layer(weight, down.contiguous(), up.contiguous().to(down.dtype), out, float(scale))
        groups.setdefault((weight.dtype, down.dtype, out.dtype), []).append(layer)
    recording = any(out.is_cuda for out in outs) and torch.cuda.is_current_stream_capturing()
    for layers in groups.values():
        if len(layers) == 1:
            _direct(*layers[0].form()).run_over(layers[0]._asdict())
            continue
        for one in launches(layers, recording):
            one.run()
