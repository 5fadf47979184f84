"""Compiles and links csrc/ against a torch that need not be importable, and looks up every torch symbol it uses.

    python csrc/check_torch.py TORCH_FOLDER      # for example site-packages/torch of torch 2.11

Exit status 1 when a source does not compile or a symbol is missing in that torch's libraries.
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


def main(torch_dir: Path) -> int:
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
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "_C.so"

        def compile_one(numbered: tuple[int, str]) -> str | None:
            index, source = numbered
            target = str(Path(folder) / f"{index}.o")
            done = subprocess.run(
                [*common, "-c", str(recipe.ROOT / source), "-o", target], text=True, capture_output=True
            )
            print(f"{'failed  ' if done.returncode else 'compiled'} {source}")
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return None
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, enumerate(recipe.sources(".cpp"))))
        if None in objects:
            return 1
        lib = torch_dir / "lib"
        link = [*compiler.split(), "-shared", *objects, "-o", str(library), f"-L{lib}", "-ltorch", "-ltorch_cpu"]
        subprocess.run(link, check=True)
        symbols = listed(library, "--undefined-only")
    ours = {s for s in symbols if s.startswith(("torch_", "aoti_torch_", "_ZN2at", "_ZN3c10", "_ZN5torch"))}
    there = {name for file in ("libtorch_cpu.so", "libc10.so") for name in listed(lib / file, "--defined-only")}
    missing = sorted(ours - there)
    print(f"{len(ours)} torch symbols used, {len(missing)} missing {' '.join(missing)}")
    return 1 if missing or not ours else 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "lib" / "libtorch_cpu.so").exists():
        print("usage: check_torch.py TORCH_FOLDER, a folder with lib/libtorch_cpu.so", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(main(Path(sys.argv[1])))
