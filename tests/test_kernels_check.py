"""kernels/check.py: the shipped kernels compile without spills for GPUs that are not here; what is wrong is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from kernels_help import needs_triton

needs_triton()

from lorun_fast.kernels import check, configs  # noqa: E402

COMMAND = [sys.executable, "-m", "lorun_fast.kernels.check"]


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=540)


def test_the_sample_compiles_without_spills():
    done = _run("--sample")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    for kernel in ("lora_conv2d_rows", "lora_conv2d_taps", "output_side", "input_side", "reduce_parts"):
        assert any(kernel in line for line in lines), done.stdout
    assert {line.split()[0] for line in lines} == {f"sm_{arch}" for arch in configs.ARCHITECTURES}


def test_the_interpreter_does_not_compile():
    done = _run("--sample", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def _report(**changes) -> check.Report:
    fine = {"registers": 128, "shared": 50_000, "tensor": 9, "bulk": 3, "stores": 4}
    report = check.Report("case", "lora_conv2d_taps", 90, warps=4, programs=1, **(fine | changes))
    report.judge(products=True, bulk=True)
    return report


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, ""),
        ({"spilled": 8}, "SPILLS"),
        ({"shared": 240_000}, "DOES NOT FIT"),
        ({"tensor": 0}, "NO TENSOR-CORE INSTRUCTIONS"),
        ({"bulk": 0}, "NO BULK COPIES"),
        ({"stores": 0}, "STORES NOTHING"),
    ],
)
def test_what_is_wrong_is_named(changes, wrong):
    assert _report(**changes).wrong == wrong


def test_programs_per_multiprocessor():
    assert _report().per_sm == 4  # 128 threads of 128 registers four times; 50 kB of shared memory four times
    assert _report(registers=255).per_sm == 2
    assert _report(shared=100_000).per_sm == 2


def test_every_problem_has_launches_on_every_architecture():
    for problem in check.problems():
        for arch in configs.ARCHITECTURES:
            launches = check.launches(problem, arch)
            assert len(launches) == (1 if not problem.backward else 3 if problem.form == "peft" else len(launches))
            assert all(one.programs > 0 for one in launches)
