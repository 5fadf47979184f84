"""How csrc/ is compiled: sources, flags, headers, CUDA toolkit. The one recipe that setup.py and check_cuda.py share.

Imports no torch: a build that cannot see torch must still be able to say so.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

TARGET_TORCH = (2, 11)
"""Oldest torch that the extension runs on; only its stable ABI is used, so newer ones run the same binary."""

DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0+PTX"


def target_macro() -> str:
    """``TORCH_TARGET_VERSION`` as torch/csrc/stable/version.h encodes it: one byte each for major and minor, on top."""
    major, minor = TARGET_TORCH
    return f"0x{(major << 56) | (minor << 48):016x}"


def sources(suffix: str) -> list[str]:
    """Paths of all ``csrc/**/*suffix``, relative to the root, in a fixed order."""
    return sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob(f"*{suffix}"))


def headers() -> list[str]:
    return [path for suffix in (".h", ".cuh") for path in sources(suffix)]


def torch_include_dirs(torch_dir: str | Path) -> list[str]:
    """Header folders of an installed torch (pybind11's headers come with it)."""
    include = Path(torch_dir) / "include"
    return [str(include), str(include / "torch" / "csrc" / "api" / "include")]


def cxx_flags() -> list[str]:
    # No -march: hot loops carry their own targets (csrc/common/simd.h), so a binary runs on another machine.
    # -fno-math-errno and -fno-trapping-math change no result; they let loops vectorise.
    return [
        "-std=c++20",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        *more_flags(),
    ]


def more_flags() -> list[str]:
    """``LORUN_CXX_FLAGS``: for the compiler and the linker, after the recipe's own, so that they win."""
    return shlex.split(os.environ.get("LORUN_CXX_FLAGS", ""))


def link_flags(torch_dir: str | Path) -> list[str]:
    # Some compilers link the C++ library statically. What of it the extension then shows to others mixes with torch's
    # own: numbers are missing from error messages, or writing one crashes.
    hidden = ["-Wl,--exclude-libs,libstdc++.a"] if sys.platform == "linux" else []
    return [f"-L{Path(torch_dir) / 'lib'}", "-ltorch", "-ltorch_cpu", *hidden, *more_flags()]


def nvcc_flags() -> list[str]:
    return [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        "-Xcompiler=-fvisibility=hidden",
        "-diag-suppress=177",
    ]


def gencode_flags(archs: str) -> list[str]:
    """``"8.0;9.0a;10.0+PTX"`` as nvcc's -gencode flags."""
    flags = []
    for arch in re.split(r"[;\s,]+", archs.strip()):
        number, _, ptx = arch.partition("+")
        sm = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{sm},code=sm_{sm}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{sm},code=compute_{sm}")
    return flags


def find_compiler() -> tuple[str | None, str]:
    """(command, description) of a working C++20 compiler, or (None, why there is none). CXX decides alone if set."""
    named = os.environ.get("CXX")
    tried = []
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]) is None:
            tried.append(f"{candidate}: not found")
            continue
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text(
                "#include <concepts>\ntemplate <std::integral T> T f(T x) { return x; }\nint main() { return f(0); }\n"
            )
            build = [*command, "-std=c++20", str(probe), "-o", str(probe.with_suffix(""))]
            done = subprocess.run(build, capture_output=True, text=True)
        if done.returncode == 0:
            version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()
            return candidate, version[0] if version else candidate
        complaint = (done.stderr.strip().splitlines() or ["no message"])[0]
        tried.append(f"{candidate}: cannot build a C++20 program: {complaint}")
    return None, "; ".join(tried)


def find_cuda_home() -> tuple[Path | None, str]:
    """(toolkit folder with bin/nvcc and include/cuda_runtime.h, nvcc's version) or (None, why not).

    Looks at CUDA_HOME and CUDA_PATH, at nvcc on PATH (also behind a link or a wrapper script), at /usr/local/cuda,
    and at the toolkit's Python packages.
    """
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        roots += [Path(nvcc).resolve().parent.parent, _toolkit_behind(nvcc)]
    roots.append("/usr/local/cuda")
    roots += [root for path in sys.path if path for root in sorted(Path(path).glob("nvidia/cu[0-9]*"), reverse=True)]
    for root in filter(None, roots):
        root = Path(root)
        if (root / "bin" / "nvcc").exists() and (root / "include" / "cuda_runtime.h").exists():
            done = subprocess.run([str(root / "bin" / "nvcc"), "--version"], capture_output=True, text=True)
            release = re.search(r"release (\d+\.\d+)", done.stdout)
            if release:
                return root, release.group(1)
    return None, "no CUDA toolkit found (CUDA_HOME, nvcc on PATH, /usr/local/cuda, Python packages)"


def _toolkit_behind(nvcc: str) -> str | None:
    # A dry run prints the TOP folder that nvcc itself uses, whatever wrapper stands before it.
    done = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else None
