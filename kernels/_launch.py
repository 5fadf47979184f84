"""A kernel launch as data: run it here, or compile the same thing for a GPU that is not there (check.py).

What a launch depends on besides addresses and values is worked out once and kept (Plan): on a small problem a GPU would
otherwise wait for Python. The launchers key their plans with everything that decides one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

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


# Versions of Triton whose compiled kernels take a launch as Ready makes it; others launch every time as the first time.
DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)

# How many plans each launcher keeps: more than the layers of a network in its forms, sizes and batches.
PLANS = 1024


class Slot(NamedTuple):
    """Holds the place of what a plan calls ``name``, among the arguments of a launch.

    box: (shape, strides, block) where the kernel reads the tensor through a descriptor.
    """

    name: str
    box: tuple[list[int], list[int], list[int]] | None = None


def slots(*names: str) -> dict[str, Slot]:
    """Arguments that a plan calls as the kernel does."""
    return {name: Slot(name) for name in names}


@dataclass
class Launch:
    """kernel[(programs,)](**args). ``args`` hold tensors, descriptors, ints, floats; ``constants`` the constexprs.

    In a plan ``args`` hold slots too, which over() fills.
    """

    kernel: triton.JITFunction
    programs: int
    args: dict[str, Tensor | TensorDescriptor | Slot | int | float | None]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 2
    options: dict = field(default_factory=dict)
    # What over() has compiled, by what decided that beyond this plan.
    _ready: dict[tuple, Ready] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def _slots(self) -> list[tuple[str, Slot]]:
        return [(argument, value) for argument, value in self.args.items() if isinstance(value, Slot)]

    def run_over(self, values: dict[str, Tensor | int | float | None]) -> None:
        """over(values).run(); from the second call on without Triton's launcher, which takes several times as long."""
        if not self.programs:
            return
        tensors = [t for _, (name, _) in self._slots if isinstance(t := values[name], Tensor)]
        # What Triton compiles for, of a pointer: its dtype, and whether it is a multiple of 16 bytes.
        key = (tensors[0].get_device(), *[(t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
        ready = self._ready.get(key)
        if ready is not None and not _watched():
            ready(self.programs, key[0], values)
            return
        compiled = self.over(values).run()
        if compiled is not None and DIRECT:
            self._ready[key] = Ready.of(self, compiled)

    def over(self, values: dict[str, Tensor | int | float | None]) -> Launch:
        """This launch with what its slots name."""
        args = self.args.copy()
        for argument, (name, box) in self._slots:
            args[argument] = values[name] if box is None else TensorDescriptor(values[name], *box)
        return Launch(self.kernel, self.programs, args, self.constants, self.warps, self.stages, self.options)

    def run(self) -> triton.compiler.CompiledKernel | None:
        """Returns what ran; None if nothing was to be done, and in the interpreter."""
        if not self.programs:
            return None
        return self.kernel[(self.programs,)](
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


def _watched() -> bool:
    """Whether a profiler wants to hear of launches, as it does from Triton's own launcher."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


class Ready(NamedTuple):
    """A compiled kernel with the arguments of a plan's launch in the order of its signature."""

    compiled: triton.compiler.CompiledKernel
    args: list
    holes: list[tuple[int, str, tuple | None]]  # (place, name among the values, box of its descriptor)

    @staticmethod
    def of(launch: Launch, compiled: triton.compiler.CompiledKernel) -> Ready:
        known = launch.args | launch.constants
        args, holes = [known[name] for name in launch.kernel.arg_names], []
        for place, slot in enumerate(args):
            if isinstance(slot, Slot):
                args[place] = None
                holes.append((place, *slot))
        return Ready(compiled, args, holes)

    def __call__(self, programs: int, device: int, values: dict[str, Tensor | int | float | None]) -> None:
        args = self.args.copy()
        for place, name, box in self.holes:
            args[place] = value = values[name]
            if box is not None:
                # Without its constructor, whose checks the same box has passed over another aligned tensor.
                args[place] = described = object.__new__(TensorDescriptor)
                described.base = value
                described.shape, described.strides, described.block_shape = box
        stream = torch._C._cuda_getCurrentRawStream(device)
        kernel = self.compiled
        kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, without its tensors; new: (shape, dtype) of those that every call makes."""

    launches: list[Launch]
    new: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def over(self, values: dict[str, Tensor | int | float | None]) -> list[Launch]:
        """The launches over these tensors and numbers. Adds the new tensors to ``values``."""
        self._make(values)
        return [one.over(values) for one in self.launches]

    def run(self, values: dict[str, Tensor | int | float | None]) -> None:
        """over(values), run one after the other."""
        self._make(values)
        for one in self.launches:
            one.run_over(values)

    def _make(self, values: dict[str, Tensor | int | float | None]) -> None:
        x = values["x"]
        for name, (shape, dtype) in self.new.items():
            values[name] = x.new_empty(shape, dtype=dtype)


def register_options(dtype: torch.dtype) -> dict:
    """Launch options for a dtype. On fp32's ordinary cores ptxas spills to raise occupancy unless given a bound."""
    return {"maxnreg": 255} if dtype == torch.float32 else {}
