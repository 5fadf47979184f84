"""The whole network: compressive sensing at 25 %, nine stages, a residual U-Net shared by all of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lorun_fast as lf
from benchmarks.harness import optional
from benchmarks.harness.registry import (
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
from lorun_fast.reference import block_cs as reference

RATIO, BLOCK = 0.25, 32
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


def gradient_step(x: Tensor, y: Tensor, phi: Tensor, rho: Tensor) -> Tensor:
    """The best plain form of the rivals' gradient step, on whole blocks."""
    n, m, rows, cols = y.shape
    blocks = x.view(n, rows, BLOCK, cols, BLOCK).transpose(2, 3).reshape(-1, BLOCK * BLOCK)
    back = torch.addmm(y.permute(0, 2, 3, 1).reshape(-1, m), blocks, phi.mT, beta=-1) @ phi
    return x - rho * back.view(n, rows, cols, BLOCK, BLOCK).transpose(2, 3).reshape(x.shape)


def unfold(y: Tensor, phi: Tensor, rho: Tensor, denoise: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The rivals' network: x = D_k(z), K times."""
    x = reference.block_cs_adjoint(y, phi, BLOCK, y.shape[2] * BLOCK, y.shape[3] * BLOCK)
    for k, step_size in enumerate(rho.unbind()):
        x = denoise(gradient_step(x, y, phi, step_size), k)
    return x


def _definition(base: Base, weights: Callable[[dict[str, Tensor], str], Tensor]) -> Callable[..., Tensor]:
    """The network in float64, from stacked weights per layer (K, ...), hand-merged."""
    denoiser = copy.deepcopy(base.denoiser).double()
    phi = base.op.phi.double()

    def network(**inputs) -> Tensor:
        stacked = {f"{name}.weight": weights(inputs, name) for name in base.layers}

        def denoise(z: Tensor, k: int) -> Tensor:
            return torch.func.functional_call(denoiser, {name: w[k] for name, w in stacked.items()}, (z,))

        return unfold(inputs["y"], phi, inputs["step_size"], denoise)

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


WIDE, SMALL = (32, 64, 96, 128), (8, 16)


@case(
    "network.cs25",
    suite="network",
    sizes=[
        size(
            "1x1x256x256", dtypes=("fp32", "bf16"), modes=(FORWARD,), regimes=(WARM,), compiled=True,
            n=1, px=256, channels=WIDE, stages=9,
        ),
        *(
            size(
                f"{n}x1x256x256", dtypes=("fp32", "bf16"), modes=(FORWARD,), regimes=(WARM,), devices=("cuda",),
                compiled=n == 16, n=n, px=256, channels=WIDE, stages=9,
            )
            for n in (16, 4, 64)
        ),
        *(
            size(
                f"{n}x1x128x128", dtypes=("fp32", "bf16"), modes=(FORWARD,), regimes=(WARM,), devices=("cpu",),
                n=n, px=128, channels=WIDE, stages=9,
            )
            for n in (1, 2, 4, 8)
        ),
        size("1x1x64x64", quick=True, modes=(FORWARD,), regimes=(WARM,), n=1, px=64, channels=SMALL, stages=3),
    ],
)  # fmt: skip
def inference(dtype, device, *, n, px, channels, stages, form="peft") -> Problem:
    """One image, and throughput against batch size."""
    return _problem(dtype, device, n, px, channels, stages, form)


@case(
    "network.training",
    suite="network",
    sizes=[
        size("8x1x96x96", modes=(TRAIN,), regimes=(WARM,), devices=("cpu",), n=8, px=96, channels=WIDE, stages=9),
        size(
            "16x1x96x96", dtypes=("bf16",), modes=(TRAIN,), regimes=(WARM,), devices=("cuda",),
            n=16, px=96, channels=WIDE, stages=9,
        ),
        size("1x1x32x32", quick=True, modes=(TRAIN,), regimes=(WARM,), n=1, px=32, channels=SMALL, stages=2),
    ],
)  # fmt: skip
def training(dtype, device, *, n, px, channels, stages, form="loralib") -> Problem:
    """Gradients of adapters and step sizes, the base frozen; time and peak memory against untied stages."""
    return _problem(dtype, device, n, px, channels, stages, form)


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


def _autocast(p: Problem, fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """fn under bf16 autocast where the problem is in bf16."""
    if p.dtype != "bf16":
        return fn

    def run() -> Tensor:
        with torch.autocast(p.device.type, torch.bfloat16):
            return fn().float()

    return run


@inference.contender("lorun_fast", kind=OURS, ops=("block_cs_step",), compiled=True, graphed=True)
def _(p: Problem):
    """eval() merges; bf16 by autocast."""
    net = _lorun(p).eval()
    return _autocast(p, lambda: net(p.y))


@inference.contender("lorun_fast, bf16 nhwc", kind=OURS, ops=("block_cs_step",), compiled=True, graphed=True)
def _(p: Problem):
    """Denoiser weights in bf16, channels_last."""
    if p.dtype != "bf16":
        raise Unavailable("for bf16")
    net = _lorun(p).eval().bfloat16().to(memory_format=torch.channels_last)
    return lambda: net(p.y)


@inference.contender("lorun_fast, optimize()", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    """Whatever the library does on its own for this device."""
    best = _lorun(p).optimize()
    return _autocast(p, lambda: best(p.y))


@inference.contender("lorun_fast, not merged", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    net = _lorun(p).train()
    return _autocast(p, lambda: net(p.y))


class StagedLayer(nn.Module):
    """What the rivals' layers share: a frozen base, factors per stage, the stage in force."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Parameter(down.detach().clone()), nn.Parameter(up.detach().clone())
        self.conv = F.conv_transpose2d if isinstance(base, nn.ConvTranspose2d) else F.conv2d
        self.stage = 0

    def split(self) -> None:
        """Takes the stages apart once per pass: an index per stage would scatter into zeros in the backward pass."""
        self.downs, self.ups = self.down.unbind(), self.up.unbind()


class AdapterBranch(StagedLayer):
    """A layer as adapter libraries build it: base convolution plus a rank-r branch of the stage in force."""

    def forward(self, x: Tensor) -> Tensor:
        low = self.conv(x, self.downs[self.stage], stride=self.base.stride, padding=self.base.padding)
        return self.base(x) + F.conv2d(low, self.ups[self.stage][:, :, None, None])


class MergedAtCall(StagedLayer):
    """A layer in loralib's form: the weight of the stage in force is formed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        update = (self.ups[self.stage] @ self.downs[self.stage]).view(self.base.weight.shape)
        return self.conv(x, self.base.weight + update, stride=self.base.stride, padding=self.base.padding)


def _with_layers(p: Problem, kind: type[StagedLayer]) -> Run:
    """The rivals' network with every convolution of the base replaced by ``kind``."""
    denoiser = copy.deepcopy(p.base.denoiser)
    layers = {}
    for name in p.base.layers:
        layers[name] = kind(denoiser.get_submodule(name), p.inputs[f"down.{name}"], p.inputs[f"up.{name}"])
        denoiser.set_submodule(name, layers[name])
    rho = p.step_size.detach().clone().requires_grad_(p.mode == TRAIN)
    phi = p.base.op.phi

    def denoise(z: Tensor, k: int) -> Tensor:
        for layer in layers.values():
            layer.stage = k
        return denoiser(z)

    def network() -> Tensor:
        for layer in layers.values():
            layer.split()
        return unfold(p.y, phi, rho, denoise)

    parameters = [rho, *(t for layer in layers.values() for t in (layer.down, layer.up))]
    return Run(_autocast(p, network), parameters=tuple(parameters))


@inference.contender("PEFT-style layers", compiled=True, graphed=True)
def _(p: Problem):
    return _with_layers(p, AdapterBranch)


@inference.contender("PEFT")
def _(p: Problem):
    """The peft package's own layers, one adapter a stage; it has none for transposed convolutions."""
    peft = optional.package("peft")
    denoiser = copy.deepcopy(p.base.denoiser)
    branches = []
    for name in filter(p.base.transposed, p.base.layers):
        branches.append(AdapterBranch(denoiser.get_submodule(name), p.inputs[f"down.{name}"], p.inputs[f"up.{name}"]))
        denoiser.set_submodule(name, branches[-1])
        branches[-1].split()
    names = [name for name in p.base.layers if not p.base.transposed(name)]
    ranks = {name: p.inputs[f"up.{name}"].shape[-1] for name in names}
    # "^" and "$": PEFT reads the keys as patterns, and "up" would fit others too.
    pattern = {f"^{re.escape(name)}$": rank for name, rank in ranks.items()}
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=names, rank_pattern=pattern, alpha_pattern=pattern)
    model = peft.get_peft_model(denoiser, config, adapter_name="stage0", autocast_adapter_dtype=False)
    for k in range(1, p.base.stages):
        model.add_adapter(f"stage{k}", config)
    model.to(p.device).eval()
    with torch.no_grad():
        for name in names:
            layer = model.base_model.model.get_submodule(name)
            for k in range(p.base.stages):
                layer.lora_A[f"stage{k}"].weight.copy_(p.inputs[f"down.{name}"][k])
                layer.lora_B[f"stage{k}"].weight.copy_(p.inputs[f"up.{name}"][k][:, :, None, None])

    def denoise(z: Tensor, k: int) -> Tensor:
        model.base_model.set_adapter(f"stage{k}")
        for branch in branches:
            branch.stage = k
        return model(z)

    return _autocast(p, lambda: unfold(p.y, p.base.op.phi, p.step_size, denoise))


@training.contender("loralib-style layers")
def _(p: Problem):
    return _with_layers(p, MergedAtCall)


def _copies(p: Problem) -> nn.ModuleList:
    """K denoisers with the merged weights of their stage."""
    copies = nn.ModuleList(copy.deepcopy(p.base.denoiser) for _ in range(p.base.stages))
    with torch.no_grad():
        for name in p.base.layers:
            for k, weight in enumerate(p.base.merged(p.inputs, name)):
                copies[k].get_submodule(name).weight.copy_(weight)
    return copies


@inference.contender("hand-merged", compiled=True, graphed=True)
def _(p: Problem):
    """Nine plain U-Nets, merged by hand: nothing of this library but the numbers."""
    copies = _copies(p)
    return _autocast(p, lambda: unfold(p.y, p.base.op.phi, p.step_size, lambda z, k: copies[k](z)))


@inference.contender("hand-merged, bf16 nhwc", compiled=True, graphed=True)
def _(p: Problem):
    if p.dtype != "bf16":
        raise Unavailable("for bf16")
    copies = _copies(p).bfloat16().to(memory_format=torch.channels_last)
    return lambda: unfold(p.y, p.base.op.phi, p.step_size, lambda z, k: copies[k](z.bfloat16()).float())


@inference.contender("tied network", kind=LIMIT)
def _(p: Problem):
    """No adapters at all: one U-Net for every stage, our gradient step."""
    net = lf.LoRun(p.base.op, p.base.denoiser, stages=p.base.stages, sharing="tied").to(p.device).eval()
    with torch.no_grad():
        net.step_size.copy_(p.step_size)

    def base_weights(inputs, name) -> Tensor:
        weight = p.base.layer(name).weight.detach().double()
        return weight.expand(p.base.stages, *weight.shape)

    return Run(_autocast(p, lambda: net(p.y)), reference=_definition(p.base, base_weights))


def _trained(p: Problem, net: lf.LoRun) -> Run:
    factors = (_layer(net, name).get_parameter(key) for name in p.base.layers for key in ("down", "up"))
    return Run(_autocast(p, lambda: net(p.y)), parameters=(net.step_size, *factors))


@training.contender("lorun_fast", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    return _trained(p, _lorun(p).train())


@training.contender("lorun_fast, checkpoint", kind=OURS, ops=("block_cs_step",))
def _(p: Problem):
    """Each stage's activations recomputed in the backward pass."""
    return _trained(p, _lorun(p, checkpoint=True).train())


@training.contender("untied", kind=LIMIT)
def _(p: Problem):
    """Nine full denoisers, all weights trained: what low-rank stages replace. Another problem, so no rival."""
    copies = _copies(p)
    rho = p.step_size.detach().clone().requires_grad_()
    weights = [copies[k].get_submodule(name).weight for k in range(p.base.stages) for name in p.base.layers]
    run = _autocast(p, lambda: unfold(p.y, p.base.op.phi, rho, lambda z, k: copies[k](z)))
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
