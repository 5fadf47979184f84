"""LoRun: K stages of a gradient step and a staged denoiser (arXiv 2602.18697)."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorun_fast._scope import call_holding
from lorun_fast.operators import SensingOperator
from lorun_fast.ops._checks import finite, number_or_tensor, parameter_dtype, whole
from lorun_fast.ops._direct import transforms_active
from lorun_fast.ops.lora import is_channels_last
from lorun_fast.ops.relayout import relayout
from lorun_fast.stages import (
    ParameterReport,
    StagedDenoiser,
    Stages,
    TiedDenoiser,
    UntiedDenoiser,
    adapt,
    check_order,
    copy_of,
    image_of,
)

_DATA_STEPS = ("gradient", "prox")
_NOISE_MAPS = ("measurement", "stage")
# The proximal data step weighs two errors: that of y, at least the rounding to 8 bits, and that of x, a tenth of the
# images' range at rho = 1.
_ROUNDING = 1 / (255 * 12**0.5)
_SPREAD = 0.1
_KINDS = {"lora": StagedDenoiser, "tied": TiedDenoiser, "untied": UntiedDenoiser}


def _like(x: Tensor, z: Tensor) -> Tensor:
    """x in z's dtype, and on a CPU in the layout in which the operators compute."""
    if x.device.type == "cpu" and is_channels_last(x) and z.is_contiguous():
        return relayout(x, torch.contiguous_format, z.dtype)
    return x.to(z.dtype)


def falling_step_sizes(stages: int, first: float = 49 / 255, last: float = 2 / 255) -> Tensor:
    """(stages,) step sizes rho_k whose levels rho_k / 10 fall geometrically, for ``noise_map="stage"``."""
    return torch.logspace(math.log10(first), math.log10(last), stages) / _SPREAD


def _noise(sigma: float | Tensor | None, x: Tensor) -> Tensor:
    return number_or_tensor("sigma", 0.0 if sigma is None else sigma, parameter_dtype(x.dtype), x.device)


def _check_sigma(sigma: float | Tensor | None) -> None:
    if sigma is None or torch.compiler.is_compiling() or transforms_active():
        return
    if not isinstance(sigma, numbers.Real | Tensor):
        raise TypeError(f"sigma: expected a number or a tensor, got {type(sigma).__name__}")
    if isinstance(sigma, Tensor) and (sigma.device.type != "cpu" or not sigma.numel()):
        return  # asking a GPU would wait for it
    least = sigma.min().item() if isinstance(sigma, Tensor) else sigma
    if not least >= 0:
        raise ValueError(f"sigma: expected at least 0, got {least}")


class LoRun(nn.Module):
    """Unfolded proximal gradient descent:  z = x - rho_k Phi^T (Phi x - y);  x = D(z; W0 + dW_k).

    op: the sensing operator. denoiser: any module with forward(z) or forward(z, sigma) (copied), or a
        staged denoiser (used as it is; stages, form and sharing are then its own, and gamma is None).
    stages: K. gamma, form: adapters, see :func:`lorun_fast.adapt`.
    sharing: "lora", one frozen base and an adapter set per stage; "tied", one trainable base for all stages;
        "untied", K trainable copies.
    checkpoint: recompute activations in the backward pass instead of storing them: True for every stage, or a
        number, for so many of the first stages. Each costs a third of its own time in training.
    step_size: the initial rho, one learned value per stage.
    data_step: "gradient", as above; or "prox", z = op.prox(x, y, mu_k), the exact minimiser of
        ||Phi z - y||^2 / 2 + mu_k ||z - x||^2 / 2 with mu_k = (sigma^2 + 1 / (12 255^2)) / (rho_k / 10)^2, the ratio of
        the variances of y (noise of sigma, rounding) and x. It reaches in one step what gradient steps need many for
        where Phi is ill-conditioned, as blur is. An operator without a closed form takes conjugate gradients
        (:meth:`SensingOperator.prox`), which converge the slower the smaller mu: a smaller step_size helps.
    noise_map: what a denoiser that takes a noise level is told: "measurement", the sigma of y; or "stage", the level
        s_k = sqrt((rho_k / 10)^2 + sigma^2) of z_k, for data_step="prox", which then weighs by s_k too. A base that
        was trained on Gaussian noise of every level then works from the first pass, as in half-quadratic splitting,
        when the rho_k fall from stage to stage (:func:`falling_step_sizes`).

    eval() merges the adapters into per-stage weights, train() drops them again. A fresh LoRun with
    sharing="lora" equals the tied network to the last bit; in 16 bits on a CPU, by kernels of the layers' own, to
    rounding.
    """

    def __init__(
        self,
        op: SensingOperator,
        denoiser: nn.Module,
        stages: int = 9,
        gamma: float = 10,
        form: str = "loralib",
        sharing: str = "lora",
        *,
        checkpoint: bool | int = False,
        step_size: float = 1.0,
        data_step: str = "gradient",
        noise_map: str = "measurement",
    ):
        super().__init__()
        if not isinstance(op, SensingOperator):
            raise TypeError(f"op: expected a SensingOperator, got {type(op).__name__}")
        if sharing not in tuple(_KINDS):
            raise ValueError(f"sharing: expected one of {', '.join(_KINDS)}, got {sharing!r}")
        if data_step not in _DATA_STEPS:
            raise ValueError(f"data_step: expected one of {', '.join(_DATA_STEPS)}, got {data_step!r}")
        if noise_map not in _NOISE_MAPS:
            raise ValueError(f"noise_map: expected one of {', '.join(_NOISE_MAPS)}, got {noise_map!r}")
        if noise_map == "stage" and data_step != "prox":
            raise ValueError(f"noise_map='stage': expected data_step='prox', got {data_step!r}")
        stages = whole("stages", stages, 1)
        rho = finite("step_size", step_size)
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser: expected an nn.Module, got {type(denoiser).__name__}")
        if isinstance(denoiser, Stages):
            staged = denoiser
            sharing = next(name for name, kind in _KINDS.items() if isinstance(staged, kind))
            if sharing == "lora":
                gamma, form = None, "/".join(sorted({layer.form for layer in staged.adapted.values()}))
        elif sharing == "lora":
            staged = adapt(denoiser, stages, gamma, form)
        else:
            staged = _KINDS[sharing](denoiser, stages)
        stages = staged.stages
        if not hasattr(checkpoint, "__index__") or not 0 <= checkpoint <= stages:
            raise ValueError(
                f"checkpoint: expected True, False or a number of stages up to {stages}, got {checkpoint!r}"
            )
        self.op, self.denoiser = op, staged
        self.gamma, self.form, self.sharing = gamma, form, sharing
        self.data_step, self.noise_map = data_step, noise_map
        self.checkpoint = checkpoint if isinstance(checkpoint, bool) else operator.index(checkpoint)
        self._tells_noise = staged.takes_noise()
        wide = parameter_dtype(torch.get_default_dtype())  # as _apply keeps them
        self.step_size = nn.Parameter(torch.full((staged.stages,), rho, dtype=wide))
        self.register_load_state_dict_post_hook(LoRun._merge_again)

    @property
    def stages(self) -> int:
        """K."""
        return self.denoiser.stages

    def forward(
        self,
        y: Tensor,
        *,
        op: SensingOperator | None = None,
        size: tuple[int, int] | None = None,
        sigma: float | Tensor | None = None,
        return_stages: bool = False,
    ) -> Tensor | list[Tensor]:
        """Restores images from measurements.

        y: as the operator gives it. op: another operator of the same task for this call (another kernel, mask
        or Phi). size: (H, W) where y alone cannot tell. sigma: noise level, for denoisers that take one and for
        data_step="prox"; a number of at least 0, 0-d or (N,).
        return_stages: return [x_0, x_1, ..., x_K] instead of x_K.
        Returns (N, C, H, W) in y's dtype; the denoiser runs in its own dtype or under autocast.
        """
        op = self.op if op is None else op
        if not isinstance(op, SensingOperator) or op.task != self.op.task:
            got = f"{type(op).__name__} ({op.task})" if isinstance(op, SensingOperator) else type(op).__name__
            raise ValueError(f"op: expected an operator for task {self.op.task!r}, got {got}")
        _check_sigma(sigma)
        if isinstance(sigma, Tensor) and sigma.ndim and sigma.shape[0] not in (1, y.shape[0]):
            raise ValueError(f"sigma: expected a number, 0-d or ({y.shape[0]},), got shape {tuple(sigma.shape)}")
        x = op.initial(y, size)
        outputs = [x]
        recomputed = self.stages if self.checkpoint is True else int(self.checkpoint)
        if not torch.is_grad_enabled():
            recomputed = 0
        step, held = self.stage_step, self.denoiser.hold()
        if held is not None:
            step = partial(call_holding, held, step)
        for k in range(self.stages):
            if k < recomputed:
                x = checkpoint(step, k, x, y, op, sigma, use_reentrant=False)
            else:
                x = step(k, x, y, op, sigma)
            if return_stages:
                outputs.append(x)
        return outputs if return_stages else x

    def stage_step(
        self,
        k: int,
        x: Tensor,
        y: Tensor,
        op: SensingOperator | None = None,
        sigma: float | Tensor | None = None,
    ) -> Tensor:
        """One stage: x_k -> x_{k+1}, a data step and the denoiser. Arguments as for :meth:`forward`."""
        return self.denoise(k, self.data_update(k, x, y, op, sigma), sigma)

    def data_update(
        self,
        k: int,
        x: Tensor,
        y: Tensor,
        op: SensingOperator | None = None,
        sigma: float | Tensor | None = None,
    ) -> Tensor:
        """The first half of a stage, x_k -> z_k."""
        op = self.op if op is None else op
        rho = self._rho(k)
        return op.gradient_step(x, y, rho) if self.data_step == "gradient" else op.prox(x, y, self._mu(rho, x, sigma))

    def denoise(self, k: int, z: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        """The second half, z_k -> x_{k+1}, in the denoiser's own dtype."""
        real = (p.dtype for p in self.denoiser.parameters() if p.is_floating_point())  # spectra's weights are complex
        dtype = next(real, z.dtype)
        if self.noise_map == "stage":
            sigma = self._variance(self._rho(k), _noise(sigma, z)).sqrt()
        elif sigma is not None and not self._tells_noise:
            if self.data_step != "prox":
                raise ValueError(f"sigma: expected None, for {type(self.denoiser.one()).__name__} takes no sigma")
            sigma = None  # it was for the data step
        if isinstance(sigma, Tensor) and sigma.is_floating_point():
            sigma = sigma.to(dtype)  # a map of it goes beside the image
        return _like(image_of(self.denoiser(z.to(dtype), stage=k, sigma=sigma), self.denoiser.one()), z)

    def _rho(self, k: int) -> Tensor:
        rho = self.step_size[k]
        return rho.to(parameter_dtype(rho.dtype))

    def _variance(self, rho: Tensor, noise: Tensor) -> Tensor:
        """Of x_k's error, as the stage assumes it."""
        own = (_SPREAD * rho).square()
        return own + noise.square() if self.noise_map == "stage" else own

    def _mu(self, rho: Tensor, x: Tensor, sigma: float | Tensor | None) -> Tensor:
        noise = _noise(sigma, x)
        return ((noise.square() + _ROUNDING**2) / self._variance(rho, noise)).reshape(-1, 1, 1, 1)

    def with_stages(self, order: Iterable[int | None], *, step_size: float = 1.0) -> LoRun:
        """A copy with other stages: adapters (copies, if untied) and step sizes of these, in this order; None: fresh.

        net.with_stages([0, 1, 2, 3, 4, 4, 4, 4, 4]) makes nine stages of five, to train on; net.with_stages(range(3))
        takes the first three. step_size: of fresh stages, whose denoiser is the base. What is recomputed in training
        (``checkpoint``) stays, up to the new number of stages. Errors as :meth:`StagedDenoiser.with_stages`.
        """
        order = check_order(order, self.stages)
        rho = finite("step_size", step_size)
        denoiser = self.denoiser.with_stages(order)
        steps = torch.stack(
            [torch.full_like(self.step_size[0], rho) if k is None else self.step_size[k] for k in order]
        )
        memo = {id(self.denoiser): denoiser}
        memo[id(self.step_size)] = nn.Parameter(steps.detach(), requires_grad=self.step_size.requires_grad)
        net = copy_of(self, memo)
        if not isinstance(net.checkpoint, bool):
            net.checkpoint = min(net.checkpoint, net.stages)
        return net

    def train(self, mode: bool = True) -> LoRun:
        super().train(mode)
        if not mode:
            self.denoiser.merge()
        return self

    def _apply(self, fn, recurse=True):
        # Step sizes stay fp32 (or fp64), as the operator's parameters do, and so do their gradients.
        steps, grad = self.step_size.detach().clone(), self.step_size.grad
        grad = None if grad is None else grad.clone()
        super()._apply(fn, recurse)
        if self.step_size.dtype in (torch.float16, torch.bfloat16):
            self.step_size.data = steps.to(self.step_size.device)
            self.step_size.grad = None if grad is None else grad.to(self.step_size.device)
        self._merge_again()
        return self

    def _merge_again(self, *_) -> None:
        # Moving and loading drop the layers' merged weights; a network in eval mode promises merged ones.
        if not self.training:
            self.denoiser.merge()

    def optimize(
        self,
        *,
        dtype: torch.dtype | None = None,
        channels_last: bool | None = None,
        convolutions: str | None = None,
        compile: bool = False,
        cuda_graph: bool | None = None,
        images: Tensor | None = None,
        sigma: float | None = None,
    ) -> LoRun:
        """A copy made ready for inference on the device where this network is; ``.report`` says what was done and why.

        Merges every stage into a plain denoiser, in fp32 and rounded once; lays convolution weights out with
        channels innermost; stores the denoiser in bf16 where the device multiplies it fast (a CPU with AMX or
        AVX512-bf16, a GPU of compute capability 8.0) and the score moves by at most 0.02 dB, in its own dtype
        elsewhere; on a CPU computes convolutions in bf16 by matrix tiles (AMX), else by minimal filtering (3 x 3, AVX2
        or AVX-512; rounding errors some 1e-5 of the values' size); on a GPU captures a CUDA graph per measurement size,
        and in 16 bits computes 3 x 3 convolutions of up to 128 channels by the fused kernel, at sizes where that is
        faster. The operator and the iterate stay as they are. The result is called as this network is, shares
        nothing with it, and does not train.

        dtype, channels_last, convolutions, cuda_graph: instead of what would be chosen; convolutions: "direct"
        (no layer is replaced: torch's, and the kernels that a denoiser calls by itself, as SpectralTransformer does
        for depthwise layers), "winograd" or "packed" (CPU), "fused" (GPU).
        compile: torch.compile every stage, on a CPU with frozen weights: minutes at the first call, for a network that
        runs long.
        images: (N, C, H, W) in [0, 1] to score bf16 on, restored from their measurements; photographs of
        scikit-image by default. sigma: for the score, of a network that takes a noise level.
        Raises TypeError or ValueError for what it does not take, and for images that tell no score.
        """
        from lorun_fast.optimize import optimize

        return optimize(
            self, dtype=dtype, channels_last=channels_last, convolutions=convolutions, compile=compile,
            cuda_graph=cuda_graph, images=images, sigma=sigma,
        )  # fmt: skip

    def parameter_report(self) -> ParameterReport:
        """Counts: base, per stage, total with step sizes, ratio to untied; the operator's values apart."""
        report = self.denoiser.parameter_report()
        operator = sum(t.numel() for t in self.op.state_dict().values())
        return ParameterReport(
            report.base, report.per_stage, report.stages, self.stages, operator, copies=report.copies
        )

    def extra_repr(self) -> str:
        data_step = f", data_step={self.data_step!r}" if self.data_step != "gradient" else ""
        noise_map = f", noise_map={self.noise_map!r}" if self.noise_map != "measurement" else ""
        return (
            f"stages={self.stages}, sharing={self.sharing!r}, form={self.form!r}, gamma={self.gamma}"
            f"{data_step}{noise_map}"
        )
