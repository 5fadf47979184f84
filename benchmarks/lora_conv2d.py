"""One LoRA convolution, 3 x 3, with a frozen base: both forms, and a batch whose samples are at different stages."""

from __future__ import annotations

import importlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorun_fast as lf
from benchmarks.harness import optional
from benchmarks.harness.registry import (
    FORWARD,
    LIMIT,
    MODES,
    OURS,
    OVERHEAD,
    TRAIN,
    WARM,
    Problem,
    Run,
    Size,
    Unavailable,
    Work,
    case,
    size,
)
from lorun_fast import adapters, kernels
from lorun_fast.ops import _backends
from lorun_fast.reference import lora as reference

GAMMA, STAGES = 10, 9


def _rank(channels: int) -> int:
    return adapters.rank(channels, channels, GAMMA)


def _factors(form: str, channels: int, stages: int | None, device) -> tuple[Tensor, Tensor]:
    shapes = adapters.factor_shapes((channels, channels, 3, 3), _rank(channels), form)
    lead = () if stages is None else (stages,)
    return tuple(0.1 * torch.randn(*lead, *shape, device=device) for shape in shapes)


def _inputs(dtype, device, n: int, channels: int, px: int, form: str, last: bool, stages: int | None = None) -> dict:
    down, up = _factors(form, channels, stages, device)
    layout = torch.channels_last if last else torch.contiguous_format
    weight = torch.randn(channels, channels, 3, 3, device=device) / (3 * channels**0.5)
    return {
        "x": torch.randn(n, channels, px, px, device=device).to(dtype).to(memory_format=layout),
        "weight": weight.to(dtype).to(memory_format=layout),
        "bias": torch.randn(channels, device=device).to(dtype),
        "down": down.to(dtype),
        "up": up.to(dtype),
    }


def _work(inputs: dict[str, Tensor], form: str) -> tuple[Work, Work]:
    """Least work: merged, forward is one convolution. Training with a frozen base adds one for x's gradient and
    the factors' own: 3r/C convolutions in the peft form (rank-r products), one (the full dW) in the loralib form."""
    x, weight = inputs["x"], inputs["weight"]
    channels = weight.shape[0]
    conv = 2 * x.numel() * channels * 9
    image = x.numel() * x.element_size()
    factors = 3 * _rank(channels) / channels if form == "peft" else 1
    return Work(2 * image, conv), Work(5 * image, conv * (2 + factors))


def _sizes(extra: Sequence[Size] = ()) -> list[Size]:
    """CPU: one layer at 256 px, channels_last too; CUDA: channels x pixels x batch, headline first."""
    cpu, cuda = {"devices": ("cpu",)}, {"devices": ("cuda",), "dtypes": ("bf16",)}
    sizes = [
        size("1x64x256x256", compiled=True, n=1, channels=64, px=256, last=False, **cpu),
        size("1x64x256x256 nhwc", dtypes=("fp32", "bf16"), compiled=True, n=1, channels=64, px=256, last=True, **cpu),
    ]
    headline = [(16, 64, 256), (16, 32, 256), (1, 64, 256), (1, 32, 256)]
    grid = itertools.product((16, 1), (28, 96, 128, 256, 64, 32), (256, 128, 64))
    for n, channels, px in dict.fromkeys([*headline, *grid]):
        first = (n, channels, px) in headline[:1]
        label = f"{n}x{channels}x{px}x{px} nhwc"
        sizes.append(size(label, regimes=(WARM,), compiled=first, n=n, channels=channels, px=px, last=True, **cuda))
    sizes.append(size("1x8x8x8", quick=True, regimes=(WARM, OVERHEAD), n=1, channels=8, px=8, last=False))
    return [*sizes, *extra]


def _problem(form: str, dtype, device, n: int, channels: int, px: int, last: bool) -> Problem:
    inputs = _inputs(dtype, device, n, channels, px, form, last)
    forward, train = _work(inputs, form)

    def definition(x, weight, bias, down, up) -> Tensor:
        return reference.lora_conv2d(x, weight, bias, down, up, padding=1)

    return Problem(inputs, definition, forward, train, wrt=("x", "down", "up"), items=n)


def _first_sizes() -> list[Size]:
    cuda = {"dtypes": ("bf16",), "devices": ("cuda",), "regimes": (WARM,), "modes": (FORWARD,)}
    sizes = [
        size(f"{n}x{channels}x256x256 nhwc", n=n, channels=channels, px=256, last=True, **cuda)
        for n, channels in itertools.product((16, 1), (64, 32))
    ]
    tiny = {"n": 1, "channels": 8, "px": 8, "last": True}
    return [*sizes, size("1x8x8x8 nhwc", quick=True, regimes=(WARM,), modes=(FORWARD,), **tiny)]


@case("lora_conv2d.first_experiment", suite="layers", sizes=_first_sizes())
def first_experiment(dtype, device, *, n, channels, px, last) -> Problem:
    """Does the fused forward earn its place? cuDNN on merged weights against it; below 0.9x it does not."""
    return _problem("peft", dtype, device, n, channels, px, last)


@case("lora_conv2d.peft", suite="layers", sizes=_sizes())
def peft_form(dtype, device, *, n, channels, px, last) -> Problem:
    """dW = a 3 x 3 to r channels, then a 1 x 1."""
    return _problem("peft", dtype, device, n, channels, px, last)


@case("lora_conv2d.loralib", suite="layers", sizes=_sizes())
def loralib_form(dtype, device, *, n, channels, px, last) -> Problem:
    """dW = (up @ down) viewed as the weight."""
    return _problem("loralib", dtype, device, n, channels, px, last)


def _both(name: str, **settings):
    """Registers a contender for both forms; it tells them by the shape of ``p.down``."""

    def register(build):
        for one in (peft_form, loralib_form):
            one.contender(name, **settings)(build)
        return build

    return register


class _By(torch.autograd.Function):
    """One backend whatever the table says, x kept."""

    @staticmethod
    def forward(ctx, name, x, weight, bias, down, up, stage):
        ctx.backend = _backends.BACKENDS["lora_conv2d"][name]
        ctx.save_for_backward(x, weight, bias, down, up, stage)
        return ctx.backend.forward(x, weight, bias, down, up, stage, None, *_GEOMETRY)

    @staticmethod
    def backward(ctx, grad):
        mask = [True, False, False, True, True]
        dx, d_down, d_up = ctx.backend.backward(grad, *ctx.saved_tensors, None, *_GEOMETRY, mask)
        return None, dx, None, None, d_down, d_up, None


# scale, stride, padding, dilation, groups, activation, transposed, output padding
_GEOMETRY = (1.0, [1, 1], [1, 1], [1, 1], 1, None, False, [0, 0])


def _fused(p: Problem, stage: Tensor | None = None):
    """The forced kernel, on CUDA only."""
    if p.device.type != "cuda":
        raise Unavailable("the kernels run on CUDA")
    if kernels.unavailable():
        raise Unavailable(kernels.unavailable())
    return lambda: _By.apply("triton", p.x, p.weight, p.bias, p.down, p.up, stage)


def _form(p: Problem) -> str:
    return "peft" if p.down.ndim == 4 else "loralib"


@_both("lorun_fast", kind=OURS, graphed=MODES)
def _(p: Problem):
    return lambda: lf.functional.lora_conv2d(p.x, p.weight, p.bias, p.down, p.up, padding=1)


@_both("fused kernel", kind=OURS, devices=("cuda",), graphed=MODES)
def _(p: Problem):
    """The Triton kernels; in the loralib form after the merge kernel."""
    return _fused(p)


def _asked_for(backend: str, p: Problem):
    """LORUN_BACKEND's way, without setting it."""
    known = _backends.BACKENDS["lora_conv2d"][backend]
    reason = known.missing()
    if reason is not None:
        raise Unavailable(reason)
    reason = known.supports(p.x, p.weight, p.bias, p.down, p.up, None, None, *_GEOMETRY)
    if reason is not None:
        raise Unavailable(f"it serves calls where {reason}")
    return lambda: _By.apply(backend, p.x, p.weight, p.bias, p.down, p.up, None)


@_both("lorun_fast, winograd", kind=OURS, devices=("cpu",))
def _(p: Problem):
    """LORUN_BACKEND=winograd: the convolution and its gradients by minimal filtering."""
    return _asked_for("winograd", p)


@_both("lorun_fast, packed", kind=OURS, devices=("cpu",))
def _(p: Problem):
    """LORUN_BACKEND=packed: the convolution, x's gradient and narrow weight gradients by matrix tiles."""
    return _asked_for("packed", p)


@_both("lorun_fast merged", kind=OURS, modes=(FORWARD,), compiled=True, graphed=True)
def _(p: Problem):
    channels = p.weight.shape[0]
    layer = lf.LoRAConv2d(channels, channels, 3, padding=1, stages=1, rank=_rank(channels), form=_form(p))
    layer = layer.to(p.x.device, p.x.dtype)
    with torch.no_grad():
        for parameter, value in (
            (layer.weight, p.weight),
            (layer.bias, p.bias),
            (layer.down, p.down),
            (layer.up, p.up),
        ):
            parameter.copy_(value)
    if p.args["last"]:
        layer.to(memory_format=torch.channels_last)
    layer.eval()
    layer.merge()
    return lambda: layer(p.x)


def _weight(p: Problem) -> Tensor:
    return p.weight + adapters.delta(p.down, p.up, p.weight.shape).to(p.weight.dtype)


@_both("merged beforehand", modes=(FORWARD,), compiled=True, graphed=True)
def _(p: Problem):
    """One convolution with a weight merged by hand, untimed: what inference can do."""
    with torch.no_grad():
        weight = _weight(p)
        if p.args["last"]:
            weight = weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(p.x, weight, p.bias, padding=1)


@_both("merged beforehand, max-autotune", modes=(FORWARD,), devices=("cuda",), graphed=True, compiles=True)
def _(p: Problem):
    """Inductor's search over its own kernels and cuDNN; as all others, compared with the definition before timing.

    A search takes half a minute.
    """
    with torch.no_grad():
        weight = _weight(p).contiguous(memory_format=torch.channels_last)
    return torch.compile(
        lambda: F.conv2d(p.x, weight, p.bias, padding=1), mode="max-autotune-no-cudagraphs", dynamic=False
    )


@_both("merged at every call", compiled=True, graphed=MODES)
def _(p: Problem):
    """The weight formed inside the call; autograd takes the base weight's gradient apart for the factors."""
    return lambda: F.conv2d(p.x, _weight(p), p.bias, padding=1)


@peft_form.contender("adapter branch", compiled=True, graphed=MODES)
def _(p: Problem):
    """Base convolution plus a low-rank branch: three convolutions and an addition."""

    def run() -> Tensor:
        return F.conv2d(p.x, p.weight, p.bias, padding=1) + F.conv2d(
            F.conv2d(p.x, p.down, padding=1), p.up[:, :, None, None]
        )

    return run


def _base_convolution(p: Problem) -> nn.Conv2d:
    channels = p.weight.shape[0]
    base = nn.Conv2d(channels, channels, 3, padding=1, device=p.x.device, dtype=p.x.dtype)
    with torch.no_grad():
        base.weight.copy_(p.weight)
        base.bias.copy_(p.bias)
    if p.args["last"]:
        base.to(memory_format=torch.channels_last)
    return base.requires_grad_(False)


@peft_form.contender("PEFT", compiled=True, graphed=(TRAIN,))
def _(p: Problem):
    """The peft package's own layer."""
    peft = optional.package("peft")
    rank = p.up.shape[1]
    model = nn.Sequential(OrderedDict(conv=_base_convolution(p)))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["conv"])
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.conv
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        down.copy_(p.down)
        up.copy_(p.up[:, :, None, None])
    layer.to(p.x.dtype)
    if p.args["last"]:
        layer.to(memory_format=torch.channels_last)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Run(lambda: layer(p.x), parameters=(p.x, down, up))


@loralib_form.contender("loralib", compiled=True, graphed=(TRAIN,))
def _(p: Problem):
    """The loralib package's own layer, its weights merged at every call as it does in training."""
    loralib = optional.package("loralib")
    channels, rank = p.weight.shape[0], _rank(p.weight.shape[0])
    layer = loralib.Conv2d(channels, channels, 3, r=rank, lora_alpha=rank, merge_weights=False, padding=1)
    layer = layer.to(p.x.device, p.x.dtype)
    with torch.no_grad():
        for parameter, value in (
            (layer.conv.weight, p.weight),
            (layer.conv.bias, p.bias),
            (layer.lora_A, p.down),
            (layer.lora_B, p.up),
        ):
            parameter.copy_(value)
    layer.conv.requires_grad_(False)
    if p.args["last"]:
        layer.conv.to(memory_format=torch.channels_last)
    return Run(lambda: layer(p.x), parameters=(p.x, layer.lora_A, layer.lora_B))


@first_experiment.contender("fused kernel", kind=OURS, graphed=True)
def _(p: Problem):
    """Base and low-rank product in one launch, factors as they are trained."""
    return _fused(p)


@first_experiment.contender("fused kernel on merged weights", kind=OURS, graphed=True)
def _(p: Problem):
    """The same kernel without an adapter: what its convolution alone costs."""
    _fused(p)
    with torch.no_grad():
        weight = _weight(p)
    convolve = importlib.import_module("lorun_fast.kernels.lora_conv2d").forward
    return lambda: convolve(p.x, weight, p.bias, None, None, padding=1)


@first_experiment.contender("cuDNN on merged weights", graphed=True)
def _(p: Problem):
    """channels_last, cudnn.benchmark; merged beforehand, untimed."""
    with torch.no_grad():
        weight = _weight(p).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(p.x, weight, p.bias, padding=1)


@_both("bare convolution", kind=LIMIT, graphed=MODES)
def _(p: Problem):
    """The base alone, no adapter; in training with the gradient for x only."""

    def definition(x, weight, bias, down, up) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    return Run(lambda: F.conv2d(p.x, p.weight, p.bias, padding=1), reference=definition, wrt=("x",))


def _mixed_sizes() -> list[Size]:
    sizes = [size("16x32x64x64", devices=("cpu",), regimes=(WARM,), n=16, channels=32, px=64, last=False)]
    cuda = {"dtypes": ("bf16",), "devices": ("cuda",), "regimes": (WARM,)}
    for channels, px in ((64, 256), (64, 64), (32, 256), (32, 64)):
        sizes.append(size(f"16x{channels}x{px}x{px} nhwc", n=16, channels=channels, px=px, last=True, **cuda))
    sizes.append(size("4x8x8x8", quick=True, regimes=(WARM, OVERHEAD), n=4, channels=8, px=8, last=False))
    return sizes


@case("lora_conv2d.mixed", suite="layers", sizes=_mixed_sizes())
def mixed(dtype, device, *, n, channels, px, last) -> Problem:
    """Samples of one batch at different stages, of nine; the peft form."""
    inputs = _inputs(dtype, device, n, channels, px, "peft", last, STAGES)
    inputs["stage"] = torch.arange(n, device=device) % STAGES
    forward, train = _work(inputs, "peft")

    def definition(x, weight, bias, down, up, stage) -> Tensor:
        return reference.lora_conv2d(x, weight, bias, down, up, stage=stage, padding=1)

    return Problem(inputs, definition, forward, train, wrt=("x", "down", "up"), items=n)


@mixed.contender("lorun_fast", kind=OURS)
def _(p: Problem):
    return lambda: lf.functional.lora_conv2d(p.x, p.weight, p.bias, p.down, p.up, stage=p.stage, padding=1)


@mixed.contender("fused kernel", kind=OURS, devices=("cuda",), graphed=True)
def _(p: Problem):
    """The Triton kernels: every sample with its own stage, in one launch."""
    return _fused(p, p.stage)


def _stage_weights(p: Problem) -> Tensor:
    return p.weight + adapters.delta(p.down, p.up, p.weight.shape).to(p.weight.dtype)


@mixed.contender("one convolution per stage")
def _(p: Problem):
    """Samples sorted by stage beforehand, untimed; the merged weights formed in the call, as training needs."""
    groups = [(k, (p.stage == k).nonzero()[:, 0]) for k in p.stage.unique().tolist()]
    back = torch.cat([index for _, index in groups]).argsort()

    def run() -> Tensor:
        weights = _stage_weights(p)
        return torch.cat([F.conv2d(p.x[index], weights[k], p.bias, padding=1) for k, index in groups])[back]

    return run


@mixed.contender("one grouped convolution")
def _(p: Problem):
    """One group per sample, with its own merged weight."""
    n, channels = p.x.shape[:2]

    def run() -> Tensor:
        weights = _stage_weights(p)[p.stage].flatten(0, 1)
        out = F.conv2d(p.x.reshape(1, n * channels, *p.x.shape[2:]), weights, padding=1, groups=n)
        return out.view(n, channels, *p.x.shape[2:]) + p.bias[:, None, None]

    return run


@mixed.contender("adapter branch, grouped")
def _(p: Problem):
    """The base convolution over the batch, and the low-rank branch as grouped convolutions."""
    n, channels = p.x.shape[:2]

    def run() -> Tensor:
        down, up = p.down[p.stage], p.up[p.stage]
        images = p.x.reshape(1, n * channels, *p.x.shape[2:])
        low = F.conv2d(images, down.flatten(0, 1), padding=1, groups=n)
        branch = F.conv2d(low, up.flatten(0, 1)[:, :, None, None], groups=n)
        return F.conv2d(p.x, p.weight, p.bias, padding=1) + branch.view(n, channels, *p.x.shape[2:])

    return run


@mixed.contender("bare convolution", kind=LIMIT)
def _(p: Problem):
    """The base alone at one weight for all samples."""

    def definition(x, weight, bias, down, up, stage) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    return Run(lambda: F.conv2d(p.x, p.weight, p.bias, padding=1), reference=definition, wrt=("x",))
