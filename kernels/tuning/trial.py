"""A trial: one problem's tensors on a device, its definition in float64, and whether a tile gives it."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from lorun_fast.kernels import lora_conv2d, lora_conv2d_backward
from lorun_fast.kernels.tables import Key
from lorun_fast.kernels.tiles import BackwardTile, Tile
from lorun_fast.kernels.tuning.problems import Problem, shipped_tile, tensors
from lorun_fast.reference import lora as reference

_SCALE = 0.7


@contextlib.contextmanager
def poisoned():
    """New tensors start as NaN, so that what a kernel leaves out shows; and torch's deterministic mode is on."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Trial:
    """One problem on one device. What PyTorch itself gives in the problem's dtype sets what a tile is allowed."""

    def __init__(self, problem: Problem, device: str):
        self.problem = problem
        self._t = t = tensors(problem, device)
        _, s = t.read(problem)
        direction = "backward" if problem.backward else "forward"
        self.key = Key(direction, s.arrange()[0], str(t.x.dtype), s.rank, s.mixed, problem.activation)
        self.dtype = t.x.dtype
        self._need_bias = problem.activation is not None
        self._output = None
        if problem.backward and problem.knows:
            with torch.no_grad():
                y = self._before_activation(t.x, t.weight, t.bias, t.down, t.up)
                self._output = reference.epilogue(y, problem.activation, None)
        self._truth = self._define(torch.float64)
        self._own = self._define(self.dtype)

    def shipped(self, arch: int) -> Tile | BackwardTile:
        return shipped_tile(self.problem, self.key.geometry, self.dtype, arch, self.key.rank)

    def _before_activation(self, x, weight, bias, down, up) -> Tensor:
        p, stage = self.problem, self._t.stage
        geometry = {"stride": p.stride, "padding": p.k // 2}
        if down is not None:
            return reference.lora_conv2d(x, weight, bias, down, up, scale=_SCALE, stage=stage, **geometry)
        if stage is None:
            return F.conv2d(x, weight, bias, **geometry)
        return reference.conv2d_per_sample(x, weight[stage], bias, **geometry, dilation=1, groups=1)

    def _define(self, dtype: torch.dtype) -> list[Tensor]:
        """The results by the definition, in ``dtype``: y, or the gradients of x, factors (or weight), and bias."""
        p, t = self.problem, self._t
        inputs = [None if i is None else i.to(dtype) for i in (t.x, t.weight, t.bias, t.down, t.up)]
        if not p.backward:
            with torch.no_grad():
                y = self._before_activation(*inputs)
                return [reference.epilogue(y, p.activation, t.dy.to(dtype) if p.residual else None)]
        wanted = (0, 1) if t.down is None else (0, 3, 4)
        order = wanted + ((2,) if self._need_bias else ())
        leaves = [inputs[i].requires_grad_() for i in order]
        before = self._before_activation(*inputs)
        # The sign that the kernel is given decides for the definition too: rounding may turn that of a value near zero.
        source = before.detach() if self._output is None else self._output.to(dtype)
        grad = reference.activation_backward(t.dy.to(dtype), p.activation, source)
        return list(torch.autograd.grad(before, leaves, grad))

    def run(self, tile: Tile | BackwardTile) -> list[Tensor]:
        """What the kernels give with this tile, in the order of the definition."""
        p, t = self.problem, self._t
        more = {"scale": _SCALE, "stage": t.stage, "stride": p.stride, "padding": p.k // 2, "activation": p.activation}
        inputs = (t.x, t.weight, t.bias, t.down, t.up)
        if p.backward:
            need = (True, True, self._need_bias)
            found = lora_conv2d_backward.backward(t.dy, *inputs, output=self._output, need=need, tile=tile, **more)
            return [f for f in found if f is not None]
        return [lora_conv2d.forward(*inputs, residual=t.dy if p.residual else None, tile=tile, **more)]

    def fault(self, tile: Tile | BackwardTile) -> str:
        """What is wrong with what this tile gives; empty where it is right, and the same bits twice.

        Right: nothing left unwritten, and an error of at most twice PyTorch's in the same dtype, plus four roundings
        of the largest value.
        """
        try:
            with poisoned():
                first, second = self.run(tile), self.run(tile)
        except Exception as error:  # what a compiler, a driver or a launch may raise is not ours to list
            return f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
        for got, again, own, truth in zip(first, second, self._own, self._truth, strict=True):
            if not torch.isfinite(got).all():
                return "WRONG: leaves elements unwritten, or NaN"
            largest = truth.abs().max().item()
            allowed = 2 * (own.double() - truth).abs().max().item() + 4 * torch.finfo(got.dtype).eps * largest
            error = (got.double() - truth).abs().max().item()
            if error > allowed:
                return f"WRONG: error {error:.3g}, allowed {allowed:.3g}"
            if not torch.equal(got, again):
                return "WRONG: two runs differ"
        return ""
