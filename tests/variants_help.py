"""What runs under a lesser instruction set than this machine's best: a script in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lorun_fast import _native


def lesser_variants(test):
    """Marks a test of ``variant``: the two below the best, where the extension has several."""
    test = pytest.mark.parametrize("variant", ["baseline", "avx2"])(test)
    several = platform.machine() in ("x86_64", "AMD64")
    test = pytest.mark.skipif(not several, reason="one variant on this architecture")(test)
    return pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")(test)


def check_under(variant: str, script: str) -> None:
    """Runs the script, which prints "checked" at its end, under this variant."""
    env = {**os.environ, "LORUN_CPU": variant, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout == "checked\n", done.stderr
