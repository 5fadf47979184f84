"""Builds lorun_fast._C where it can, and says in one line each what it decided. Metadata is in pyproject.toml.

LORUN_BUILD=0          leave the extension out
LORUN_FORCE_BUILD=1    a missing or failed extension is an error
LORUN_BUILD_CUDA       auto (default): CUDA sources when nvcc and a CUDA torch are there; 0: never; 1: or fail
LORUN_CXX_FLAGS        more flags for the C++ compiler and the linker, after this project's own
TORCH_CUDA_ARCH_LIST   CUDA architectures, for example "9.0a"; MAX_JOBS: parallel compilations
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
recipe = importlib.import_module("recipe")

PACKAGES = [
    "lorun_fast",
    "lorun_fast.apps",
    "lorun_fast.apps.tasks",
    "lorun_fast.apps.tasks.cassi",
    "lorun_fast.apps.tasks.cs",
    "lorun_fast.apps.tasks.sr",
    "lorun_fast.denoisers",
    "lorun_fast.interop",
    "lorun_fast.kernels",
    "lorun_fast.kernels.tuning",
    "lorun_fast.operators",
    "lorun_fast.ops",
    "lorun_fast.reference",
]
PACKAGE_DIR = {"lorun_fast.kernels": "kernels"}

HOW_TO_BUILD = "pip install --no-build-isolation -e .   (with torch >= 2.11, setuptools >= 77 and ninja installed)"
FORCED = os.environ.get("LORUN_FORCE_BUILD", "0") == "1"


def say(text: str) -> None:
    print(f"lorun_fast: {text}", file=sys.stderr, flush=True)


def without_extension(reason: str) -> None:
    """Reports why there will be no extension; an error if one was demanded."""
    if FORCED:
        raise SystemExit(f"lorun_fast: LORUN_FORCE_BUILD=1, but the extension cannot be built: {reason}")
    say(f"WARNING: extension not built: {reason}")
    say("installing pure Python: everything works, on the slower reference implementations")
    say(f"to get the extension: {HOW_TO_BUILD}")


def find_torch():
    """The torch to build against, or None after saying why not."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        without_extension(
            f"this build cannot import torch ({error}). If torch is installed, pip's build isolation hides it "
            "from setup.py: pass --no-build-isolation"
        )
        return None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < recipe.TARGET_TORCH:
        without_extension(f"torch {torch.__version__} is older than {'.'.join(map(str, recipe.TARGET_TORCH))}")
        return None
    say(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'no'}")
    return torch


def find_cuda(torch) -> Path | None:
    """The CUDA toolkit to compile with, or None after saying why CUDA sources are left out."""
    wish = os.environ.get("LORUN_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"lorun_fast: LORUN_BUILD_CUDA: expected auto, 0 or 1, got {wish!r}")
    if wish == "0":
        say("CUDA sources: left out (LORUN_BUILD_CUDA=0)")
        return None
    home, detail = recipe.find_cuda_home()
    if torch.version.cuda is None:
        reason = "this torch is built without CUDA"
    elif home is None:
        reason = detail
    elif detail.split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"nvcc is {detail}, torch is built for CUDA {torch.version.cuda}: their major versions must agree"
    elif not recipe.sources(".cu"):
        reason = "there are none"
    else:
        return home
    if wish == "1":
        raise SystemExit(f"lorun_fast: LORUN_BUILD_CUDA=1, but CUDA sources cannot be built: {reason}")
    say(f"CUDA sources: left out ({reason})")
    return None


def cuda_archs(torch) -> str:
    """TORCH_CUDA_ARCH_LIST, else the visible devices' architectures, else a list that covers Ampere and later."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        return named
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{a}.{b}{'a' if a == 9 else ''}" for a, b in sorted(seen)) or recipe.DEFAULT_CUDA_ARCHS


def cudart(home: Path) -> list[str]:
    """Link arguments for the CUDA runtime; the toolkit's Python packages ship it without the unversioned link."""
    for folder in (home / "lib64", home / "lib"):
        if (folder / "libcudart.so").exists():
            return [f"-L{folder}", "-lcudart"]
        versioned = sorted(folder.glob("libcudart.so.*"))
        if versioned:
            return [str(versioned[-1])]
    raise SystemExit(f"lorun_fast: expected libcudart.so under {home}, found none")


def plan() -> tuple[list[Extension], type[build_ext]]:
    """The extensions to build and the command that builds them."""
    if os.environ.get("LORUN_BUILD", "1") == "0":
        without_extension("LORUN_BUILD=0")
        return [], build_ext
    torch = find_torch()
    if torch is None:
        return [], build_ext
    compiler, detail = recipe.find_compiler()
    if compiler is None:
        without_extension(f"no C++20 compiler ({detail})")
        return [], build_ext
    os.environ["CXX"] = compiler
    say(f"C++ compiler: {detail}")

    torch_dir = Path(torch.__file__).parent
    sources = recipe.sources(".cpp")
    macros = [("TORCH_TARGET_VERSION", recipe.target_macro())]
    include_dirs = recipe.torch_include_dirs(torch_dir)
    # As system headers too, so that the warnings are about this project's code.
    flags = {"cxx": [*recipe.cxx_flags(), *(f"-isystem{folder}" for folder in include_dirs)]}
    link = recipe.link_flags(torch_dir)
    home = find_cuda(torch)
    if home:
        archs = cuda_archs(torch)
        os.environ["CUDA_HOME"] = str(home)
        sources += recipe.sources(".cu")
        flags["nvcc"] = recipe.nvcc_flags() + recipe.gencode_flags(archs)
        macros += [("USE_CUDA", None), ("LORUN_CUDA_ARCHS", f'"{archs}"')]
        link += ["-ltorch_cuda", *cudart(home)]
        say(f"CUDA sources: compiled with {home / 'bin' / 'nvcc'} for {archs}")
    macros.append(("LORUN_CXX_FLAGS", f'"{" ".join(recipe.cxx_flags())}"'))

    cpp_extension = importlib.import_module("torch.utils.cpp_extension")
    ninja = cpp_extension.is_ninja_available()
    say(f"building lorun_fast._C from {len(sources)} files with {'ninja' if ninja else 'setuptools (ninja is faster)'}")
    extension = Extension(
        "lorun_fast._C",
        sources,
        depends=recipe.headers(),
        include_dirs=[str(ROOT / "csrc"), *include_dirs],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link,
        language="c++",
        optional=not FORCED,
    )
    return [extension], builder(cpp_extension.BuildExtension)


def builder(torch_build: type[build_ext]) -> type[build_ext]:
    class Build(torch_build):
        """torch's build command; a failed compilation leaves a pure Python package unless the build was forced."""

        def build_extensions(self) -> None:
            targets = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
            if self.inplace or self.editable_mode:
                # A lasting folder for objects: the next editable build compiles only what changed.
                self.build_temp = str(ROOT / "build" / f"editable-{sys.implementation.cache_tag}")
                targets += [ROOT / "lorun_fast" / path.name for path in targets]
            for path in targets:
                path.unlink(missing_ok=True)  # a failed build must not leave the last one's binary behind
            name_objects = self.compiler.object_filenames

            def object_filenames(sources, *args, **kwargs):
                # An op's .cpp and .cu share their stem; their objects must not.
                objects = name_objects(sources, *args, **kwargs)
                return [o[:-2] + ".cu.o" if s.endswith(".cu") else o for s, o in zip(sources, objects, strict=True)]

            self.compiler.object_filenames = object_filenames
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                if FORCED:
                    raise
                without_extension(f"compilation failed, see above ({str(error).splitlines()[0]})")

    return Build


# Front ends also run this file only for metadata: decide and print when something is built.
building = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv)
extensions, command = plan() if building else ([], build_ext)
setup(
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    ext_modules=extensions,
    cmdclass={"build_ext": command},
)
