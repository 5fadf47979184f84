"""A kernel launch as data: run it here, or compile the same thing for a GPU that is not there (check.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


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

    def source(self):
        """The triton.compiler.ASTSource that run() would compile, specialised as Triton's launcher does."""
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, dict(self.constants), {}
        for position, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                continue
            value = self.args[name]
            if value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                block = ",".join(map(str, value.block_shape))
                signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
            elif isinstance(value, Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)


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
