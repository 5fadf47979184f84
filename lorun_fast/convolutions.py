"""What a denoiser calls to have several of its steps done as one, and the convolutions of inference.

A denoiser that calls :func:`convolve` and :func:`residual_block` gets every fusion that its layers allow: adapted ones
that learn become one op a block, and those of inference, modules that stand for torch's and compute the same
otherwise, apply what follows a convolution on the way. :func:`depthwise` is for depthwise layers, in training too.

On a CPU :class:`WinogradConv2d`: minimal filtering (ops/winograd_conv2d.py), :class:`ThinConv2d`, from or to few
channels (ops/fused_conv2d.py), and :class:`DepthwiseConv2d` (ops/depthwise_conv2d.py); with AMX in bf16
:class:`PackedConv2d` and :class:`PackedConvTranspose2d`: matrix tiles (ops/packed_conv2d.py). On a GPU
:class:`FusedConv2d`, where that takes less time than cuDNN's and what follows: a kernel for Hopper
(ops/fused_conv2d.py), or that of LoRA convolutions, without an adapter (kernels/lora_conv2d.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lorun_fast.layers import LoRAConv2d, take_attributes
from lorun_fast.ops import _backends, _lora_autograd, fused_conv2d, lora_residual_block
from lorun_fast.ops.depthwise_conv2d import depthwise_conv2d
from lorun_fast.ops.lora import per_sample
from lorun_fast.ops.packed_conv2d import MAX_KERNEL, as_cells, packed_block, packed_conv2d, packed_weight
from lorun_fast.ops.winograd_conv2d import LEAST_CHANNELS, has_enough, winograd_block, winograd_conv2d, winograd_weight
from lorun_fast.reference.packed_conv2d import CHANNELS as PACKED_CHANNELS


def _form_again(module: StandIn, *_) -> None:
    module.form_weight()


class StandIn:
    """A convolution whose state is that of the layer it stands for, and whose weight is kept in another form as well.

    Mixed in before that layer's class, with its attributes: a denoiser may ask a layer for its kind, for its stride, or
    for what its author has put there. forward(input, activation=None, residual=None) is act(conv(input) + bias) +
    residual; activation: None or "relu".
    """

    method: str
    """As a report names it."""
    expected: str
    device = "cpu"

    def __init__(self, conv: nn.Module):
        nn.Module.__init__(self)  # that of the layer's class would draw a weight
        reason = self.unfit(conv)
        if reason is not None:
            raise ValueError(f"conv: expected {self.expected}, got {reason}")
        self.weight = nn.Parameter(conv.weight.detach(), requires_grad=False)
        bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        take_attributes(conv, self, ())
        self.register_load_state_dict_post_hook(_form_again)

    @staticmethod
    def unfit(conv: nn.Module) -> str | None:
        """Why this cannot stand for a module; None if it can."""
        raise NotImplementedError

    def form_weight(self) -> None:
        """Makes the other form of the weight, where the kernel does not read it as it is."""

    def forward(self, input: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        if input.ndim == 3:  # one image, as the layer takes it too
            return self(input[None], activation, None if residual is None else residual[None])[0]
        return self.compute(input, activation, residual)

    def compute(self, input: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        """forward() of a batch."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _unfit_size(conv: nn.Module) -> str | None:
    """Why a module is no convolution of 3 x 3 with stride and padding 1; None if it is one."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}"
    if conv.kernel_size != (3, 3):
        return "its kernel is not 3 x 3"
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding not in ((1, 1), "same"):
        return "its stride or dilation is not 1, or its result not of the image's size"
    return None if conv.padding_mode == "zeros" else "it does not pad with zeros"


def _unfit_same_size(conv: nn.Module) -> str | None:
    """The same for one that is not grouped, in a dtype that the kernels compute in."""
    reason = _unfit_size(conv)
    if reason is not None:
        return reason
    if conv.groups != 1:
        return "it is grouped"
    return _unfit_dtype(conv)


def _unfit_dtype(conv: nn.Module) -> str | None:
    return None if conv.weight.dtype in _DTYPES else f"its weight is {conv.weight.dtype}"


class WinogradConv2d(StandIn, nn.Conv2d):
    """An nn.Conv2d of 3 x 3 with stride and padding 1, for inference: a quarter of its multiplications.

    ``points``, (36, in, out): its weight transformed, 4 times as large, and ``offset``, its bias, both in fp32 also
    where the layer has 16 bits. Raises ValueError for a layer that this does not fit.
    """

    method = "F(4x4, 3x3)"
    expected = "a 3 x 3 convolution with stride and padding 1"

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.register_buffer("points", None, persistent=False)
        self.register_buffer("offset", None, persistent=False)
        self.form_weight()

    @staticmethod
    def unfit(conv: nn.Module) -> str | None:
        """Why this cannot stand for a module; None if it can."""
        reason = _unfit_same_size(conv)
        if reason is None and not has_enough(conv.in_channels, conv.out_channels):
            return f"it has less than {LEAST_CHANNELS} channels on a side"
        return reason

    def form_weight(self) -> None:
        self.points = winograd_weight(self.weight)
        self.offset = None if self.bias is None else self.bias.to(self.points.dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.points.dtype.itemsize < 4:  # they stay wide beside a weight of 16 bits
            self.form_weight()
        return self

    def compute(self, input: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        input = input.to(self.weight.dtype)  # as autocast would
        return winograd_conv2d(input, self.points, self.offset, activation=activation, residual=residual)


class ThinConv2d(StandIn, nn.Conv2d):
    """An nn.Conv2d of 3 x 3 with stride and padding 1 from or to at most four channels, for inference.

    A network's first layer and its last: torch's takes up to ten times as long on channels_last images. Raises
    ValueError for a layer that this does not fit.
    """

    method = "thin kernel"
    expected = "a 3 x 3 convolution with stride and padding 1 from or to few channels"

    @staticmethod
    def unfit(conv: nn.Module) -> str | None:
        """Why this cannot stand for a module; None if it can."""
        reason = _unfit_same_size(conv)
        if reason is None and not fused_conv2d.is_thin(conv.weight):
            return f"it has {conv.in_channels} channels in and {conv.out_channels} out"
        return reason

    def compute(self, input: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        input = input.to(self.weight.dtype)
        return fused_conv2d.fused_conv2d(input, self.weight, self.bias, activation=activation, residual=residual)


_LEAST_CHANNELS = 8
"""Of a depthwise convolution: fewer fill no vector, and no gain was measured."""


def _unfit_depthwise(conv: nn.Module) -> str | None:
    """Why a module is no depthwise convolution that depthwise_conv2d should compute; None if it is one."""
    reason = _unfit_size(conv)
    if reason is not None:
        return reason
    if not conv.groups == conv.in_channels == conv.out_channels:
        return "it is not depthwise"
    return None if conv.groups >= _LEAST_CHANNELS else f"it has fewer than {_LEAST_CHANNELS} channels"


class DepthwiseConv2d(StandIn, nn.Conv2d):
    """A depthwise nn.Conv2d of 3 x 3 with stride and padding 1, for inference.

    Raises ValueError for a layer that this does not fit.
    """

    method = "depthwise kernel"
    expected = "a depthwise 3 x 3 convolution with stride and padding 1"

    @staticmethod
    def unfit(conv: nn.Module) -> str | None:
        """Why this cannot stand for a module; None if it can."""
        return _unfit_depthwise(conv) or _unfit_dtype(conv)

    def compute(self, input: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        return _finish(depthwise_conv2d(input.to(self.weight.dtype), self.weight, self.bias), activation, residual)


def _padding(conv: nn.Conv2d) -> int | None:
    """Of an undilated layer of square kernels, on all sides; None where they differ."""
    if conv.padding == "same":
        return None if conv.kernel_size[0] % 2 == 0 else conv.kernel_size[0] // 2
    above, left = (0, 0) if conv.padding == "valid" else conv.padding
    return above if above == left else None


class _Packed(StandIn):
    """What the two convolutions by matrix tiles share. ``tiles``: the weight as these take it."""

    method = "matrix tiles"
    expected = "a bf16 convolution of square kernels"
    geometry: dict[str, int]

    def __init__(self, conv: nn.Module):
        super().__init__(conv)
        self.register_buffer("tiles", None, persistent=False)
        self.register_buffer("offset", None, persistent=False)
        self.form_weight()

    @classmethod
    def unfit(cls, conv: nn.Module) -> str | None:
        """Why this cannot stand for a module; None if it can."""
        if type(conv) not in cls.__bases__:
            return f"a {type(conv).__name__}"
        (size, width), (stride, other) = conv.kernel_size, conv.stride
        if size != width or stride != other or size > MAX_KERNEL:
            return f"its kernel is not square and at most {MAX_KERNEL} x {MAX_KERNEL}, or its strides differ"
        if conv.dilation != (1, 1) or conv.groups != 1 or conv.padding_mode != "zeros":
            return "it is dilated, grouped or does not pad with zeros"
        reason = cls._unfit_padding(conv)
        if reason is not None:
            return reason
        return None if conv.weight.dtype == torch.bfloat16 else f"its weight is {conv.weight.dtype}"

    def form_weight(self) -> None:
        self.tiles = packed_weight(self.weight)
        self.offset = None if self.bias is None else self.bias.float()

    def compute(self, input: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        input = input.to(self.tiles.dtype)  # as autocast would
        return packed_conv2d(input, self.tiles, self.offset, activation=activation, residual=residual, **self.geometry)


class PackedConv2d(_Packed, nn.Conv2d):
    """An nn.Conv2d for inference in bf16. Raises ValueError for a layer that this does not fit."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.geometry = {
            "out": conv.out_channels, "kernel": conv.kernel_size[0], "stride": conv.stride[0], "padding": _padding(conv)
        }  # fmt: skip

    @staticmethod
    def _unfit_padding(conv: nn.Conv2d) -> str | None:
        return "its padding is not the same on all sides" if _padding(conv) is None else None

    @property
    def keeps_size(self) -> bool:
        """Whether it is 3 x 3 with stride and padding 1."""
        return self.geometry == {"out": self.out_channels, "kernel": 3, "stride": 1, "padding": 1}


class PackedConvTranspose2d(_Packed, nn.ConvTranspose2d):
    """An nn.ConvTranspose2d whose stride is its kernel's size, for inference in bf16: a 1 x 1 convolution whose
    channels are spread over pixels. Raises ValueError for a layer that this does not fit.
    """

    def __init__(self, conv: nn.ConvTranspose2d):
        super().__init__(conv)
        size = conv.kernel_size[0]
        self.geometry = {"out": size * size * conv.out_channels, "kernel": 1, "shuffle": size}

    @staticmethod
    def _unfit_padding(conv: nn.ConvTranspose2d) -> str | None:
        size, stride = conv.kernel_size[0], conv.stride[0]
        if stride != size or conv.padding != (0, 0) or conv.output_padding != (0, 0):
            return "it is a transposed convolution whose stride is not its kernel's size, or with padding"
        if size * conv.out_channels % PACKED_CHANNELS:
            return f"it is transposed and its stride times its channels no multiple of {PACKED_CHANNELS}"
        return None

    def form_weight(self) -> None:
        self.tiles = packed_weight(as_cells(self.weight))
        self.offset = None if self.bias is None else self.bias.repeat(self.kernel_size[0] ** 2).float()

    def forward(
        self, input: Tensor, activation: str | None = None, residual: Tensor | None = None, output_size=None
    ) -> Tensor:
        """output_size: as for nn.ConvTranspose2d, also in its place."""
        if isinstance(activation, (tuple, list)):
            activation, output_size = None, activation
        if output_size is not None:
            cell = self.geometry["shuffle"]
            padding = [size - cell * length for size, length in zip(output_size[-2:], input.shape[-2:], strict=True)]
            if padding != [0, 0]:
                return F.conv_transpose2d(input, self.weight, self.bias, cell, output_padding=padding)
        return super().forward(input, activation, residual)


_MOST_CHANNELS = 128


class FusedConv2d(StandIn, nn.Conv2d):
    """An nn.Conv2d for inference in bf16 or fp16 on a GPU: bias, ReLU and residual in one pass with the convolution.

    By one of two kernels where that was measured to take less time, else, and where a gradient is wanted or the call is
    traced, by torch. Raises ValueError for a layer that neither ever serves.
    """

    method = "fused kernel"
    expected = "a 3 x 3 convolution in bf16 or fp16 with stride 1"
    device = "cuda"
    everywhere = False
    """The kernel also at sizes where torch was measured to be faster."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        padding = {"same": conv.dilation, "valid": (0, 0)}.get(conv.padding, conv.padding)
        self.geometry = (conv.stride, padding, conv.dilation)
        self._is_plain = padding == conv.dilation == (1, 1)

    @staticmethod
    def unfit(conv: nn.Module) -> str | None:
        """Why this cannot stand for a module; None if it can."""
        if type(conv) is not nn.Conv2d:
            return f"a {type(conv).__name__}"
        if conv.groups != 1 or conv.padding_mode != "zeros":
            return "it is grouped or does not pad with zeros"
        if conv.kernel_size != (3, 3) or conv.stride != (1, 1):
            return "its kernel is not 3 x 3 or its stride not 1, where no gain was measured"
        if max(conv.in_channels, conv.out_channels) > _MOST_CHANNELS:
            return f"it has more than {_MOST_CHANNELS} channels, where no gain was measured"
        return None if conv.weight.dtype in (torch.bfloat16, torch.float16) else f"its weight is {conv.weight.dtype}"

    def _pays(self, input: Tensor) -> bool:
        """Whether the Triton kernel takes less time than cuDNN and a pass for ReLU or the residual, by an H200 in bf16.

        Residual blocks of 16 channels at 256 px took 0.27 to 0.57 of that time, of 32 at 128 and 256 px 0.52 to 0.78,
        convolutions with one channel on a side 0.15 to 0.4; blocks of 64 to 128 channels 0.62 to 0.87, but in large
        batches 1.04 to 1.15: those of 64 channels are fused_conv2d's.
        """
        n, _, height, width = input.shape
        widest = max(self.in_channels, self.out_channels)
        if widest <= 32 or min(self.in_channels, self.out_channels) <= 16:
            return True
        return n * height * width < (2**18 if widest <= 64 else 2**16)

    def compute(self, input: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        input = input.to(self.weight.dtype)  # as autocast would
        learns = torch.is_grad_enabled() and (input.requires_grad or (residual is not None and residual.requires_grad))
        eager = input.device.type == self.device and not learns and not torch.compiler.is_compiling()
        if eager and self._is_plain and fused_conv2d.serves(input, self.weight):
            return fused_conv2d.fused_conv2d(input, self.weight, self.bias, activation=activation, residual=residual)
        if eager and (self.everywhere or self._pays(input)):
            kernel = _backends.BACKENDS["lora_conv2d"]["triton"]
            unmerged = (None, None, None)  # down, up, stage
            call = (input, self.weight, self.bias, *unmerged, residual, 1.0, *self.geometry, 1, activation, False, None)
            if kernel.supports(*call) is None:
                return kernel.forward(*call)
        return _finish(F.conv2d(input, self.weight, self.bias, *self.geometry), activation, residual)


def convolve(conv: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """act(conv(x)) + residual, in one pass where the layer can; for the code of a denoiser.

    conv: any convolution, or what adapt() and optimize() put in its place. activation: None or "relu".
    residual: as the result.
    """
    if not isinstance(conv, StandIn):
        return _finish(conv(x), activation, residual)
    if residual is not None and residual.dtype != conv.weight.dtype:
        return _finish(conv(x, activation), None, residual)
    return conv(x, activation, residual)


def depthwise(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), sooner where it is a depthwise nn.Conv2d of 3 x 3 and x (N, C, H, W) lies on a CPU, channels innermost.

    An exported program keeps torch's convolution, so that it runs without this library.
    """
    plain = _unfit_depthwise(conv) is None and not _is_watched(conv)
    if plain and x.device.type == "cpu" and x.ndim == 4 and x.stride(1) == 1 and not torch.compiler.is_exporting():
        return depthwise_conv2d(x, conv.weight, conv.bias)
    return conv(x)


def _finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """act(y) + residual, a pass each."""
    if activation == "relu":
        y = F.relu(y)
    elif activation is not None:
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return y if residual is None else residual + y


def residual_block(first: nn.Module, second: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """x + second(relu(first(x))) + residual, in one pass where the layers can; for the code of a denoiser.

    first, second: nn.Conv2d that keep the image's size, or what adapt() and optimize() put in their place.
    x, residual: (N, C, H, W). Returns the same shape. Layers with hooks are called one by one.
    """
    if _are_both(PackedConv2d, first, second) and first.keeps_size and second.keeps_size:
        return packed_block(
            x.to(first.tiles.dtype), first.tiles, second.tiles, first_bias=first.offset, second_bias=second.offset,
            middle=first.out_channels, residual=residual,
        )  # fmt: skip
    if _are_both(WinogradConv2d, first, second):
        dtypes = {t.dtype for t in (x, first.weight, second.weight, residual) if t is not None}
        if len(dtypes) == 1:
            return winograd_block(
                x, first.points, second.points, first_bias=first.offset, second_bias=second.offset, residual=residual
            )
    if x.ndim == 4 and _are_a_lora_block(first, second):
        stage = first.stage_now(x.shape[0])
        if per_sample(stage) or x.device.type not in _lora_autograd.DEVICES:
            return lora_residual_block.of_layers(x, first, second, stage, residual)
    y = convolve(second, convolve(first, x, "relu"), residual=x)
    return y if residual is None else y + residual


def _has_hooks(layer: nn.Module) -> bool:
    """Whether something else is to see the layer's own arguments, result or gradients."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _is_more(conv: nn.Module) -> bool:
    """Whether a layer has a forward, parameters, buffers or modules of its own, which what stands for it has not."""
    own = conv._parameters.keys() - {"weight", "bias"}
    return bool("forward" in vars(conv) or own or conv._buffers or conv._modules)


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody could tell an op from a call of the layer."""
    return _has_hooks(layer) or "forward" in vars(layer) or _has_any_global_hook()


def _are_both(kind: type[StandIn], *layers: nn.Module) -> bool:
    """Whether the layers are of this kind, and nobody could tell one op from calls of them."""
    return all(isinstance(layer, kind) and not _is_watched(layer) for layer in layers)


def _are_a_lora_block(*layers: nn.Module) -> bool:
    """Whether nobody could tell the one op from calls of these two layers, which learn."""
    fit = all(
        type(layer) is LoRAConv2d and not layer.merged and lora_residual_block.fits(layer) and not _is_watched(layer)
        for layer in layers
    )
    return fit and len({layer.stages for layer in layers}) == 1


KINDS: dict[str, tuple[type[StandIn], ...]] = {
    "winograd": (WinogradConv2d, ThinConv2d, DepthwiseConv2d),
    "packed": (PackedConv2d, PackedConvTranspose2d),
    "fused": (FusedConv2d,),
}
"""Of each method: what stands for a layer, the first that fits it; the first that does for any names the method."""


def _stand_in_for(conv: nn.Module, kind: str) -> type[StandIn] | None:
    return next((stand_in for stand_in in KINDS[kind] if stand_in.unfit(conv) is None), None)


def replace_convolutions(networks: list[nn.Module], kind: str) -> tuple[int, int]:
    """In place, every convolution that fits, one for all copies of it that share a weight; (replaced, all convolutions)
    of one.

    kind: one of KINDS.
    """
    made: dict[tuple[str, int, int | None], StandIn] = {}
    counts = (0, 0)
    for network in dict.fromkeys(networks):
        slots = [
            (parent, name, child)
            for parent in network.modules()
            for name, child in parent._modules.items()
            if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d))
        ]
        paths = {id(module): path for path, module in network.named_modules()}
        kinds = [None if _has_hooks(conv) or _is_more(conv) else _stand_in_for(conv, kind) for _, _, conv in slots]
        counts = (len(slots) - kinds.count(None), len(slots))
        for (parent, name, conv), stand_in in zip(slots, kinds, strict=True):
            if stand_in is None:
                continue
            key = (paths[id(conv)], id(conv.weight), None if conv.bias is None else id(conv.bias))
            if key not in made:
                made[key] = stand_in(conv)
            setattr(parent, name, made[key])
    return counts
