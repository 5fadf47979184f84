"""csrc/check_cuda.py, which CI runs over every CUDA source, notices a spill and a source that does not compile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import check_cuda  # noqa: E402
import recipe  # noqa: E402

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90a'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function '_Z6spillsPf' for 'sm_90a'
ptxas info    : Function properties for _Z6spillsPf
    48 bytes stack frame, 32 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 48 bytes cumulative stack size
"""


def test_report_of_ptxas():
    clean, spills = check_cuda.parse(REPORT)
    assert clean == check_cuda.Kernel("_Z5cleanPf", 40, 0, 0, 0, 2048) and not clean.spills
    assert spills == check_cuda.Kernel("_Z6spillsPf", 32, 48, 32, 16, 0) and spills.spills


def test_every_source_is_checked_for_every_architecture(monkeypatch, tmp_path, capsys):
    seen = []

    def compile_source(source, arch, *_):
        seen.append((source, arch))
        return REPORT.split("ptxas info    : Compiling entry function '_Z6")[0]

    monkeypatch.setattr(recipe, "find_cuda_home", lambda: (tmp_path, "13.0"))
    monkeypatch.setattr(check_cuda, "compile_source", compile_source)
    assert check_cuda.main([]) == 0
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu")}
    assert set(seen) == {(source, arch) for source in sources for arch in ("8.0", "9.0a", "10.0")}
    assert len(sources) >= 3 and "no spills" in capsys.readouterr().out


@pytest.mark.parametrize("report", [REPORT, "", RuntimeError("x.cu does not compile")])
def test_a_spill_or_a_failure_fails(monkeypatch, tmp_path, report):
    def compile_source(*_):
        if isinstance(report, Exception):
            raise report
        return report

    monkeypatch.setattr(recipe, "find_cuda_home", lambda: (tmp_path, "13.0"))
    monkeypatch.setattr(check_cuda, "compile_source", compile_source)
    assert check_cuda.main(["x.cu", "--arch", "9.0a"]) == 1


def test_a_missing_toolkit_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(recipe, "find_cuda_home", lambda: (None, "no CUDA toolkit found"))
    assert check_cuda.main([]) == 2
    assert "no CUDA toolkit found" in capsys.readouterr().err


def test_a_kernel_that_spills(tmp_path):
    if recipe.find_cuda_home()[0] is None:
        pytest.skip("no nvcc here: .ci/cuda-sources installs one")
    # 64 running sums and 32 registers.
    (tmp_path / "spills.cu").write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(const float* __restrict__ q, float* p, int n) {\n"
        "  float sum[64] = {};\n"
        "  for (int k = 0; k < n; ++k) {\n#pragma unroll\n"
        "    for (int i = 0; i < 64; ++i) sum[i] += q[k * 128 + i] * q[k * 128 + 64 + i * 7 % 64] + threadIdx.x;\n  }\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = sum[i];\n}\n"
    )
    assert check_cuda.main([str(tmp_path / "spills.cu"), "--arch", "9.0a"]) == 1
