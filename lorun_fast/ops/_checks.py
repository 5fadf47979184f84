"""Argument checks shared by the ops: one clear error, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lorun_fast.ops._constants import constant

STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The dtype of parameters beside an image of each of them.
WIDE = {dtype: torch.float64 if dtype is torch.float64 else torch.float32 for dtype in STORAGE_DTYPES}
_LARGEST = torch.finfo(torch.float32).max


def shape_of(t: Tensor) -> str:
    return "(" + ", ".join(str(s) for s in t.shape) + ")"


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of measurements and operator parameters beside an image of ``dtype``: fp64 stays, the rest is fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def in_16_bits(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, without a call where nothing changes."""
    return t if t.dtype is dtype else t.to(dtype)


def number_or_tensor(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.as_tensor, but a number is written on the device: a CUDA graph cannot record a copy from the host."""
    if isinstance(value, int | float):
        _check_range(name, value, dtype)
        return torch.full((), value, dtype=dtype, device=device)
    try:
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or a tensor, got {value!r}") from None


def _check_range(name: str, value: float, dtype: torch.dtype) -> None:
    """Raises ValueError for a finite number that the dtype does not hold; torch's own error has no name."""
    # In a graph the number may be a symbol, of which nothing is to be asked.
    if not torch.compiler.is_compiling() and torch.finfo(dtype).max < abs(value) < math.inf:
        raise ValueError(f"{name}: expected a number that {dtype} holds, got {value}".replace("torch.", ""))


def number(name: str, value: float) -> float:
    """A user's number."""
    try:
        if isinstance(value, str | bytes):  # float() would read it
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def finite(name: str, value: float) -> float:
    """A user's number, neither NaN nor infinite, in fp32 too."""
    if type(value) is float and abs(value) <= _LARGEST:  # at every call of a layer
        return value
    found = number(name, value)
    if not math.isfinite(found):
        raise ValueError(f"{name}: expected a finite number, got {found}")
    _check_range(name, found, torch.float32)
    return found


def whole(name: str, value: int, least: int) -> int:
    """A user's whole number of at least ``least``."""
    if type(value) is int and value >= least:  # at every call of an op
        return value
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def pair(size: tuple[int, int]) -> tuple[int, int]:
    """A user's (H, W), an array too; a size that tracing made a symbol is one as well."""
    if isinstance(size, np.ndarray):
        size = size.tolist()
    if isinstance(size, (tuple, list)) and len(size) == 2:
        height, width = size
        if _is_whole(height) and _is_whole(width):
            return height, width
    raise ValueError(f"size: expected two whole numbers (H, W), got {size!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) or hasattr(value, "__index__")


def check_tensor(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")


def check_flag(name: str, value: bool | None) -> None:
    if value not in (None, True, False):
        raise TypeError(f"{name}: expected True, False or None, got {value!r}")


def holds(test: Callable[..., bool], *args) -> bool:
    """test(*args), and False where something is no tensor or no number: which one, the checks that follow say."""
    try:
        return test(*args)
    except (AttributeError, TypeError):
        return False


def batch_of(name: str, t: Tensor) -> int:
    """The length of the first axis."""
    try:
        return t.shape[0]
    except (AttributeError, IndexError):
        check_tensor(name, t)
        raise ValueError(f"{name}: expected an axis of samples, got shape ()") from None


def check_image(name: str, x: Tensor, ndim: int, layout: str) -> None:
    check_tensor(name, x)
    if x.ndim != ndim:
        raise ValueError(f"{name}: expected {layout}, got shape {shape_of(x)}")
    if x.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")


def check_same_device(first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    for name, t in others:
        check_tensor(name, t)
        if t.device != first[1].device:
            raise ValueError(f"{name} is on {t.device}, but {first[0]} is on {first[1].device}: move one of them")


def empty_channels_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Like x, channels innermost, also in its strides where an axis has one element: what such a kernel returns."""
    n, channels, height, width = shape
    return x.new_empty((n, height, width, channels)).permute(0, 3, 1, 2)


def check_finishing(
    x: Tensor,
    out: int,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    names: tuple[str, str] = ("weight", "bias"),
    dtype: torch.dtype | None = None,
) -> None:
    """Of a convolution to ``out`` channels that keeps x's size: what follows it, and that all is as x is.

    dtype: of weight and bias, where that is not x's.
    """
    want = (x.shape[0], out, *x.shape[2:])
    weight_name, bias_name = names
    others = [(weight_name, weight), (bias_name, bias), ("residual", residual)]
    others = [(name, t) for name, t in others if t is not None]
    for name, t in others:
        check_tensor(name, t)
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"{bias_name}: expected shape ({out}), got {shape_of(bias)}")
    if residual is not None and residual.shape != want:
        raise ValueError(f"residual: expected shape {want}, got {shape_of(residual)}")
    for name, t in others:
        expected = x.dtype if dtype is None or t is residual else dtype
        if t.dtype != expected:
            whose = "as x has" if expected == x.dtype else f"beside x in {x.dtype}"
            raise TypeError(f"{name}: expected {expected} {whose}, got {t.dtype}")
    check_same_device(("x", x), *others)


def step_size(rho: float | Tensor, x: Tensor, name: str = "rho") -> Tensor:
    """The step size as the ops take it: shape (1,) or (N, C), in the parameter dtype, on x's device.

    rho: a number, a 0-d tensor, or a tensor broadcastable to (N, C, 1, 1). A tensor is read on its device;
    nothing is copied to the host.
    """
    dtype = WIDE.get(x.dtype, torch.float32)
    if not isinstance(rho, Tensor):
        try:
            return constant(rho, dtype, x.device)
        except TypeError:
            raise TypeError(f"{name}: expected a number or a tensor, got {type(rho).__name__}") from None
        except RuntimeError:
            if isinstance(rho, complex):
                raise TypeError(f"{name}: expected a real number, got {rho}") from None
            _check_range(name, rho, dtype)
            raise
    if rho.device != x.device:
        raise ValueError(f"{name} is on {rho.device}, but x is on {x.device}: move one of them")
    if rho.dtype is not dtype:
        if not rho.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {rho.dtype}")
        rho = rho.to(dtype)
    if rho.ndim == 0:
        return rho.view(1)
    if rho.ndim == 1 and rho.shape[0] == 1:
        return rho
    n, c = x.shape[0], x.shape[1]
    if rho.ndim > 4 or any(s != 1 for s in rho.shape[max(rho.ndim - 2, 0) :]):
        raise _no_step_size(name, rho, x)
    rho = rho.reshape((1,) * (4 - rho.ndim) + tuple(rho.shape))
    if rho.shape[0] not in (1, n) or rho.shape[1] not in (1, c):
        raise _no_step_size(name, rho, x)
    if rho.shape[0] == 1 and rho.shape[1] == 1:
        return rho.reshape(1)
    return rho.expand(n, c, 1, 1).reshape(n, c)


def _no_step_size(name: str, rho: Tensor, x: Tensor) -> ValueError:
    # Written only where it is raised: a size in a string is a constant to Dynamo, and each batch a graph of its own.
    n, c = x.shape[:2]
    want = f"a number, a 0-d tensor, or a tensor broadcastable to (N, C, 1, 1) = ({n}, {c}, 1, 1)"
    return ValueError(f"{name}: expected {want}, got shape {shape_of(rho)}")


def sum_to_step(grad: Tensor, rho: Tensor) -> Tensor:
    """Reduces an (N, C) table of step-size gradients to the shape of the op's ``rho``."""
    return grad.sum().reshape(1) if rho.ndim == 1 else grad
