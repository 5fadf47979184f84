"""``lorun-fast info``: this installation, and what a network's file holds."""

from __future__ import annotations

import argparse
import json

from lorun_fast.apps import models, tables
from lorun_fast.config import show_config

EPILOG = """\
examples:
  lorun-fast info
  lorun-fast info cs-25
  lorun-fast info runs/cs/model.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lorun-fast info``."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL|FILE", help="a network to describe as well; default: list the shipped ones"
    )


def run(args: argparse.Namespace) -> int:
    # The network first: an unknown one must not hide below a page of versions.
    model = _model(args.model) if args.model else _shipped()
    show_config()
    print(model)
    return 0


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
        ("step sizes", ", ".join(f"{rho:.4g}" for rho in model.net.step_size.tolist())),
        ("parameters", str(model.net.parameter_report())),
        ("notes", json.dumps(config["notes"], indent=1) if "notes" in config else "none"),
    ]
    return f"network {name}\n" + tables.pairs([(f"  {key}", value) for key, value in rows])
