"""Snapshot spectral imaging (CASSI): the gradient step, and Phi x alone at the dispersion that deepinv knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness import optional
from benchmarks.harness.registry import (
    FORWARD,
    LIMIT,
    OURS,
    OVERHEAD,
    WARM,
    Problem,
    Run,
    Unavailable,
    Work,
    case,
    size,
)
from lorun_fast.reference import cassi as reference


def _inputs(
    dtype, device, n: int, bands: int, height: int, width: int, step: int, full: bool, own: bool = False
) -> dict[str, Tensor]:
    """full: a mask per band; own: one per sample."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (n, 1, height, width) if own else (bands, height, width) if full else (height, width)
    return {
        "x": torch.rand(n, bands, height, width, device=device).to(dtype),
        "y": torch.rand(n, height, width + step * (bands - 1), device=device, dtype=wide) * bands / 2,
        "mask": torch.rand(shape, device=device, dtype=wide),
        "rho": torch.tensor([0.3], device=device, dtype=wide),
    }


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _definition(step: int):
    def gradient_step(x, y, mask, rho) -> Tensor:
        residual = reference.cassi(x, mask, step) - y
        return x - rho * reference.cassi_adjoint(residual, mask, x.shape[1], step)

    return gradient_step


@case(
    "cassi.step",
    suite="ops",
    sizes=[
        size("1x28x256x256", compiled=True, n=1, bands=28, height=256, width=256),
        size("1x28x256x256 full Phi", n=1, bands=28, height=256, width=256, full=True),
        size("16x28x256x256", n=16, bands=28, height=256, width=256),
        size("16x28x256x256 half", dtypes=("bf16", "fp16"), devices=("cuda",), n=16, bands=28, height=256, width=256),
        size("8x28x256x256 mask per sample", n=8, bands=28, height=256, width=256, own=True),
        size("1x28x660x660", modes=(FORWARD,), n=1, bands=28, height=660, width=660),
        size("1x4x16x16", quick=True, regimes=(WARM, OVERHEAD), n=1, bands=4, height=16, width=16),
    ],
)
def step(dtype, device, *, n, bands, height, width, step=2, full=False, own=False) -> Problem:
    """z = x - rho Phi^T (Phi x - y), differentiated for x and rho: a fixed mask, a learned step size."""
    inputs = _inputs(dtype, device, n, bands, height, width, step, full, own)
    x, y, mask = inputs["x"], inputs["y"], inputs["mask"]
    return Problem(
        inputs,
        _definition(step),
        forward=Work(_nbytes(x, x, y, mask), 4 * x.numel()),
        # Backward reads the gradient, writes x's, and takes rho's from the residual that the forward pass kept.
        train=Work(_nbytes(x, x, x, x, y, y, y, mask, mask), 8 * x.numel()),
        wrt=("x", "rho"),
    )


@step.contender("lorun_fast", kind=OURS, ops=("cassi_step",), graphed=True)
def _(p: Problem):
    op = lf.CASSI(p.mask, bands=p.args["bands"], step=p.args.get("step", 2))
    return lambda: op.gradient_step(p.x, p.y, p.rho)


class Layout:
    """The geometry of a problem, and its tensors in the dtype that the rivals compute in."""

    def __init__(self, p: Problem):
        self.step = p.args.get("step", 2)
        self.n, self.bands, self.height, self.width = p.x.shape
        self.wide = self.width + self.step * (self.bands - 1)
        dtype = p.x.dtype
        self.y, self.mask = p.y.to(dtype), p.mask.to(dtype)
        self.problem = p

    @property
    def rho(self) -> Tensor:
        return self.problem.rho.to(self.problem.x.dtype)

    def window(self, c: int) -> slice:
        """The columns of the measurement that band c reaches."""
        return slice(c * self.step, c * self.step + self.width)

    def mask_of(self, c: int) -> Tensor:
        return self.mask[:, 0] if self.mask.ndim == 4 else self.mask if self.mask.ndim == 2 else self.mask[c]

    def windows(self, wide: Tensor) -> Tensor:
        """(N, H, W + step*(L-1)) -> a view (N, L, H, W): every band's window, nothing copied."""
        return wide.unfold(-1, self.width, self.step).transpose(1, 2)

    def shift(self, cube: Tensor) -> Tensor:
        """Each band at its place on the detector, as networks usually do it."""
        out = cube.new_zeros(self.n, self.bands, self.height, self.wide)
        for c in range(self.bands):
            out[:, c, :, self.window(c)] = cube[:, c]
        return out

    def shift_back(self, cube: Tensor) -> Tensor:
        out = cube.new_zeros(self.n, self.bands, self.height, self.width)
        for c in range(self.bands):
            out[:, c] = cube[:, c, :, self.window(c)]
        return out


@step.contender("one call per sample", graphed=True)
def _(p: Problem):
    """Ours, sample by sample: what one mask for each asks of an operator that has one mask for all."""
    if p.mask.ndim != 4:
        raise Unavailable("all samples share a mask")
    ops = [lf.CASSI(mask[0], bands=p.args["bands"]) for mask in p.mask]
    return lambda: torch.cat([op.gradient_step(p.x[i, None], p.y[i, None], p.rho) for i, op in enumerate(ops)])


@step.contender("band loop", compiled=True, graphed=True)
def _(p: Problem):
    """The usual form: two shift functions, each a Python loop that copies band by band into zeros."""
    s = Layout(p)

    def run() -> Tensor:
        residual = s.shift(p.x * s.mask).sum(1) - s.y
        return p.x - s.rho * s.mask * s.shift_back(residual.unsqueeze(1).repeat(1, s.bands, 1, 1))

    return run


class _SlicesInPlace(torch.autograd.Function):
    @staticmethod
    def measure(cube: Tensor, out: Tensor, s: Layout) -> Tensor:
        for c in range(s.bands):
            out[..., s.window(c)].addcmul_(cube[:, c], s.mask_of(c))
        return out

    @staticmethod
    def forward(ctx, x: Tensor, rho: Tensor, s: Layout) -> Tensor:
        residual = _SlicesInPlace.measure(x, -s.y, s)
        ctx.save_for_backward(residual, rho)
        ctx.layout = s
        return torch.addcmul(x, s.windows(residual), s.mask * rho, value=-1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        residual, rho = ctx.saved_tensors
        s = ctx.layout
        q = _SlicesInPlace.measure(grad, torch.zeros_like(residual), s)
        grad_x = torch.addcmul(grad, s.windows(q), s.mask * rho, value=-1)
        return grad_x, -(q * residual).sum().reshape(1), None


@step.contender("slices in place", graphed=True)
def _(p: Problem):
    """A loop of in-place multiply-adds on slices, no cube of zeros, its backward pass written by hand."""
    s = Layout(p)
    if p.mode == FORWARD:

        def run() -> Tensor:
            residual = _SlicesInPlace.measure(p.x, -s.y, s)
            return torch.addcmul(p.x, s.windows(residual), s.mask * s.rho, value=-1)

        return run
    return lambda: _SlicesInPlace.apply(p.x, s.rho, s)


@step.contender("skewed view", compiled=True, graphed=True)
def _(p: Problem):
    """No loop: rows padded so that a reshape moves each band by its shift, then one sum."""
    s = Layout(p)
    if s.step == 0:
        raise Unavailable("needs a dispersion")

    def run() -> Tensor:
        coded = F.pad((p.x * s.mask).transpose(1, 2), (0, s.step * s.bands))
        flat = coded.flatten(2)[..., : s.bands * s.wide]
        residual = flat.unflatten(2, (s.bands, s.wide)).sum(2) - s.y
        return p.x - s.rho * s.mask * s.windows(residual)

    return run


@step.contender("gather", compiled=True, graphed=True)
def _(p: Problem):
    """No loop: one gather by a table of columns each way."""
    s = Layout(p)
    shift = s.step * torch.arange(s.bands, device=p.x.device)[:, None]
    column = torch.arange(s.wide, device=p.x.device) - shift
    column = torch.where((column >= 0) & (column < s.width), column, s.width)
    column = column[None, :, None].expand(s.n, s.bands, s.height, s.wide)
    back = (torch.arange(s.width, device=p.x.device) + shift)[None, :, None].expand(s.n, s.bands, s.height, s.width)

    def run() -> Tensor:
        coded = F.pad(p.x * s.mask, (0, 1))
        residual = coded.gather(3, column).sum(1) - s.y
        return p.x - s.rho * s.mask * residual.unsqueeze(1).expand(-1, s.bands, -1, -1).gather(3, back)

    return run


@step.contender("padded bands", compiled=True, graphed=True)
def _(p: Problem):
    """Each band padded to its place and added up: what torch.compile fuses best."""
    s = Layout(p)

    def run() -> Tensor:
        residual = -s.y
        for c in range(s.bands):
            after = s.step * (s.bands - 1 - c)
            residual = residual + F.pad(p.x[:, c] * s.mask_of(c), (c * s.step, after))
        return p.x - s.rho * s.mask * s.windows(residual)

    return run


@step.contender("x.clone()", kind=LIMIT, modes=(FORWARD,))
def _(p: Problem):
    """The least any out-of-place step can do: read x, write as much."""
    return Run(lambda: p.x.clone(), reference=lambda x, y, mask, rho: x)


@case(
    "cassi.prox",
    suite="ops",
    sizes=[
        size("1x28x256x256", n=1, bands=28, height=256, width=256),
        size("1x4x16x16", quick=True, regimes=(WARM, OVERHEAD), n=1, bands=4, height=16, width=16),
    ],
)
def prox(dtype, device, *, n, bands, height, width) -> Problem:
    """x + Phi^T ((y - Phi x) / (mu + Phi_s)), differentiated for x and mu: the data step of most networks for CASSI."""
    inputs = _inputs(dtype, device, n, bands, height, width, 2, False)
    inputs["mu"] = inputs.pop("rho")
    x, y, mask = inputs["x"], inputs["y"], inputs["mask"]

    def definition(x, y, mask, mu) -> Tensor:
        weight = reference.cassi_prox_weight(mask, mu, bands, 2)
        return reference.cassi_step(x, y, mask, torch.ones_like(mu), weight, 2, False)[0]

    return Problem(
        inputs,
        definition,
        forward=Work(_nbytes(x, x, y, mask), 4 * x.numel()),
        train=Work(_nbytes(x, x, x, x, y, y, y, mask, mask), 8 * x.numel()),
        wrt=("x", "mu"),
    )


@prox.contender("lorun_fast", kind=OURS, ops=("cassi_step", "cassi_prox_weight"), graphed=True)
def _(p: Problem):
    """Phi_s anew at every call."""
    op = lf.CASSI(p.mask, bands=p.args["bands"])
    return lambda: op.prox(p.x, p.y, p.mu)


def _diagonal(p: Problem) -> Tensor:
    """Phi_s, zeros set to 1: what networks hold beside the mask."""
    return 1 / reference.cassi_prox_weight(p.mask, p.mask.new_zeros(1), p.args["bands"], 2)


@prox.contender("band loop", graphed=True)
def _(p: Problem):
    """The usual form, with Phi_s given."""
    s, diagonal = Layout(p), _diagonal(p)

    def run() -> Tensor:
        measured = s.shift(p.x * s.mask).sum(1)
        correction = (s.y - measured) / (p.mu + diagonal)
        return p.x + s.mask * s.shift_back(correction.unsqueeze(1).repeat(1, s.bands, 1, 1))

    return run


@prox.contender("slices in place", modes=(FORWARD,), graphed=True)
def _(p: Problem):
    """A loop of in-place multiply-adds on slices, with Phi_s given."""
    s, diagonal = Layout(p), _diagonal(p)

    def run() -> Tensor:
        correction = _SlicesInPlace.measure(p.x, -s.y, s).div_(p.mu + diagonal)
        return torch.addcmul(p.x, s.windows(correction), s.mask, value=-1)

    return run


@case(
    "cassi.forward",
    suite="ops",
    sizes=[
        # Odd heights: at an even height, or an even measurement width, deepinv's result lies a pixel off.
        size("1x28x63x64 step 1", n=1, bands=28, height=63, width=64, step=1),
        size("1x28x255x256 step 1", modes=(FORWARD,), regimes=(WARM,), n=1, bands=28, height=255, width=256, step=1),
        size("1x4x15x16 step 1", quick=True, regimes=(WARM, OVERHEAD), n=1, bands=4, height=15, width=16, step=1),
    ],
)
def forward(dtype, device, *, n, bands, height, width, step) -> Problem:
    """y = Phi x with one column between bands, which is what deepinv's operator computes, times L."""
    inputs = _inputs(dtype, device, n, bands, height, width, step, False)
    x, y, mask = inputs["x"], inputs["y"], inputs["mask"]
    return Problem(
        inputs,
        lambda x, y, mask, rho: reference.cassi(x, mask, step),
        forward=Work(_nbytes(x, y, mask), 2 * x.numel()),
        train=Work(_nbytes(x, x, y, y, mask, mask), 4 * x.numel()),
        wrt=("x",),
    )


@forward.contender("lorun_fast", kind=OURS, ops=("cassi",))
def _(p: Problem):
    op = lf.CASSI(p.mask, bands=p.args["bands"], step=p.args["step"])
    return lambda: op(p.x)


@forward.contender("padded bands")
def _(p: Problem):
    s = Layout(p)

    def run() -> Tensor:
        bands = [F.pad(p.x[:, c] * s.mask_of(c), (c * s.step, s.step * (s.bands - 1 - c))) for c in range(s.bands)]
        return torch.stack(bands).sum(0)

    return run


@forward.contender("slices in place", modes=(FORWARD,))
def _(p: Problem):
    s = Layout(p)
    return lambda: _SlicesInPlace.measure(p.x, torch.zeros_like(s.y), s)


@forward.contender("deepinv")
def _(p: Problem):
    """CompressiveSpectralImaging, single disperser; its measurement is the mean over bands."""
    bands = p.args["bands"]
    physics = optional.package("deepinv").physics.CompressiveSpectralImaging(
        tuple(p.x.shape[1:]), mask=p.mask[None, None], mode="sd", shear_dir="w", device=p.x.device
    )
    return lambda: physics.A(p.x)[:, 0] * bands
