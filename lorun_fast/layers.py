"""Convolution, linear and attention layers with one base weight and one low-rank adapter per stage."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorun_fast import _scope, adapters
from lorun_fast.ops import _lora_autograd
from lorun_fast.ops import lora_conv2d as conv_ops
from lorun_fast.ops import lora_linear as linear_ops
from lorun_fast.ops._checks import STORAGE_DTYPES, as_dtype, batch_of, finite, shape_of, whole
from lorun_fast.ops.lora import at_stage, check_floating, check_given_stages, check_stage, per_sample
from lorun_fast.ops.lora_merge import lora_merge, lora_merge_stage
from lorun_fast.reference import lora as reference


def _take_hooks(source: nn.Module, target: nn.Module) -> None:
    """The forward and backward hooks of a layer go to the one that takes its place."""
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"):
        for kind in ("", "_with_kwargs", "_always_called"):
            held = getattr(source, f"_{name}{kind}", None)
            if held:
                getattr(target, f"_{name}{kind}").update(held)
    # Without it torch takes the backward hooks for neither of their two kinds, and calls none.
    target._is_full_backward_hook = source._is_full_backward_hook


# What an adapted layer has by these names is its own.
TAKEN = {"stages", "rank", "form", "scale", "down", "up", "merged"}
_STAYS = {"_merged", "_merged_stages", "_merged_from", "forward", "_compiled_call_impl"}


def take_attributes(source: nn.Module, target: nn.Module, taken: Collection[str] = TAKEN) -> None:
    """What somebody's code keeps on a layer goes to the one that takes its place, where that code looks for it.

    taken: names that have a meaning of their own in one of the two.
    """
    for name, value in vars(source).items():
        if name not in _STAYS and name not in taken:
            vars(target).setdefault(name, value)


def _storage(dtype: torch.dtype | None) -> torch.dtype | None:
    """A user's dtype of a layer; None stands for the default one."""
    if dtype not in (None, float, *STORAGE_DTYPES):  # torch takes Python's float, too
        raise TypeError(f"dtype: expected float32, float64, bfloat16, float16 or None, got {dtype!r}")
    return dtype


class AdaptedLayer:
    """What the layers share: stacked factors, the stage, merging. Mixed in before an nn layer.

    Parameters: ``weight`` and ``bias`` of the base, shared by all stages; ``down`` (K, ...) and ``up`` (K, ...).
    ``up`` starts at zero, so every stage starts as the base layer.
    """

    # What a plain layer holds, by name: what the adapter updates (some of several may be None), its bias, all else.
    WEIGHTS: tuple[str, ...] = ("weight",)
    BIAS = "bias"
    BESIDE: tuple[str, ...] = ()

    stages: int
    rank: int
    form: str
    scale: float
    _transposed = False
    # No buffer: copies of a network whose buffers are paired in order, one of them merged, would not fit together.
    _merged: Tensor | None = None
    _merged_stages: tuple[Tensor, ...] = ()  # its entries: an index makes a view, which costs some microseconds
    _merged_from: tuple[nn.Parameter | None, ...] = ()

    def _add_adapter(self, stages: int, rank: int, form: str, scale: float) -> None:
        stages, rank = whole("stages", stages, 1), whole("rank", rank, 1)
        self.stages, self.rank, self.form, self.scale = stages, rank, form, finite("scale", scale)
        down, up = adapters.factor_shapes(
            self.weight.shape, rank, form, groups=getattr(self, "groups", 1), transposed=self._transposed
        )
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.down = nn.Parameter(torch.empty(stages, *down, **like))
        self.up = nn.Parameter(torch.empty(stages, *up, **like))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draws ``down`` as a fresh layer's weight is drawn and sets ``up`` to zero: every stage is the base again."""
        self._draw(self.down, self.up)
        self.unmerge()

    @staticmethod
    def _draw(down: Tensor, up: Tensor) -> None:
        bound = 1 / math.sqrt(max(1, math.prod(down.shape[2:])))  # torch's layers may have no inputs
        nn.init.uniform_(down, -bound, bound)
        nn.init.zeros_(up)

    def with_stages(self, order: Sequence[int | None], memo: dict[int, object] | None = None) -> AdaptedLayer:
        """A copy whose stages are those of these numbers, in this order; None: a fresh one. memo: as for deepcopy."""
        memo = {} if memo is None else memo
        if id(self) in memo:  # a part of another layer, as an attention's out_proj
            return memo[id(self)]
        for part in self.children():
            if isinstance(part, AdaptedLayer):
                part.with_stages(order, memo)
        given = (self.down, self.up)
        down, up = (t.detach()[[0 if k is None else k for k in order]] for t in given)
        for i, k in enumerate(order):
            if k is None:
                self._draw(down[i : i + 1], up[i : i + 1])
        for old, new in zip(given, (down, up), strict=True):
            memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
        layer = copy.deepcopy(self, memo)
        layer.stages = len(order)
        layer.unmerge()
        return layer

    @property
    def sharded(self) -> bool:
        """Whether this process holds parts of the parameters alone (FSDP's fully_shard, between calls)."""
        return any(hasattr(self._parameters.get(name), "device_mesh") for name in (*self.WEIGHTS, "down", "up"))

    @property
    def computed(self) -> bool:
        """Whether a hook computes weight or factors before each call, as torch's old weight_norm and pruning do."""
        return any(isinstance(vars(self).get(name), Tensor) for name in (*self.WEIGHTS, "down", "up"))

    @property
    def merged(self) -> bool:
        """Whether the layer runs on merged weights: not with other parameters in place, as of functional_call."""
        if self._merged is None:
            return False
        # Asked for some times a call: no loop, which would cost as much as the rest of it.
        weight, down, up = self._merged_from
        now = self._parameters
        return now.get("weight") is weight and now.get("down") is down and now.get("up") is up

    def _take_merged(self, weights: Tensor) -> None:
        self._merged, self._merged_stages = weights, weights.unbind()
        self._merged_from = tuple(self._parameters.get(name) for name in (*self.WEIGHTS, "down", "up"))

    @torch.no_grad()
    def merge(self) -> None:
        """Computes W0 + scale * dW of every stage once, for inference; ``weight`` itself stays as it is.

        Gradients do not reach the factors through merged weights, and later changes to ``weight``, ``down`` or
        ``up`` do not reach the merged ones. train(), loading a state dict and moving the module drop them. A layer
        whose parameters are sharded (FSDP) stays unmerged: it merges at each call, where they are whole. So does one
        whose weight or factors a hook computes before each call.
        """
        merge_layers([self])

    def unmerge(self) -> None:
        """Drops the merged weights."""
        self._merged, self._merged_stages, self._merged_from = None, (), ()

    def stage_weight(self, stage: int | Tensor) -> Tensor:
        """The weight of one stage, or (N, *weight.shape) for a tensor (N,) of stages."""
        check_stage(stage, self.stages, stage.shape[0] if per_sample(stage) else 0)
        check_given_stages(stage, self.stages)
        if self.merged:
            return self._merged[stage]
        return reference.stage_weight(self.weight, self.down, self.up, self.scale, stage, self._transposed)

    def _merged_at(self, stage: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The merged weight, one per sample for a tensor of stages, and the bias, in x's dtype as unmerged ones are."""
        check_given_stages(stage, self.stages)
        if per_sample(stage) and not stage.shape[0]:
            stage = 0  # any will do
        if type(stage) is int and not torch.compiler.is_compiling():  # in a graph it is a symbol
            weight = self._merged_stages[stage]
        else:
            weight = self._merged[stage] if per_sample(stage) else at_stage(self._merged, stage)
        bias = self.bias
        if weight.dtype != x.dtype:
            check_floating("x", x)
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return weight, bias

    def _weight_at(self, stage: int | Tensor, merged: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight of a call, one per sample for a tensor of stages, and the bias, in x's dtype; merged: the weight
        where a staged denoiser has merged it for the call.
        """
        check_floating("x", x)
        if self.merged:
            return self._merged_at(stage, x)
        check_given_stages(stage, self.stages)
        if merged is None:
            if per_sample(stage) and not stage.shape[0]:
                stage = 0  # any will do
            down, up = (
                t[stage.to(t.device)] if per_sample(stage) else at_stage(t, stage) for t in (self.down, self.up)
            )
            merged = adapters.merged_weight(self.weight, down, up, self.scale)
        return merged.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)

    def _call_merged(self, function: Callable, check: Callable, x: Tensor, *args) -> Tensor:
        """function(x, *args), torch's own; where that fails, check(x, self) has the first word."""
        try:
            return function(x, *args)
        except RuntimeError:
            check(x, self)
            raise

    def _parts(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """A weight and a bias by their names in the plain layer."""
        return {"weight": weight, "bias": bias}

    def plain(self, weight: Tensor, bias: Tensor | None = None, memo: dict[int, object] | None = None) -> nn.Module:
        """The nn layer that this one adapts, with its geometry and this weight and bias, neither of them training.

        memo: as for deepcopy, of what the layer has beside them; the out_proj of an attention is plain only from there.
        """
        arguments = self._base_arguments(self) | {"bias": bias is not None, "device": "meta"}
        layer = next(base for base, ours in LAYERS.items() if isinstance(self, ours))(**arguments)
        for name, part in self._parts(weight, bias).items():
            if part is not None:
                setattr(layer, name, nn.Parameter(part, requires_grad=False))
        for name in self.BESIDE:
            setattr(layer, name, copy.deepcopy(getattr(self, name), memo))
        _take_hooks(self, layer)
        take_attributes(self, layer)
        return layer.train(self.training)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, down, up) as lora_merge takes them, whose result is then viewed as the weight."""
        return self.weight, self.down, self.up

    def merged_now(self, stage: int | Tensor | None = None) -> Tensor | None:
        """The weight of the stage that a call takes, where a staged denoiser has merged all layers for the call."""
        return _scope.weight_in_scope(self) if stage is None else None

    def operands(
        self, stage: int | Tensor, merged: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(weight, down, up, stage) as the ops take them: factors of a whole call's stage, or stacked with a stage
        per sample; none beside a merged weight.
        """
        if merged is not None:
            return merged, None, None, None
        if per_sample(stage):
            return self.weight, self.down, self.up, stage
        if self.stages == 1:  # an index would write its gradient into zeros
            return self.weight, self.down.squeeze(0), self.up.squeeze(0), None
        held = None if isinstance(stage, Tensor) else _scope.held_factors(self, stage)
        if held is not None:
            return self.weight, held[0].squeeze(0), held[1].squeeze(0), None
        return self.weight, at_stage(self.down, stage), at_stage(self.up, stage), None

    def merges_first(self) -> bool:
        """Whether training needs the whole weight's gradient anyway, so that merging costs nothing beyond the merge."""
        return False

    def stage_now(self, batch: int, stage: int | Tensor | None = None) -> int | Tensor:
        """The stage that a call with this many samples takes: the given one, else the staged denoiser's."""
        if stage is None:
            stage = _scope.current_stage()
        if stage is None:
            if self.stages != 1:
                raise ValueError(f"stage: expected 0 to {self.stages - 1}, got none: {self._how_to_name_a_stage()}")
            return 0
        check_stage(stage, self.stages, batch)
        return stage

    @staticmethod
    def _how_to_name_a_stage() -> str:
        if torch._C._current_graph_task_id() == -1:
            return "pass layer(..., stage=k)"
        return (  # recomputed in the backward pass, after the staged call has ended
            "a denoiser that recomputes its activations (torch.utils.checkpoint) does so outside its stage; "
            "checkpoint the call of the staged denoiser instead, or LoRun(checkpoint=True)"
        )

    def train(self, mode: bool = True):
        if mode:
            self.unmerge()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.unmerge()

        def by_stage(t: Tensor) -> Tensor:
            # A conversion to channels_last takes four axes; stacked factors of the peft form have five.
            return fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.ndim == 5 else fn(t)

        return super()._apply(by_stage, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.unmerge()  # the merged weights lie on the device of this layer
        return replica

    def extra_repr(self) -> str:
        own = f"stages={self.stages}, rank={self.rank}, form={self.form!r}"
        return ", ".join(filter(None, (super().extra_repr(), own)))

    @classmethod
    def from_base(cls, base: nn.Module, *, stages: int = 9, rank: int = 7, form: str = "loralib", scale: float = 1.0):
        """A layer that takes over what ``base`` holds (the same Parameter objects) and adds adapters."""
        kind = next(plain for plain, ours in LAYERS.items() if issubclass(cls, ours))
        if not isinstance(base, kind):
            raise TypeError(f"base: expected an nn.{kind.__name__}, got {type(base).__name__}")
        for weight in filter(lambda t: t is not None, (getattr(base, name) for name in cls.WEIGHTS)):
            if weight.dtype not in STORAGE_DTYPES:
                raise TypeError(f"base: expected a weight of float32, float64, bfloat16 or float16, got {weight.dtype}")
        layer = cls(**cls._base_arguments(base), stages=stages, rank=rank, form=form, scale=scale, device="meta")
        for name in (*cls.WEIGHTS, cls.BIAS, *cls.BESIDE):
            setattr(layer, name, getattr(base, name))
        layer._add_adapter(stages, rank, form, scale)
        _take_hooks(base, layer)
        take_attributes(base, layer)
        return layer.train(base.training)


class AdaptedConvolution(AdaptedLayer):
    """What the two convolutions share."""

    def merges_first(self) -> bool:
        # On a GPU a call of its own is one product more. The factors of the peft form have gradients of their own,
        # cheaper than the weight's.
        if self.weight.device.type in _lora_autograd.DEVICES:
            return False
        return self.form == "loralib" or self.weight.requires_grad or not torch.is_grad_enabled()


class LoRAConv2d(AdaptedConvolution, nn.Conv2d):
    """nn.Conv2d with K low-rank adapters: y = conv(x, W0 + scale * dW_k) + bias.

    Arguments as for nn.Conv2d, then:
    stages: K. rank: r of each adapter. form: "loralib" or "peft", see :mod:`lorun_fast.adapters`.
    scale: factor of the update (alpha / r of other libraries).
    dtype: float32, float64, bfloat16, float16 or None, torch's default.

    layer(x, stage): stage an int, or an int64 tensor: (N,), one stage per sample, or 0-d, one of all; it may be left
    out only if stages == 1, or inside a staged denoiser, which provides it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        stages: int = 9,
        rank: int = 7,
        form: str = "loralib",
        scale: float = 1.0,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            _storage(dtype),
        )  # fmt: skip
        self._add_adapter(stages, rank, form, scale)

    @staticmethod
    def _base_arguments(base: nn.Conv2d) -> dict:
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        return {name: getattr(base, name) for name in names} | {"bias": base.bias is not None}

    def forward(self, input: Tensor, stage: int | Tensor | None = None) -> Tensor:
        merged, stage = self.merged_now(stage), self.stage_now(batch_of("x", input), stage)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if not self.merged:
            return conv_ops.of_layer(input, self, stage, padding, merged=merged)
        weight, bias = self._merged_at(stage, input)
        conv = reference.conv2d_per_sample if weight.ndim == 5 else F.conv2d
        geometry = (self.stride, padding, self.dilation, self.groups)
        return self._call_merged(conv, conv_ops.check_images, input, weight, bias, *geometry)


class LoRAConvTranspose2d(AdaptedConvolution, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with K low-rank adapters. Adapter arguments and stage as for :class:`LoRAConv2d`."""

    _transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        stages: int = 9,
        rank: int = 7,
        form: str = "loralib",
        scale: float = 1.0,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, _storage(dtype),
        )  # fmt: skip
        self._add_adapter(stages, rank, form, scale)

    @staticmethod
    def _base_arguments(base: nn.ConvTranspose2d) -> dict:
        return LoRAConv2d._base_arguments(base) | {"output_padding": base.output_padding}

    def forward(
        self, input: Tensor, stage: int | Tensor | None = None, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """output_size: as for nn.ConvTranspose2d, also in its place, as a denoiser that knows no stages passes it."""
        if isinstance(stage, (tuple, list)):
            stage, output_size = None, stage
        merged, stage = self.merged_now(stage), self.stage_now(batch_of("x", input), stage)
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input, list(output_size), self.stride, self.padding, self.kernel_size, 2, self.dilation
            )
        if not self.merged:
            return conv_ops.of_layer(input, self, stage, self.padding, output_padding, merged=merged)
        weight, bias = self._merged_at(stage, input)
        conv = reference.conv_transpose2d_per_sample if weight.ndim == 5 else F.conv_transpose2d
        geometry = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        return self._call_merged(conv, conv_ops.check_images, input, weight, bias, *geometry)


class _LoRAConvNd(AdaptedLayer):
    """What convolutions of one and of three axes share: a weight merged once a call, and torch's convolution of it.

    Adapter arguments and stage as for :class:`LoRAConv2d`. ``_transposed`` is False in transposed ones too: their
    update is the product of the factors as it stands.
    """

    _conv: Callable

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        padding_mode="zeros", device=None, dtype=None, *, stages=9, rank=7, form="peft", scale=1.0,
    ):  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            _storage(dtype),
        )  # fmt: skip
        self._add_adapter(stages, rank, form, scale)

    def merges_first(self) -> bool:
        return True

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight.flatten(1), self.down.flatten(2), self.up

    def _apply(self, fn, recurse=True):
        self.unmerge()
        return nn.Module._apply(self, fn, recurse)  # five axes are a weight's here, not stacked factors

    def _check(self, x: Tensor, layer: AdaptedLayer) -> None:
        axes = len(self.kernel_size)
        if x.ndim not in (axes + 1, axes + 2) or x.shape[-axes - 1] != self.in_channels:
            raise ValueError(f"x: expected (N, {self.in_channels}, ...) with {axes} axes of space, got {shape_of(x)}")

    def _convolve(self, x: Tensor, stage: int | Tensor | None, **geometry) -> Tensor:
        """torch's convolution of x with the weight of the stage. geometry: beside stride, dilation and groups."""
        merged, stage = self.merged_now(stage), self.stage_now(batch_of("x", x), stage)
        weight, bias = self._weight_at(stage, merged, x)
        conv = partial(type(self)._conv, stride=self.stride, dilation=self.dilation, **geometry)
        if weight.ndim > self.weight.ndim:
            conv = partial(reference.conv_per_sample, conv, self.groups)
        else:
            conv = partial(conv, groups=self.groups)
        return self._call_merged(conv, self._check, x, weight, bias)

    def forward(self, input: Tensor, stage: int | Tensor | None = None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            check_floating("x", input)
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._convolve(input, stage, padding=padding)


class LoRAConv1d(_LoRAConvNd, nn.Conv1d):
    """nn.Conv1d with K low-rank adapters, by torch's convolution. Adapter arguments and stage as for
    :class:`LoRAConv2d`; both forms are that of peft, with groups it is called loralib.
    """

    _conv = staticmethod(F.conv1d)
    _base_arguments = staticmethod(LoRAConv2d._base_arguments)


class LoRAConv3d(_LoRAConvNd, nn.Conv3d):
    """nn.Conv3d with K low-rank adapters; as :class:`LoRAConv1d`."""

    _conv = staticmethod(F.conv3d)
    _base_arguments = staticmethod(LoRAConv2d._base_arguments)


class _LoRAConvTransposeNd(_LoRAConvNd):
    """The same of transposed ones."""

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, output_padding=0, groups=1, bias=True,
        dilation=1, padding_mode="zeros", device=None, dtype=None, *, stages=9, rank=7, form="peft", scale=1.0,
    ):  # fmt: skip
        super(_LoRAConvNd, self).__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, _storage(dtype),
        )  # fmt: skip
        self._add_adapter(stages, rank, form, scale)

    def forward(
        self, input: Tensor, stage: int | Tensor | None = None, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """output_size: as for :class:`LoRAConvTranspose2d`."""
        if isinstance(stage, (tuple, list)):
            stage, output_size = None, stage
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input, list(output_size), self.stride, self.padding, self.kernel_size, len(self.stride), self.dilation
            )
        return self._convolve(input, stage, padding=self.padding, output_padding=output_padding)


class LoRAConvTranspose1d(_LoRAConvTransposeNd, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with K low-rank adapters; as :class:`LoRAConv1d`."""

    _conv = staticmethod(F.conv_transpose1d)
    _base_arguments = staticmethod(LoRAConvTranspose2d._base_arguments)


class LoRAConvTranspose3d(_LoRAConvTransposeNd, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with K low-rank adapters; as :class:`LoRAConv1d`."""

    _conv = staticmethod(F.conv_transpose3d)
    _base_arguments = staticmethod(LoRAConvTranspose2d._base_arguments)


class LoRALinear(AdaptedLayer, nn.Linear):
    """nn.Linear with K low-rank adapters; both forms are the same here. Stage as for :class:`LoRAConv2d`.

    x: (..., in); with one stage per sample, N leads.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        stages: int = 9,
        rank: int = 7,
        form: str = "loralib",
        scale: float = 1.0,
    ):
        super().__init__(in_features, out_features, bias, device, _storage(dtype))
        self._add_adapter(stages, rank, form, scale)

    @staticmethod
    def _base_arguments(base: nn.Linear) -> dict:
        return {"in_features": base.in_features, "out_features": base.out_features, "bias": base.bias is not None}

    def forward(self, input: Tensor, stage: int | Tensor | None = None) -> Tensor:
        stage = self.stage_now(batch_of("x", input), stage)
        if not self.merged:
            return linear_ops.of_layer(input, self, stage)
        weight, bias = self._merged_at(stage, input)
        linear = reference.linear_per_sample if weight.ndim == 3 else F.linear
        return self._call_merged(linear, linear_ops.check_features, input, weight, bias)


class _LoRAOutProjection(LoRALinear, NonDynamicallyQuantizableLinear):
    """The out_proj of an attention, whose weight is computed with and which is never called."""

    def merges_first(self) -> bool:
        return True


class _WithWeights:
    """A layer as torch's code reads it, with other tensors in place. Other threads may be calling the layer itself."""

    def __init__(self, layer: nn.Module, tensors: dict[str, object]):
        self._layer = layer
        vars(self).update(tensors)

    def __getattr__(self, name: str) -> object:
        return getattr(self._layer, name)


def _in_projection(attention: nn.MultiheadAttention) -> Tensor:
    """An attention's in-projection as one matrix, see :class:`LoRAMultiheadAttention`."""
    if attention.in_proj_weight is not None:
        return attention.in_proj_weight
    return torch.cat([attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight], 1)


class LoRAMultiheadAttention(AdaptedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with K low-rank adapters of its in-projection, and K of its out-projection.

    Arguments as for nn.MultiheadAttention, then those of :class:`LoRAConv2d`; both forms are the same here. ``weight``
    is the in-projection as one matrix, with one adapter of ``rank``: in_proj_weight, (3E, E), or where kdim or vdim
    differ from E = embed_dim the weights of q, k and v side by side, (E, E + kdim + vdim). ``out_proj`` is an adapted
    layer by itself, which merges by itself; :meth:`from_base` takes over that of the base as it is.

    layer(query, key, value, ..., stage=k): as nn.MultiheadAttention, computed by it, without and with its fast path.
    Stage as for :class:`LoRAConv2d`, samples along the batch axis that ``batch_first`` names; with one per sample the
    products of all queries and keys are formed, (N, heads, L, S). No nested tensors.
    """

    WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    BIAS = "in_proj_bias"
    BESIDE = ("bias_k", "bias_v", "out_proj")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        stages: int = 9,
        rank: int = 7,
        form: str = "loralib",
        scale: float = 1.0,
    ):
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            _storage(dtype),
        )  # fmt: skip
        self._add_adapter(stages, rank, form, scale)
        self.out_proj = _LoRAOutProjection.from_base(self.out_proj, stages=stages, rank=rank, form=form, scale=scale)

    @staticmethod
    def _base_arguments(base: nn.MultiheadAttention) -> dict:
        names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
        taken = {name: getattr(base, name) for name in names}
        return taken | {"bias": base.in_proj_bias is not None, "add_bias_kv": base.bias_k is not None}

    @property
    def weight(self) -> Tensor:
        return _in_projection(self)

    @property
    def bias(self) -> Tensor | None:
        return self.in_proj_bias

    def _parts(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        if self.in_proj_weight is not None:
            return {"in_proj_weight": weight, "in_proj_bias": bias}
        parts = weight.split([self.embed_dim, self.kdim, self.vdim], 1)
        return dict(zip(self.WEIGHTS[1:], parts, strict=True)) | {"in_proj_bias": bias}

    @property
    def merged(self) -> bool:
        if self._merged is None:
            return False
        now = (self._parameters.get(name) for name in (*self.WEIGHTS, "down", "up"))
        return all(p is q for p, q in zip(now, self._merged_from, strict=True))

    def merges_first(self) -> bool:
        return True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        stage: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        of_each = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, t, width in of_each:
            check_floating(name, t)
            if t.ndim not in (2, 3) or t.shape[-1] != width:
                raise ValueError(f"{name}: expected ({width},) as its last of two or three axes, got {shape_of(t)}")
        given, batch = stage, 0 if self.batch_first else 1
        stage = self.stage_now(query.shape[batch] if query.ndim == 3 else 1, given)
        if per_sample(stage) and query.ndim == 2:
            stage = stage.squeeze(0)
        if per_sample(stage):  # autocast has no part in what vmap calls
            tensors, dtype = (query, key, value, key_padding_mask, attn_mask), _lora_autograd.narrowed(query)
            query, key, value, key_padding_mask, attn_mask = (
                as_dtype(t, dtype) if t is not None and t.is_floating_point() else t for t in tensors
            )
        weight, bias = self._weight_at(stage, self.merged_now(given), query)
        out = self.out_proj
        if isinstance(out, AdaptedLayer):
            out_weight, out_bias = out._weight_at(stage, out.merged_now(given), query)
        else:
            out_weight, out_bias = (None if t is None else t.to(query.dtype) for t in (out.weight, out.bias))
        more = {name: t.to(query.dtype) for name in ("bias_k", "bias_v") if (t := getattr(self, name)) is not None}

        def attend(weight, out_weight, query, key, value, key_padding_mask, attn_mask, need_weights=True):
            now = self._parts(weight, bias) | more
            now["out_proj"] = _WithWeights(out, {"weight": out_weight, "bias": out_bias})
            return nn.MultiheadAttention.forward(
                _WithWeights(self, now), query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip

        args = (weight, out_weight, query, key, value, key_padding_mask, attn_mask)
        if weight.ndim == 2:
            return attend(*args, need_weights)
        by_head = attn_mask is not None and attn_mask.ndim == 3
        if by_head:
            args = (*args[:-1], attn_mask.unflatten(0, (-1, self.num_heads)))
        dims = (0, 0 if out_weight.ndim == 3 else None, batch, batch, batch, None if key_padding_mask is None else 0)
        # A sample at a time, with need_weights: without, torch takes a fused attention, which vmap runs in a loop.
        y, weights = torch.vmap(attend, (*dims, 0 if by_head else None), (batch, 0), randomness="different")(*args)
        return y, weights if need_weights else None


def current_weight(layer: nn.Module) -> Tensor:
    """The weight that a call of ``layer`` would compute with now: ``layer.weight``, of an adapted one with its stage's
    update, (N, *layer.weight.shape) where each sample has a stage of its own.

    Of an nn.MultiheadAttention it is the in-projection, see :class:`LoRAMultiheadAttention`.

    For code that shares a weight, as a convolution and its transpose do, inside a denoiser that is adapted or not;
    gradients reach the factors of unmerged layers. Raises ValueError outside a staged call, unless stages == 1.
    """
    if not isinstance(layer, AdaptedLayer):
        return _in_projection(layer) if isinstance(layer, nn.MultiheadAttention) else layer.weight
    merged = layer.merged_now()
    if merged is not None:
        return merged
    stage = _scope.current_stage()
    return layer.stage_weight(layer.stage_now(stage.shape[0] if per_sample(stage) else 0))


def _by_op(
    merge: Callable,
    layers: Sequence[AdaptedLayer],
    matrices: Callable[[AdaptedLayer], tuple[Tensor, Tensor, Tensor]] = lambda layer: layer.matrices(),
) -> dict[AdaptedLayer, Tensor]:
    """What merge(weights, downs, ups, scales, transposed) makes of each of these layers, a call per device."""
    by_device: dict[torch.device, list[AdaptedLayer]] = {}
    for layer in layers:
        by_device.setdefault(layer.weight.device, []).append(layer)
    found: dict[AdaptedLayer, Tensor] = {}
    for group in by_device.values():
        weights, downs, ups = zip(*(matrices(layer) for layer in group), strict=True)
        merged = merge(
            list(weights),
            list(downs),
            list(ups),
            scales=[layer.scale for layer in group],
            transposed=[layer._transposed for layer in group],
        )
        for layer, weight, t in zip(group, weights, merged, strict=True):
            shape = layer.weight.shape
            found[layer] = t if weight.ndim == len(shape) else t.unflatten(-1, shape[1:])
    return found


@torch.inference_mode(False)  # merged under inference_mode, they serve calls outside of it all the same
@torch.no_grad()
def merged_weights(
    layers: Sequence[AdaptedLayer], dtype: torch.dtype | None = None, channels_last: bool | None = None
) -> list[Tensor]:
    """(K, *weight.shape) for each of these layers, by one op per device. dtype, channels_last: as in lora_merge."""
    found = _by_op(partial(lora_merge, dtype=dtype, channels_last=channels_last), layers)
    return [found[layer] for layer in layers]


def stage_weights(layers: Sequence[AdaptedLayer], stage: int) -> dict[AdaptedLayer, Tensor]:
    """The merged weight of one stage for each of these layers, by one op per device; gradients reach the factors."""
    held = {layer: _scope.held_factors(layer, stage) for layer in layers}
    apart = {layer: factors for layer, factors in held.items() if factors is not None}

    def of_one(layer: AdaptedLayer) -> tuple[Tensor, Tensor, Tensor]:
        weight, stacked, _ = layer.matrices()
        down, up = apart[layer]
        return weight, down.reshape(1, *stacked.shape[1:]), up

    found = _by_op(partial(lora_merge_stage, stage=0), list(apart), of_one)
    return found | _by_op(partial(lora_merge_stage, stage=stage), [layer for layer in layers if layer not in apart])


def all_stage_weights(layers: Sequence[AdaptedLayer]) -> dict[AdaptedLayer, tuple[Tensor, ...]]:
    """The merged weights of all stages for those layers that can take them, on a GPU; in autocast's dtype if it is on.

    For a pass over all stages: a host takes as long to launch one stage's merge as that of all.
    """
    found = {}
    for layer in layers:
        if not isinstance(layer, AdaptedConvolution) or layer.weight.device.type not in _lora_autograd.DEVICES:
            continue
        stacked = _lora_autograd.merge(layer.weight, layer.down, layer.up, layer.scale, layer._transposed)
        dtype = _lora_autograd.narrowed(layer.weight)
        # cuDNN's convolutions in 16 bits read channels innermost: laid out once for all stages and both passes.
        layout = torch.channels_last if dtype.itemsize == 2 else torch.preserve_format
        found[layer] = stacked.flatten(0, 1).to(dtype, memory_format=layout).view_as(stacked).unbind()
    return found


def factors_apart(layers: Sequence[AdaptedLayer]) -> dict[AdaptedLayer, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """The factors of each stage, (1, ...), of those layers whose factors learn on a CPU.

    For a pass over all stages: taken from the stack by each stage, every gradient is written into zeros of the stack's
    size, and these are added; taken apart once, they are put together once.
    """
    return {
        layer: (layer.down.split(1), layer.up.split(1))
        for layer in layers
        if layer.stages > 1
        and layer.weight.device.type == "cpu"
        and torch.is_grad_enabled()
        and (layer.down.requires_grad or layer.up.requires_grad)
        and not layer.sharded
    }


@torch.inference_mode(False)
@torch.no_grad()
def merge_layers(layers: Sequence[AdaptedLayer]) -> None:
    """merge() of many layers at once, but for sharded and computed ones: these merge at each call, where their weights
    are whole and up to date.
    """
    layers = [layer for layer in layers if not layer.sharded and not layer.computed]
    for layer, weights in zip(layers, merged_weights(layers), strict=True):
        layer._take_merged(weights)


LAYERS: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
    nn.ConvTranspose1d: LoRAConvTranspose1d,
    nn.ConvTranspose2d: LoRAConvTranspose2d,
    nn.ConvTranspose3d: LoRAConvTranspose3d,
    nn.MultiheadAttention: LoRAMultiheadAttention,
    NonDynamicallyQuantizableLinear: _LoRAOutProjection,  # before nn.Linear, which it is as well
    nn.Linear: LoRALinear,
}
