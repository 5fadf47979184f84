"""``lorun-fast info``: this installation, and what a network's or a measurement's file holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from lorun_fast.apps import measurements, models, tables
from lorun_fast.config import show_config

EPILOG = """\
examples:
  lorun-fast info
  lorun-fast info cs-25
  lorun-fast info runs/cs/model.safetensors
  lorun-fast info measurements.npz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast info``."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL|FILE",
        help="a network, or a file of measurements, to describe as well; default: list the shipped networks",
    )


def run(args: argparse.Namespace) -> int:
    # The file first: an unknown one must not hide below a page of versions.
    if not args.model:
        text = _shipped()
    elif Path(args.model).suffix.lower() in measurements.SUFFIXES:
        text = _measurements(Path(args.model))
    else:
        text = _model(args.model)
    show_config()
    print(text)
    return 0


# A file of measurements has a dozen keys at most; any other .mat file may have thousands.
_MOST_ROWS = 24


def _measurements(path: Path) -> str:
    rows = []
    arrays = measurements.Raw(path).arrays
    for key, values in list(arrays.items())[:_MOST_ROWS]:
        if values.size <= 4:
            what = ", ".join(map(str, values.ravel().tolist()))
        elif values.dtype.kind in "fiu":
            good = values[np.isfinite(values)]
            bad = values.size - good.size
            what = f"{good.min():.4g} to {good.max():.4g}, mean {good.mean(dtype=float):.4g}" if good.size else ""
            what += f" ({bad} NaN or infinite)" if bad else ""
        else:
            what = f"{values.ravel()[0]}, ..."
        rows.append([f"  {key}", " x ".join(map(str, values.shape)) or "1", str(values.dtype), what])
    text = f"measurements {path}\n" + tables.table(["  key", "shape", "type", "values"], rows)
    return text if len(arrays) <= _MOST_ROWS else f"{text}\n  and {len(arrays) - _MOST_ROWS} more"


# What the learned rho of a stage is: with the exact data step it weighs x against y.
_STEPS = {"gradient": "step sizes", "prox": "rho of each stage"}


def _shipped() -> str:
    names = models.shipped()
    return "shipped networks\n" + "\n".join(f"  {name}" for name in names or ["(none)"])


def _model(name: str) -> str:
    model = models.load(name)
    config = models.read_config(model.path)
    network, denoiser = config["network"], config["denoiser"]
    rows = [
        ("file", f"{model.path} ({model.path.stat().st_size / 2**20:.2f} MiB, sha256 {model.sha256()[:16]}...)"),
        ("task", f"{model.task.NAME}: {model.task.describe(model.net.op)}"),
        ("network", ", ".join(f"{key} {value}" for key, value in network.items())),
        ("denoiser", f"{denoiser['type']} {json.dumps(denoiser['config'])}"),
        (_STEPS[model.net.data_step], ", ".join(f"{rho:.4g}" for rho in model.net.step_size.tolist())),
        ("parameters", str(model.net.parameter_report())),
        ("notes", json.dumps(config["notes"], indent=1) if "notes" in config else "none"),
    ]
    return f"network {name}\n" + tables.pairs([(f"  {key}", value) for key, value in rows])
