"""csrc/recipe.py: an extension built by it stands beside torch's own libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import recipe  # noqa: E402

SOURCE = """
#include <torch/csrc/stable/library.h>

#include "common/tensor.h"

STABLE_TORCH_LIBRARY(lorun_fast_recipe, m) {
  m.def("refuse(Tensor x) -> Tensor");
}

static lorun::Tensor refuse(lorun::Tensor x) {
  lorun::check_shape("x", x, {x.dim() + 1});
  STD_TORCH_CHECK(false, "got ", x.dim());
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(lorun_fast_recipe, CPU, m) {
  m.impl("refuse", TORCH_BOX(&refuse));
}
"""
CALL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.lorun_fast_recipe.refuse(torch.zeros(12))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the linker's option is of Linux")
def test_errors_name_numbers_where_the_cpp_library_is_linked_statically(tmp_path):
    compiler, detail = recipe.find_compiler()
    assert compiler is not None, detail
    torch_dir = Path(torch.__file__).parent
    source, library = tmp_path / "refuse.cpp", tmp_path / "refuse.so"
    source.write_text(SOURCE)
    include = [part for path in recipe.torch_include_dirs(torch_dir) for part in ("-isystem", path)]
    command = [*compiler.split(), *recipe.cxx_flags(), "-O0", "-fPIC", "-shared", "-static-libstdc++"]
    command += [f"-DTORCH_TARGET_VERSION={recipe.target_macro()}", f"-I{recipe.CSRC}", *include, str(source)]
    command += ["-o", str(library), "-Wl,-Bsymbolic-functions", *recipe.link_flags(torch_dir)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", CALL, str(library)], check=False, capture_output=True, text=True)
    assert "x: expected shape (2), got (12)" in done.stdout, (done.returncode, done.stdout, done.stderr)


def test_flags_of_the_environment_come_last(monkeypatch):
    monkeypatch.setenv("LORUN_CXX_FLAGS", "-O1 -fsanitize='address,undefined'")
    asked = ["-O1", "-fsanitize=address,undefined"]
    assert recipe.cxx_flags()[-2:] == asked and recipe.link_flags("torch")[-2:] == asked
    monkeypatch.delenv("LORUN_CXX_FLAGS")
    assert not set(asked) & {*recipe.cxx_flags(), *recipe.link_flags("torch")}
