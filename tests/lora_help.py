"""Problems for the backends of lora_conv2d."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorun_fast import adapters
from lorun_fast.ops import _backends
from lorun_fast.ops._backends import Backend


def problem(
    form="peft", n=4, in_=8, out=16, kernel=3, size=(7, 6), rank=2, stages=None, dtype=torch.float64, groups=1,
    transposed=False,
) -> dict[str, Tensor]:  # fmt: skip
    """x, weight, bias, down and up of that dtype; stacked factors with ``stages``."""
    generator = torch.Generator().manual_seed(0)
    weight = (in_, out // groups, kernel, kernel) if transposed else (out, in_ // groups, kernel, kernel)
    lead = () if stages is None else (stages,)
    down, up = adapters.factor_shapes(weight, rank, form, groups=groups, transposed=transposed)
    shapes = {"x": (n, in_, *size), "weight": weight, "bias": (out,), "down": (*lead, *down), "up": (*lead, *up)}
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator) / (5 if name == "weight" else 1)
        for name, shape in shapes.items()
    }


def packed_anywhere(monkeypatch) -> None:
    """Lets the packed backend serve without AMX, where its ops run plain loops: slow, and the same code around them."""
    for name in ("lora_conv2d", "lora_residual_block"):
        anywhere = replace(_backends.BACKENDS[name]["packed"], missing=lambda: None)
        monkeypatch.setitem(_backends.BACKENDS[name], "packed", anywhere)


def channels_last(p: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same problem with x of that dtype, channels innermost."""
    return p | {"x": p["x"].to(dtype or p["x"].dtype).contiguous(memory_format=torch.channels_last)}


def why_not(
    backend: Backend, x: Tensor, weight: Tensor, *, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
    activation=None, transposed=False,
) -> str | None:  # fmt: skip
    """Why the backend does not support a call, or None."""
    geometry = ([*stride], [*padding], [*dilation], groups, activation, transposed, [0, 0])
    return backend.supports(x, weight, None, None, None, None, None, 1.0, *geometry)


def call_of(p: dict[str, Tensor]) -> tuple:
    """The op's arguments for a problem, padding 1."""
    return (*p.values(), None, None, 1.0, [1, 1], [1, 1], [1, 1], 1, None, False, [0, 0])
