"""Compiles every shipped configuration for GPUs that need not be here, and reports what the compiler made of it.

    python -m lorun_fast.kernels.check [--arch 80 90 100] [--case PATTERN | --sample] [--small] [--jobs 2] [--json FILE]

Per kernel: registers, spilled bytes, shared memory, programs per multiprocessor, tensor-core and bulk-copy
instructions. Exit status: 0 clean; 1 a kernel spills, does not fit, lacks tensor-core instructions where its products
are 16 bits wide, or does not compile; 2 Triton cannot compile here (not installed, or TRITON_INTERPRET is set).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from lorun_fast.kernels.tuning.problems import Problem, launches, problems, small, tile_of

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
PRODUCTS = ("lora_conv2d_taps", "lora_conv2d_rows", "output_side", "output_rows", "input_side")


# What the tests compile: every kernel, each architecture and way of reading an image. (problem, launches, architecture)
SAMPLE = (
    (Problem(64, form="merge", factors="float32"), (0, 1), 80),
    (Problem(64), (0,), 90),
    (Problem(64, dtype="float16", backward=True), (0, 1), 90),
    (Problem(28, backward=True), (0, 2), 80),
    (Problem(64, 128, stride=2), (0,), 100),
)


@dataclass
class Report:
    """What one kernel became. Sizes in bytes; tensor and bulk: counts of tensor-core and bulk-copy instructions."""

    case: str
    kernel: str
    arch: int
    warps: int
    programs: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    per_sm: int = 0
    tensor: int = 0
    bulk: int = 0
    async_copies: int = 0
    stores: int = 0
    wrong: str = ""

    def inspect_code(self, ptx: str) -> None:
        """Counts the instructions that tell how a kernel computes and reads."""
        self.tensor = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))
        self.bulk = ptx.count("cp.async.bulk.tensor")
        self.async_copies = len(re.findall(r"cp\.async\.c[ag]", ptx))
        self.stores = ptx.count("st.global")

    def judge(self, *, products: bool, bulk: bool) -> None:
        """Fills in how many programs share a multiprocessor, and what is wrong.

        products: tensor-core instructions are expected. bulk: bulk copies are.
        """
        by_registers = 65536 // (32 * self.warps * -(-max(self.registers, 1) // 8) * 8)
        by_shared = SHARED_PER_SM[self.arch] // (self.shared + 1024)
        self.per_sm = min(by_registers, by_shared, 64 // self.warps, 32)
        if self.spilled:
            self.wrong = "SPILLS"
        elif self.shared > SHARED_LIMIT[self.arch] or self.per_sm < 1:
            self.wrong = "DOES NOT FIT"
        elif not self.stores:
            self.wrong = "STORES NOTHING"
        elif products and not self.tensor:
            self.wrong = "NO TENSOR-CORE INSTRUCTIONS"
        elif bulk and not self.bulk:
            self.wrong = "NO BULK COPIES"

    def line(self) -> str:
        return (
            f"sm_{self.arch:<4}{self.kernel:<18}{self.case:<42}{self.warps:>2} warps {self.registers:>4} registers "
            f"{self.spilled:>4} B spilled {self.shared:>7} B shared {self.per_sm:>2} per SM "
            f"{self.tensor:>4} tensor-core {self.bulk:>3} bulk {self.async_copies:>4} cp.async"
            + (f"   {self.wrong}" if self.wrong else "")
        )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack: what does not fit into registers) of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def _multiplies(one) -> bool:
    """Whether a launch forms matrix products: output_side with merged weights and a saved output only scales dy."""
    v = one.constants
    return one.kernel.fn.__name__ != "output_side" or v["RANK"] > 0 or (v["ACT"] is not None and not v["KNOWN"])


def inspect(problem: Problem, index: int, arch: int, tile=None, capability: int | None = None) -> Report:
    """Compiles one launch of a problem for one architecture, with the shipped tile or another.

    capability: of the GPU to compile for, where it is a newer one than ``arch``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.tools.tensor_descriptor import TensorDescriptor

    one = launches(problem, arch, tile)[index]
    kernel = one.kernel.fn.__name__
    report = Report(problem.name, kernel, arch, one.warps, one.programs)
    target = GPUTarget("cuda", capability or arch, 32)
    try:
        source, options = one.source(target)
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        report.wrong = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
        return report
    report.inspect_code(compiled.asm["ptx"])
    report.registers, report.spilled = _resources(compiled.asm["cubin"])
    report.shared = compiled.metadata.shared
    described = any(isinstance(value, TensorDescriptor) for value in one.args.values())
    products = kernel in PRODUCTS and _multiplies(one)
    report.judge(products=products and problem.dtype != "float32", bulk=products and described and arch >= 90)
    return report


class Compiler:
    """inspect() in ``jobs`` processes, for one architecture; what it compiles stays in Triton's cache.

    with Compiler(90, 2) as compile: compile(problem, tiles, launches) -> for each tile, the report of each launch.
    """

    def __init__(self, arch: int, jobs: int, capability: int | None = None):
        self.arch, self.capability = arch, capability
        self._pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, problem: Problem, tiles: list, indices: list[int]) -> list[list[Report]]:
        wanted = [
            [self._pool.submit(inspect, problem, i, self.arch, t, self.capability) for i in indices] for t in tiles
        ]
        return [[one.result() for one in row] for row in wanted]


def _inspect(task: tuple) -> Report:
    return inspect(*task)


def tasks(archs, pattern: str | None = None, sized=lambda problem: problem) -> list[tuple]:
    """Every (problem, launch, architecture, tile) to compile; identical kernels appear once.

    sized: makes the problem another size, with the tile it has.
    """
    from triton.backends.compiler import GPUTarget

    found, seen = [], set()
    for arch in archs:
        for whole in problems():
            problem, tile = sized(whole), tile_of(whole, arch)
            if pattern and not (pattern in problem.name or fnmatch.fnmatchcase(problem.name, pattern)):
                continue
            for index, one in enumerate(launches(problem, arch, tile)):
                source, options = one.source(GPUTarget("cuda", arch, 32))
                key = (arch, one.kernel.fn.__name__, source.hash(), str(options))
                if key not in seen:
                    seen.add(key)
                    found.append((problem, index, arch, tile))
    return found


def run(selected: list[tuple], jobs: int) -> Iterator[Report]:
    if jobs == 1:
        yield from map(_inspect, selected)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_inspect, selected)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100])
    parser.add_argument("--case", help="a part of a case's name, or a shell pattern")
    parser.add_argument("--sample", action="store_true", help="only what the tests compile")
    parser.add_argument("--small", action="store_true", help="the image sizes of the tests on a GPU")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    from lorun_fast import kernels

    why = kernels.unavailable()
    if not why and os.environ.get("TRITON_INTERPRET") == "1":
        why = "TRITON_INTERPRET=1: the interpreter does not compile"
    if why:
        print(f"kernels check: {why}", file=sys.stderr)
        return 2
    reports = []
    selected = tasks(args.arch, args.case, small if args.small else lambda problem: problem)
    if args.sample:
        selected = [(problem, i, arch) for problem, indices, arch in SAMPLE for i in indices]
    if not selected:
        print(f"kernels check: no case matches {args.case!r}", file=sys.stderr)
        return 2
    for report in run(selected, args.jobs):
        print(report.line(), flush=True)
        reports.append(report)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    wrong = sum(bool(r.wrong) for r in reports)
    import triton

    verdict = f"{wrong} of {len(reports)} kernels FAILED" if wrong else f"{len(reports)} kernels, no spills"
    print(f"kernels check: Triton {triton.__version__}: {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
