"""Compiles the CUDA sources for the CPU (see cuda_runtime.h beside this file) and registers their operators."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import recipe  # noqa: E402

NAMESPACE = "lorun_fast_cuda_on_cpu"
SOURCES = tuple(f"csrc/{op}/{op}.cu" for op in ("block_cs", "blur_downsample", "cassi", "fused_conv2d"))
# No contraction: nvcc contracts too, but not the same products, and tests must not lean on either.
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
# Pointers of kernels walk past a tensor's ends, from null where it is empty; what they must not do there is load.
FLAGS += ("-Wno-unknown-pragmas", *recipe.more_flags(), "-fno-sanitize=pointer-overflow")
_KEEP: list[torch.library.Library] = []


def load(schemas: dict[str, str]):
    """The operators' namespace. Built once per state of the sources, into build/."""
    torch_dir = Path(torch.__file__).parent
    headers = [p for folder in (ROOT / "csrc", HERE) for p in sorted(folder.rglob("*.*h"))]
    contents = b"".join(p.read_bytes() for p in [*headers, *(ROOT / source for source in SOURCES)])
    key = hashlib.sha256(contents + repr((FLAGS, torch.__version__, sys.version)).encode()).hexdigest()[:16]
    library = ROOT / "build" / "cuda-on-cpu" / f"{key}.so"
    if not library.exists():
        _compile(library, torch_dir)
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for schema in schemas.values():
        definitions.define(schema)
    _KEEP.append(definitions)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, NAMESPACE)


def _compile(library: Path, torch_dir: Path) -> None:
    compiler, detail = recipe.find_compiler()
    if compiler is None:
        raise RuntimeError(f"the CUDA kernels run on the CPU only where a C++20 compiler is: {detail}")
    library.parent.mkdir(parents=True, exist_ok=True)
    for old in set(library.parent.glob("*.so")) - {library}:
        old.unlink(missing_ok=True)
    include = [part for path in recipe.torch_include_dirs(torch_dir) for part in ("-isystem", path)]
    define = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={recipe.target_macro()}"]
    command = [*compiler.split(), *FLAGS, *define, f"-I{HERE}", f"-I{recipe.CSRC}", *include]

    def run(arguments: list[str]) -> None:
        done = subprocess.run(command + arguments, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command + arguments)}\n{done.stderr}")

    # Several processes of one test run may build at once.
    own = os.getpid()
    objects = [library.with_suffix(f".{own}.{i}.o") for i in range(len(SOURCES))]
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(run, ["-x", "c++", "-c", str(ROOT / source), "-o", str(out)])
            for source, out in zip(SOURCES, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    fresh = library.with_suffix(f".{own}.new")
    run(["-shared", *map(str, objects), "-o", str(fresh), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"])
    fresh.replace(library)
    for out in objects:
        out.unlink()
