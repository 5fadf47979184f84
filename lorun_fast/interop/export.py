"""Programs of torch's own ops, for where lorun_fast is not installed: AOTInductor, ExecuTorch, TensorRT, another torch.

``torch.export`` keeps the ops of this library as they are, which a process that imports it runs fastest. Here each is
replaced by its definition. docs/export.md compares the ways.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.parameter import is_lazy

from lorun_fast.network import LoRun
from lorun_fast.operators import CASSI, BlockCS, BlurDownsample, SensingOperator
from lorun_fast.ops import _backends
from lorun_fast.ops._checks import batch_of, number_or_tensor, step_size
from lorun_fast.ops._library import DEFINITIONS, NAMESPACE
from lorun_fast.optimize import MergedStages, plain_stages
from lorun_fast.reference import blur_downsample_real, cassi, fused_conv2d, lora
from lorun_fast.reference._step_size import per_channel
from lorun_fast.reference._wide import wide
from lorun_fast.stages import Stage, Stages, image_of


def _cassi(x: Tensor, mask: Tensor, step: int) -> Tensor:
    # Rows of all bands one after another, each with ``step`` columns more than the next band's place is away: read in
    # rows of the measurement, every band lies at its place. Some passes, where a sum per band would be 28 nodes.
    coded = (x.to(mask.dtype) * mask).transpose(1, 2)
    bands, width = coded.shape[2:]
    measured = width + step * (bands - 1)
    rows = F.pad(coded, (0, measured + step - width)).flatten(2)[:, :, : bands * measured]
    return rows.unflatten(2, (bands, measured)).sum(2).to(x.dtype)


def _cassi_step(x, y, mask, rho, weight, step, keep_residual):
    wide = x.to(mask.dtype)
    residual = _cassi(wide, mask, step)
    if y is not None:
        residual = residual - y
    weighted = residual if weight is None else weight * residual
    z = wide - per_channel(rho) * cassi.cassi_adjoint(weighted, mask, x.shape[1], step)
    return z.contiguous().to(x.dtype), residual if keep_residual else residual.new_empty((0,))


def _cassi_prox_weight(mask, mu, bands, step):
    samples = mask.shape[0] if mask.ndim == 4 else 1
    diagonal = _cassi(mask.expand(samples, bands, *mask.shape[-2:]), mask, step)
    return 1 / (mu[:, None, None] + torch.where(diagonal == 0, 1, diagonal))


def _lora_merge(weights, downs, ups, scales, transposed, dtype, channels_last):
    found = []
    for weight, down, up, scale, flipped in zip(weights, downs, ups, scales, transposed, strict=True):
        merged = lora.merged_weight(wide(weight), down, up, scale, transposed=flipped)
        found.append(merged.to(weight.dtype if dtype is None else dtype))
    return found


def _lora_merge_stage(weights, downs, ups, scales, transposed, stage):
    factors = ([t[stage : stage + 1] for t in ts] for ts in (downs, ups))
    return [t[0] for t in _lora_merge(weights, *factors, scales, transposed, None, None)]


def _points(weight: Tensor, adjoint: bool) -> Tensor:
    """reference/winograd_conv2d.py's winograd_weight, without a matrix: a program has no place for new constants."""
    if adjoint:
        weight = weight.flip(2, 3).transpose(0, 1)

    def six(t: Tensor, dim: int) -> Tensor:
        a, b, c = t.unbind(dim)
        ones, twos = (a + c) / -6, a / 24 + c / 6
        return torch.stack([a / 4, ones - b / 6, ones + b / 6, twos + b / 12, twos - b / 12, c], dim)

    points = six(six(weight.double(), 2), 3).permute(2, 3, 1, 0).flatten(0, 1)
    return points.to(wide(weight).dtype)


def _weight(points: Tensor) -> Tensor:
    """The 3 x 3 weight (out, in, 3, 3) of its transform to points, of which these suffice."""

    def three(t: Tensor, dim: int) -> Tensor:
        zero, plus, minus, _, _, infinity = t.unbind(dim)
        return torch.stack([4 * zero, 3 * (minus - plus), infinity], dim)

    return three(three(points.unflatten(0, (6, 6)), 0), 1).permute(3, 2, 0, 1)


def _winograd_conv2d(x, weight, bias, relu, residual):
    # As a direct convolution, which other runtimes know how to compute fast.
    residual = None if residual is None else wide(residual)
    return fused_conv2d.fused_conv2d(wide(x), _weight(weight), bias, residual, relu).to(x.dtype)


def _winograd_block(x, first, first_bias, second, second_bias, residual):
    added = wide(x) if residual is None else wide(x) + residual
    inside = _winograd_conv2d(x, first, first_bias, True, None)
    return _winograd_conv2d(wide(inside), second, second_bias, False, added).to(x.dtype)


def _lora_residual_block_backward(*args):
    with _backends.use_backend(_backends.REFERENCE):  # of its convolutions, too
        return DEFINITIONS["lora_residual_block_backward"](*args)


# Instead of definitions that write in place, make constants, or compute as suits one processor: a program has none of
# that. Those of the FFT are the direct sums, for the FFT is complex.
_OTHERS = {
    "cassi": _cassi,
    "cassi_step": _cassi_step,
    "cassi_prox_weight": _cassi_prox_weight,
    "lora_merge": _lora_merge,
    "lora_merge_stage": _lora_merge_stage,
    "lora_residual_block_backward": _lora_residual_block_backward,
    "winograd_weight": _points,
    "winograd_conv2d": _winograd_conv2d,
    "winograd_block": _winograd_block,
    "winograd_weight_gradient": fused_conv2d.thin_weight_gradient,
}


def _definition(name: str) -> Callable:
    if name in _OTHERS:
        return _OTHERS[name]
    if name.startswith("blur_downsample_fft"):
        return DEFINITIONS[name.replace("_fft", "")]
    backends = _backends.BACKENDS.get(name.removesuffix("_backward"), {})
    if _backends.REFERENCE in backends:
        backend = backends[_backends.REFERENCE]
        return backend.backward if name.endswith("_backward") else backend.forward
    return DEFINITIONS[name]


_TORCHS = ("aten", "prim", "prims")


def decompositions() -> dict[torch._ops.OperatorBase, Callable]:
    """Every op of this library and its definition in torch's own, for ``ExportedProgram.run_decompositions``.

    Results agree to rounding. The FFT's ops become the direct sums, and convolutions by minimal filtering direct ones.
    """
    ops = getattr(torch.ops, NAMESPACE)
    return {getattr(ops, name).default: _definition(name) for name in DEFINITIONS}


def portable(program: ExportedProgram) -> ExportedProgram:
    """The program in torch's own ops alone, dynamic sizes as before; it runs where lorun_fast is not installed.

    program: of ``torch.export.export``, of a network, a layer or anything that calls them. For inference.
    Raises TypeError for another object, ValueError for a program with ops of a third library.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program: expected an ExportedProgram of torch.export.export, got {type(program).__name__}")
    if any(name.startswith(f"{NAMESPACE}.") for name in _foreign(program)):
        program = program.run_decompositions(decompositions())
    if left := _foreign(program):
        raise ValueError(f"program: expected torch's own ops and lorun_fast's, got {', '.join(left)} as well")
    return program


def _foreign(program: ExportedProgram) -> list[str]:
    """The ops that are not torch's own, also in what the program's branches call."""
    found = set()
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _TORCHS:
                found.add(str(node.target))
    return sorted(found)


class _RealBlurDownsample(BlurDownsample):
    """The operator by direct sums, and its proximal step without complex numbers."""

    def prox(self, x: Tensor, y: Tensor, mu: float | Tensor) -> Tensor:
        kernel = self._beside("kernel", x)
        mu = step_size(mu, x, "mu")
        return blur_downsample_real.blur_downsample_prox(x, y.to(kernel.dtype), kernel, mu, self.scale)


def without_fft(op: SensingOperator) -> SensingOperator:
    """A copy of an operator that computes nothing through the FFT, for runtimes without one: the same to rounding.

    Of a BlurDownsample with direct sums, its proximal step with products by matrices of cosines and sines; it suits
    inference. Others have no FFT.
    """
    if not isinstance(op, SensingOperator):
        raise TypeError(f"op: expected a SensingOperator, got {type(op).__name__}")
    if type(op) is not BlurDownsample:
        return copy.deepcopy(op)
    return _RealBlurDownsample(op.kernel.detach().clone(), op.scale, method="direct")


# What of an operator may be an input.
_TENSORS = {BlockCS: "phi", BlurDownsample: "kernel", CASSI: "mask"}


class _Restoration(nn.Module):
    """A network's call; its operator's tensor and the noise level may be among the inputs."""

    def __init__(self, net: LoRun, op: SensingOperator, size: tuple[int, int] | None, sigma: float | Tensor | None):
        super().__init__()
        self.net, self.op, self.size, self.sigma = net, op, size, sigma

    def operator_tensors(self) -> dict[str, Tensor]:
        name = _TENSORS.get(type(self.op))
        return {} if name is None else {name: getattr(self.op, name)}

    def plain(self) -> nn.Module:
        fast = self.net.optimize(dtype=torch.float32, convolutions="direct", cuda_graph=False)
        op = without_fft(self.op)
        if type(op) is BlockCS:  # one look at a Phi that stays spares a program the factorisation
            op = BlockCS.from_config(op.config() | {"learn": False}, op.state_dict())
            op.has_orthonormal_rows()
        return _Restoration(fast, op, self.size, self.sigma)

    def forward(self, y: Tensor, *, sigma=None, phi=None, kernel=None, mask=None) -> Tensor:
        given = {name: t for name, t in (("phi", phi), ("kernel", kernel), ("mask", mask)) if t is not None}
        op = type(self.op).from_config(self.op.config() | {"learn": False}, given) if given else self.op
        return self.net(y, op=op, size=self.size, sigma=self.sigma if sigma is None else sigma)


class _Denoising(nn.Module):
    """One stage's denoiser."""

    def __init__(self, staged: Stages, stage: int, sigma: float | Tensor | None):
        super().__init__()
        self.staged, self.stage, self.sigma = staged, stage, sigma

    def operator_tensors(self) -> dict[str, Tensor]:
        return {}

    def plain(self) -> nn.Module:
        own = plain_stages(self.staged, torch.float32).copies[self.stage]
        return _Denoising(MergedStages([own]), 0, self.sigma)

    def forward(self, z: Tensor, *, sigma=None) -> Tensor:
        x = self.staged(z, stage=self.stage, sigma=self.sigma if sigma is None else sigma)
        return image_of(x, self.staged.one())


def _exported(module: nn.Module, y: Tensor, given: dict[str, Tensor], shapes: tuple) -> ExportedProgram:
    of_y, of_given = shapes
    dynamic = {next(iter(signature(module.forward).parameters)): of_y} | of_given
    try:
        return torch.export.export(module, (y,), given, dynamic_shapes=dynamic)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"net: expected a network that torch.export can trace, got {reason[0] if reason else type(error).__name__}"
        ) from error


# The axes of an operator's tensor that serves all samples.
_AXES = {"phi": 2, "kernel": 2, "mask": 3}


def program(
    net: LoRun | Stage,
    y: Tensor,
    *,
    op: SensingOperator | None = None,
    size: tuple[int, int] | None = None,
    sigma: float | Tensor | None = None,
    inputs: str | Sequence[str] = (),
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
) -> ExportedProgram:
    """A network as a portable program: merged, fp32, without complex numbers, for any batch.

    net: a LoRun; its input is ``y``. Or one stage of a staged denoiser, ``staged[k]``, whose input is ``z``.
    y: measurements, or a stage's image, of the shape that the program is to take; their values do not matter.
    op, size, sigma: as for :meth:`LoRun.forward`, fixed in the program, or examples of what ``inputs`` names.
    inputs: what becomes an input behind y, by name: "sigma", and the operator's tensor ("phi", "kernel" or "mask") in
        the shape that it has here. sigma is 0-d, or (N,) where the example is.
    dynamic_batch: any number of samples, instead of y's. dynamic_size: any height and width, instead of y's: of whole
        blocks for BlockCS, and not for CASSI, whose mask tells the size.

    The program takes fp32, complex64 for a complex y, returns fp32, on the CPU, and is for inference; the network stays
    as it is. Raises TypeError or ValueError for what does not fit together, for a network that has no weights yet, and
    for a denoiser that torch.export does not trace.
    """
    if not isinstance(net, LoRun | Stage):
        raise TypeError(f"net: expected a LoRun or a stage of a staged denoiser, got {type(net).__name__}")
    for name, t in net.state_dict(keep_vars=True).items():
        if is_lazy(t) or t.is_meta:
            raise ValueError(f"net: expected its weights, got no values for {name}")
    batch, inputs = batch_of("y", y), (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if isinstance(net, LoRun):
        module = _Restoration(net, net.op if op is None else op, size, sigma)
        takes_sigma = net.denoiser.takes_noise() or net.data_step == "prox"
    elif op is None and size is None:
        module, takes_sigma = _Denoising(net.staged, net.stage, sigma), net.staged.takes_noise()
    else:
        raise ValueError(f"op, size: expected None beside a stage, got {type(op).__name__} and {size}")
    known = {"sigma": sigma} if takes_sigma else {}
    known |= module.operator_tensors()
    if wrong := [name for name in inputs if name not in known]:
        raise ValueError(f"inputs: expected some of {', '.join(known) or 'none'}, got {wrong[0]!r}")
    if dynamic_size:
        if size is not None:
            raise ValueError(f"size: expected None beside dynamic_size=True, got {tuple(size)}")
        if "mask" in known:
            raise ValueError("dynamic_size: expected False for CASSI, whose mask tells the size, got True")

    # Only one sample, row or column would become a constant.
    batch = max(batch, 2) if dynamic_batch else batch
    sides = [max(side, 2) if dynamic_size else side for side in y.shape[-2:]]
    dtype = torch.complex64 if y.is_complex() else torch.float32
    example = torch.zeros((batch, *y.shape[1:-2], *sides), dtype=dtype)
    axes = {0: Dim("batch")} if dynamic_batch else {}
    if dynamic_size:
        axes |= dict.fromkeys((y.ndim - 2, y.ndim - 1), Dim.DYNAMIC)
    given, shapes = {}, {}
    for name, value in known.items():
        t = number_or_tensor(name, 0.0 if value is None else value, torch.float32, torch.device("cpu"))
        of_samples = t.ndim > _AXES.get(name, 0)
        if of_samples and dynamic_batch and name not in inputs:
            raise ValueError(f"{name}: expected one for all samples, or dynamic_batch=False, got one per sample")
        if name in inputs:
            given[name] = t[:1].expand(batch, *t.shape[1:]).clone() if of_samples else t.detach()
            shapes[name] = {0: axes[0]} if of_samples and dynamic_batch else None
    given, shapes = ({name: by_name[name] for name in inputs} for by_name in (given, shapes))
    plain = module.plain().float().cpu()
    for t in (*plain.parameters(), *plain.buffers()):
        t.data = t.data.clone()  # a stage's weights are views of all stages', which would be saved for each
    with torch.no_grad():
        return portable(_exported(plain, example, given, (axes or None, shapes)))


def dimensions(program: ExportedProgram) -> dict[str, str]:
    """What the symbols in the shapes of :func:`program`'s result stand for: "batch", "rows", "columns"."""
    first = program.graph_signature.user_inputs[0]
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == first)
    sides = zip((0, -2, -1), ("batch", "rows", "columns"), strict=True)
    return {str(shape[axis]): name for axis, name in sides if isinstance(shape[axis], torch.SymInt)}


def renamed(text: str, names: dict[str, str]) -> str:
    """A shape's expression with other names for its symbols."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)
