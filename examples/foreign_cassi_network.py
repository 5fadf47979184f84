"""Somebody's unfolding network for snapshot spectral imaging, before and after: our operator and adapt() dropped in.

    python examples/foreign_cassi_network.py              # 28 bands of 256 x 256, as the field measures

``Before`` is an ADMM network as one writes it: shifts in loops over the bands, a denoiser per stage. ``After`` is the
same class with two changes, marked (1) and (2). Both start from the same denoiser and give the same image.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

import lorun_fast as lf


class Denoiser(nn.Module):
    """A small residual denoiser; stands for whatever the network uses."""

    def __init__(self, bands: int, width: int = 32):
        super().__init__()
        self.head = nn.Conv2d(bands, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Conv2d(width, bands, 3, padding=1)

    def forward(self, x):
        return x + 0.1 * self.tail(torch.relu(self.body(torch.relu(self.head(x)))))


class Before(nn.Module):
    """x = prox(z - u);  z = D_k(x + u);  u = u + x - z."""

    def __init__(self, mask, bands, denoiser, stages, step=2):
        super().__init__()
        self.bands, self.step = bands, step
        self.register_buffer("phi", self.shift(mask.expand(1, bands, *mask.shape)))
        self.register_buffer("phi_s", (self.phi**2).sum(1).clamp_min(1e-9))
        self.mu = nn.Parameter(torch.full((stages,), 0.1))
        self.denoisers = nn.ModuleList(copy.deepcopy(denoiser) for _ in range(stages))

    def shift(self, x):
        out = x.new_zeros(*x.shape[:3], x.shape[3] + self.step * (self.bands - 1))
        for c in range(self.bands):
            out[:, c, :, c * self.step : c * self.step + x.shape[3]] = x[:, c]
        return out

    def shift_back(self, y, width):
        return torch.stack([y[:, c, :, c * self.step : c * self.step + width] for c in range(self.bands)], 1)

    def prox(self, x, y, mu):
        residual = (y - (self.phi * self.shift(x)).sum(1)) / (mu + self.phi_s)
        return x + self.shift_back(self.phi * residual[:, None], x.shape[3])

    def start(self, y):
        width = y.shape[2] - self.step * (self.bands - 1)
        return self.shift_back(y[:, None].expand(-1, self.bands, -1, -1), width) * self.step / self.bands

    def forward(self, y):
        z = self.start(y)
        u = torch.zeros_like(z)
        for k in range(len(self.mu)):
            x = self.prox(z - u, y, self.mu[k])
            z = self.denoise(x + u, k)
            u = u + x - z
        return z

    def denoise(self, x, k):
        return self.denoisers[k](x)


class After(Before):
    """The same network. What the operator needs of a shape lives in it; one denoiser serves all stages."""

    def __init__(self, mask, bands, denoiser, stages, step=2):
        nn.Module.__init__(self)
        self.op = lf.CASSI(mask, bands=bands, step=step)  # (1) the operator, with its closed-form step
        self.prox, self.start = self.op.prox, self.op.initial
        self.mu = nn.Parameter(torch.full((stages,), 0.1))
        self.staged = lf.adapt(denoiser, stages=stages)  # (2) one base, an adapter a stage

    def denoise(self, x, k):
        return self.staged(x, stage=k)


def seconds(call, repeats: int) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--bands", type=int, default=28)
    p.add_argument("--stages", type=int, default=5)
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args(argv)
    torch.manual_seed(0)
    mask = (torch.rand(args.size, args.size) > 0.5).float()
    denoiser = Denoiser(args.bands)
    before, after = (cls(mask, args.bands, denoiser, args.stages) for cls in (Before, After))
    y = after.op(torch.rand(1, args.bands, args.size, args.size))

    def train(net):
        net(y).square().mean().backward()

    with torch.no_grad():
        difference = (before(y) - after(y)).abs().max()
    print(f"largest difference of the restored images: {difference:.1e}")
    for name, call in (("prox step, forward and backward", step_of(y, args)), ("training", train)):
        times = [seconds(lambda net=net, call=call: call(net), args.repeats) for net in (before, after)]
        report(name, times)
    with torch.inference_mode():
        times = [seconds(lambda: before(y), args.repeats)]
        after.staged.merge()
        times.append(seconds(lambda: after(y), args.repeats))
    report("inference, merged", times)
    counts = [sum(p.numel() for p in net.parameters()) for net in (before, after)]
    print(f"{'parameters':<34}{counts[0]:>12,}  {counts[1]:>12,}  {counts[0] / counts[1]:.1f}x fewer")


def step_of(y, args):
    x = torch.rand(1, args.bands, args.size, args.size, requires_grad=True)
    return lambda net: net.prox(x, y, net.mu[0]).sum().backward()


def compared(before: float, after: float) -> str:
    return f"{before / after:.1f}x faster" if after <= before else f"{after / before:.1f}x slower"


def report(name: str, times: list[float]) -> None:
    before, after = (f"{1000 * t:.1f} ms" for t in times)
    print(f"{name:<34}{before:>12}  {after:>12}  {compared(*times)}")


if __name__ == "__main__":
    main()
