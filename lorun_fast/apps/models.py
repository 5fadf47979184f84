"""Networks by name or file, ready to run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open

from lorun_fast import io
from lorun_fast.apps import tasks
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.network import LoRun
from lorun_fast.operators import OPERATORS

WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Model:
    """A network in eval mode on its device, the name it was asked for by, and its task's module."""

    name: str
    path: Path
    net: LoRun
    task: ModuleType

    def sha256(self) -> str:
        """Of the file, which tells weights apart."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def shipped() -> dict[str, Path]:
    """The networks that come with the package, by name: in order, cs-4 before cs-10."""

    def order(path: Path) -> list:
        return [int(word) if word.isdigit() else word for word in path.stem.split("-")]

    return {path.stem: path for path in sorted(WEIGHTS.glob("*.safetensors"), key=order)}


def _of_run(name: str) -> Path:
    """What a finished run left in its folder."""
    return Path(name) / "model.safetensors"


def locate(name: str) -> Path:
    """The file of a shipped network, a file itself, or a finished run's. Raises UserError for none of them."""
    known = shipped()
    path = known.get(name, Path(name))
    if path.is_dir() and _of_run(name).is_file():
        path = _of_run(name)
    if name in tasks.NAMES and not path.is_file():
        path = known.get(tasks.get(name).DEMO_MODEL, path)
    if not path.is_file():
        names = ", ".join(known) or "none in this installation"
        raise UserError(
            f"expected a shipped network ({names}), a .safetensors file or the folder of a finished run, got {name!r}"
        )
    return path


def task_of(words: Sequence[str]) -> str:
    """The task of the first word that names a network (or a task); the first task where none does."""
    for word in words:
        if word in tasks.NAMES:
            return word
        if word in shipped() or word.endswith(".safetensors") or _of_run(word).is_file():
            operator = read_config(locate(word))["operator"]["type"]
            return OPERATORS[operator].task if operator in OPERATORS else tasks.NAMES[0]
    return tasks.NAMES[0]


def read_config(path: Path) -> dict:
    """The header of a network's file. Raises UserError for a damaged or foreign file."""
    return _reading(path, io.read_config)


def shape_of(name: str, tensor: str) -> tuple[int, ...]:
    """The shape of one tensor of a network's file, read from its header."""
    with safe_open(locate(name), framework="pt") as f:
        return tuple(f.get_slice(tensor).get_shape())


def load(name: str, device: str | torch.device = "cpu", task: str | None = None) -> Model:
    """Raises UserError for an unknown name, a damaged or foreign file, a noise level that the task does not have, and
    for a network of another task than ``task``.
    """
    path = locate(name)
    net = read_network(path)
    own = tasks.get(net.op.task)
    if task not in (None, own.NAME):
        raise UserError(f"--model: expected a network for task {task!r}, got {name} for {own.NAME!r}")
    base = net.denoiser.one()
    if getattr(base, "noise_level", False) and not own.NOISE_LEVEL:
        raise UserError(f"expected a network that restores from y alone, got {path}, which also takes a noise level")
    # Convolutions of this size run 1.3 to 1.6 times faster channels-last on a CPU, and no slower on a GPU.
    return Model(name, path, net.to(device, memory_format=torch.channels_last), own)


def read_network(path: Path) -> LoRun:
    """A saved network. Raises UserError for a damaged or foreign file."""
    return _reading(path, io.load)


def _reading(path: Path, reader):
    try:
        return reader(path)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        text = first_line(error)
        raise UserError(text if str(path) in text else f"expected a saved network, got {path}: {text}") from error
