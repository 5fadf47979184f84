"""What an evaluation writes down, whatever the task: the network, the machine, and JSON without infinities."""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from lorun_fast._version import __version__
from lorun_fast.apps import files, images
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.models import Model
from lorun_fast.apps.runtime import Runtime


def network(model: Model) -> dict:
    """Name, hash, size and kind of the network."""
    return {
        "model": model.name,
        "model_sha256": model.sha256(),
        "parameters": model.net.parameter_report().total,
        "stages": model.net.stages,
        "sharing": model.net.sharing,
        "task": model.task.NAME,
    }


def machine(how: Runtime) -> dict:
    """Device, dtype, batch, threads, versions, and the peak memory so far."""
    return {
        "device": how.device.type,
        "dtype": how.dtype_name,
        "batch": how.batch,
        "threads": torch.get_num_threads(),
        "versions": {"lorun_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "peak_memory_bytes": how.peak_memory(),
    }


def check(args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    """Raises UserError unless --json and --figure, where given, name files that can be written: none of the inputs,
    no picture for one and a PNG for the other.
    """
    figure = getattr(args, "figure", None)
    if args.json is not None and args.json.suffix.lower() in images.SUFFIXES:
        raise UserError(f"--json: expected a name that is not an image's, got {args.json}")
    if figure is not None and figure.suffix.lower() != ".png" and not files.written_in_place(figure):
        raise UserError(f"--figure: expected a name that ends in .png, got {figure}")
    for path in (args.json, figure):
        if path is not None:
            files.check_file(path, inputs)


def write(path: Path, report: dict) -> None:
    """The report as JSON, complete or not at all. A number that is not finite becomes null.

    Bytes of a file name that are no UTF-8 are escaped: json.load gives them back.
    """
    text = json.dumps(_without_infinities(report), indent=1, allow_nan=False, ensure_ascii=False)
    with files.replacing(path) as f:
        f.write(f"{text}\n".encode(errors="backslashreplace"))


def _without_infinities(value):
    # JSON has no infinity: the PSNR of an exact restoration becomes null.
    if isinstance(value, dict):
        return {k: _without_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_infinities(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
