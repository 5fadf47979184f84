"""One safetensors file per network: weights, sensing operator and configuration."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor, nn

from lorun_fast import denoisers
from lorun_fast._files import complete_file
from lorun_fast.network import LoRun
from lorun_fast.operators import OPERATORS, SensingOperator
from lorun_fast.stages import StagedDenoiser, Stages, adapt_layers

_KEY = "lorun_fast"
_VERSION = 1
# What the header must hold, part by part; the rest came later and has a default.
_FIELDS = {
    "network": {"stages", "gamma", "form", "sharing"},
    "operator": {"type", "config"},
    "denoiser": {"type", "config"},
}

_BASE = "denoiser.base."
_SETTINGS = ("prox_iterations", "prox_tolerance")


def _config(net: LoRun) -> dict:
    base = net.denoiser.one()
    known = denoisers.registered(type(base).__name__) is type(base)
    config = {
        "version": _VERSION,
        "network": {
            "stages": net.stages,
            "gamma": net.gamma,
            "form": net.form,
            "sharing": net.sharing,
            "data_step": net.data_step,
            "noise_map": net.noise_map,
        },
        "operator": {"type": type(net.op).__name__, "config": _operator_config(net.op)} | _own_settings(net.op),
        "denoiser": {"type": type(base).__name__, "config": base.config() if known else None},
    }
    if isinstance(net.denoiser, StagedDenoiser):
        config["adapters"] = {
            name: {"rank": layer.rank, "form": layer.form, "scale": layer.scale}
            for name, layer in net.denoiser.adapted.items()
        }
    return config


def _own_settings(op: SensingOperator) -> dict:
    """How far its proximal step goes, where the operator has other values than its class."""
    return {name: getattr(op, name) for name in _SETTINGS if name in vars(op)}


def _operator_config(op: SensingOperator) -> dict | None:
    """The constructor's arguments beside its tensors; None for a class that is not registered."""
    if OPERATORS.get(type(op).__name__) is not type(op):
        return None
    config = op.config()
    try:
        type(op).from_config(config, op.state_dict())
    except Exception as error:
        raise ValueError(
            f"net: expected an operator that {type(op).__name__}.from_config() rebuilds from its config() and "
            f"state_dict(), got {type(error).__name__}: {error}"
        ) from error
    return config


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _of_base(net: LoRun) -> dict[str, Tensor]:
    """What a network of LoRA stages takes over from its base, by its names in the network's state."""
    factors = {id(p) for p in net.denoiser.adapter_parameters()}
    state = net.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if name.startswith(_BASE) and id(t) not in factors}


def save(
    net: LoRun,
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    notes: dict | None = None,
    base: bool = True,
) -> None:
    """Writes one safetensors file from which :func:`load` rebuilds the network.

    dtype: storage type of floating-point tensors (torch.float16 halves the file); None keeps each one's own.
    notes: JSON-serialisable facts to keep in the header, such as the data and the budget of a training run.
    base: False leaves the base's tensors out of a network of LoRA stages. ``load(path, denoiser=...)`` takes them from
        the denoiser that it is given, and refuses one with others.
    The file appears under its name only when it is complete. It does not say how to train: a loaded network checkpoints
    no stage, and the base of its LoRA stages is frozen (``net.denoiser.freeze_base(False)``).
    """
    if not isinstance(net, LoRun):
        raise TypeError(f"net: expected a LoRun, got {type(net).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point type, got {dtype!r}")
    path = _path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, found a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder to write into, found no {path.parent}")
    config, left_out = _config(net), {}
    if not base:
        if not isinstance(net.denoiser, StagedDenoiser):
            raise ValueError(f"base: expected True for sharing={net.sharing!r}, got False: it has no adapters to keep")
        left_out = _of_base(net)
        config["denoiser"]["base"] = _fingerprint({name.removeprefix(_BASE): t for name, t in left_out.items()})
    if notes is not None:
        config["notes"] = notes
    try:
        header = json.dumps(config)
    except (TypeError, ValueError) as error:  # ValueError: something that holds itself
        raise type(error)(f"notes: expected what JSON can hold, got {notes!r} ({error})") from None
    tensors = {}
    for name, t in net.state_dict().items():
        if name in left_out:
            continue
        t = t.detach().cpu()
        # safetensors refuses tensors that share memory; a clone per name keeps tied weights loadable.
        tensors[name] = (t.to(dtype) if dtype is not None and t.is_floating_point() else t).clone().contiguous()
    with complete_file(path) as temporary:
        # save_file() makes an error of its own of a full disk.
        temporary.write_bytes(serialized(tensors, metadata={_KEY: header}))


def read_config(path: str | os.PathLike) -> dict:
    """The configuration in a saved network's header, without reading its tensors."""
    return _read(path, tensors=False)[0]


def _path(path: str | os.PathLike) -> Path:
    try:
        found = Path(path)
        str(found).encode()
    except TypeError:
        raise TypeError(f"path: expected a str or a path, got {path!r}") from None
    except UnicodeEncodeError:  # safetensors writes such a file and does not read it
        raise ValueError(f"path: expected a name in UTF-8, got {os.fsencode(path)!r}") from None
    return found


def _read(path: str | os.PathLike, tensors: bool = True) -> tuple[dict, dict]:
    path = _path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: expected a saved network (.safetensors), found {found}")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            state = {name: f.get_tensor(name) for name in f.keys()} if tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got a damaged one ({error})") from None
    if _KEY not in metadata:
        raise ValueError(f"{path}: expected a network saved by lorun_fast, got a safetensors file without its header")
    try:
        config = json.loads(metadata[_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: expected lorun_fast's header to be JSON, got something else ({error})") from None
    config = config if isinstance(config, dict) else {}
    version, missing = config.get("version"), _missing(config)
    if not isinstance(version, int):
        missing.append("version")
    elif version > _VERSION:
        raise ValueError(f"{path}: expected format version {_VERSION} or older, got {version}: update lorun_fast")
    if missing:
        raise ValueError(f"{path}: expected {', '.join(sorted(missing))} in lorun_fast's header, found none")
    return config, state


def _missing(config: dict) -> list[str]:
    """What a header of this version lacks, such as "operator" or "network.gamma"."""
    missing = []
    for part, fields in _FIELDS.items():
        record = config.get(part)
        if not isinstance(record, dict):
            missing.append(part)
            continue
        missing += [f"{part}.{f}" for f in fields - record.keys()]
        if not isinstance(record.get("type", ""), str):
            missing.append(f"{part}.type")
    lora = "network" not in missing and config["network"].get("sharing") == "lora"
    if lora and not isinstance(config.get("adapters"), dict):
        missing.append("adapters")
    return missing


@contextmanager
def _rebuilding(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Errors of a constructor as errors of the file that names its arguments."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: expected the arguments of a {what} in lorun_fast's header, got {said}") from error


@contextmanager
def _usual_defaults() -> Iterator[None]:
    """fp32 and the CPU for new tensors, whatever torch's defaults are: a file's tensors are put into them."""
    before = torch.get_default_dtype()
    if before != torch.float32:  # set for all threads
        torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        if before != torch.float32:
            torch.set_default_dtype(before)


def load(
    path: str | os.PathLike,
    *,
    denoiser: nn.Module | None = None,
    op: SensingOperator | None = None,
    device: str | torch.device = "cpu",
) -> LoRun:
    """Rebuilds a saved network, in fp32 and eval mode (merged).

    denoiser: the base module, needed only if its class was not registered with
        :func:`lorun_fast.denoisers.register_denoiser`, whose weights are overwritten; or for a file without the base's
        tensors (``save(base=False)``), in the dtype that it had when the network was saved.
    op: likewise, of :func:`lorun_fast.operators.register_operator`; its tensors are overwritten.
    Raises FileNotFoundError, or ValueError for a damaged or foreign file and for a device that torch does not reach.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that this torch reaches, got {device!r} ({reason})") from None
    with _usual_defaults():
        return _rebuilt(path, denoiser, op).to(device).eval()


def _rebuilt(path, denoiser: nn.Module | None, op: SensingOperator | None) -> LoRun:
    config, state = _read(path)
    spec = config["denoiser"]
    if denoiser is None and "base" in spec:
        raise ValueError(f"{path}: its base, a {spec['type']}, is not in the file: pass load(path, denoiser=...)")
    if denoiser is None:
        cls = denoisers.registered(spec["type"])
        if cls is None or spec["config"] is None:
            raise ValueError(
                f"{path}: its base denoiser {spec['type']} is not registered: pass load(path, denoiser=...)"
            )
        with _rebuilding(path, spec["type"]):
            denoiser = cls(**spec["config"])
    elif not isinstance(denoiser, nn.Module) or isinstance(denoiser, Stages):
        got = type(denoiser).__name__ if isinstance(denoiser, Stages) else repr(denoiser)
        raise TypeError(f"denoiser: expected the base module, as it was before adapt(), got {got}")
    elif "base" in spec and _fingerprint(denoiser.state_dict()) != spec["base"]:
        raise ValueError(
            f"{path}: expected the base that its adapters were saved with, to the bit, got a {type(denoiser).__name__} "
            "with other tensors or dtypes"
        )
    if op is None:
        operator = OPERATORS.get(config["operator"]["type"])
        if operator is None or config["operator"]["config"] is None:
            raise ValueError(
                f"{path}: its operator {config['operator']['type']} is not registered: pass load(path, op=...)"
            )
        with _rebuilding(path, operator.__name__):
            op = operator.from_config(
                config["operator"]["config"],
                {k.removeprefix("op."): t for k, t in state.items() if k.startswith("op.")},
            )
    elif not isinstance(op, SensingOperator):
        raise TypeError(f"op: expected a SensingOperator, got {type(op).__name__}")
    else:
        op = copy.deepcopy(op)
    for name in _SETTINGS:
        if name in config["operator"]:
            setattr(op, name, config["operator"][name])
    network = config["network"]
    if network["sharing"] == "lora":
        try:
            denoiser = adapt_layers(denoiser, network["stages"], config["adapters"])
        except ValueError as error:
            raise ValueError(
                f"{path}: expected the layers of a {spec['type']}, got a {type(denoiser).__name__}: {error}"
            ) from None
        except TypeError as error:
            raise ValueError(f"{path}: expected stages and adapters in lorun_fast's header, got {error}") from None
    with _rebuilding(path, "LoRun"):
        net = LoRun(op, denoiser, **network)
    net.gamma, net.form = network["gamma"], network["form"]
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
        if "base" in spec:
            given = _of_base(net)
            missing = [name for name in missing if name not in given]
    except RuntimeError as error:
        first = "".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"{path}: expected the tensors of this {spec['type']}, got others: {first}") from None
    if missing or unexpected:
        raise ValueError(
            f"{path}: expected the tensors of a {spec['type']} network, got {len(missing)} missing "
            f"({', '.join(missing[:3])}) and {len(unexpected)} unknown ({', '.join(unexpected[:3])})"
        )
    return net


def pretrained_names() -> list[str]:
    """The names that :func:`load_pretrained` knows."""
    folder = resources.files("lorun_fast") / "weights"
    return sorted(f.name.removesuffix(".safetensors") for f in folder.iterdir() if f.name.endswith(".safetensors"))


def load_pretrained(name: str, *, device: str | torch.device = "cpu") -> LoRun:
    """A network whose weights come with the package, in fp32 and eval mode; docs/results.md says how each was trained.

    name: "cs-25", "cs-10", "cs-4", "cs-1", "sr" or "cassi". Raises ValueError for another, and for a device that torch
    does not reach.
    """
    if name not in pretrained_names():
        raise ValueError(f"expected one of {', '.join(pretrained_names()) or '(none shipped)'}, got {name!r}")
    with resources.as_file(resources.files("lorun_fast") / "weights" / f"{name}.safetensors") as path:
        return load(path, device=device)
