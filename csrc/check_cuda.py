"""Compiles every CUDA source for the shipped architectures and reports registers and spills of each kernel.

    python csrc/check_cuda.py [--arch 8.0 9.0a 10.0] [SOURCE ...]

Needs nvcc and any torch (a CPU-only one too: the sources include its stable headers only); nothing is linked or run.
Exit status: 0 clean, 1 a kernel spills or a source does not compile, 2 no nvcc or no torch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import recipe

ARCHS = ("8.0", "9.0a", "10.0")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture; sizes in bytes."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)


def compile_source(source: str, arch: str, cuda_home: Path, torch_dir: Path) -> str:
    """ptxas's report for one source; RuntimeError with the compiler's words if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(cuda_home / "bin" / "nvcc"),
            *recipe.nvcc_flags(),
            *recipe.gencode_flags(arch),
            "-Xptxas=-v",
            "-Xcompiler=-fPIC",
            "-DUSE_CUDA",
            f"-DTORCH_TARGET_VERSION={recipe.target_macro()}",
            f"-I{recipe.CSRC}",
            *(part for path in recipe.torch_include_dirs(torch_dir) for part in ("-isystem", path)),
            "-c",
            str(recipe.ROOT / source),
            "-o",
            str(Path(folder) / "object.o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile for {arch}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def parse(report: str) -> list[Kernel]:
    """The kernels in ptxas's report, in its order."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    kernels = []
    for m in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        sizes = (int(m[key]) for key in ("registers", "stack", "stores", "loads"))
        kernels.append(Kernel(m["name"], *sizes, int(shared[1]) if shared else 0))
    return kernels


def readable(names: list[str], cuda_home: Path) -> dict[str, str]:
    """Demangled kernel names without the project's namespaces and the argument lists."""
    for tool in (str(cuda_home / "bin" / "cu++filt"), "c++filt"):
        try:
            done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
        except FileNotFoundError:
            continue
        plain = [line.removeprefix("void ").replace("(anonymous namespace)::", "") for line in done.stdout.splitlines()]
        ours = "|".join(folder.name for folder in recipe.CSRC.iterdir() if folder.is_dir())
        plain = [re.sub(rf"(lorun|{ours}|<unnamed>|torch|headeronly|c10)::", "", line) for line in plain]
        plain = [re.sub(r"\(\w+\)(?=\d)", "", line) for line in plain]  # an enumerator prints as (Type)1
        return {name: line.split("(")[0] for name, line in zip(names, plain, strict=True)}
    return {name: name for name in names}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", default=recipe.sources(".cu"), help="default: every .cu under csrc/")
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    args = parser.parse_args(argv)
    cuda_home, detail = recipe.find_cuda_home()
    if cuda_home is None:
        print(f"check_cuda: {detail}", file=sys.stderr)
        return 2
    torch = find_spec("torch")
    if torch is None:
        print("check_cuda: torch is not installed: its headers are needed", file=sys.stderr)
        return 2
    failed = False
    for source in args.sources:
        for arch in args.arch:
            try:
                kernels = parse(compile_source(source, arch, cuda_home, Path(torch.origin).parent))
            except RuntimeError as error:
                print(error)
                failed = True
                continue
            if not kernels:
                print(f"{source} sm_{arch}: ptxas reported no kernel")
                failed = True
            names = readable([kernel.name for kernel in kernels], cuda_home)
            for k in kernels:
                failed = failed or k.spills
                print(
                    f"{source} sm_{arch}: {k.registers:3d} registers, {k.spill_stores + k.spill_loads:3d} B spilled, "
                    f"{k.stack:3d} B stack, {k.shared:5d} B shared{'  SPILL' if k.spills else ''}  {names[k.name]}"
                )
    print(f"check_cuda: nvcc {detail}: {'FAILED' if failed else 'no spills'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
