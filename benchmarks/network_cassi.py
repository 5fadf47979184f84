"""The whole network of snapshot spectral imaging: nine proximal steps, a spectral Transformer shared by all of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lorun_fast as lf
from benchmarks.harness.registry import DTYPES, FORWARD, OURS, WARM, Problem, Run, Unavailable, Work, case, size
from benchmarks.staged_rivals import autocast
from lorun_fast.denoisers.spectral_transformer import SpectralBlock
from lorun_fast.optimize import plain_stages
from lorun_fast.reference import cassi as reference
from lorun_fast.reference import spectral_attention as attention

BANDS, STEP = 28, 2


class PlainBlock(nn.Module):
    """A block of the denoiser in torch's own ops, attention as its definition has it: the least work we found."""

    def __init__(self, block: SpectralBlock):
        super().__init__()
        self.expand, self.local, self.merge = block.expand, block.local, block.merge
        self.temperature, self.hidden = block.temperature, block.hidden

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        t = self.expand(x.permute(0, 2, 3, 1))
        t = self.local(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        t = self.merge(attention.spectral_attention(t, self.temperature.flatten(), self.hidden))
        return x + t.reshape(n, height, width, channels).permute(0, 3, 1, 2)


def _plain(net: lf.LoRun, dtype: torch.dtype | None, channels_last: bool | None) -> list[nn.Module]:
    """Nine denoisers with merged weights and nothing of this library inside."""
    found = []
    for merged in plain_stages(net.denoiser, dtype, channels_last).copies:
        denoiser = copy.deepcopy(merged)
        for parent in list(denoiser.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, SpectralBlock):
                    setattr(parent, name, PlainBlock(child))
        found.append(denoiser.requires_grad_(False))
    return found


def _unfold(y: Tensor, mask: Tensor, mu: Tensor, denoise: Callable[[Tensor, int], Tensor], stages: int) -> Tensor:
    """The rivals' network; Phi x and its adjoint without a loop, Phi_s formed once."""
    width, wide = mask.shape[1], y.shape[-1]
    weight = reference.cassi_prox_weight(mask, mu, BANDS, STEP)

    def windows(t: Tensor) -> Tensor:
        return t.unfold(-1, width, STEP).transpose(1, 2)

    x = windows(y) * (STEP / BANDS)
    for k in range(stages):
        coded = F.pad((x * mask).transpose(1, 2), (0, STEP * BANDS)).flatten(2)[..., : BANDS * wide]
        residual = (y - coded.unflatten(2, (BANDS, wide)).sum(2)) * weight
        x = denoise(x + mask * windows(residual), k)
    return x


@case(
    "network.cassi",
    suite="network",
    sizes=[
        size(
            "1x28x256x256", dtypes=("fp32", "bf16"), modes=(FORWARD,), regimes=(WARM,), devices=("cpu",),
            compiled=True, px=256, channels=(28, 56, 112), stages=9,
        ),
        size(
            "1x28x16x16", quick=True, modes=(FORWARD,), regimes=(WARM,), px=16, channels=(28, 56), stages=2,
        ),
    ],
)  # fmt: skip
def network(dtype, device, *, px, channels, stages) -> Problem:
    """The network of the shipped weights: blocks 0-1-1, the exact data step, adapters of another draw."""
    blocks = (0, *[1] * (len(channels) - 1))
    base = lf.SpectralTransformer(BANDS, BANDS, channels, blocks)
    mask = (torch.rand(px, px) > 0.5).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that depthwise layers keep their weights
        net = lf.LoRun(lf.CASSI(mask, BANDS, STEP), base, stages=stages, data_step="prox").to(device)
    with torch.no_grad():
        for layer in net.denoiser.adapted.values():
            layer.up.normal_(0, 0.02)
    x = torch.rand(1, BANDS, px, px, device=device)
    exact = [d.double() for d in _plain(net, None, None)]
    meta = copy.deepcopy(exact[0]).to("meta")
    with FlopCounterMode(display=False) as counter:
        meta(torch.empty(x.shape, device="meta", dtype=torch.float64))
    # Every stage begins with the same one.
    inputs = {"y": net.op(x), "mask": net.op.mask, "mu": net._mu(net.step_size[0].detach(), x, None).flatten()}
    p = Problem(
        inputs,
        lambda y, mask, mu: _unfold(y, mask, mu, lambda z, k: exact[k](z), stages),
        forward=Work(4 * (x.numel() + inputs["y"].numel()), stages * (counter.get_total_flops() + 4 * x.numel())),
        items=1,
        tolerance={torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype],
    )
    p.net = net
    return p


@network.contender("lorun_fast", kind=OURS, ops=("cassi_step", "spectral_attention"))
def _(p: Problem):
    """eval() merges; bf16 by autocast."""
    net = p.net.eval()
    return autocast(p, lambda: net(p.y))


@network.contender("lorun_fast, optimize()", kind=OURS, ops=("cassi_step", "spectral_attention"))
def _(p: Problem):
    """Whatever the library does on its own for this device in the problem's dtype."""
    best = p.net.optimize(dtype=DTYPES[p.dtype])
    return lambda: best(p.y)


@network.contender("lorun_fast, optimize(), fp32", kind=OURS, ops=("cassi_step", "spectral_attention"))
def _(p: Problem):
    """In a table of bf16."""
    if p.dtype != "bf16":
        raise Unavailable("beside bf16")
    best = p.net.optimize(dtype=torch.float32)
    return lambda: best(p.y)


def _hand_merged(p: Problem, channels_last: bool, compile: bool = False) -> Run:
    dtype = DTYPES[p.dtype]
    denoisers = _plain(p.net, dtype, channels_last)
    if compile:
        for denoiser in denoisers:
            denoiser.compile()  # one graph: the copies share their code, and weights are its inputs

    def run() -> Tensor:
        with torch.no_grad():
            return _unfold(p.y, p.mask, p.mu, lambda z, k: denoisers[k](z.to(dtype)).to(z.dtype), len(denoisers))

    return Run(run)


@network.contender("hand-merged")
def _(p: Problem):
    """Nine plain Transformers in torch's ops, in bf16 where the problem is."""
    return _hand_merged(p, channels_last=False)


@network.contender("hand-merged, nhwc")
def _(p: Problem):
    """The same with channels_last weights."""
    return _hand_merged(p, channels_last=True)


@network.contender("hand-merged nhwc, compiled", compiles=True)
def _(p: Problem):
    return _hand_merged(p, channels_last=True, compile=True)
