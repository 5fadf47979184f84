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


# What every script starts with.
_FRAME = """
import torch
import torch.nn.functional as F
from lorun_fast import _native

info = _native.build_info()
assert info["cpu_active"] == {variant!r} and not info["amx"]
torch.manual_seed(0)


def dtypes(single, narrow):
    # (dtype, that of its parameters, how close results are) of an operator; narrow: of bf16 and fp16
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        double = dtype == torch.float64
        close = dict(rtol=1e-12, atol=1e-12) if double else single if dtype == torch.float32 else narrow
        yield dtype, torch.float64 if double else torch.float32, close


def compare(reference, calls, close):
    for name, args in calls:
        got = getattr(torch.ops.lorun_fast, name)(*args)
        torch.testing.assert_close(got, getattr(reference, name)(*args), **close)


"""


def check_under(variant: str, script: str, **values) -> None:
    """Runs the script under this variant. values: names that it finds."""
    text = _FRAME.format(variant=variant) + "".join(f"{name} = {value!r}\n" for name, value in values.items()) + script
    env = {**os.environ, "LORUN_CPU": variant, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", text + 'print("checked")'], capture_output=True, text=True, env=env)
    assert done.stdout == "checked\n", done.stderr
