"""A residual block, x + conv(relu(conv(x))), both convolutions 3 x 3 in bf16: inference on a CPU with matrix tiles."""

from __future__ import annotations

import torch
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import LIMIT, OURS, Problem, Unavailable, Work, case
from benchmarks.winograd_conv2d import (
    bare_convolutions,
    block_inputs,
    block_of,
    block_sizes,
    plain_contenders,
    tolerance,
)
from lorun_fast import _native


@case("packed_conv2d.block", suite="layers", sizes=block_sizes("bf16"))
def block(dtype, device, *, n, channels, px) -> Problem:
    """The sizes of the network behind cs-25 at 256 px, and ISTA-Net+'s."""
    inputs = block_inputs(dtype, device, n, channels, px)
    x = inputs["x"]
    moved = x.element_size() * (2 * x.numel() + 2 * 9 * channels * channels)
    return Problem(inputs, block_of, forward=Work(moved, 2 * 2 * 9 * x.numel() * channels), tolerance=tolerance(dtype))


def _tiles() -> None:
    if not _native.has_tiles():
        raise Unavailable("this CPU has no AMX: plain loops would serve")


@block.contender("lorun_fast", kind=OURS, ops=("packed_block",))
def _(p: Problem):
    """One call: what lies between the convolutions stays in the cache."""
    _tiles()
    first, second = (lf.functional.packed_weight(w) for w in (p.first, p.second))

    def run() -> Tensor:
        with torch.no_grad():
            return lf.functional.packed_block(p.x, first, second)

    return run


@block.contender("lorun_fast, two calls", kind=OURS, ops=("packed_conv2d",))
def _(p: Problem):
    """Two calls, activation and residual inside."""
    _tiles()
    conv = lf.functional.packed_conv2d
    first, second = (lf.functional.packed_weight(w) for w in (p.first, p.second))
    settings = {"out": p.args["channels"], "kernel": 3, "padding": 1}

    def run() -> Tensor:
        with torch.no_grad():
            return conv(conv(p.x, first, activation="relu", **settings), second, residual=p.x, **settings)

    return run


plain_contenders(block, block_of)
block.contender("two bare convolutions", kind=LIMIT)(bare_convolutions)
