"""Whether an operator keeps what a network relies on."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lorun_fast.operators.base import SensingOperator
from lorun_fast.ops._checks import whole

_CLOSE = 1e-9  # beside fp64's 2e-16, after a transform or a sum of any length
_CLOSED_FORM = 1e-6  # of what may rest on a property, as orthonormal rows, that fp32 parameters have to rounding


def check_operator(op: SensingOperator, shape: Sequence[int], *, seed: int = 0) -> None:
    """Raises ValueError for the first thing that an operator of your own does not keep; for its tests.

    shape: of images, (N, C, H, W), N at least 2 unless the operator takes one. With random images and measurements in
    fp64, on the device of the operator's tensors: Phi is linear; <Phi x, y> = <x, Phi^T y>, for complex y its real
    part; ``gradient_step`` is x - rho Phi^T (Phi x - y), for a number, a 0-d tensor and one per sample, with the
    gradients that this has, and in x's dtype; ``initial`` has an image's shape; ``norm``, where there is one, is no
    smaller than what Phi does to an image, and a ``prox`` of its own meets the optimality condition.
    """
    if not isinstance(op, SensingOperator):
        raise TypeError(f"op: expected a SensingOperator, got {type(op).__name__}")
    shape = tuple(whole("shape", n, 1) for n in shape)
    device = next((t.device for t in op.state_dict().values()), torch.device("cpu"))
    source = torch.Generator().manual_seed(whole("seed", seed, 0))

    def draw(like: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(like, generator=source, dtype=dtype).to(device)

    single, op, size = op, copy.deepcopy(op).double(), shape[-2:]
    x, other = draw(shape), draw(shape)
    measured = _tensor("forward", op(x))
    if not measured.ndim or measured.shape[0] != shape[0]:
        raise ValueError(f"forward: expected a y of {shape[0]} samples, got shape {tuple(measured.shape)}")
    y = draw(measured.shape, measured.dtype)
    _expect("forward: Phi (2 x + u)", op(2 * x + other), "2 Phi x + Phi u", 2 * measured + op(other))

    back = _image("adjoint", op.adjoint(y, size), x)
    left, right = (measured.conj() * y).sum().real, (x * back).sum()
    if not abs(left - right) <= _CLOSE * measured.norm() * y.norm():
        raise ValueError(f"adjoint: expected <x, Phi^T y> = <Phi x, y> = {left:.9g}, got {right:.9g}")
    _image("initial", op.initial(y, size), x)

    x.requires_grad_()
    for rho in (0.3, torch.tensor(0.3).to(x), 0.5 + torch.rand(shape[0], 1, 1, 1, generator=source).to(x)):
        leaves = {"x": x} | ({"rho": rho.requires_grad_()} if isinstance(rho, Tensor) else {})
        step = _image("gradient_step", op.gradient_step(x, y, rho), x)
        want = x - rho * op.adjoint(op(x) - y, size)
        _expect("gradient_step", step, "x - rho Phi^T (Phi x - y)", want)
        if not step.requires_grad:
            raise ValueError("gradient_step: expected a result with gradients for x, got one without")
        both = (torch.autograd.grad((t * other).sum(), leaves.values(), allow_unused=True) for t in (step, want))
        for name, got, should in zip(leaves, *both, strict=True):
            got = torch.zeros_like(should) if got is None else got
            _expect(f"gradient_step: its gradient for {name}", got, "that of the formula", should)
    x = x.detach()
    low = single.gradient_step(x.float(), single(x.float()), torch.tensor(0.3, device=device))
    if low.dtype != torch.float32:
        raise ValueError(f"gradient_step: expected x's dtype, torch.float32, got {low.dtype}")

    if type(op).prox is not SensingOperator.prox:
        nearest = op.prox(x, y, 0.5)
        want = op.adjoint(op(_image("prox", nearest, x)) - y, size)
        _expect("prox: mu (x - v)", 0.5 * (x - nearest), "Phi^T (Phi v - y)", want, _CLOSED_FORM)
    try:
        norm = op.norm()
    except NotImplementedError:
        return
    for _ in range(20):
        x = op.adjoint(op(x), size)
        x = x / x.norm()
    least = op(x).norm()
    if not norm >= least * (1 - _CLOSE):
        raise ValueError(f"norm: expected at least {least:.9g}, which Phi stretches some image by, got {norm:.9g}")


def _tensor(name: str, found: object) -> Tensor:
    if not isinstance(found, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(found).__name__}")
    return found


def _image(name: str, found: object, x: Tensor) -> Tensor:
    if _tensor(name, found).shape != x.shape or found.dtype != x.dtype:
        raise ValueError(
            f"{name}: expected an image {tuple(x.shape)} of {x.dtype}, got {tuple(found.shape)} of {found.dtype}"
        )
    return found


def _expect(name: str, got: Tensor, formula: str, want: Tensor, close: float = _CLOSE) -> None:
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-300)
    if not error <= close:
        raise ValueError(f"{name}: expected {formula}, got {error:.1e} of the largest value off")
