"""What the tests of the command line share: tiny networks and pictures, and the check of a refused command."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import lorun_fast as lf
from lorun_fast.apps.cli import main

BLOCK = 8


def tiny_network(path: Path, *, ratio: float = 0.25, block_size: int = BLOCK, seed: int = 0) -> Path:
    """Two stages that differ, and a Phi drawn from ``seed``; saved at ``path``."""
    torch.manual_seed(seed)
    op = lf.BlockCS.gaussian(ratio, block_size, seed=seed)
    net = lf.LoRun(op, lf.ResUNet(channels=(4, 8), blocks=1), stages=2)
    with torch.no_grad():
        for layer in net.denoiser.adapted.values():
            layer.up.normal_(0, 0.05)
        net.step_size.copy_(torch.tensor([1.0, 0.7]))
    path.parent.mkdir(parents=True, exist_ok=True)
    lf.save(net, path)
    return path


def picture(path: Path, height: int = 24, width: int = 32, *, mode: str = "L", seed: int = 0) -> np.ndarray:
    """A random smooth picture, saved at ``path``; its pixels."""
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), dtype=np.uint8)
    pixels = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return pixels


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Writing a file past ``most`` bytes fails, in any language: a full disk for them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, but the list of what the command wrote there."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lorun-fast")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def refused(capsys, *arguments) -> str:
    """Runs a command that must be refused: status 2, one line on stderr, no traceback. Returns the line."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == 2, captured
    lines = [line for line in captured.err.splitlines() if not line.startswith("lorun-fast: note: ")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("lorun-fast: error: "), captured.err
    assert "expected" in lines[0] and ", got" in lines[0], lines[0]
    return lines[0]


def accepted(capsys, *arguments) -> str:
    """Runs a command that must succeed; what it prints."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out
