"""Block compressive sensing: where Phi comes from, and whether measurements fit a network."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lorun_fast.apps import images, matrices, models
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.measurements import MeasurementFile, numbers
from lorun_fast.apps.runtime import at_least_one, percentage
from lorun_fast.operators import BlockCS

NAME = "cs"
DEMO_MODEL = "cs-25"
NOISE_LEVEL = False
LAYOUT = ("m", "rows", "columns")
OPERATOR_KEYS = ("phi", "block_size")

# Networks may be stored in half precision: the same Phi differs by its rounding.
_SAME_PHI = 1e-3


def add_operator_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose Phi; one of --ratio, --phi and --model is required."""
    group = parser.add_argument_group("Phi (one of --ratio, --phi, --model)")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--ratio",
        type=percentage,
        metavar="PERCENT",
        help="the Phi of the shipped network for this percentage, 100 m / B^2; with --gaussian a random one",
    )
    source.add_argument("--phi", type=Path, metavar="FILE", help="your own Phi (m, B*B) in a .mat, .npy or .npz file")
    source.add_argument("--model", metavar="NAME|FILE", help="the Phi of this network")
    group.add_argument("--key", default="phi", help="variable in the .mat or .npz file (default: phi)")
    group.add_argument(
        "--block-size",
        type=at_least_one,
        metavar="B",
        help="block size; default: the square root of Phi's columns, or 32",
    )
    group.add_argument(
        "--gaussian", action="store_true", help="with --ratio: a Gaussian Phi with orthonormal rows, drawn from --seed"
    )


def operator(args: argparse.Namespace) -> BlockCS:
    """The operator that the options name. Raises UserError where they contradict each other or the file."""
    if args.gaussian and args.ratio is None:
        raise UserError(f"expected --ratio beside --gaussian, got {'--phi' if args.phi else '--model'}")
    if args.phi is not None:
        phi = matrices.load(args.phi, args.key)
        return BlockCS(torch.from_numpy(phi), _block_size(f"{args.phi}", phi.shape, args.block_size))
    if args.gaussian:
        block_size = 32 if args.block_size is None else args.block_size
        return BlockCS.gaussian(args.ratio / 100, block_size, seed=args.seed)
    name = args.model or f"{NAME}-{args.ratio:g}"
    if args.model is None and name not in models.shipped():
        shipped = [n.removeprefix(f"{NAME}-") for n in models.shipped() if n.startswith(f"{NAME}-")]
        raise UserError(
            f"--ratio: expected one that a network is shipped for ({', '.join(shipped) or 'none'}), "
            f"or --gaussian for a random Phi, got {args.ratio:g}"
        )
    model = models.load(name, task=NAME)
    if args.block_size not in (None, model.net.op.block_size):
        raise UserError(f"--block-size: expected {model.net.op.block_size} as in {name}, got {args.block_size}")
    return model.net.op


def _block_size(source: str, shape: tuple[int, ...], asked: int | None) -> int:
    block_size = math.isqrt(shape[1]) if asked is None else asked
    if block_size**2 != shape[1] or shape[0] > shape[1]:
        want = "B*B a square number" if asked is None else f"B*B = {asked**2}"
        hint = " (is it transposed?)" if shape[0] > shape[1] else ""
        raise UserError(f"{source}: expected Phi of shape (m, B*B), {want} and m at most that, got {shape}{hint}")
    return block_size


def operator_arrays(op: BlockCS) -> dict[str, np.ndarray]:
    """Phi as a measurement file holds it."""
    return {"phi": op.phi.detach().float().cpu().numpy(), "block_size": np.int64(op.block_size)}


def _kind(op: BlockCS) -> str:
    return "learned" if isinstance(op.phi, nn.Parameter) else "fixed"


def describe(op: BlockCS) -> str:
    """One line: m, B, ratio."""
    m, n = op.phi.shape
    return f"{100 * op.ratio:.4g} % ({m} of {n}), {op.block_size}x{op.block_size} blocks, {_kind(op)} Phi"


def facts(op: BlockCS) -> dict:
    """The same for JSON."""
    return {"phi": _kind(op), "m": op.phi.shape[0], "block_size": op.block_size, "ratio": op.ratio}


def default_model(file: MeasurementFile) -> str:
    """The shipped network with as many measurements a block as the file has; else the demo's."""
    m = file.items[0].y.shape[0]
    for name in models.shipped():
        if name.startswith(f"{NAME}-") and models.shape_of(name, "op.phi")[0] == m:
            return name
    return DEMO_MODEL


def add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``restore`` for block compressive sensing."""
    group = parser.add_argument_group("block compressive sensing")
    group.add_argument(
        "--use-file-phi",
        action="store_true",
        help="restore with the file's Phi although the network was trained with another (the score suffers)",
    )


def sigma(file: MeasurementFile, args: argparse.Namespace) -> None:
    """These networks take no noise level."""


def suffixes(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the files that :func:`save` writes."""
    return (".png",)


def save(path: Path, x: np.ndarray, args: argparse.Namespace) -> None:
    """One PNG."""
    images.save(path.with_name(f"{path.name}.png"), x, args.bits)


def operator_for(
    file: MeasurementFile, op: BlockCS, path: Path, model: str, args: argparse.Namespace
) -> BlockCS | None:
    """Checks the measurements against a network's operator ``op``.

    Returns None to restore with the network's own Phi, or with --use-file-phi the operator of the file.
    Raises UserError when block size, ratio, Phi, the shape of y or an image size do not fit.
    """
    m, b = op.phi.shape[0], op.block_size
    own = None
    if "block_size" in file.operator:
        block_size = file.operator["block_size"]
        if block_size.shape != () or block_size.dtype.kind not in "iu" or int(block_size) != b:
            raise UserError(f"{path}: expected block_size {b} as in {model}, got {_plain(block_size)}")
    if "phi" in file.operator:
        phi = file.operator["phi"]
        if phi.shape != tuple(op.phi.shape):
            raise UserError(
                f"{path}: expected Phi of shape {tuple(op.phi.shape)} ({100 * op.ratio:.4g} % of {b}x{b} blocks) "
                f"as in {model}, got {phi.shape}"
            )
        own = torch.from_numpy(numbers(path, "phi", phi))
    for item in file.items:
        if item.y.shape[0] != m:
            raise UserError(
                f"{path}: expected y of shape ({', '.join(LAYOUT)}) with m = {m} as in {model}, got {item.y.shape}"
            )
        rows, columns = item.y.shape[1:]
        if item.size is not None and (rows, columns) != tuple(-(-side // b) for side in item.size):
            raise UserError(
                f"{path}: expected {-(-item.size[0] // b)} x {-(-item.size[1] // b)} blocks of {b}x{b} for the "
                f"{item.size[0]} x {item.size[1]} image {item.name!r} (height x width), got y with {rows} x {columns}"
            )
    if args.use_file_phi:
        if own is None:
            raise UserError(f"{path}: expected the key phi for --use-file-phi, got none")
        return BlockCS(own, b)
    if own is not None:
        phi = op.phi.detach().cpu().float()
        difference = ((own - phi).abs().max() / phi.abs().max()).item()
        if not difference <= _SAME_PHI:
            raise UserError(
                f"{path}: expected the Phi that {model} was trained with, got another one (entries differ by up to "
                f"{100 * difference:.3g} % of the largest): train a network for it, or try --use-file-phi"
            )
    return None


def _plain(values: np.ndarray) -> str:
    return str(values.item()) if values.size == 1 else f"shape {values.shape}"
