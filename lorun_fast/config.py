"""What this installation is made of, and which implementation serves each op on each device."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata

import torch

from lorun_fast import _native, functional
from lorun_fast._version import __version__
from lorun_fast.ops import _backends
from lorun_fast.ops._library import NAMESPACE, SCHEMAS, UNAVAILABLE

_VARIABLES = (
    "LORUN_BACKEND",
    "TRITON_INTERPRET",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
_REFERENCE = "reference (PyTorch)"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _triton() -> str:
    """Triton's version, or why it cannot be imported."""
    found = _version("triton")
    if found is None:
        return "not installed"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises nearly anything
        return f"{found}, does not import: {error}"
    return found


def _cpu() -> dict:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    named = capabilities.get("cpu_name", "Unknown")  # as on ARM
    return {
        "name": named if named != "Unknown" else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": bool(capabilities.get("amx_bf16", False)),
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def _backend(op: str, device: str) -> tuple[str, str]:
    """(what serves the op on this device, why nothing faster does; empty where the fastest does)."""
    if device == "cuda" and torch.version.cuda is None:
        return "none", "this torch is built without CUDA"
    key = device.upper()
    if device == "cuda" and op in UNAVAILABLE and torch.cuda.is_available():
        reason = UNAVAILABLE[op](torch.cuda.current_device())
        if reason:
            return _REFERENCE, reason
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key):
        return ("C++" if device == "cpu" else "CUDA"), ""
    reason = f"lorun_fast._C has no {key} implementation of it"
    if not _native.available():
        reason = _native.reason()
    elif device == "cuda" and not _native.build_info().get("cuda"):
        reason = "lorun_fast._C was built without CUDA sources"
    if op in _backends.BACKENDS:
        name, reasons = _backends.served(op, device)
        if name != _backends.REFERENCE:
            return name, reasons
        reason = reasons or reason
    return _REFERENCE, reason


def _config() -> dict:
    # An op's backend serves its backward pass too.
    names = sorted(
        op for op in SCHEMAS if op.removesuffix("_backward") not in _backends.BACKENDS or op in functional.__all__
    )
    backends = {
        op: {device: dict(zip(("backend", "reason"), _backend(op, device), strict=True)) for device in ("cpu", "cuda")}
        for op in names
    }
    return {
        "versions": {
            "lorun_fast": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _triton(),
            "numpy": _version("numpy"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "cpu": _cpu(),
        "gpus": _gpus(),
        "extension": {
            "loaded": _native.available(),
            "reason": _native.reason(),
            "build": dict(_native.build_info()),
        },
        "ops": backends,
        "environment": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if name in _VARIABLES or name.startswith(("LORUN_", "MALLOC_"))
        },
    }


def _text(config: dict) -> str:
    cpu, extension = config["cpu"], config["extension"]
    amx = ", AMX bf16" if cpu["amx_bf16"] else ""
    lines = ["versions"]
    lines += [f"  {name:<12}{value or 'none'}" for name, value in config["versions"].items()]
    lines += ["devices", f"  cpu         {cpu['name']}, {cpu['capability']}{amx}, {cpu['threads']} threads"]
    for index, gpu in enumerate(config["gpus"]):
        lines.append(
            f"  cuda:{index}      {gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['memory_gib']} GiB"
        )
    if not config["gpus"]:
        why = "torch is built without CUDA" if config["versions"]["cuda"] is None else "torch finds no device"
        lines.append(f"  cuda        none ({why})")
    lines.append(f"lorun_fast._C: {'loaded' if extension['loaded'] else 'not loaded: ' + extension['reason']}")
    for name, value in extension["build"].items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        lines.append(f"  {name:<14}{'none' if shown == '' else shown}")
    lines.append("ops")
    # One reason usually holds for every op: say it once, below the table.
    reasons: dict[str, int] = {}
    width = max(map(len, config["ops"])) + 2
    for op, devices in config["ops"].items():
        cells = []
        for device, served in devices.items():
            mark = f" [{reasons.setdefault(served['reason'], len(reasons) + 1)}]" if served["reason"] else ""
            cells.append(f"{device}: {served['backend']}{mark}")
        lines.append(f"  {op:<{width}}{'   '.join(cells)}")
    lines += [f"  [{number}] {reason}" for reason, number in reasons.items()]
    lines.append("environment")
    lines += [f"  {name}={value}" for name, value in config["environment"].items()] or ["  (nothing set)"]
    return "\n".join(lines)


def show_config(*, quiet: bool = False) -> dict:
    """Prints and returns what this installation is made of.

    Keys: versions; cpu; gpus; extension (loaded, reason, build) for lorun_fast._C; ops, {op: {device: {backend,
    reason}}}, the reason saying why nothing faster serves the op; environment, the variables in force.
    quiet: only return it.
    """
    config = _config()
    if not quiet:
        print(_text(config))
    return config
