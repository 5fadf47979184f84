"""The single block of phase 1, applied to its own output: how every recipe trains and scores it.

A block that has only ever seen the start does harm when it is applied nine times. So it is first run some times
without gradients, and trained on what it then meets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.network import LoRun
from lorun_fast.operators import SensingOperator


def trained_pass(
    net: LoRun, y: Tensor, passes: int, op: SensingOperator | None = None, sigma: Tensor | None = None
) -> Tensor:
    """One pass with gradients after ``passes`` without; what is learned of the operator learns through a first one."""
    estimate = (net.op if op is None else op).initial(y)
    with torch.no_grad():
        for _ in range(passes):
            estimate = net.stage_step(0, estimate, y, op, sigma)
    return net.stage_step(0, estimate, y, op, sigma)


def more_passes(
    net: LoRun, x: Tensor, y: Tensor, passes: int, op: SensingOperator | None = None, sigma: Tensor | None = None
) -> Tensor:
    """What a single block makes of its result ``x`` in ``passes`` more; x itself for a network of several stages."""
    for _ in range(passes if net.stages == 1 else 0):
        x = net.stage_step(0, x, y, op, sigma)
    return x
