"""A network made ready for inference, as a careful user would by hand: merged, laid out, narrowed, compiled."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType

import torch
from torch import Tensor, nn

from lorun_fast import _native
from lorun_fast.convolutions import KINDS, WinogradConv2d, replace_convolutions
from lorun_fast.kernels import unavailable
from lorun_fast.layers import merged_weights
from lorun_fast.network import LoRun
from lorun_fast.ops._checks import check_flag, check_image, finite
from lorun_fast.stages import StagedDenoiser, Stages, UntiedDenoiser, copy_of, sigma_by_name

MOST_LOST = 0.02
"""How far bf16 may move the score, in dB, before it is not chosen."""


@dataclass(frozen=True)
class Report:
    """What optimize() did, a line per choice with its reason: (what, done, why)."""

    rows: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in self.rows) for i in range(2)]
        return "\n".join(f"{what:<{widths[0]}}  {done:<{widths[1]}}  {why}".rstrip() for what, done, why in self.rows)

    def __getitem__(self, what: str) -> tuple[str, str]:
        """(done, why) of one choice."""
        found = {name: (done, why) for name, done, why in self.rows}
        if what not in found:
            raise KeyError(f"expected one of {', '.join(found)}, got {what!r}")
        return found[what]


class MergedStages(UntiedDenoiser):
    """K plain denoisers with their stage's merged weights; whatever no adapter changes is one tensor for all."""

    def __init__(self, copies: Sequence[nn.Module]):
        Stages.__init__(self)
        self.stages = len(copies)
        self.copies = nn.ModuleList(copies)
        self._by_name = sigma_by_name(copies[0])


class OptimizedLoRun(LoRun):
    """A network for inference only, made by :meth:`LoRun.optimize`; called as a LoRun is. ``report``: what was done."""

    report: Report

    def __init__(self, net: LoRun, staged: MergedStages):
        super().__init__(copy.deepcopy(net.op), staged, data_step=net.data_step, noise_map=net.noise_map)
        self.gamma, self.form = net.gamma, net.form
        self.step_size = nn.Parameter(net.step_size.detach().clone(), requires_grad=False)
        self.requires_grad_(False)
        self._graphs: _Graphs | None = None
        self.compiled_on: torch.device | None = None
        self.eval()

    @torch.no_grad()
    def forward(self, y: Tensor, *, op=None, size=None, sigma=None, return_stages: bool = False):
        def call(y: Tensor):
            return LoRun.forward(self, y, op=op, size=size, sigma=sigma, return_stages=return_stages)

        replayable = op is None and not return_stages and not isinstance(sigma, Tensor)
        if self._graphs is None or not replayable:
            return call(y)
        return self._graphs(y, (None if size is None else tuple(size), sigma), call)

    def _apply(self, fn, recurse=True):
        conv = next((m for m in self.denoiser.modules() if isinstance(m, WinogradConv2d)), None)
        narrow = conv is not None and (dtype := fn(conv.points.new_empty(0)).dtype).itemsize < 4
        if narrow and dtype != conv.weight.dtype:
            raise TypeError(
                f"expected float32 or float64, in which this network's convolutions compute, got {dtype}: "
                f"optimize(dtype={dtype}) of the network that it was made from"
            )
        # A graph reads the memory it was recorded with, which a move or a conversion frees.
        if self._graphs is not None:
            self._graphs = _Graphs(self._graphs.after)
        return super()._apply(fn, recurse)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.compiled_on is not None:  # no copy of a module keeps what was compiled for it
            _compile(self, self.compiled_on)

    def train(self, mode: bool = True) -> OptimizedLoRun:
        if mode:
            raise RuntimeError("train: expected a network with adapters, got an optimized one, which is for inference")
        return super().train(False)

    def with_stages(self, order, *, step_size: float = 1.0):
        raise RuntimeError("with_stages: expected the network that was optimized, got the optimized one")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}\n{self.report}" if hasattr(self, "report") else super().extra_repr()


class _Graphs:
    """CUDA graphs of one function of y, one per shape, dtype and setting; replaying costs one launch.

    after: how many calls of a key go by before it is recorded, which takes as long as some.
    """

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.seen: Counter[tuple] = Counter()
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, y: Tensor, settings: tuple, call: Callable[[Tensor], Tensor]) -> Tensor:
        key = (tuple(y.shape), y.dtype, y.device, settings)
        if key not in self.captured:
            self.seen[key] += 1
            if self.seen[key] <= self.after:
                return call(y)
            self.captured[key] = self._capture(y, call)
        graph, static_y, static_x = self.captured[key]
        static_y.copy_(y)
        graph.replay()
        return static_x.clone()

    @staticmethod
    @torch.inference_mode(False)  # recorded under inference_mode, it serves calls outside of it all the same
    @torch.no_grad()
    def _capture(y: Tensor, call: Callable[[Tensor], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static_y = y.clone()
        stream = torch.cuda.Stream(y.device)
        stream.wait_stream(torch.cuda.current_stream(y.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose algorithms and allocate their work space before capture
                call(static_y)
        torch.cuda.current_stream(y.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # On y's device and a stream of it: the default one belongs to the device that recorded first.
        with torch.cuda.device(y.device), torch.cuda.graph(graph, stream=stream):
            static_x = call(static_y)
        return graph, static_y, static_x


def plain_stages(staged: Stages, dtype: torch.dtype | None = None, channels_last: bool | None = None) -> MergedStages:
    """Every stage as a plain denoiser: merged in fp32 and rounded once, in the wanted dtype and layout.

    dtype: of all floating-point tensors; None keeps each one's own. channels_last: of four-dimensional weights; None
        keeps each one's own.
    """

    def converted(t: Tensor) -> Tensor:
        t = t.detach()
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        if channels_last is not None and t.ndim == 4:
            t = t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return t

    def shared(base: nn.Module, memo: dict[int, object]) -> dict[int, object]:
        for p in base.parameters():
            memo.setdefault(id(p), nn.Parameter(converted(p), requires_grad=False))
        for b in base.buffers():
            memo.setdefault(id(b), converted(b))
        return memo

    if isinstance(staged, StagedDenoiser):
        layers = list(staged.adapted.values())
        merged = merged_weights(layers, dtype, channels_last)
        biases = [None if layer.bias is None else converted(layer.bias) for layer in layers]
        rest = shared(staged.base, {})
        copies = []
        for k in range(staged.stages):
            memo = dict(rest)
            # Backwards, for an attention takes its out_proj from the memo, which comes behind it.
            for layer, weights, bias in reversed(list(zip(layers, merged, biases, strict=True))):
                memo[id(layer)] = layer.plain(weights[k], bias, memo)
            copies.append(copy_of(staged.base, memo))
    elif isinstance(staged, UntiedDenoiser):
        copies = [copy_of(c, shared(c, {})) for c in staged.copies]
    else:
        copies = [copy_of(staged.base, shared(staged.base, {}))] * staged.stages
    return MergedStages(copies).eval()


def fast_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether bf16 convolutions run on matrix units of this device, and which, or why not."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}" + ("" if major >= 8 else ", bf16 needs 8.0")
    if device.type != "cpu":
        return False, f"nothing is known of bf16 on {device.type}"
    if torch.cpu._is_amx_tile_supported():
        return True, "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "AVX512-bf16"
    return False, "this CPU has neither AMX nor AVX512-bf16"


# What images say that an operator does not measure; one of somebody else's leaves it to torch.
_MISFITS = (TypeError, ValueError, IndexError, RuntimeError)


def image_channels(net: LoRun) -> int:
    """C of the images that a network restores."""
    by_task = {"cs": 1, "cassi": getattr(net.op, "bands", None)}
    return by_task.get(net.op.task, getattr(net.denoiser.one(), "out_channels", 3))


def demo_images(net: LoRun) -> Tensor:
    """Two of scikit-image's photographs, (2, C, H, W) in [0, 1], in the channels and size that the operator measures.

    Raises ImportError without scikit-image.
    """
    from skimage import data

    mask = getattr(net.op, "mask", None)
    channels = image_channels(net)
    height, width = (240, 240) if mask is None else mask.shape[-2:]
    photographs = [torch.from_numpy(image()).permute(2, 0, 1).float() / 255 for image in (data.astronaut, data.coffee)]
    resized = [nn.functional.interpolate(p[None], (height, width), mode="area") for p in photographs]
    colour = torch.cat(resized)
    if channels == 1:
        return torch.einsum("nchw,c->nhw", colour, colour.new_tensor([0.299, 0.587, 0.114]))[:, None]
    # Between red and blue a photograph stands for a spectrum.
    bands = nn.functional.interpolate(colour.flatten(2).mT, channels, mode="linear", align_corners=True)
    return bands.mT.unflatten(2, (height, width))


@torch.no_grad()
def score(net: LoRun, x: Tensor, sigma: float | None) -> float:
    """Mean PSNR in dB of restoring ``x`` (N, C, H, W) in [0, 1] from its measurements without noise."""
    restored = net(net.op(x), size=tuple(x.shape[-2:]), sigma=sigma).float().clamp(0, 1)
    error = (restored - x).square().mean((1, 2, 3)).double().clamp_min(1e-20)
    return float((-10 * error.log10()).mean())


def optimize(
    net: LoRun,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    convolutions: str | None = None,
    compile: bool = False,
    cuda_graph: bool | None = None,
    images: Tensor | None = None,
    sigma: float | None = None,
    record_after: int = 0,
) -> OptimizedLoRun:
    """See :meth:`LoRun.optimize`. record_after: calls of a size before a CUDA graph of it is captured."""
    check_flag("channels_last", channels_last)
    check_flag("cuda_graph", cuda_graph)
    if compile not in (True, False):
        raise TypeError(f"compile: expected True or False, got {compile!r}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or None, got {dtype}")
    device = net.step_size.device
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a network on a CUDA device, got one on {device}")
    if convolutions not in (None, "direct", *KINDS):
        known = ", ".join(repr(kind) for kind in ("direct", *KINDS))
        raise ValueError(f"convolutions: expected {known} or None, got {convolutions!r}")
    if convolutions in KINDS and device.type != (wanted := KINDS[convolutions][0].device):
        where = {"cpu": "CPU", "cuda": "GPU"}[wanted]
        raise ValueError(f"convolutions: {convolutions!r} expects a network on a {where}, got one on {device}")
    if isinstance(sigma, Tensor):
        raise TypeError("sigma: expected a number, got a tensor")
    if sigma is not None and finite("sigma", sigma) < 0:
        raise ValueError(f"sigma: expected a noise level of at least 0, got {sigma}")
    if images is not None:
        _check_images(net, images)
    rows = []
    if isinstance(net.denoiser, StagedDenoiser):
        rows.append(
            ("merged", f"{len(net.denoiser.adapted)} layers, {net.stages} stages", "one plain denoiser a stage")
        )
    else:
        rows.append(("merged", "nothing", f"sharing is {net.sharing!r}"))

    last = True if channels_last is None else channels_last
    why = "convolutions run on channels innermost" if channels_last is None else "asked for"
    rows.append(("layout", "channels_last" if last else "contiguous", why))

    def built(to: torch.dtype | None) -> OptimizedLoRun:
        return OptimizedLoRun(net, plain_stages(net.denoiser, to, last))

    real = (p.dtype for p in net.denoiser.parameters() if p.is_floating_point())
    own = next(real, net.step_size.dtype)  # a denoiser may have none
    wanted, undone = (net, built, own, dtype, convolutions, device, images, sigma), False
    try:
        best, chosen, why = _narrowed(*wanted)
    except _DoesNotRun as error:
        if channels_last is not None:
            raise ValueError(f"the denoiser does not run as asked for: {error}") from error
        last, undone = False, True
        rows[-1] = ("layout", "contiguous", f"the denoiser does not run on channels innermost: {error}")
        best, chosen, why = _narrowed(*wanted)
    rows.append(("dtype", str(chosen).removeprefix("torch."), why))
    graph = device.type == "cuda" if cuda_graph is None else cuda_graph
    if undone and convolutions is None:
        done = ("direct", "the others' results have channels innermost")
    else:
        done = _convolutions(best, chosen, device, convolutions, launched=not graph or compile)
    rows.append(("convolutions", *done))

    if compile:
        best.compiled_on = device
        _compile(best, device)
        how = "a graph a stage, weights frozen into it" if device.type == "cpu" else "one graph for all stages"
        rows.append(("torch.compile", how, "compiled at the first call of each size"))
    else:
        rows.append(("torch.compile", "no", "not asked for"))
    if graph:
        best._graphs = _Graphs(record_after)
    when = f"after {record_after} calls" if record_after else "at the first call"
    why = f"captured {when} of each size" if graph else f"{device.type} device" if not cuda_graph else ""
    if cuda_graph is False:
        why = "not asked for"
    rows.append(("CUDA graph", "yes" if graph else "no", why))
    best.report = Report(tuple(rows))
    return best


class _DoesNotRun(RuntimeError):
    """A copy of the network fails where the network itself does not."""


def _check_images(net: LoRun, images: Tensor) -> None:
    """Raises for images that tell no score, whether or not this machine is going to ask for one."""
    check_image("images", images, 4, "(N, C, H, W)")
    if not images.numel():
        raise ValueError(f"images: expected at least one, got shape {tuple(images.shape)}")
    low, high = (float(t) for t in images.aminmax())
    if not (low >= 0 and high <= 1):  # a NaN is the lowest and the highest
        raise ValueError(f"images: expected values in [0, 1], got {low:.3g} to {high:.3g}")
    with torch.no_grad():
        try:
            net.op(images.to(net.step_size.device))
        except torch.OutOfMemoryError:
            raise
        except _MISFITS as error:
            raise type(error)(f"images: expected what the network's operator measures, got others: {error}") from None


def _narrowed(net, built, own, dtype, convolutions, device, images, sigma) -> tuple[OptimizedLoRun, torch.dtype, str]:
    """(network, dtype of its denoiser, why): bf16 where the device multiplies it fast and the score allows it."""
    if dtype is not None:
        best = built(dtype)
        if images is None:
            return best, dtype, "asked for"
        try:
            said = _change(net, best, images, sigma)[1]
        except _DoesNotRun as error:
            said = f"the denoiser does not run in it ({error})"
        return best, dtype, f"asked for; {said}"
    if own != torch.float32:
        return built(None), own, "the network's own"
    fast, what = fast_bf16(device)
    plain = built(None)
    if not fast:
        return plain, own, what
    narrow = built(torch.bfloat16)
    try:
        change, said = _change(net, narrow, images, sigma)
    except _DoesNotRun as error:
        change, said = math.inf, f"the denoiser does not run in it ({error})"
        _change(net, plain, images, sigma)  # nor may the layout be what it runs in
    if abs(change) <= MOST_LOST:
        return narrow, torch.bfloat16, f"{what}; {said}"
    return plain, own, f"{what}, but bf16 not chosen: {said}"


def _convolutions(
    net: OptimizedLoRun, dtype: torch.dtype, device: torch.device, wish: str | None, launched: bool
) -> tuple[str, str]:
    """(done, why): another method than torch's, where it was measured to be faster, or as asked for.

    launched: as in fastest_convolutions.
    """
    kind, why = (wish, "asked for") if wish is not None else fastest_convolutions(dtype, device, launched)
    if kind == "direct":
        return kind, why
    replaced, convolutions = replace_convolutions(net.denoiser.copies, kind)
    if not replaced:
        return "direct", {
            "winograd": "no layer of 3 x 3, stride 1 and 8 channels or more, depthwise or not grouped",
            "packed": "no bfloat16 convolution of square kernels",
            "fused": "no bfloat16 or float16 convolution of 3 x 3 with stride 1 and up to 128 channels",
        }[kind]
    made = {type(module) for module in net.denoiser.modules()}
    method = next(stand_in.method for stand_in in KINDS[kind] if stand_in in made)
    return method, f"{replaced} of {convolutions} layers a stage; {why}"


def fastest_convolutions(dtype: torch.dtype, device: torch.device, launched: bool = False) -> tuple[str, str]:
    """(a kind of lorun_fast/convolutions.py or "direct", why).

    launched: a GPU's host launches or compiles every step, instead of replaying a recording.
    """
    found = _native.build_info()
    loops = found.get("cpu_active", "none")
    if device.type == "cuda":
        return _fastest_on_a_gpu(dtype, launched)
    if device.type != "cpu":
        return "direct", f"{device.type} device"
    if dtype == torch.bfloat16 and found.get("amx"):
        return "packed", "AMX"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "direct", f"other methods are for float32, bfloat16 and float16, this is {dtype}".replace("torch.", "")
    if loops in _native.MEASURED_LOOPS:
        return "winograd", f"{loops.upper()}; a quarter of the multiplications"
    return "direct", f"minimal filtering was measured with AVX2 and AVX-512, this CPU's loops are {loops}"


def _fastest_on_a_gpu(dtype: torch.dtype, launched: bool) -> tuple[str, str]:
    reason = unavailable()
    if dtype not in (torch.bfloat16, torch.float16):
        return "direct", f"the kernel gains in 16 bits, this is {dtype}".replace("torch.", "")
    if reason:
        return "direct", reason
    if launched:
        return "direct", "without a CUDA graph, or compiled, torch's take less of the host's time"
    return "fused", "ReLU and sums in the same pass, by size"


def _change(net: LoRun, other: LoRun, images: Tensor | None, sigma: float | None) -> tuple[float, str]:
    """How far ``other``'s score lies from the network's own, in dB, and the sentence that says so."""
    given = images is not None or sigma is not None
    if images is None:
        try:
            images = demo_images(net)
        except ImportError:
            return math.inf, "score not checked (pass images=, or install scikit-image for its photographs)"
    images = images.to(net.step_size.device)
    if sigma is None and getattr(net.denoiser.one(), "noise_level", False):
        sigma = 0.0
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        own = score(net, images, sigma)
    except torch.OutOfMemoryError:
        raise
    except _MISFITS as error:
        if given:
            raise type(error)(f"images, sigma: expected what the network takes, got others: {error}") from None
        return math.inf, f"score not checked, pass images= and sigma= that the network takes ({error})"
    finally:
        net.train(modes[net])  # which drops merged weights, or forms them
        for module, training in modes.items():
            module.training = training
    if given and math.isnan(own):
        raise ValueError("images, sigma: expected a score of the network in fp32, got NaN")
    try:
        change = score(other, images, sigma) - own
    except torch.OutOfMemoryError:
        raise
    except _MISFITS as error:  # an FFT inside, for one, knows no bf16
        raise _DoesNotRun(str(error)) from error
    return change, f"score moves by {change:+.4f} dB on {len(images)} images"


def _compile(net: OptimizedLoRun, device: torch.device) -> None:
    for module in dict.fromkeys(net.denoiser.copies):
        # In place of the module's own call, as Module.compile() does, so that names and state stay as they are. That
        # would compile nothing of a class of torch.nn itself, an nn.Sequential for one.
        module._compiled_call_impl = _frozen(module) if device.type == "cpu" else partial(torch.compile(_call), module)


def _call(module: nn.Module, *args, **kwargs):
    return module._call_impl(*args, **kwargs)


def _frozen(module: nn.Module) -> Callable:
    """The module's call, compiled with its weights as constants: packed for the CPU's convolutions, whatever follows
    fused to them.
    """
    from torch._inductor import config

    # Code of its own: graphs belong to a function's code, which keeps some eight of them, and constants make each stage
    # another one.
    compiled = torch.compile(FunctionType(_call.__code__.replace(co_name="stage"), globals()))

    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return module._call_impl(*args, **kwargs)
        with config.patch(freezing=True):  # Dynamo too asks this, not torch.compile's options
            return compiled(module, *args, **kwargs)

    return call
