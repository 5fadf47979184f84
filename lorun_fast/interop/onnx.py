"""Networks as ONNX files, for onnxruntime and what else reads them.

A file holds a portable program of lorun_fast/interop/export.py: torch's own ops, translated by torch.onnx.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lorun_fast._files import complete_file
from lorun_fast.interop import export as programs
from lorun_fast.interop._packages import require
from lorun_fast.network import LoRun
from lorun_fast.operators import SensingOperator
from lorun_fast.stages import Stage

onnx = require("onnx", extra="onnx")
require("onnxscript", extra="onnx")


def export(
    net: LoRun | Stage,
    y: Tensor,
    path: str | os.PathLike,
    *,
    op: SensingOperator | None = None,
    size: tuple[int, int] | None = None,
    sigma: float | Tensor | None = None,
    inputs: str | Sequence[str] = (),
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int | None = None,
) -> None:
    """Writes a network, merged and in fp32, as one ONNX file.

    net, y, op, size, sigma, inputs, dynamic_batch, dynamic_size: as for :func:`lorun_fast.interop.export.program`. The
    file's inputs have these names, ``y`` (of a stage, ``z``) first, its output is ``x``.
    opset: version of ONNX's operators; None leaves it to torch.
    A kernel per sample needs dynamic_batch=False: the number of groups of ONNX's convolution is fixed.

    The file is checked by onnx, and appears under its name only when it is complete. Raises what ``program`` raises,
    ValueError for what ONNX does not hold, and OSError where the file cannot be written.
    """
    path = _checked(path)
    program = programs.program(
        net, y, op=op, size=size, sigma=sigma, inputs=inputs, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size
    )
    _write(program, path, opset, programs.dimensions(program))


def save(
    program: ExportedProgram,
    path: str | os.PathLike,
    *,
    opset: int | None = None,
    names: dict[str, str] | None = None,
) -> None:
    """Writes a program of ``torch.export.export``, of anything that calls this library, as one ONNX file.

    Inputs keep the program's names; outputs are ``x``, or ``x_0``, ``x_1`` and so on. names: for symbols of the
    program's shapes, such as {"s17": "batch"}. Otherwise as :func:`export`.
    A BlurDownsample's proximal step goes through the FFT, whose complex numbers ONNX does not hold: build the network
    with ``lorun_fast.interop.export.without_fft(op)``.
    """
    path = _checked(path)
    _write(programs.portable(program), path, opset, names or {})


def _checked(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, found a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder to write into, found no {path.parent}")
    return path


def _write(program: ExportedProgram, path: Path, opset: int | None, symbols: dict[str, str]) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            raise ValueError(f"program: expected real numbers, which ONNX holds, got {value.dtype} in {node.name}")
        if "conv" in str(node.target) and any(isinstance(a, torch.fx.Node) for a in node.args[6:]):
            raise ValueError(
                "program: expected convolutions with a fixed number of groups, got as many as there are samples (a "
                "kernel or a stage per sample): for ONNX they need a fixed batch, dynamic_batch=False"
            )
    outputs = program.graph_signature.user_outputs
    names = ["x"] if len(outputs) == 1 else [f"x_{i}" for i in range(len(outputs))]
    try:
        with _quiet():
            model = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, output_names=names, verbose=False
            ).model_proto
        _clean(model, symbols)
        onnx.checker.check_model(model, full_check=True)
    except (torch.onnx.errors.OnnxExporterError, onnx.checker.ValidationError) as error:
        raise ValueError(f"program: expected what ONNX holds, got an error of torch.onnx: {_reason(error)}") from error
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset not in (None, written):
        raise ValueError(f"opset: expected a version that torch.onnx writes, such as {written}, got {opset}")
    with complete_file(path) as temporary:
        onnx.save(model, temporary)


def _clean(model: onnx.ModelProto, symbols: dict[str, str]) -> None:
    """Takes out where in which source file every node comes from, and names the sizes."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = programs.renamed(dim.dim_param, symbols)


def _reason(error: BaseException) -> str:
    """The innermost error's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its remarks on torch's own deprecations."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
