"""What every sensing operator offers, whatever the task."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from lorun_fast.operators import conjugate_gradients
from lorun_fast.ops._checks import WIDE, check_image, check_same_device, check_tensor, finite, number, step_size, whole
from lorun_fast.ops._direct import transforms_active


class SensingOperator(nn.Module):
    """A linear measurement y = Phi x with the pieces that unfolding networks need.

    A subclass of your own needs ``forward`` and ``adjoint``, and holds Phi's parameters as fp32 (or fp64) buffers or
    parameters. The rest has a definition here, to be replaced where you know a faster one: ``gradient_step`` is made of
    the two, ``initial`` is the adjoint, ``prox`` takes conjugate gradients. x is real; y may be anything that leads
    with the batch, complex too.
    :func:`lorun_fast.operators.check_operator` tells what is wrong with one, and
    :func:`lorun_fast.operators.register_operator` lets saved networks find it again.

    task: what a network compares before it takes another operator for a call; the class's name by default.
    prox_iterations, prox_tolerance: how far conjugate gradients go, see :meth:`prox`. A class or an operator may have
        others; saved networks keep an operator's.
    """

    task: str = ""
    prox_iterations: int = 30
    prox_tolerance: float = 1e-4

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.task:
            cls.task = cls.__name__

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Phi^T y, an image (N, C, H, W) in y's dtype. size: (H, W), where y alone cannot tell."""
        raise NotImplementedError

    def gradient_step(self, x: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """x - rho * Phi^T (Phi x - y), in x's shape and dtype.

        rho: a number, 0-d, or broadcastable to (N, C, 1, 1).
        """
        return (x - rho * self.adjoint(self(x) - y, tuple(x.shape[-2:]))).to(x.dtype)

    def initial(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The start x_0 of the iteration, (N, C, H, W). size: (H, W), where y alone cannot tell."""
        return self.adjoint(y, size)

    def image_size(self, y: Tensor, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """(H, W) of the image behind y: ``size``, or what y tells; None where neither does. Raises if they differ."""
        return size

    def norm(self) -> Tensor:
        """The largest singular value of Phi, a 0-d tensor."""
        raise NotImplementedError(f"{type(self).__name__} does not tell its norm")

    def prox(
        self,
        x: Tensor,
        y: Tensor,
        mu: float | Tensor,
        *,
        iterations: int | None = None,
        tolerance: float | None = None,
    ) -> Tensor:
        """argmin_v ||Phi v - y||^2 / 2 + mu ||v - x||^2 / 2, in x's shape and dtype.

        mu: positive; a number, 0-d, (N,), or broadcastable to (N, C, 1, 1); a tensor's sign is not read.
        iterations, tolerance: instead of ``prox_iterations`` and ``prox_tolerance``, of what follows.

        Here by conjugate gradients from x on, in fp32 (fp64 beside fp64 images). A sample stops when the residual of
        its optimality condition, Phi^T (Phi v - y) + mu (v - x), has fallen to ``tolerance`` times that at x, whatever
        its batch mates do; a warning tells of samples that did not after ``iterations``. Tolerance 0 takes so many,
        without a word. Differentiable in x, y, mu and what Phi is made of, once: by conjugate gradients again, so
        memory does not grow with iterations. The gradient is the exact minimiser's, as far as both came to it.
        """
        iterations = whole("iterations", self.prox_iterations if iterations is None else iterations, 1)
        tolerance = finite("tolerance", self.prox_tolerance if tolerance is None else tolerance)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance}")
        check_image("x", x, 4, "(N, C, H, W)")
        check_tensor("y", y)
        check_same_device(("x", x), ("y", y))
        return conjugate_gradients.prox(self, x, y, proximal_weight(mu, x), iterations, tolerance)

    def config(self) -> dict:
        """JSON-serialisable constructor arguments beside the tensors of ``state_dict()``; none by default."""
        return {}

    @classmethod
    def from_config(cls, config: dict, state: dict[str, Tensor]) -> SensingOperator:
        """Rebuilds an operator from :meth:`config` and the tensors of its ``state_dict()``.

        By default these are what the constructor takes by the same names.
        """
        own = inspect.signature(cls).parameters
        return cls(**config, **{name: t for name, t in state.items() if name in own})

    def _beside(self, name: str, t: Tensor) -> Tensor:
        """Phi's parameter in the dtype that it has beside an image or a measurement."""
        # Where nn.Module looks last, after a microsecond: most of them hold a buffer.
        held = self._buffers.get(name)
        if held is None:
            held = getattr(self, name)
        # What is no tensor has no dtype, and what is no image another one: the op says so.
        dtype = WIDE.get(getattr(t, "dtype", None), torch.float32)
        return held if held.dtype is dtype else held.to(dtype)

    def _apply(self, fn, recurse=True):
        # Operator parameters stay fp32 (or fp64): net.half() and net.bfloat16() change the denoiser only.
        def keep_wide(t: Tensor) -> Tensor:
            if t.is_complex():  # net.to(torch.float32) would leave the imaginary part behind
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    out = fn(t)
                wide = {torch.float32: torch.complex64, torch.float64: torch.complex128}
                return out if out.is_complex() else t.to(out.device, wide.get(out.dtype, t.dtype))
            out = fn(t)
            if out.is_floating_point() and out.dtype in (torch.float16, torch.bfloat16):
                out = t.to(device=out.device)
            return out

        return super()._apply(keep_wide, recurse)


def one_per_sample(mu: float | Tensor) -> float | Tensor:
    """A weight as the ops take step sizes: (N,) as (N, 1, 1, 1)."""
    return mu.reshape(-1, 1, 1, 1) if isinstance(mu, Tensor) and mu.ndim == 1 else mu


def proximal_weight(mu: float | Tensor, x: Tensor) -> Tensor:
    """A user's mu: a positive number, 0-d, (N,), or broadcastable to (N, C, 1, 1); as the ops take step sizes."""
    if not isinstance(mu, Tensor) and not number("mu", mu) > 0:
        raise ValueError(f"mu: expected a positive number, got {mu}")
    return step_size(one_per_sample(mu), x, "mu")


def as_matrix(name: str, value: object, ndims: tuple[int, ...]) -> Tensor:
    """A user's array (tensor, numpy array, nested list) as a finite fp32 or fp64 tensor with one of these ranks."""
    if isinstance(value, np.ndarray):
        # A flipped view has negative strides, a file's array may have another byte order: torch takes neither.
        value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
    try:
        # torch.as_tensor would move a tensor to the default device.
        t = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor or an array of numbers, got {type(value).__name__}") from error
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {t.layout}")
    if t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {t.dtype}")
    if t.dtype not in (torch.float32, torch.float64):
        t = t.float()
    if t.ndim not in ndims or t.numel() == 0:
        want = " or ".join(f"{n}-D" for n in ndims)
        raise ValueError(f"{name}: expected a non-empty {want} array, got shape {tuple(t.shape)}")
    # Traced, as where a network's input is a kernel, or under vmap there are no values to read.
    readable = not (t.is_meta or torch.compiler.is_compiling() or transforms_active())
    if readable and not torch.isfinite(t).all():
        raise ValueError(f"{name}: expected finite values, got {int((~torch.isfinite(t)).sum())} NaN or infinite ones")
    return t
