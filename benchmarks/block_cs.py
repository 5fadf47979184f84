"""Block compressive sensing: the gradient step, and its two halves."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import lorun_fast as lf
from benchmarks.harness.registry import FORWARD, LIMIT, OURS, OVERHEAD, WARM, Problem, Run, Work, case, size
from lorun_fast.reference import block_cs as reference

RATIO = 0.25


def _inputs(dtype: torch.dtype, device, n: int, height: int, width: int, block: int) -> dict[str, Tensor]:
    m = round(RATIO * block * block)
    phi = lf.BlockCS.gaussian(RATIO, block).phi.to(device)
    rows, cols = math.ceil(height / block), math.ceil(width / block)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.rand(n, 1, height, width, device=device).to(dtype),
        "y": torch.randn(n, m, rows, cols, device=device, dtype=wide),
        "phi": phi.to(wide),
        "rho": torch.tensor([0.7], device=device, dtype=wide),
    }


def _work(inputs: dict[str, Tensor], products: int, images: int) -> Work:
    """``products`` products of Phi with every block; ``images`` image-sized tensors moved, and y and Phi once."""
    x, y, phi = inputs["x"], inputs["y"], inputs["phi"]
    blocks = y.shape[0] * y.shape[2] * y.shape[3]
    moved = images * x.numel() * x.element_size() + sum(t.numel() * t.element_size() for t in (y, phi))
    return Work(moved, products * 2 * blocks * phi.numel())


def _phi(p: Problem) -> Tensor:
    return p.phi.to(p.x.dtype)


def _padded(p: Problem) -> Tensor:
    """x, zero-padded at the bottom and right to whole blocks."""
    block = p.args["block"]
    bottom, right = -p.x.shape[2] % block, -p.x.shape[3] % block
    return F.pad(p.x, (0, right, 0, bottom)) if bottom or right else p.x


def _descend(p: Problem, back: Tensor) -> Tensor:
    return p.x - p.rho.to(p.x.dtype) * back[:, :, : p.x.shape[2], : p.x.shape[3]]


TINY = size("1x1x16x16 B8", quick=True, regimes=(WARM, OVERHEAD), n=1, height=16, width=16, block=8)
ONE = size("1x1x512x512 B32", compiled=True, n=1, height=512, width=512, block=32)
BATCH = size("16x1x256x256 B32", n=16, height=256, width=256, block=32)


@case(
    "block_cs.step",
    suite="ops",
    sizes=[
        ONE,
        BATCH,
        size("64x1x512x512 B32", dtypes=("fp32", "bf16"), devices=("cuda",), n=64, height=512, width=512, block=32),
        size(
            "16x1x256x256 B32 half", dtypes=("bf16", "fp16"), devices=("cuda",), n=16, height=256, width=256, block=32
        ),
        size("1x1x250x330 B33", modes=(FORWARD,), n=1, height=250, width=330, block=33),
        TINY,
    ],
)
def step(dtype, device, *, n, height, width, block) -> Problem:
    """z = x - rho Phi^T (Phi x - y), differentiated for x and rho: a fixed Phi, a learned step size."""
    inputs = _inputs(dtype, device, n, height, width, block)
    return Problem(
        inputs,
        lambda x, y, phi, rho: reference.block_cs_step(x, y, phi, rho, block),
        forward=_work(inputs, products=2, images=2),
        # The backward pass is one more step (on the gradient); rho's gradient falls out of its first product.
        train=_work(inputs, products=4, images=5),
        wrt=("x", "rho"),
    )


@case("block_cs.learned_phi", suite="ops", sizes=[BATCH, TINY])
def learned_phi(dtype, device, *, n, height, width, block) -> Problem:
    """The step where Phi is learned too: differentiated for x, phi and rho."""
    inputs = _inputs(dtype, device, n, height, width, block)
    return Problem(
        inputs,
        lambda x, y, phi, rho: reference.block_cs_step(x, y, phi, rho, block),
        forward=_work(inputs, products=2, images=2),
        train=_work(inputs, products=6, images=5),
        wrt=("x", "phi", "rho"),
    )


@step.contender("lorun_fast", kind=OURS, ops=("block_cs_step",), graphed=True)
def _(p: Problem):
    op = lf.BlockCS(p.phi, p.args["block"])
    return lambda: op.gradient_step(p.x, p.y, p.rho)


@learned_phi.contender("lorun_fast", kind=OURS, ops=("block_cs_step", "block_cs_grad_phi"))
def _(p: Problem):
    return lambda: lf.functional.block_cs_step(p.x, p.y, p.phi, p.rho, block_size=p.args["block"])


@learned_phi.contender("strided + transposed convolution")
@step.contender("strided + transposed convolution", compiled=True, graphed=True)
def _(p: Problem):
    """How published networks write it: Phi's rows as B x B kernels of stride B."""
    block = p.args["block"]

    def run() -> Tensor:
        kernels = _phi(p).reshape(-1, 1, block, block)
        residual = F.conv2d(_padded(p), kernels, stride=block) - p.y.to(kernels.dtype)
        return _descend(p, F.conv_transpose2d(residual, kernels, stride=block))

    return run


@learned_phi.contender("unfold + matmul")
@step.contender("unfold + matmul", compiled=True, graphed=True)
def _(p: Problem):
    """Blocks as columns, two products, fold back."""
    block = p.args["block"]

    def run() -> Tensor:
        phi, x = _phi(p), _padded(p)
        residual = phi @ F.unfold(x, block, stride=block) - p.y.flatten(2).to(phi.dtype)
        return _descend(p, F.fold(phi.mT @ residual, x.shape[2:], block, stride=block))

    return run


@learned_phi.contender("reshape + matmul")
@step.contender("reshape + matmul", compiled=True, graphed=True)
def _(p: Problem):
    """Blocks as rows by reshape and transpose, one product over all of them each way."""
    b = p.args["block"]
    n, m, rows, cols = p.y.shape

    def run() -> Tensor:
        phi, x = _phi(p), _padded(p)
        blocks = x.view(n, rows, b, cols, b).transpose(2, 3).reshape(-1, b * b)
        y = p.y.permute(0, 2, 3, 1).reshape(-1, m).to(phi.dtype)
        back = torch.addmm(y, blocks, phi.mT, beta=-1) @ phi
        back = back.view(n, rows, cols, b, b).transpose(2, 3).reshape(n, 1, rows * b, cols * b)
        return _descend(p, back)

    return run


@step.contender("two bare products", kind=LIMIT, modes=(FORWARD,), graphed=True)
def _(p: Problem):
    """Only the arithmetic: both products on blocks that are laid out already."""
    phi, block = _phi(p), p.args["block"]
    blocks = reference.to_blocks(p.x, block).flatten(0, 2).contiguous()

    def definition(x, y, phi, rho) -> Tensor:
        return reference.to_blocks(x, block).flatten(0, 2) @ phi.mT @ phi

    return Run(lambda: blocks @ phi.mT @ phi, reference=definition)


@case("block_cs.forward", suite="ops", sizes=[ONE, TINY])
def forward(dtype, device, *, n, height, width, block) -> Problem:
    """y = Phi x."""
    inputs = _inputs(dtype, device, n, height, width, block)
    return Problem(
        inputs,
        lambda x, y, phi, rho: reference.block_cs(x, phi, block),
        forward=_work(inputs, products=1, images=1),
        train=_work(inputs, products=2, images=2),
        wrt=("x",),
    )


@forward.contender("lorun_fast", kind=OURS, ops=("block_cs",))
def _(p: Problem):
    op = lf.BlockCS(p.phi, p.args["block"])
    return lambda: op(p.x)


@forward.contender("strided convolution", compiled=True)
def _(p: Problem):
    block = p.args["block"]
    return lambda: F.conv2d(_padded(p), _phi(p).reshape(-1, 1, block, block), stride=block)


@forward.contender("reshape + matmul", compiled=True)
def _(p: Problem):
    b = p.args["block"]
    n, m, rows, cols = p.y.shape

    def run() -> Tensor:
        blocks = _padded(p).view(n, rows, b, cols, b).transpose(2, 3).reshape(n, rows * cols, b * b)
        return (_phi(p) @ blocks.mT).view(n, m, rows, cols)

    return run
