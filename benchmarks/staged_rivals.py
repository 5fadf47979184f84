"""Rivals of the whole network: one gradient step, and the ways to give nine stages their own layers or weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import optional
from benchmarks.harness.registry import TRAIN, Problem, Run
from lorun_fast.reference import block_cs as reference

BLOCK = 32


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


def autocast(p: Problem, fn: Callable[[], Tensor], dtype: str | None = None) -> Callable[[], Tensor]:
    """fn under bf16 autocast where the problem, or ``dtype``, is bf16."""
    if (dtype or p.dtype) != "bf16":
        return fn

    def run() -> Tensor:
        with torch.autocast(p.device.type, torch.bfloat16):
            return fn().float()

    return run


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


def with_layers(p: Problem, kind: type[StagedLayer]) -> Run:
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
    return Run(autocast(p, network), parameters=tuple(parameters))


def peft_layers(p: Problem, dtype: str | None = None) -> Callable[[], Tensor]:
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

    return autocast(p, lambda: unfold(p.y, p.base.op.phi, p.step_size, denoise), dtype)


def loralib_factors(down: Tensor, up: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """A peft pair (K, r, in, k, k), (K, out, r) as loralib's (K, r k, in k), (K, out k, r k), the same update.

    loralib views its product as the weight, so every k rows of it are one filter: row j of the k holds the j-th part of
    the filter, and ``up`` repeats itself along the diagonal.
    """
    stages, rank = down.shape[:2]
    eye = torch.eye(kernel, dtype=up.dtype, device=up.device)
    return down.reshape(stages, rank * kernel, -1), torch.stack([torch.kron(one, eye) for one in up])


class LoralibStages(nn.Module):
    """loralib's own layers, one a stage, around one base convolution."""

    def __init__(self, base: nn.Conv2d, down: Tensor, up: Tensor):
        super().__init__()
        loralib = optional.package("loralib")
        kernel, rank = base.kernel_size[0], up.shape[-1]
        self.stage = 0
        self.layers = nn.ModuleList()
        for lora_a, lora_b in zip(*loralib_factors(down, up, kernel), strict=True):
            layer = loralib.Conv2d(
                base.in_channels, base.out_channels, kernel, r=rank, lora_alpha=rank, merge_weights=False,
                stride=base.stride, padding=base.padding, bias=base.bias is not None,
            )  # fmt: skip
            layer.lora_A, layer.lora_B = (nn.Parameter(t.detach().clone()) for t in (lora_a, lora_b))
            layer.conv = base
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[self.stage](x)


def loralib_layers(p: Problem) -> Callable[[], Tensor]:
    """The loralib package's own layers, unmerged: merged ones would be nine networks, the hand-merged row."""
    denoiser = copy.deepcopy(p.base.denoiser).requires_grad_(False)
    staged = []
    for name in p.base.layers:
        down, up = p.inputs[f"down.{name}"], p.inputs[f"up.{name}"]
        if p.base.transposed(name):
            staged.append(AdapterBranch(denoiser.get_submodule(name), down, up))
            staged[-1].split()
        else:
            staged.append(LoralibStages(denoiser.get_submodule(name), down, up))
        denoiser.set_submodule(name, staged[-1])
    denoiser.eval()

    def denoise(z: Tensor, k: int) -> Tensor:
        for layer in staged:
            layer.stage = k
        return denoiser(z)

    return autocast(p, lambda: unfold(p.y, p.base.op.phi, p.step_size, denoise))


def merged_copies(p: Problem, *, channels_last: bool = False) -> nn.ModuleList:
    """K denoisers with the merged weights of their stage."""
    copies = nn.ModuleList(copy.deepcopy(p.base.denoiser) for _ in range(p.base.stages))
    with torch.no_grad():
        for name in p.base.layers:
            for k, weight in enumerate(p.base.merged(p.inputs, name)):
                copies[k].get_submodule(name).weight.copy_(weight)
    if channels_last:
        copies.to(memory_format=torch.channels_last)
    return copies.requires_grad_(p.mode == TRAIN)


def hand_merged(p: Problem, *, channels_last: bool = False) -> Callable[[], Tensor]:
    """Plain denoisers, merged by hand, one a stage; in bf16 where channels_last is, else under autocast."""
    copies = merged_copies(p, channels_last=channels_last)
    if channels_last and p.dtype == "bf16":
        copies.bfloat16()
        return lambda: unfold(p.y, p.base.op.phi, p.step_size, lambda z, k: copies[k](z.bfloat16()).float())
    return autocast(p, lambda: unfold(p.y, p.base.op.phi, p.step_size, lambda z, k: copies[k](z)))


def hand_merged_compiled(p: Problem, *, channels_last: bool = False, mode: str | None = None) -> Callable[[], Tensor]:
    """One compiled denoiser, called with the weights of each stage: a graph instead of nine of them.

    mode: torch.compile's.
    """
    weights = [dict(one.named_parameters()) for one in merged_copies(p, channels_last=channels_last)]
    if p.dtype == "bf16":
        weights = [{name: w.bfloat16() for name, w in one.items()} for one in weights]
    denoiser = copy.deepcopy(p.base.denoiser)
    dtype = next(iter(weights[0].values())).dtype

    @torch.compile(dynamic=False, mode=mode)
    def stage(weights: dict[str, Tensor], z: Tensor) -> Tensor:
        return torch.func.functional_call(denoiser, weights, (z,))

    return lambda: unfold(p.y, p.base.op.phi, p.step_size, lambda z, k: stage(weights[k], z.to(dtype)).float())
