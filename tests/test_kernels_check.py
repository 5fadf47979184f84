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


# Triton's launcher with a driver that only names a GPU, stopped where it would compile.
LAUNCHED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from lorun_fast.kernels import check
from lorun_fast.kernels.tuning.problems import Problem

target = GPUTarget("cuda", 90, 32)


class Named:
    get_current_target = staticmethod(lambda: target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Stopped(Exception):
    pass


def stop(source, target, options):
    raise Stopped(source.hash(), make_backend(target).parse_options(dict(options)).hash())


driver.set_active(Named())
count = 0
TEXTS = "forward 64", "backward 28 relu", "backward 64-128 s2 mixed gelu", "backward 64 fp32", "forward linear 31"
for text in TEXTS:
    for one in check.launches(Problem.parse(text), 90) + check.launches(Problem(64, form="merge"), 90):
        source, options = one.source(target)
        key = source.hash(), make_backend(target).parse_options(dict(options)).hash()
        one.kernel.device_caches[0]
        one.kernel.compile = stop
        try:
            one.run()
        except Stopped as stopped:
            assert stopped.args == key, (text, one.kernel.fn.__name__)
            count += 1
print(count)
"""


def test_what_is_compiled_here_is_found_by_a_launch():
    """The key in Triton's cache, so that compiling with all cores beforehand spares a GPU's time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LAUNCHED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and int(done.stdout) == 11 + 5 * 2, done.stdout + done.stderr


def test_one_kernel_serves_images_of_every_size():
    code = (
        "from triton.backends.compiler import GPUTarget\n"
        "from lorun_fast.kernels import check\n"
        "from lorun_fast.kernels.tuning.problems import Problem\n"
        "def keys(px, batch):\n"
        "    found = check.launches(Problem(64, px=px, batch=batch, backward=True), 90)\n"
        "    return [one.source(GPUTarget('cuda', 90, 32))[0].hash() for one in found]\n"
        "assert keys(256, 16) == keys(80, 1) == keys(97, 3)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


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
            expected = (
                {"merge": {2}, "peft": {3}, "merged": {2, 3}}[problem.form]
                if problem.backward or (problem.form == "merge")
                else {1}
            )
            assert len(launches) in expected
            assert all(one.programs > 0 for one in launches)
