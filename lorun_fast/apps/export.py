"""``lorun-fast export``: a network as a file that runs where lorun_fast is not installed."""

from __future__ import annotations

import argparse
import importlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lorun_fast.apps import files, models, progress, runtime, tables
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.tasks.sr import kernels
from lorun_fast.interop import export as programs
from lorun_fast.network import LoRun
from lorun_fast.operators import BlurDownsample, SensingOperator
from lorun_fast.optimize import image_channels

EPILOG = """\
.onnx is for onnxruntime and others that read ONNX (pip install 'lorun-fast[onnx]'); .pt2 is a program of torch's own
ops, for torch.export.load, AOTInductor and whatever takes an ExportedProgram. Both are merged, in fp32, and take any
batch unless --batch says otherwise. The file is run once and compared with the network.

examples:
  lorun-fast export cs-25 -o cs.onnx --size 256 256
  lorun-fast export cs-25 -o cs.pt2 --size dynamic
  lorun-fast export sr -o sr.onnx --size dynamic --scale 2 --inputs kernel sigma
  lorun-fast export cassi -o cassi.onnx --batch 1
"""
_ANY = "dynamic"
_ONNX, _PROGRAM = ".onnx", ".pt2"


def _count(text: str) -> int | None:
    return None if text == _ANY else runtime.at_least_one(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast export``."""
    parser.add_argument("model", metavar="MODEL", help="a shipped network, a .safetensors file or a run's folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a name in .onnx or .pt2")
    parser.add_argument(
        "--size",
        nargs="+",
        type=_count,
        metavar=("H", "W"),
        help=f"of the image, or one word, {_ANY}: any (cs: of whole blocks); not for cassi, whose mask has one",
    )
    parser.add_argument(
        "--batch", type=_count, metavar=f"N|{_ANY}", help=f"images at a time (default: {_ANY}, any number)"
    )
    parser.add_argument(
        "--inputs",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what becomes an input beside y: phi (cs), kernel (sr) or mask (cassi), and sigma",
    )
    parser.add_argument("--opset", type=runtime.at_least_one, metavar="N", help="of an ONNX file (default: torch's)")
    group = parser.add_argument_group("super-resolution")
    group.add_argument("--scale", type=runtime.at_least_one, metavar="S", help="default: the network's own")
    group.add_argument("--kernel", type=Path, metavar="FILE", help="a file of one kernel (default: the network's own)")
    group.add_argument(
        "--sigma",
        type=runtime.not_negative,
        metavar="SIGMA",
        help="noise level of y, for images in [0, 1] (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    write = {_ONNX: _write_onnx, _PROGRAM: _write_program}.get(args.output.suffix)
    if write is None:
        raise UserError(f"-o: expected a name that ends in {_ONNX} or {_PROGRAM}, got {args.output}")
    if args.opset is not None and write is not _write_onnx:
        raise UserError(f"--opset: expected a file in {_ONNX}, got {args.output}")
    if write is _write_onnx:
        _package()
    files.check_file(args.output)
    net = models.load(args.model).net
    op = _operator(args, net)
    size = _size(args, op)
    sigma = 0.0 if args.sigma is None and net.denoiser.takes_noise() else args.sigma
    if sigma is not None and net.data_step != "prox" and not net.denoiser.takes_noise():
        raise UserError(f"--sigma: expected a network that takes a noise level, got {args.model}")
    how = {"op": op, "size": size, "sigma": sigma}
    y = _example(net, op, size, args.batch or 2)
    with progress.bar(2, "exporting", unit="step") as bar, torch.no_grad(), warnings.catch_warnings():
        # Torch's, of what will change in itself, and of weights with channels innermost on other devices than a CPU.
        warnings.simplefilter("ignore")
        try:
            program = programs.program(
                net, y, **how, inputs=args.inputs, dynamic_batch=args.batch is None, dynamic_size=size is None
            )
            bar.update()
            facts, call = write(program, args)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        bar.update()
        checked = f"not run here: pip install onnxruntime, which lets {args.output.name} be compared with the network"
        if call is not None:
            apart = float((call(y, program.example_inputs[1]) - net(y, **how)).abs().max())
            checked = f"largest difference to the network here {apart:.1e}, in a batch of {len(y)}"
    rows = [("file", f"{args.output} ({args.output.stat().st_size / 2**20:.1f} MiB{facts})"), *_shapes(program)]
    print(tables.pairs([*rows, ("checked", checked)]))
    return 0


def _package():
    """lorun_fast.interop.onnx. Raises UserError where it has not what it needs."""
    try:
        return importlib.import_module("lorun_fast.interop.onnx")
    except ImportError as error:
        raise UserError(f"expected what writes {_ONNX} files, got: {error}") from error


def _operator(args: argparse.Namespace, net: LoRun) -> SensingOperator:
    """The network's own, or of --scale and --kernel."""
    op = net.op
    given = [f"--{name}" for name in ("scale", "kernel") if getattr(args, name) is not None]
    if not given:
        return op
    if not isinstance(op, BlurDownsample):
        raise UserError(f"{given[0]}: expected a network for task 'sr', got {args.model} for {op.task!r}")
    kernel = op.kernel
    if args.kernel is not None:
        found = kernels.load(args.kernel)
        if len(found) != 1:
            raise UserError(f"--kernel: expected a file of one kernel, got {args.kernel} with {len(found)}")
        kernels.warn_of_sum(str(args.kernel), found[0])
        kernel = torch.from_numpy(found[0])
    return BlurDownsample(kernel.detach(), args.scale or op.scale)


def _size(args: argparse.Namespace, op: SensingOperator) -> tuple[int, int] | None:
    """(H, W), or None for any."""
    size = args.size
    if op.task == "cassi":
        own = tuple(op.mask.shape[-2:])
        if size is not None and tuple(size) != own:
            raise UserError(f"--size: expected {own[0]} {own[1]} as the mask is, or none, got {_said(size)}")
        return own
    if size is None:
        raise UserError(f"expected --size H W or --size {_ANY}, got none")
    if size == [None]:
        return None
    if len(size) != 2 or None in size:
        raise UserError(f"--size: expected two whole numbers H W, or {_ANY}, got {_said(size)}")
    if op.task == "sr" and any(side % op.scale for side in size):
        raise UserError(f"--size: expected multiples of the scale, {op.scale}, got {_said(size)}")
    return tuple(size)


def _said(size: list[int | None]) -> str:
    return " ".join(_ANY if side is None else str(side) for side in size)


def _example(net: LoRun, op: SensingOperator, size: tuple[int, int] | None, batch: int) -> Tensor:
    """Measurements of noise."""
    height, width = size or (24 * getattr(op, "scale", 3), 32 * getattr(op, "scale", 3))
    x = torch.rand((batch, image_channels(net), height, width), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return op(x)


def _write_program(program: ExportedProgram, args: argparse.Namespace) -> tuple[str, Callable]:
    content = io.BytesIO()
    torch.export.save(program, content)  # which may end the process on a full disk, where it writes to a file
    with files.replacing(args.output) as f:
        f.write(content.getbuffer())
    call = torch.export.load(args.output).module()
    return "", lambda y, given: call(y, **given)


def _write_onnx(program: ExportedProgram, args: argparse.Namespace) -> tuple[str, Callable | None]:
    package = _package()
    with files.writing(args.output):
        package.save(program, args.output, opset=args.opset, names=programs.dimensions(program))
    opset = package.onnx.load(args.output, load_external_data=False).opset_import[0].version
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return f", opset {opset}", None
    session = InferenceSession(args.output)

    def call(y: Tensor, given: dict[str, Tensor]) -> Tensor:
        feed = {"y": y, **given}
        return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in feed.items()})[0])

    return f", opset {opset}", call


def _shapes(program: ExportedProgram) -> list[tuple[str, str]]:
    """The rows of inputs and outputs, fp32 all of them."""
    names = programs.dimensions(program)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature

    def said(value: Tensor) -> str:
        return "(" + ", ".join(programs.renamed(str(side), names) for side in value.shape) + ")"

    inputs = [f"{name} {said(values[name])}" for name in signature.user_inputs]
    return [("inputs", "\n".join(inputs)), ("output", f"x {said(values[signature.user_outputs[0]])}")]
