"""Compiles and links csrc/ against a torch that need not be importable, and looks up every torch symbol it uses.

    python csrc/check_torch.py TORCH_FOLDER      # for example site-packages/torch of torch 2.11
    CXX='clang++ --target=aarch64-linux-gnu' python csrc/check_torch.py TORCH_FOLDER --compile-only

CUDA sources too, where a toolkit is found. --compile-only: C++ alone, for another machine than that torch is for. Exit
status 1 when a source does not compile or a symbol is missing in that torch's libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import recipe


def listed(library: Path, which: str) -> set[str]:
    """Names of the dynamic symbols that a library defines or leaves undefined."""
    listing = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}


def main(torch_dir: Path, compile_only: bool) -> int:
    compiler, detail = recipe.find_compiler()
    if compiler is None:
        print(f"no C++20 compiler ({detail})", file=sys.stderr)
        return 1
    system = [f"-isystem{folder}" for folder in recipe.torch_include_dirs(torch_dir)]
    common = [
        *compiler.split(), *recipe.cxx_flags(), "-O0", "-fPIC", f"-I{recipe.CSRC}", *system,
        f"-I{sysconfig.get_path('include')}", f"-DTORCH_TARGET_VERSION={recipe.target_macro()}",
        "-DTORCH_EXTENSION_NAME=_C", '-DLORUN_CXX_FLAGS=""',
    ]  # fmt: skip
    cuda_home, detail = (None, "not asked for") if compile_only else recipe.find_cuda_home()
    if cuda_home is None:
        print(f"CUDA sources left out: {detail}")
    else:
        # Unoptimised: what is asked is whether they compile, and which symbols they use.
        nvcc = [
            str(cuda_home / "bin" / "nvcc"), *(f for f in recipe.nvcc_flags() if f not in ("-O3", "-lineinfo")),
            *recipe.gencode_flags("9.0a"), "-G", "-Xcompiler=-fPIC", "-DUSE_CUDA", f"-I{recipe.CSRC}",
            *(part for path in recipe.torch_include_dirs(torch_dir) for part in ("-isystem", path)),
            f"-DTORCH_TARGET_VERSION={recipe.target_macro()}",
        ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "_C.so"

        def compile_one(numbered: tuple[int, str]) -> str | None:
            index, source = numbered
            target = str(Path(folder) / f"{index}.o")
            command = nvcc if source.endswith(".cu") else common
            done = subprocess.run(
                [*command, "-c", str(recipe.ROOT / source), "-o", target], text=True, capture_output=True
            )
            print(f"{'failed  ' if done.returncode else 'compiled'} {source}")
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return None
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sources = recipe.sources(".cpp") + (recipe.sources(".cu") if cuda_home else [])
            objects = list(pool.map(compile_one, enumerate(sources)))
        if None in objects:
            return 1
        if compile_only:
            return 0
        lib = torch_dir / "lib"
        link = [*compiler.split(), "-shared", *objects, "-o", str(library), f"-L{lib}", "-ltorch", "-ltorch_cpu"]
        subprocess.run(link, check=True)
        symbols = listed(library, "--undefined-only")
    ours = {s for s in symbols if s.startswith(("torch_", "aoti_torch_", "_ZN2at", "_ZN3c10", "_ZN5torch"))}
    files = [lib / f"lib{name}.so" for name in ("torch_cpu", "c10", "torch_cuda", "c10_cuda")]
    there = {name for file in files if file.exists() for name in listed(file, "--defined-only")}
    if not files[2].exists():
        ours = {name for name in ours if "cuda" not in name}  # a torch without CUDA: headers are all that it can show
    missing = sorted(ours - there)
    print(f"{len(ours)} torch symbols used, {len(missing)} missing {' '.join(missing)}")
    return 1 if missing or not ours else 0


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if argument != "--compile-only"]
    if len(folders) != 1 or not (Path(folders[0]) / "lib" / "libtorch_cpu.so").exists():
        print("usage: check_torch.py TORCH_FOLDER [--compile-only], a folder with lib/libtorch_cpu.so", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(main(Path(folders[0]), "--compile-only" in sys.argv))
