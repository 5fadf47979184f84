"""What one training step draws: made on the CPU from the seed and the step alone, moved to the device as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorun_fast.operators import SensingOperator


@dataclass(frozen=True)
class Batch:
    """x: the images. others: tensors beside them, by name. op: the batch's own operator, where it brings one.
    passes: of the block's own, before the one that is trained (phase 1).
    """

    x: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)
    op: SensingOperator | None = None
    passes: int = 0

    def tensors(self) -> list[Tensor]:
        return [self.x, *self.others.values(), *([] if self.op is None else self.op.buffers())]

    def kind(self) -> tuple:
        """What the operations of a step follow from; two batches of a kind differ in their values alone."""
        op = None if self.op is None else (type(self.op), *sorted(self.op.config().items()))
        return op, self.passes, tuple(self.others), tuple((t.shape, t.dtype) for t in self.tensors())

    def pinned(self) -> Batch:
        """In memory that a GPU reads by itself, beside the host's work."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return self._with(lambda t: t.to(device, non_blocking=True))

    def copy_(self, other: Batch) -> None:
        """Takes the values of another batch of this kind."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(new, non_blocking=True)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        others = {name: change(t) for name, t in self.others.items()}
        op = copy.copy(self.op)
        if op is not None:
            op._buffers = op._buffers.copy()  # or it would be this batch's own operator that changes
            op._apply(change)
        return Batch(change(self.x), others, op, self.passes)
