"""Compiles guard_pages.cpp, beside this file, for the processes that are to have it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().with_name("guard_pages.cpp")
ROOT = SOURCE.parent.parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import recipe  # noqa: E402

FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")


def environment(side: str) -> dict[str, str]:
    """Of a process whose tensors lie against closed pages on this side, "begin" or "end". Built into build/."""
    compiler, detail = recipe.find_compiler()
    if compiler is None:
        raise RuntimeError(f"guard pages need a C++20 compiler: {detail}")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    library = ROOT / "build" / "guard-pages" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")  # several processes of one test run may build at once
        subprocess.run([*compiler.split(), *FLAGS, str(SOURCE), "-o", str(own), "-ldl"], check=True)
        own.replace(library)
    return {**os.environ, "LD_PRELOAD": str(library), "LORUN_GUARD": side}
