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
once for given addresses and shapes, so that later calls are one launch and a CUDA graph can record them.
Products are in fp32 on the ordinary cores: exact, and too few to matter.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorun_fast.kernels._launch import Launch, ceil_div

BLOCK_M, BLOCK_N, BLOCK_Q = 32, 64, 16
# One row per layer: addresses, the product's shape, the weight's inner shape, strides of W and of out.
FIELDS = (
    "weight", "down", "up", "out", "first", "m", "n", "q", "stages", "inner", "taps",
    "w_o", "w_i", "w_t", "y_k", "y_o", "y_i", "y_t", "scale",
)  # fmt: skip


@triton.jit
def lora_merge(
    table, owners, FIELDS: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr, OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """One BM x BN block of one layer's product at one stage. WEIGHT, FACTOR, OUT: element types."""
    pid = tl.program_id(0)
    row = table + tl.load(table + owners + pid) * FIELDS
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    down = tl.load(row + 1).to(tl.pointer_type(FACTOR))
    up = tl.load(row + 2).to(tl.pointer_type(FACTOR))
    out = tl.load(row + 3).to(tl.pointer_type(OUT))
    cell = pid - tl.load(row + 4)
    M = tl.load(row + 5)
    N = tl.load(row + 6)
    Q = tl.load(row + 7)
    inner = tl.load(row + 9)
    taps = tl.load(row + 10)
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
    base = tl.load(
        weight + o * tl.load(row + 11) + i * tl.load(row + 12) + t * tl.load(row + 13), mask=inside, other=0.0
    )
    at = out + k * tl.load(row + 14) + o * tl.load(row + 15) + i * tl.load(row + 16) + t * tl.load(row + 17)
    scale = tl.load(row + 18).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(at, (base.to(tl.float32) + scale * acc).to(OUT), mask=inside)


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Layer:
    """One layer's tensors. weight: (out, in) or (a, b, kh, kw). down, up: stacked, contiguous. out: (K, ...)."""

    weight: Tensor
    down: Tensor
    up: Tensor
    out: Tensor
    scale: float

    def product(self) -> tuple[int, int, int]:
        """(M, N, q) of up @ down."""
        q = self.up.shape[-1]
        m = self.up.shape[-2]
        return m, self.weight.numel() // m, q

    def row(self, first: int) -> list[int]:
        m, n, q = self.product()
        w, y = self.weight, self.out
        inner, taps = w.shape[1], w.shape[2:].numel()
        strides = []
        for t, lead in ((w, 0), (y, 1)):
            # The taps of one channel are equally spaced in every layout that convolutions use.
            strides += [t.stride(lead), t.stride(lead + 1), t.stride(-1) if t.ndim - lead == 4 else 1]
        y_strides = [y.stride(0), *strides[3:]]
        pointers = [t.data_ptr() for t in (w, self.down, self.up, y)]
        scale = struct.unpack("<i", struct.pack("<f", self.scale))[0]
        return [*pointers, first, m, n, q, y.shape[0], inner, taps, *strides[:3], *y_strides, scale]

    @property
    def blocks(self) -> int:
        m, n, _ = self.product()
        return self.out.shape[0] * ceil_div(m, BLOCK_M) * ceil_div(n, BLOCK_N)


@functools.lru_cache(maxsize=64)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The table on the device. Equal numbers describe equal memory, so it may be kept."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def launch(layers: Sequence[Layer]) -> Launch:
    """The launch for layers that share device, weight, factor and output dtypes."""
    first, rows, owners = 0, [], []
    for index, layer in enumerate(layers):
        rows += layer.row(first)
        owners += [index] * layer.blocks
        first += layer.blocks
    one = layers[0]
    args = {"table": _table((*rows, *owners), one.out.device), "owners": len(rows)}
    constants = {
        "FIELDS": len(FIELDS), "WEIGHT": _TYPES[one.weight.dtype], "FACTOR": _TYPES[one.down.dtype],
        "OUT": _TYPES[one.out.dtype], "BM": BLOCK_M, "BN": BLOCK_N, "BQ": BLOCK_Q,
    }  # fmt: skip
    return Launch(lora_merge, first, args, constants, 4, 1)


def regular(t: Tensor, lead: int = 0) -> bool:
    """Whether the taps of one channel are equally spaced, so that three strides describe the weight."""
    return t.ndim - lead != 4 or t.shape[-2] == 1 or t.stride(-2) == t.shape[-1] * t.stride(-1)


def forward(
    weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float],
    outs: Sequence[Tensor],
) -> None:  # fmt: skip
    """Writes W + scale * dW of every stage of every layer into ``outs``, (K, *weight.shape) each.

    One launch where all layers share their dtypes, else one per combination of (weight, factors, out) dtypes.
    Not for the peft form of transposed convolutions, whose update is no single product.
    """
    groups: dict[tuple, list[Layer]] = {}
    for weight, down, up, scale, out in zip(weights, downs, ups, scales, outs, strict=True):
        weight = weight if regular(weight) else weight.contiguous()
        if not regular(out, 1):
            raise ValueError(f"out: expected equally spaced taps, got strides {out.stride()}")
        layer = Layer(weight, down.contiguous(), up.contiguous().to(down.dtype), out, float(scale))
        groups.setdefault((weight.dtype, down.dtype, out.dtype), []).append(layer)
    for layers in groups.values():
        launch(layers).run()
