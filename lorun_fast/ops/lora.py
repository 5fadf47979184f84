"""What the LoRA ops share: argument checks, and the layout of their results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorun_fast.adapters import factor_shapes
from lorun_fast.ops._checks import STORAGE_DTYPES, check_tensor, in_16_bits, shape_of
from lorun_fast.ops._direct import transforms_active
from lorun_fast.reference.lora import ACTIVATIONS

_INTEGERS = (torch.int64, torch.int32)


def check_stage(stage: int | Tensor | None, stages: int, batch: int) -> None:
    """Raises unless ``stage`` is an int in [0, stages), or an int tensor: 0-d, or (N,) for this batch."""
    if isinstance(stage, Tensor):
        if stage.ndim or stage.dtype not in _INTEGERS:
            check_stage_per_sample(stage, batch)
        else:
            check_given_stages(stage, stages)
    elif isinstance(stage, bool) or not (isinstance(stage, int) or _is_number(stage)):
        raise TypeError(f"stage: expected an int or an int64 tensor, got {type(stage).__name__}")
    elif not 0 <= stage < stages:
        raise IndexError(f"stage: expected 0 to {stages - 1}, got {stage}")


def check_stage_per_sample(stage: Tensor, batch: int) -> None:
    """Raises unless ``stage`` is an int tensor (N,) for this batch."""
    if stage.dtype not in _INTEGERS:
        raise TypeError(f"stage: expected an int or an int64 tensor, got {stage.dtype}")
    if stage.ndim != 1 or stage.shape[0] != batch:
        raise ValueError(
            f"stage: expected one stage per sample, shape ({batch},) for an input that leads with {batch}, "
            f"got {shape_of(stage)}: a layer that folds other axes into the batch takes one stage per call"
        )


def per_sample(stage: int | Tensor | None) -> bool:
    """Whether a stage is one for each sample. A 0-d tensor is one of all, read on its device."""
    return isinstance(stage, Tensor) and stage.ndim > 0


def at_stage(stacked: Tensor, stage: int | Tensor) -> Tensor:
    """The entry of a stack (K, ...) at a stage of all samples; a 0-d tensor is read on the device."""
    if isinstance(stage, Tensor):
        return stacked.index_select(0, stage.reshape(1).to(stacked.device)).squeeze(0)
    return stacked[stage]


def _is_number(stage: object) -> bool:
    return hasattr(stage, "__index__") and not getattr(stage, "ndim", 0)  # arrays of any size have the former


def check_stages(stage: Tensor, stages: int) -> None:
    """Raises unless all entries are stages. Reads the tensor: for the CPU."""
    low, high = (int(t) for t in stage.aminmax())
    if low < 0 or high >= stages:
        raise IndexError(f"stage: expected 0 to {stages - 1}, got {low if low < 0 else high}")


def check_given_stages(stage: int | Tensor | None, stages: int) -> None:
    """As :func:`check_stages` where that costs no wait for a device; tracing and transforms do not read tensors."""
    readable = isinstance(stage, Tensor) and stage.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and stage.numel() and not transforms_active():
        check_stages(stage, stages)


def check_factors(
    weight: Tensor, down: Tensor | None, up: Tensor | None, *, stacked: bool, groups: int = 1, transposed: bool = False
) -> None:
    """Raises unless down and up are the factors of one form for this weight, with a leading stage axis if stacked."""
    if not (isinstance(down, Tensor) and isinstance(up, Tensor)):
        kinds = f"{type(down).__name__} and {type(up).__name__}"
        error = ValueError if down is None or up is None else TypeError
        raise error(f"down, up: expected two tensors, or None for both and no stage, got {kinds}")
    lead = int(stacked)
    if up.ndim != 2 + lead or down.ndim not in (2 + lead, 4 + lead):
        axis = "a leading stage axis (stage is given)" if stacked else "no stage axis (stage is None)"
        raise ValueError(f"down, up: expected {axis}, got shapes {shape_of(down)} and {shape_of(up)}")
    if lead and down.shape[0] != up.shape[0]:
        raise ValueError(f"down, up: expected one number of stages, got {down.shape[0]} and {up.shape[0]}")
    form = "peft" if down.ndim - lead == 4 else "loralib"
    cells = max(weight.shape[2], 1) if weight.ndim == 4 and form == "loralib" else 1
    r = up.shape[-1] // cells
    want_down, want_up = factor_shapes(weight.shape, max(r, 1), form, groups=groups, transposed=transposed)
    if tuple(down.shape[lead:]) != want_down or tuple(up.shape[lead:]) != want_up:
        raise ValueError(
            f"down, up: expected {want_down} and {want_up} for weight {shape_of(weight)} at rank {r}, "
            f"got {tuple(down.shape[lead:])} and {tuple(up.shape[lead:])}"
        )


def check_update(
    weight: Tensor, down: Tensor | None, up: Tensor | None, stage: Tensor | None, batch: int, **geometry
) -> None:
    """Raises unless down and up fit the weight, with a leading stage axis where a stage per sample is given, or both
    are None: the weight is used as it is.
    """
    if down is None and up is None and stage is None:
        return
    check_factors(weight, down, up, stacked=stage is not None, **geometry)
    if stage is not None:
        check_stage_per_sample(stage, batch)


def check_floating(name: str, t: Tensor) -> None:
    check_tensor(name, t)
    if t.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {t.dtype}")


def check_tensors(x: Tensor, **others: Tensor | None) -> None:
    """Raises unless x and the others that are there are floating-point tensors on one device."""
    for name, t in (("x", x), *others.items()):
        if t is None:
            continue
        check_floating(name, t)
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}: move one of them")


def check_epilogue(activation: str | None, bias: Tensor | None, residual: Tensor | None, shape, out: int) -> None:
    """Raises for an unknown activation, a bias that is not (out,), a residual that is not shaped like the output."""
    if not isinstance(activation, str | None) or activation not in ACTIVATIONS:
        known = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"activation: expected one of {known}, got {activation!r}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias: expected ({out},), got {shape_of(bias)}")
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual: expected the output's shape {tuple(shape)}, got {shape_of(residual)}")


def wanted(mask: Sequence[bool], tensors: Sequence) -> list:
    """Those of the tensors that the mask asks for."""
    return [t for t, asked in zip(tensors, mask, strict=True) if asked]


def in_place(mask: Sequence[bool], found: Iterable[Tensor]) -> list[Tensor | None]:
    """What a backward op returned, in the places of its inputs; None for those that the mask leaves out."""
    results = iter(found)
    return [next(results) if asked else None for asked in mask]


def laid_out(found: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """A backward op's results: they must not share memory with one another or with an input, and take their layout."""
    return [torch.empty_like(t).copy_(g) if g.stride() != t.stride() else g for g, t in zip(found, like, strict=True)]


def is_channels_last(t: Tensor) -> bool:
    """Whether a 4-D tensor's channels are innermost (dense or a slice), and no reading as NCHW is possible."""
    return t.ndim == 4 and t.shape[1] > 1 and t.stride(1) == 1 and not t.is_contiguous()


def layout_of(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout that a convolution gives its result: channels_last if either argument has it.

    An image of one channel has both. On a CPU in 16 bits its result is channels_last, as what follows wants it there.
    """
    last = is_channels_last(x) or is_channels_last(weight)
    if x.ndim == 4 and x.shape[1] == 1 and x.device.type == "cpu":
        last = last or in_16_bits(x)
    return torch.channels_last if last else torch.contiguous_format


def innermost(x: Tensor) -> Tensor:
    """An image of one channel as one whose channels are innermost, by strides alone: for what asks these."""
    if x.shape[1] != 1 or not x.is_contiguous():
        return x
    height, width = x.shape[2:]
    return x.as_strided(x.shape, (height * width, 1, width, 1))


def under_autocast(dtype: torch.dtype, x: Tensor, *rest):
    """Autocast narrows x, and with it the result; weight and factors stay wide until they are merged."""
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return (x.to(dtype) if eligible else x, *rest)
