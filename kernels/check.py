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
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
PRODUCTS = ("lora_conv2d_taps", "lora_conv2d_rows", "output_side", "input_side")


@dataclass(frozen=True)
class Problem:
    """One layer, as far as it decides which kernel is compiled."""

    channels: int
    out: int = 0
    k: int = 3
    stride: int = 1
    px: int = 256
    batch: int = 16
    dtype: str = "bfloat16"
    form: str = "peft"  # or "merged": no factors; or "merge": the lora_merge kernel
    factors: str = ""
    mixed: bool = False
    activation: str | None = None
    residual: bool = False
    backward: bool = False

    @property
    def name(self) -> str:
        parts = [f"{self.channels}" if not self.out else f"{self.channels}-{self.out}", f"k{self.k}"]
        parts += [f"s{self.stride}"] if self.stride > 1 else []
        parts += [f"{self.px}px"] if self.px != 256 else []
        parts += [{"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]]
        parts += [self.form] if self.form == "merged" else []
        parts += ["mixed"] if self.mixed else []
        parts += [self.activation] if self.activation else []
        parts += ["residual"] if self.residual else []
        kind = "merge" if self.form == "merge" else "backward" if self.backward else "forward"
        return " ".join([kind, *parts])


def problems() -> Iterator[Problem]:
    """What is shipped: every width class, kernel size, stride and mode that leads to a tile of its own."""
    for channels in (28, 32, 64, 96, 128, 256):
        yield Problem(channels)
        yield Problem(channels, backward=True)
    for channels in (31, 64, 128):
        busy = {"mixed": True, "activation": "gelu"}
        yield Problem(channels, residual=True, factors="float32", **busy)
        yield Problem(channels, backward=True, factors="float32", **busy)
    for channels in (32, 64, 128):
        yield Problem(channels, px=64, form="merged", mixed=True, activation="relu")
        yield Problem(channels, px=64, form="merged", mixed=True, activation="relu", backward=True)
    for backward in (False, True):
        yield Problem(64, 128, stride=2, backward=backward)
        yield Problem(32, k=5, activation="silu", backward=backward)
        yield Problem(64, 192, k=1, backward=backward)
        yield Problem(256, k=1, activation="leaky_relu", backward=backward)
        yield Problem(28, dtype="float32", backward=backward)
        yield Problem(64, dtype="float32", activation="relu", backward=backward)
        yield Problem(64, dtype="float16", backward=backward)
    for dtype in ("bfloat16", "float32"):
        yield Problem(64, dtype=dtype, form="merge", factors="float32")


def small(problem: Problem) -> Problem:
    """The same tiles on an image that the tests on a GPU can compare in float64; compiling it fills Triton's cache."""
    return replace(problem, px=80 if problem.px > 64 else 48, batch=3)


# What the tests compile: every kernel, every architecture, each way of reading an image.
SAMPLE = (
    (Problem(64, form="merge", factors="float32"), 80),
    (Problem(64), 90),
    (Problem(28), 80),
    (Problem(64, dtype="float16", backward=True), 90),
    (Problem(64, 128, stride=2), 100),
)


def launches(problem: Problem, arch: int) -> list:
    """The launches of one problem on meta tensors, with the tiles of this architecture."""
    import torch

    from lorun_fast import adapters
    from lorun_fast.kernels import configs, lora_conv2d, lora_conv2d_backward, lora_merge

    dtype = getattr(torch, problem.dtype)
    like = {"device": "meta", "dtype": dtype}
    c, o, k, n = problem.channels, problem.out or problem.channels, problem.k, problem.batch
    merged = problem.form == "merged"
    lead = (9,) if problem.mixed else ()
    x = torch.empty(n, problem.px, problem.px, c, **like).permute(0, 3, 1, 2)
    weight = torch.empty(*(lead if merged else ()), o, k, k, c, **like).movedim(-1, -3)
    down = up = None
    if not merged:
        shapes = adapters.factor_shapes((o, c, k, k), adapters.rank(c, o, 10), "peft")
        factors = getattr(torch, problem.factors or problem.dtype)
        down, up = (torch.empty(*lead, *shape, device="meta", dtype=factors) for shape in shapes)
    stage = torch.empty(n, device="meta", dtype=torch.int64) if problem.mixed else None
    bias = torch.empty(o, **like)
    a = lora_conv2d.Operands.of(x, weight, bias, down, up, 1.0, stage, problem.stride, k // 2, 1)
    y = torch.empty(n, a.g.p, a.g.q, o, **like)
    if problem.form == "merge":
        merged = torch.empty(9, *weight.shape, **like)
        stacked = (t[None].expand(9, *t.shape) for t in (down, up))
        return [lora_merge.launch([lora_merge.Layer(weight, *stacked, merged, 1.0)])]
    if problem.backward:
        tile = configs.backward(a.g, dtype, arch, a.rank)
        need = (True, True, problem.activation is not None)
        return lora_conv2d_backward.plan(a, y, problem.activation, need, 0, 9 if lead else 1, tile).launches
    tile = configs.forward(a.g, dtype, arch, a.rank, problem.mixed)
    other, kind = (y, "residual") if problem.residual else (None, "none")
    return [lora_conv2d.launch(a, y, other, kind, problem.activation, tile)]


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


def inspect(problem: Problem, index: int, arch: int) -> Report:
    """Compiles one launch of a problem for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.tools.tensor_descriptor import TensorDescriptor

    one = launches(problem, arch)[index]
    kernel = one.kernel.fn.__name__
    report = Report(problem.name, kernel, arch, one.warps, one.programs)
    try:
        options = {"num_warps": one.warps, "num_stages": one.stages} | one.options
        compiled = triton.compile(one.source(), target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        report.wrong = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
        return report
    report.inspect_code(compiled.asm["ptx"])
    report.registers, report.spilled = _resources(compiled.asm["cubin"])
    report.shared = compiled.metadata.shared
    described = any(isinstance(value, TensorDescriptor) for value in one.args.values())
    report.judge(products=kernel in PRODUCTS and problem.dtype != "float32", bulk=described and arch >= 90)
    return report


def _inspect(task: tuple[Problem, int, int]) -> Report:
    return inspect(*task)


def tasks(archs, pattern: str | None = None, sized=lambda problem: problem) -> list[tuple[Problem, int, int]]:
    """Every (problem, launch, architecture) to compile; identical kernels appear once."""
    found, seen = [], set()
    for arch in archs:
        for problem in map(sized, problems()):
            if pattern and not (pattern in problem.name or fnmatch.fnmatchcase(problem.name, pattern)):
                continue
            for index, one in enumerate(launches(problem, arch)):
                source = one.source()
                key = (arch, one.kernel.fn.__name__, one.warps, one.stages, str(source.signature),
                       str(source.constants), str(source.attrs))  # fmt: skip
                if key not in seen:
                    seen.add(key)
                    found.append((problem, index, arch))
    return found


def run(selected: list[tuple[Problem, int, int]], jobs: int) -> Iterator[Report]:
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
        selected = [(problem, i, arch) for problem, arch in SAMPLE for i in range(len(launches(problem, arch)))]
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
