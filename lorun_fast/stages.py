"""Any denoiser, staged: one shared base and K adapter sets, or K views of one base, or K copies.

A denoiser is any module with ``forward(z)`` or ``forward(z, sigma)``; what else it takes is passed on by name.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import inspect
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lorun_fast import _scope, adapters
from lorun_fast._weight_reads import weight_reads
from lorun_fast.layers import LAYERS, TAKEN, AdaptedLayer, all_stage_weights, factors_apart, merge_layers, stage_weights
from lorun_fast.ops._checks import STORAGE_DTYPES, batch_of, finite, whole
from lorun_fast.ops._direct import transforms_active
from lorun_fast.ops.lora import check_given_stages, check_stage, per_sample


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """Parameter counts of a staged denoiser or of a LoRun.

    base: one denoiser. per_stage: one adapter set. stages: K. extra: step sizes. operator: trainable or fixed
    values of the sensing operator, which ``total`` leaves out, as papers do.
    """

    base: int
    per_stage: int
    stages: int
    extra: int = 0
    operator: int = 0
    copies: int = 1

    @property
    def total(self) -> int:
        """Base (times its copies), all adapter sets and step sizes."""
        return self.base * self.copies + self.per_stage * self.stages + self.extra

    @property
    def untied(self) -> int:
        """What K full copies of the base would hold, step sizes included."""
        return self.base * self.stages + self.extra

    @property
    def ratio(self) -> float:
        """total / untied."""
        return self.total / self.untied

    def __str__(self) -> str:
        share = f" ({100 * self.per_stage / self.base:.1f} % of the base)" if self.per_stage else ""
        rows = [
            ("base denoiser", f"{self.base:,}" + (f" x {self.copies}" if self.copies > 1 else "")),
            (f"adapters, each of {self.stages} stages", f"{self.per_stage:,}{share}"),
            ("step sizes", f"{self.extra:,}"),
            ("total", f"{self.total:,}"),
            (f"{self.stages} untied copies", f"{self.untied:,}"),
            ("ratio to untied", f"{self.ratio:.3f}"),
        ]
        if self.operator:
            rows.append(("sensing operator (not in total)", f"{self.operator:,}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _changes_in_training(module: nn.Module) -> bool:
    """Whether a call in training changes what a module computes: running statistics, a spectral norm's estimate."""
    if isinstance(module, _NormBase):
        return module.track_running_stats
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)


class Stages(nn.Module):
    """What the three kinds of sharing have in common: a call with a stage, and views of single stages."""

    stages: int
    _frozen = False
    _by_name = False

    def forward(
        self, z: Tensor, stage: int | Tensor | None = None, sigma: float | Tensor | None = None, **inputs: object
    ) -> Tensor:
        raise NotImplementedError

    def _resolve(self, z: Tensor, stage: int | Tensor | None) -> int | Tensor:
        if stage is None:
            if self.stages != 1:
                raise ValueError(f"stage: expected 0 to {self.stages - 1}, got none: pass staged(z, stage=k)")
            return 0
        check_stage(stage, self.stages, batch_of("z", z))
        return stage

    def __len__(self) -> int:
        return self.stages

    def __getitem__(self, stage: int) -> Stage:
        """One stage as a denoiser of its own: staged[3](z) is staged(z, stage=3)."""
        try:
            stage = operator.index(stage)
        except TypeError:
            raise TypeError(f"stage: expected an int, got {type(stage).__name__}") from None
        if not -self.stages <= stage < self.stages:
            raise IndexError(f"stage: expected 0 to {self.stages - 1}, got {stage}")
        return Stage(self, stage % self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return (self[k] for k in range(self.stages))

    def with_stages(self, order: Iterable[int | None]) -> Stages:
        """A copy with other stages: those of these numbers, in this order, each with a copy of its adapter; None: new.

        with_stages([0, 1, 2, 3, 4, 4, 4, None, None]) makes nine stages of five, with_stages(range(3)) takes three. A
        fresh stage equals the base. Whether the base is frozen, and whether the stages are merged, stays.
        Raises IndexError for a stage that is not there, TypeError for what is no stage, ValueError for none at all and
        for a fresh one of untied copies, which have no base.
        """
        order = check_order(order, self.stages)
        memo = {}
        self._put_stages(order, memo)
        found = copy_of(self, memo)
        found.stages = len(order)
        if self.merged:
            found.merge()
        return found

    def _put_stages(self, order: list[int | None], memo: dict[int, object]) -> None:
        """Puts what holds the stages' own tensors into a deepcopy's memo, with those of the new ones."""

    def hold(self) -> _scope.Held | None:
        """What a pass over all stages forms once, for _scope.call_holding; gradients reach the factors."""
        return None

    def merge(self) -> None:
        """Computes the merged weights of every stage, for inference; sharded layers (FSDP) stay unmerged."""

    def unmerge(self) -> None:
        """Drops the merged weights."""

    @property
    def merged(self) -> bool:
        """Whether inference runs on merged weights."""
        return False

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The factors of all adapters; empty where there are none."""
        return iter(())

    def base_parameters(self) -> Iterator[nn.Parameter]:
        """Everything but the adapters."""
        return self.parameters()

    def freeze_base(self, frozen: bool = True) -> None:
        """Excludes the base (weights, biases, norms and their running statistics) from training, or includes it again.

        The norms of a frozen base normalise by their running statistics also in training, as at inference, and
        spectral norms stay what they are. Other modules keep the mode that they are in.
        """
        for p in self.base_parameters():
            p.requires_grad_(not frozen)
        self._frozen = frozen
        if self.training:
            self.unmerge()
        for module in self.modules():
            if _changes_in_training(module):
                module.train(self.training and not frozen)

    def train(self, mode: bool = True):
        super().train(mode)
        if self._frozen:
            for module in self.modules():
                if _changes_in_training(module):
                    module.eval()
        return self

    def one(self) -> nn.Module:
        """The denoiser of a stage, of the first if each has its own."""
        return self.base

    def takes_noise(self) -> bool:
        """Whether the denoiser's forward takes a noise level beside the image."""
        own = getattr(self.one(), "noise_level", None)
        if own is not None:
            return bool(own)
        if isinstance(self.one(), AdaptedLayer):  # a layer by itself, whose second argument is the stage
            return False
        if sigma_by_name(self.one()):
            return True
        kinds = [p.kind for p in inspect.signature(type(self.one()).forward).parameters.values()]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return inspect.Parameter.VAR_POSITIONAL in kinds or sum(k in positional for k in kinds) > 2  # self, z, sigma

    def parameter_report(self) -> ParameterReport:
        """Counts: base, per stage, total, ratio to untied."""
        raise NotImplementedError


def _kept_results(module: nn.Module) -> Iterator[Tensor]:
    """What some computation left in a module's attributes, or in lists, tuples and dicts of them."""
    todo, seen = [vars(part) for part in module.modules()], set()
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor) and not value.is_leaf:
            yield value
        elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)


@torch.no_grad()  # else the parameters of a scripted module's copy would be results of a computation
def copy_of(module: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """copy.deepcopy, which refuses results that are part of a graph: a feature that a module keeps of its last call,
    the weight that torch.nn.utils.weight_norm computes. These are copied without it.
    """
    memo = {} if memo is None else memo
    for t in _kept_results(module):
        memo.setdefault(id(t), t.detach().clone())
    return copy.deepcopy(module, memo)


def check_order(order: Iterable[int | None], stages: int) -> list[int | None]:
    """A user's choice of stages, as numbers from 0."""
    if isinstance(order, str | int) or not isinstance(order, Iterable):
        raise TypeError(f"order: expected numbers of stages, got {order!r}")
    found: list[int | None] = []
    for k in order:
        try:
            found.append(None if k is None else operator.index(k))
        except TypeError:
            raise TypeError(f"order: expected numbers of stages, or None for a fresh one, got {k!r}") from None
        if k is not None and not -stages <= found[-1] < stages:
            raise IndexError(f"order: expected stages 0 to {stages - 1}, got {k}")
    if not found:
        raise ValueError("order: expected one stage or more, got none")
    return [None if k is None else k % stages for k in found]


def image_of(out: object, denoiser: nn.Module) -> Tensor:
    """What a denoiser returned, which has to be an image alone."""
    if not isinstance(out, Tensor):
        raise TypeError(f"denoiser: expected an image from {type(denoiser).__name__}, got {type(out).__name__}")
    return out


class Stage(nn.Module):
    """One stage of a staged denoiser, itself a denoiser: forward(z) or forward(z, sigma). Shares all parameters.

    What else the denoiser takes is given by name: staged[3](z, features=f) is staged(z, stage=3, features=f).
    """

    def __init__(self, staged: Stages, stage: int):
        super().__init__()
        self.staged, self.stage = staged, stage

    def forward(self, z: Tensor, sigma: float | Tensor | None = None, **inputs: object) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            # A module's int is a constant to Dynamo: every stage would be a graph of its own.
            with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
                return self.staged(z, stage=self.stage, sigma=sigma, **inputs)
        return self.staged(z, stage=self.stage, sigma=sigma, **inputs)


def sigma_by_name(denoiser: nn.Module) -> bool:
    """Whether a denoiser's argument sigma is not its second, as in forward(z, features=None, sigma=None), or has to be
    named, as in forward(z, *, sigma=None).
    """
    parameters = inspect.signature(type(denoiser).forward).parameters
    named = "sigma" in parameters and parameters["sigma"].kind is inspect.Parameter.KEYWORD_ONLY
    return named or "sigma" in list(parameters)[3:]  # behind self, z and another


def _call(
    denoiser: nn.Module, by_name: bool, z: Tensor, sigma: float | Tensor | None, inputs: dict[str, object]
) -> Tensor:
    if sigma is None:
        return denoiser(z, **inputs)
    return denoiser(z, sigma=sigma, **inputs) if by_name else denoiser(z, sigma, **inputs)


class StagedDenoiser(Stages):
    """One shared base and K adapter sets; made by :func:`adapt`.

    staged(z, stage=3, sigma=None, **inputs): stage an int, or an int64 tensor: (N,), one stage per sample; 0-d, one of
    all, by which a compiled or exported denoiser has one graph for all stages. sigma is the denoiser's second argument,
    inputs are what else it takes, by name. Returns what the denoiser returns.
    adapted: {name: layer} of the adapted layers. skipped: {name: reason} of the layers left alone, and of what else
    holds weights: layers of other kinds, and matrices and kernels that are parameters by themselves.
    """

    def __init__(self, base: nn.Module, stages: int, adapted: dict[str, AdaptedLayer], skipped: dict[str, str]):
        super().__init__()
        self.base, self.stages = base, stages
        self.adapted, self.skipped = adapted, skipped
        self._by_name = sigma_by_name(base)

    def forward(
        self, z: Tensor, stage: int | Tensor | None = None, sigma: float | Tensor | None = None, **inputs: object
    ) -> Tensor:
        stage = self._resolve(z, stage)
        return _scope.call_at(stage, self._merged_at(stage), _call, self.base, self._by_name, z, sigma, inputs)

    def _merged_at(self, stage: int | Tensor) -> dict[AdaptedLayer, Tensor]:
        """What one op merges for a call: the layers that would each merge their weight, unless they are merged."""
        if isinstance(stage, Tensor) or transforms_active():
            return {}
        layers = self._unmerged()
        held = _scope.held_weights(layers, stage)
        return held or stage_weights([layer for layer in layers if layer.merges_first() and not layer.computed], stage)

    def _unmerged(self) -> list[AdaptedLayer]:
        return [layer for layer in self.adapted.values() if not layer.merged]

    def hold(self) -> _scope.Held | None:
        layers = [] if torch.compiler.is_compiling() or transforms_active() else self._unmerged()
        weights, factors = all_stage_weights(layers), factors_apart(layers)
        return _scope.Held(weights, factors) if weights or factors else None

    def merge(self) -> None:
        merge_layers(list(self.adapted.values()))

    def unmerge(self) -> None:
        for layer in self.adapted.values():
            layer.unmerge()

    @property
    def merged(self) -> bool:
        return all(layer.merged for layer in self.adapted.values())

    def _put_stages(self, order: list[int | None], memo: dict[int, object]) -> None:
        for layer in self.adapted.values():
            memo[id(layer)] = layer.with_stages(order, memo)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.adapted.values():
            yield layer.down
            yield layer.up

    def base_parameters(self) -> Iterator[nn.Parameter]:
        factors = {id(p) for p in self.adapter_parameters()}
        return (p for p in self.parameters() if id(p) not in factors)

    def parameter_report(self) -> ParameterReport:
        per_stage = _count(self.adapter_parameters()) // self.stages
        return ParameterReport(_count(self.base_parameters()), per_stage, self.stages)


class TiedDenoiser(Stages):
    """The same denoiser at every stage, without adapters: the baseline that LoRA stages start from."""

    def __init__(self, base: nn.Module, stages: int):
        super().__init__()
        self.base, self.stages = copy_of(base), stages
        self._by_name = sigma_by_name(base)

    def forward(
        self, z: Tensor, stage: int | Tensor | None = None, sigma: float | Tensor | None = None, **inputs: object
    ) -> Tensor:
        check_given_stages(self._resolve(z, stage), self.stages)
        return _call(self.base, self._by_name, z, sigma, inputs)

    def parameter_report(self) -> ParameterReport:
        return ParameterReport(_count(self.parameters()), 0, self.stages)


class UntiedDenoiser(Stages):
    """K independent copies of the denoiser: the usual unfolding network."""

    def __init__(self, base: nn.Module, stages: int):
        super().__init__()
        self.stages = stages
        self.copies = nn.ModuleList(copy_of(base) for _ in range(stages))
        self._by_name = sigma_by_name(base)

    def one(self) -> nn.Module:
        return self.copies[0]

    def _put_stages(self, order: list[int | None], memo: dict[int, object]) -> None:
        if None in order:
            raise ValueError("order: expected stages of untied copies, got None: they have no base to start from")
        memo[id(self.copies)] = nn.ModuleList(copy_of(self.copies[k]) for k in order)

    def forward(
        self, z: Tensor, stage: int | Tensor | None = None, sigma: float | Tensor | None = None, **inputs: object
    ) -> Tensor:
        stage = self._resolve(z, stage)
        if not per_sample(stage):
            return _call(self.copies[int(stage)], self._by_name, z, sigma, inputs)
        if inputs:  # which of them, or what in them, is one per sample cannot be told
            raise TypeError(f"{', '.join(inputs)}: expected none beside one stage per sample of untied copies")
        out = None
        for k in stage.unique().tolist():
            check_stage(k, self.stages, z.shape[0])
            pick = (stage == k).nonzero()[:, 0]
            levels = isinstance(sigma, Tensor) and sigma.ndim > 0 and sigma.shape[0] == z.shape[0]
            level = sigma[pick] if levels else sigma
            part = image_of(_call(self.copies[k], self._by_name, z[pick], level, {}), self.copies[k])
            out = part.new_empty((z.shape[0], *part.shape[1:])) if out is None else out
            out = out.index_copy(0, pick, part)
        return z if out is None else out

    def parameter_report(self) -> ParameterReport:
        return ParameterReport(_count(self.one().parameters()), 0, self.stages, copies=self.stages)


def _patterns(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    patterns = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{name}: expected a pattern or several, got {value!r}")
    return patterns


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


_AS_ASKED = _EXCLUDED, _NOT_INCLUDED = "excluded by pattern", "not in the include patterns"


def _reason_to_skip(name: str, layer: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    if _matches(name, exclude):
        return _EXCLUDED
    if include and not _matches(name, include):
        return _NOT_INCLUDED
    if type(layer) not in LAYERS:
        return f"{type(layer).__name__} is a subclass of its own: adapt only plain layers"
    ours = LAYERS[type(layer)]
    weights = [layer._parameters.get(name) for name in ours.WEIGHTS]
    weights = [weight for weight in weights if weight is not None]
    if not weights or not layer._parameters.keys() >= {*ours.WEIGHTS, ours.BIAS}:
        return "its weight or bias is computed (a parametrization, weight norm or pruning)"
    if other := [weight.dtype for weight in weights if weight.dtype not in STORAGE_DTYPES]:
        kind = str(other[0]).removeprefix("torch.")
        return f"its weight is {kind}: adapters are for float32, float64, bfloat16 or float16"
    if "forward" in vars(layer):
        return "its forward is one of its own: adapt only plain layers"
    own = {*layer._parameters, *layer._buffers, *layer._modules} - {*ours.WEIGHTS, ours.BIAS, *ours.BESIDE}
    if own:
        return f"it holds {', '.join(sorted(own))} beside its weight and bias: adapt only plain layers"
    taken = sorted(vars(layer).keys() & {*TAKEN, "weight", "bias"})
    if taken:
        return f"its attribute {taken[0]} has another meaning in an adapted layer"
    if getattr(layer, "groups", 1) > 1 and not include:
        return f"grouped (groups={layer.groups}): an adapter would cost more than the layer; include it to adapt it"
    return None


def _without_adapters(denoiser: nn.Module) -> dict[str, str]:
    """What holds weights beside the layers that can have adapters, by name, and why it has none."""
    found: dict[str, str] = {}
    inside: list[str] = []  # of what is said already
    for path, module in denoiser.named_modules():
        if path.startswith(tuple(inside)):
            continue
        wide = {name: p.shape for name, p in module._parameters.items() if p is not None and p.ndim > 1}
        kind = type(module)
        if isinstance(module, tuple(LAYERS)):
            inside.append(f"{path}.")
        elif isinstance(module, torch.jit.ScriptModule):
            inside.append(f"{path}." if path else "")
            if next(module.parameters(), None) is not None:
                found[path or "denoiser"] = "scripted or traced (torch.jit): adapt the module that it was made from"
        elif wide and kind.__module__.startswith("torch.nn.") and kind not in _HOLDERS:
            found[path] = f"there are no adapters for {kind.__name__}"
        else:
            for name in (name for name, shape in wide.items() if sum(size > 1 for size in shape) > 1):
                found[f"{path}.{name}" if path else name] = "a parameter by itself: adapters are for layers' weights"
    return found


_HOLDERS = (nn.Module, nn.ParameterList, nn.ParameterDict)


def _check_no_adapter_inside(denoiser: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError where a layer to adapt is part of another library's adapted one.

    loralib's convolution reads its inner layer's weight and never calls it: our adapters would learn nothing. PEFT's
    factors are layers themselves, and would be given adapters of their own.
    """
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[:i])
            kind = type(denoiser.get_submodule(path))
            package = kind.__module__.partition(".")[0]
            # The others of PEFT's classes hold a model whose layers may be plain.
            layer = package == "loralib" or any(base.__name__ == "BaseTunerLayer" for base in kind.__mro__)
            if layer:
                or_else = f", or exclude={path + '.*'!r} leaves them alone" if path else ""
                raise ValueError(
                    f"denoiser: expected plain layers, got {name} inside {package}'s {path or kind.__name__}: "
                    f"lorun_fast.interop.{package} converts such layers{or_else}"
                )


def adapt(
    denoiser: nn.Module,
    stages: int = 9,
    gamma: float = 10,
    form: str = "loralib",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    scale: float = 1.0,
) -> StagedDenoiser:
    """One shared, frozen base and K adapter sets, from any denoiser. The module passed in stays as it is.

    denoiser: any module with forward(z) or forward(z, sigma); further arguments are passed on by name, and what it
        returns comes back as it is. Its nn.Conv1d to nn.Conv3d, nn.ConvTranspose1d to nn.ConvTranspose3d, nn.Linear and
        nn.MultiheadAttention layers get adapters, the latter's out_proj one of its own; its own code does not change.
    stages: K. gamma: rank per layer, r = ceil(min(in, out) * gamma / 100), at most 100. form: "loralib" or "peft".
    include, exclude: glob patterns on the layers' qualified names ("encoder.*", "*.conv1"). Grouped and
        depthwise layers are left alone unless ``include`` names them.
    scale: factor of every update.

    A fresh result equals the denoiser at every stage, to the last bit (in eval mode, where it has norms with running
    statistics), in 16 bits on a CPU to rounding. Only the adapters train; see ``freeze_base``. Raises TypeError for
    what is no module, and ValueError when no layer is adapted, a layer has no weight yet or is part of one that loralib
    or PEFT adapted, a pattern matches nothing, or a form cannot express a layer (peft with groups, loralib with a
    kernel that is not square).
    """
    adapters.check_form(form)
    if not isinstance(denoiser, nn.Module):
        raise TypeError(f"denoiser: expected an nn.Module, got {type(denoiser).__name__}")
    if isinstance(denoiser, Stages):
        raise TypeError("denoiser: expected a plain module, got one that is staged already")
    stages, scale = whole("stages", stages, 1), finite("scale", scale)
    for name, parameter in denoiser.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name}: expected its values, got a lazy one: call the denoiser once before adapt()")
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    candidates = {name: m for name, m in denoiser.named_modules() if isinstance(m, tuple(LAYERS))}
    for pattern in include + exclude:
        if not any(_matches(name, (pattern,)) for name in candidates):
            raise ValueError(f"pattern {pattern!r} matches no layer; the layers are: {', '.join(candidates) or 'none'}")
    plan: dict[str, dict] = {}
    skipped: dict[str, str] = {}
    for name, layer in candidates.items():
        reason = _reason_to_skip(name, layer, include, exclude)
        around = name.rpartition(".")[0]
        if reason is None and around in skipped and isinstance(candidates[around], nn.MultiheadAttention):
            # Torch's attention reads the weights inside it and calls no layer.
            because = "its attention, which computes with its weight, has no adapter"
            reason = _EXCLUDED if skipped[around] == _EXCLUDED else because
        if reason is not None:
            skipped[name] = reason
            continue
        plan[name] = {"rank": adapters.rank(*_features(layer), gamma), "form": form, "scale": scale}
    _check_no_adapter_inside(denoiser, plan)
    skipped |= _without_adapters(denoiser)
    if not plan:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"denoiser: expected a convolution, Linear or attention layer to adapt in {type(denoiser).__name__}, "
            f"got none ({reasons or 'it has no such layer'})"
        )
    _warn_of_base_weights(denoiser, plan, {name: skipped[name] for name in candidates.keys() & skipped.keys()})
    return adapt_layers(denoiser, stages, plan, skipped)


def _warn_of_base_weights(denoiser: nn.Module, plan: dict[str, dict], skipped: dict[str, str]) -> None:
    """Says where the adapted denoiser computes with base weights, unless that was asked for.

    skipped: of the layers that could have had adapters.
    """

    def stay(names: list[str], what: str) -> str:
        named = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
        return f"adapt: {len(names)} {what} keep their base weights at every stage ({named})"

    grouped = [name for name, reason in skipped.items() if reason.startswith("grouped")]
    if grouped:
        warnings.warn(f"{stay(grouped, 'grouped layers')}; name them in include to adapt them", stacklevel=3)
    more = [name for name, reason in skipped.items() if name not in grouped and reason not in _AS_ASKED]
    if more:
        said = stay(more, "layers that are more than plain ones")
        warnings.warn(f"{said}: staged.skipped says why, exclude says that it is meant", stacklevel=3)
    past = {name: place for name, place in weight_reads(denoiser) if name in plan}
    if past:
        warnings.warn(
            "adapt: the denoiser computes with the weight of "
            f"{', '.join(f'{name} ({place})' for name, place in past.items())} itself instead of calling the layer: "
            "adapters have no part in that; call the layer there, take lorun_fast.layers.current_weight(layer), or "
            "exclude the layer",
            stacklevel=3,
        )


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, layer.embed_dim
    return layer.in_channels, layer.out_channels


def adapt_layers(
    denoiser: nn.Module, stages: int, plan: dict[str, dict], skipped: dict[str, str] | None = None
) -> StagedDenoiser:
    """The second half of :func:`adapt`: replaces the named layers in a copy of the denoiser.

    plan: {layer name: {"rank": r, "form": form, "scale": scale}}, as a saved network records it.
    """
    base = copy_of(denoiser)
    adapted: dict[str, AdaptedLayer] = {}
    replacement: dict[int, AdaptedLayer] = {}
    modules = dict(base.named_modules())
    for name, settings in plan.items():
        layer = modules.get(name)
        if layer is None or type(layer) not in LAYERS:
            got = "nothing" if layer is None else type(layer).__name__
            raise ValueError(f"{name}: expected a convolution, Linear or MultiheadAttention layer there, got {got}")
        try:
            adapted[name] = LAYERS[type(layer)].from_base(layer, stages=stages, **settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        replacement[id(layer)] = adapted[name]
    if id(base) in replacement:
        base = replacement[id(base)]
    else:
        done: dict[int, tuple[object, object]] = {}
        for parent in [*base.modules(), *adapted.values()]:
            _with_adapted(vars(parent), replacement, done)
    _keep_to_modules(base)
    staged = StagedDenoiser(base, stages, adapted, skipped or {})
    staged.freeze_base()
    return staged


def _with_adapted(
    value: object, replacement: dict[int, AdaptedLayer], done: dict[int, tuple[object, object]]
) -> object:
    """A module's attributes with adapted layers in place of plain ones, also in lists, tuples, dicts, dataclasses and
    functools.partial beside the registered modules, and a layer with several names under all of them.

    done: by id, what was met and what it became.
    """
    if isinstance(value, nn.Module):
        return replacement.get(id(value), value)
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, list):
        done[id(value)] = value, value
        value[:] = [_with_adapted(part, replacement, done) for part in value]
    elif isinstance(value, dict):
        done[id(value)] = value, value
        for key, part in value.items():
            value[key] = _with_adapted(part, replacement, done)
    elif isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_fields")):
        parts = [_with_adapted(part, replacement, done) for part in value]
        made = tuple(parts) if type(value) is tuple else type(value)(*parts)
        done[id(value)] = value, made
        return made
    elif isinstance(value, functools.partial):
        call = (value.func, value.args, value.keywords)
        made = [_with_adapted(part, replacement, done) for part in call]
        done[id(value)] = value, type(value)(made[0], *made[1], **made[2])
        return done[id(value)][1]
    elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__") and not isinstance(value, type):
        done[id(value)] = value, value
        _with_adapted(vars(value), replacement, done)
    return value


def _keep_to_modules(base: nn.Module) -> None:
    """Turns off the fast path of torch's Transformer layers, which reads weights past the layers that hold them."""
    for module in base.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
