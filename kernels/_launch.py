"""A kernel launch as data: run it here, or compile the same thing for a GPU that is not there (check.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Counts, which change with the size of an image: the kernels are compiled once for all of them. Strides are left out,
# because how far they may be divided decides how wide a load is.
COUNTS = (
    "H", "W", "P", "Q", "N", "patches", "across", "splits", "ROWS", "strips", "parts", "image_programs",
    "factor_patches", "factor_across", "chosen", "down_splits", "up_splits", "owners",
)  # fmt: skip


@dataclass
class Launch:
    """kernel[(programs,)](**args). ``args`` hold tensors, descriptors, ints, floats; ``constants`` the constexprs."""

    kernel: triton.JITFunction
    programs: int
    args: dict[str, Tensor | TensorDescriptor | int | float | None]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 2
    options: dict = field(default_factory=dict)

    def run(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](
                **self.args, **self.constants, num_warps=self.warps, num_stages=self.stages, **self.options
            )

    def source(self, target):
        """(triton.compiler.ASTSource, options): what run() would compile on a GPU of this GPUTarget.

        Made by Triton's own launcher, so that Triton finds what was compiled from it in its cache: how arguments are
        specialised, down to how that is written, is part of the key, and differs between versions.
        """
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        wishes = {"num_warps": self.warps, "num_stages": self.stages} | self.options
        bound, specialised, _ = bind(**self.args, **self.constants, **wishes)
        options, *parts = self.kernel._pack_args(backend, wishes, bound, specialised, wishes)
        return ASTSource(self.kernel, *parts), options.__dict__


def register_options(dtype: torch.dtype) -> dict:
    """Launch options for a dtype. On fp32's ordinary cores ptxas spills to raise occupancy unless given a bound."""
    return {"maxnreg": 255} if dtype == torch.float32 else {}


def next_power(value: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``value`` and at least ``least`` (a tensor-core dimension)."""
    return max(least, 1 << (value - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def can_describe(t: Tensor) -> bool:
    """Whether a (N, H, W, C) view suits a tensor descriptor: unit channel stride, the rest in units of 16 bytes."""
    size = t.element_size()
    return (
        t.stride(3) == 1
        and all(t.stride(i) * size % 16 == 0 and t.stride(i) > 0 for i in range(3))
        and t.data_ptr() % 16 == 0
    )
