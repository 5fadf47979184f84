"""The whole network: compressive sensing at 25 %, nine stages, a residual U-Net shared by all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lorun_fast as lf
from benchmarks import staged_rivals as rivals
from benchmarks.harness import variants
from benchmarks.harness.registry import (
    DTYPES,
    FORWARD,
    LIMIT,
    OURS,
    TRAIN,
    WARM,
    Problem,
    Run,
    Unavailable,
    Work,
    case,
    size,
)
from lorun_fast import adapters

RATIO, BLOCK = 0.25, rivals.BLOCK
ADAPTED = (nn.Conv2d, nn.ConvTranspose2d)
# Relative to the image's largest value; bf16 activations through nine stages.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Base:
    """The parts every contender builds its network from: Phi, the base denoiser, and its layers by name."""

    def __init__(self, device, channels: tuple[int, ...], stages: int):
        self.device, self.stages = device, stages
        self.op = lf.BlockCS.gaussian(RATIO, BLOCK).to(device)
        self.denoiser = lf.ResUNet(channels=channels).to(device)
        self.layers = [name for name, m in self.denoiser.named_modules() if isinstance(m, ADAPTED)]

    def layer(self, name: str) -> nn.Module:
        return self.denoiser.get_submodule(name)

    def transposed(self, name: str) -> bool:
        return isinstance(self.layer(name), nn.ConvTranspose2d)

    def factors(self, form: str, gamma: float) -> dict[str, Tensor]:
        """Stacked factors of every layer, as inputs of the problem: "down.<layer>" and "up.<layer>"."""
        found = {}
        for name in self.layers:
            layer = self.layer(name)
            rank = adapters.rank(layer.in_channels, layer.out_channels, gamma)
            shapes = adapters.factor_shapes(layer.weight.shape, rank, form, transposed=self.transposed(name))
            for key, shape in zip(("down", "up"), shapes, strict=True):
                found[f"{key}.{name}"] = 0.05 * torch.randn(self.stages, *shape, device=self.device)
        return found

    def merged(self, inputs: dict[str, Tensor], name: str) -> Tensor:
        """W0 + dW of all stages in float64, (K, *weight.shape)."""
        down, up = inputs[f"down.{name}"].double(), inputs[f"up.{name}"].double()
        weight = self.layer(name).weight.detach().double()
        return weight + adapters.delta(down, up, weight.shape, transposed=self.transposed(name))


def _definition(base: Base, weights: Callable[[dict[str, Tensor], str], Tensor]) -> Callable[..., Tensor]:
    """The network in float64, from stacked weights per layer (K, ...), hand-merged."""
    denoiser = copy.deepcopy(base.denoiser).double()
    phi = base.op.phi.double()

    def network(**inputs) -> Tensor:
        stacked = {f"{name}.weight": weights(inputs, name) for name in base.layers}

        def denoise(z: Tensor, k: int) -> Tensor:
            return torch.func.functional_call(denoiser, {name: w[k] for name, w in stacked.items()}, (z,))

        return rivals.unfold(inputs["y"], phi, inputs["step_size"], denoise)

    return network


def _flops(base: Base, n: int, px: int) -> int:
    denoiser = copy.deepcopy(base.denoiser).to("meta")
    with FlopCounterMode(display=False) as counter:
        denoiser(torch.empty(1, 1, px, px, device="meta"))
    products = 2 * 2 * base.op.phi.numel() * (px // BLOCK) ** 2
    return n * base.stages * (counter.get_total_flops() + products)


def _problem(dtype, device, n: int, px: int, channels: tuple[int, ...], stages: int, form: str) -> Problem:
    base = Base(device, channels, stages)
    x = torch.rand(n, 1, px, px, device=device)
    inputs = {"y": base.op(x), "step_size": torch.full((stages,), 0.9, device=device), **base.factors(form, 10)}
    flops = _flops(base, n, px)
    moved = 4 * (inputs["y"].numel() + x.numel() + sum(t.numel() for t in inputs.values()))
    p = Problem(
        inputs,
        _definition(base, base.merged),
        forward=Work(moved, flops),
        train=Work(2 * moved, 2 * flops),
        wrt=tuple(name for name in inputs if name != "y"),
        items=n,
        tolerance=TOLERANCE[dtype],
    )
    p.base = base
    return p


# CS25 is the shipped network's; the wide one, for a GPU to have enough to do.
CS25, WIDE, SMALL = (16, 32, 64, 64), (32, 64, 96, 128), (8, 16)
WHOLE = {"modes": (FORWARD,), "regimes": (WARM,), "stages": 9}
TINY = {"quick": True, "modes": (FORWARD,), "regimes": (WARM,), "channels": SMALL}


@case(
    "network.cs25",
    suite="network",
    sizes=[
        size("1x1x256x256", dtypes=("fp32", "bf16"), compiled=True, n=1, px=256, channels=CS25, **WHOLE),
        *(
            size(
                f"{n}x1x256x256 wide", dtypes=("fp32", "bf16"), devices=("cuda",), compiled=True,
                n=n, px=256, channels=WIDE, **WHOLE,
            )
            for n in (16, 1)
        ),
        size("1x1x64x64", n=1, px=64, stages=3, **TINY),
    ],
)  # fmt: skip
def inference(dtype, device, *, n, px, channels, stages) -> Problem:
    """The network of the shipped weights, and on a GPU a wider one."""
    return _problem(dtype, device, n, px, channels, stages, "peft")


@case(
    "network.merged",
    suite="network",
    sizes=[
        size("1x1x256x256", n=1, px=256, channels=CS25, **WHOLE),
        size("1x1x32x32", n=1, px=32, stages=2, **TINY),
    ],
)
def merged(dtype, device, *, n, px, channels, stages) -> Problem:
    """Do merged adapters cost anything? Few contenders, for many samples; the tied network is the rival."""
    return _problem(dtype, device, n, px, channels, stages, "peft")


@case(
    "network.throughput",
    suite="network",
    sizes=[
        *(
            size(f"{n}x1x{px}x{px}", dtypes=dtypes, devices=(device,), n=n, px=px, channels=CS25, **WHOLE)
            for device, dtypes, px, batches in (
                ("cpu", ("fp32", "bf16"), 128, (1, 2, 4, 8, 16)),
                ("cuda", ("bf16",), 256, (1, 2, 4, 8, 16, 32, 64)),
            )
            for n in batches
        ),
        size("2x1x32x32", n=2, px=32, stages=2, **TINY),
    ],
)
def throughput(dtype, device, *, n, px, channels, stages) -> Problem:
    """Images per second and peak memory against the batch; ``--plot`` draws the curves."""
    return _problem(dtype, device, n, px, channels, stages, "peft")


@case(
    "network.training",
    suite="network",
    sizes=[
        size(
            "8x1x96x96", dtypes=("fp32", "bf16"), modes=(TRAIN,), regimes=(WARM,), devices=("cpu",),
            n=8, px=96, channels=CS25, stages=9,
        ),
        size(
            "16x1x96x96 wide", dtypes=("bf16",), modes=(TRAIN,), regimes=(WARM,), devices=("cuda",),
            n=16, px=96, channels=WIDE, stages=9,
        ),
        size("1x1x32x32", quick=True, modes=(TRAIN,), regimes=(WARM,), n=1, px=32, channels=SMALL, stages=2),
    ],
)  # fmt: skip
def training(dtype, device, *, n, px, channels, stages) -> Problem:
    """Gradients of adapters and step sizes, the base frozen; time and peak memory against untied stages.

    Of some 10^8 inputs of ReLUs a few round to the other side of zero: each moves one stage's gradient of one layer
    by about 1 / sqrt(pixels) of its largest value.
    """
    p = _problem(dtype, device, n, px, channels, stages, "loralib")
    p.jumps = True
    return p


def _contender(cases: tuple, name: str, **settings):
    """Registers one contender for several cases."""

    def register(build):
        for one in cases:
            one.contender(name, **settings)(build)
        return build

    return register


EVERY = (inference, merged, throughput)


def _lorun(p: Problem, **settings) -> lf.LoRun:
    """Our network, with the problem's weights."""
    form = "peft" if any(t.ndim == 5 for name, t in p.inputs.items() if name.startswith("down.")) else "loralib"
    net = lf.LoRun(p.base.op, p.base.denoiser, stages=p.base.stages, form=form, **settings).to(p.device)
    with torch.no_grad():
        net.step_size.copy_(p.step_size)
        for name in p.base.layers:
            for key in ("down", "up"):
                _layer(net, name).get_parameter(key).copy_(p.inputs[f"{key}.{name}"])
    return net


def _layer(net: lf.LoRun, name: str) -> nn.Module:
    return net.denoiser.base.get_submodule(name)


@_contender((inference, merged), "lorun_fast", kind=OURS, ops=("block_cs_step",), graphed=True)
def _(p: Problem):
    """eval() merges; bf16 by autocast."""
    net = _lorun(p).eval()
    return rivals.autocast(p, lambda: net(p.y))


@inference.contender("lorun_fast, bf16 nhwc", kind=OURS, ops=("block_cs_step",), graphed=True)
def _(p: Problem):
    """Denoiser weights in bf16, channels_last."""
    if p.dtype != "bf16":
        raise Unavailable("for bf16")
    net = _lorun(p).eval().bfloat16().to(memory_format=torch.channels_last)
    return lambda: net(p.y)


@inference.contender("lorun_fast nhwc, compiled", kind=OURS, ops=("block_cs_step",), compiles=True)
def _(p: Problem):
    """channels_last, bf16 where the problem is; the denoiser compiled, two graphs for all stages."""
    net = _lorun(p).eval().to(memory_format=torch.channels_last)
    if p.dtype == "bf16":
        net.bfloat16()
    net.denoiser.compile()
    return lambda: net(p.y)


def _optimized(p: Problem, **settings):
    best = _lorun(p).optimize(dtype=DTYPES[p.dtype], **settings)
    return Run(rivals.autocast(p, lambda: best(p.y)), recorded=best.report["CUDA graph"][0] == "yes")


@_contender(EVERY, "lorun_fast, optimize()", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    """Whatever the library does on its own for this device in the problem's dtype."""
    return _optimized(p)


@_contender((inference, merged), "lorun_fast, optimize(), direct", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    """The same with torch's convolutions: the adapters' cost without the kernel's gain."""
    return _optimized(p, convolutions="direct")


@inference.contender("lorun_fast, optimize(), fp32", kind=OURS, devices=("cpu",), ops=("block_cs_step",))
def _(p: Problem):
    """In a table of bf16, what optimize() takes by itself where there are no matrix tiles: minimal filtering."""
    if p.dtype != "bf16":
        raise Unavailable("beside bf16")
    best = _lorun(p).optimize(dtype=torch.float32)
    return lambda: best(p.y)


@inference.contender("lorun_fast, not merged", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    net = _lorun(p).train()
    return rivals.autocast(p, lambda: net(p.y))


@inference.contender("PEFT-style layers", graphed=True)
def _(p: Problem):
    return rivals.with_layers(p, rivals.AdapterBranch)


@inference.contender("PEFT-style layers, compiled", devices=("cuda",), compiles=True)
def _(p: Problem):
    return variants.compiled(lambda p: rivals.with_layers(p, rivals.AdapterBranch))(p)


_contender((inference, throughput), "PEFT")(rivals.peft_layers)


@inference.contender("PEFT, fp32")
def _(p: Problem):
    """In a table of bf16, what its users run who change nothing."""
    if p.dtype != "bf16":
        raise Unavailable("beside bf16")
    return rivals.peft_layers(p, "fp32")


inference.contender("loralib")(rivals.loralib_layers)


@training.contender("loralib-style layers", graphed=(TRAIN,))
def _(p: Problem):
    return rivals.with_layers(p, rivals.MergedAtCall)


@_contender(EVERY, "hand-merged", graphed=True)
def _(p: Problem):
    """Nine plain U-Nets, merged by hand: nothing of this library but the numbers."""
    return rivals.hand_merged(p)


@_contender(EVERY, "hand-merged, nhwc", graphed=True)
def _(p: Problem):
    """The same with channels_last weights, in bf16 where the problem is."""
    return rivals.hand_merged(p, channels_last=True)


@inference.contender("hand-merged nhwc, compiled", compiles=True)
def _(p: Problem):
    return rivals.hand_merged_compiled(p, channels_last=True)


@inference.contender("hand-merged nhwc, max-autotune", devices=("cuda",), graphed=True, compiles=True)
def _(p: Problem):
    """Inductor's search over its own convolutions and cuDNN's, minutes long; its result is also replayed as a graph."""
    return rivals.hand_merged_compiled(p, channels_last=True, mode="max-autotune-no-cudagraphs")


def _tied(p: Problem) -> Run:
    """No adapters at all: one U-Net for every stage, our gradient step."""
    net = lf.LoRun(p.base.op, p.base.denoiser, stages=p.base.stages, sharing="tied").to(p.device).eval()
    with torch.no_grad():
        net.step_size.copy_(p.step_size)

    def base_weights(inputs, name) -> Tensor:
        weight = p.base.layer(name).weight.detach().double()
        return weight.expand(p.base.stages, *weight.shape)

    return Run(rivals.autocast(p, lambda: net(p.y)), reference=_definition(p.base, base_weights))


inference.contender("tied network", kind=LIMIT)(_tied)
merged.contender("tied network")(_tied)


@inference.contender("18 bare convolutions", kind=LIMIT)
def _(p: Problem):
    """3 x 3 in fp32, four times the network's first width (64 for cs-25): about the work of ISTA-Net+. A yardstick."""
    width = 4 * p.args["channels"][0]
    x = torch.randn(p.y.shape[0], width, p.args["px"], p.args["px"], device=p.device)
    weights = torch.randn(18, width, width, 3, 3, device=p.device) / (3 * width**0.5)

    def chain(x: Tensor, weights: Tensor) -> Tensor:
        for weight in weights:
            x = F.conv2d(x, weight, padding=1)
        return x

    return Run(lambda: chain(x, weights), reference=lambda **inputs: chain(x.double(), weights.double()))


def _trained(p: Problem, net: lf.LoRun, backend: str | None = None) -> Run:
    factors = (_layer(net, name).get_parameter(key) for name in p.base.layers for key in ("down", "up"))
    return Run(rivals.autocast(p, lambda: net(p.y)), parameters=(net.step_size, *factors), backend=backend)


@training.contender("lorun_fast", kind=OURS, ops=("block_cs_step",), graphed=(TRAIN,))
def _(p: Problem):
    return _trained(p, _lorun(p).train())


@training.contender("lorun_fast, winograd", kind=OURS, devices=("cpu",), ops=("block_cs_step", "winograd_conv2d"))
def _(p: Problem):
    """3 x 3 convolutions and their gradients by minimal filtering, as ``lorun-fast train`` has it without AMX."""
    return _trained(p, _lorun(p).train(), "winograd")


@training.contender("lorun_fast, checkpoint", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    """Each stage's activations recomputed in the backward pass."""
    return _trained(p, _lorun(p, checkpoint=True).train())


@training.contender("untied", kind=LIMIT, graphed=(TRAIN,))
def _(p: Problem):
    """Nine full denoisers, all weights trained: what low-rank stages replace. Another problem, so no rival."""
    copies = rivals.merged_copies(p)
    rho = p.step_size.detach().clone().requires_grad_()
    weights = [copies[k].get_submodule(name).weight for k in range(p.base.stages) for name in p.base.layers]
    run = rivals.autocast(p, lambda: rivals.unfold(p.y, p.base.op.phi, rho, lambda z, k: copies[k](z)))
    names = tuple(f"{k}.{name}" for k in range(p.base.stages) for name in p.base.layers)
    for name, weight in zip(names, weights, strict=True):
        p.inputs[name] = weight.detach().clone()

    def untied_weights(inputs, name) -> list[Tensor]:
        return [inputs[f"{k}.{name}"] for k in range(p.base.stages)]

    return Run(
        run,
        reference=_definition(p.base, untied_weights),
        wrt=("step_size", *names),
        parameters=(rho, *weights),
    )
