"""What torch.utils.flop_counter says of our ops: the operations of the definition, by whatever means they are computed.

Merging, activations and what a backward pass computes again count nothing. Formulas take shapes in place of tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]
FORMULAS: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def tell_counters() -> None:
    """Makes the formulas known to torch's counter, and to those that run: each took a copy when it was made.

    For calls that a dispatch mode sees. Importing the counter takes a fifth of a second, so that is left to who counts.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for op, formula in FORMULAS.items():
        if op not in module.flop_registry:
            module.register_flop_formula(op)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for op in FORMULAS:
                counter.flop_registry.setdefault(op, module.flop_registry[op])


def convolution(x: Shape, weight: Shape, out: Shape, transposed: bool = False) -> int:
    """Of a convolution, and of its gradient for the image or for the weight. All (N, C, H, W)."""
    return 2 * x[0] * math.prod((x if transposed else out)[2:]) * math.prod(weight)


def narrow(x: Shape, down: Shape, up: Shape, out: Shape, transposed: bool = False) -> int:
    """Of a convolution to r channels and a 1 x 1 to all of them: for the gradient of either factor of the peft form."""
    return convolution(x, down, out, transposed) + 2 * out[0] * math.prod(out[2:]) * math.prod(up)


def linear(x: Shape, weight: Shape) -> int:
    """Of a product with a weight (out, in), and of either gradient. x: (..., in)."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)
