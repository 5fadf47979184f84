"""No kernel reads or writes outside its tensors: every op at sizes and strides that are hard on a kernel's edges,
against the definition here, and in processes whose tensors lie against pages that nobody may touch (guard_pages/)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guard_pages import build
from memory_help import FAMILIES, Draw, check_family

from lorun_fast import _native
from lorun_fast.ops._library import SCHEMAS

pytestmark = pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_at_hard_sizes_and_strides(family, poisoned):
    for seed in range(8):
        check_family(family, seed)


def test_every_compiled_op_is_called():
    called = {name for family in FAMILIES.values() for name, _ in family(Draw(0))}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert called == {name for name in SCHEMAS if has_kernel(f"lorun_fast::{name}", "CPU")}


def guarded(side: str, script: str, variant: str | None = None) -> subprocess.CompletedProcess:
    if sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("needs Linux, and an allocator that no sanitizer has replaced")
    env = {**build.environment(side), "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "2"}
    if variant is not None:
        env["LORUN_CPU"] = variant
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("side, offset", [("begin", -1), ("end", 12)])
def test_guard_pages_end_a_process_that_leaves_its_tensor(side, offset):
    script = (
        "import ctypes, torch\nt = torch.zeros(3)\nctypes.string_at(t.data_ptr(), 12)\nprint('inside', flush=True)\n"
    )
    done = guarded(side, script + f"ctypes.string_at(t.data_ptr() + {offset}, 1)")
    assert done.stdout == "inside\n" and done.returncode == -signal.SIGSEGV, done.stderr


@pytest.mark.parametrize("variant", ["baseline", "avx2", None])
@pytest.mark.parametrize("side", ["begin", "end"])
def test_kernels_stay_inside_their_tensors(side, variant):
    done = guarded(side, "import memory_help; memory_help.check_all(5)", variant)
    assert done.stdout == "checked\n", done.stderr
