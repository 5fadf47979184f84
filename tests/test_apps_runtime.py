"""Batches, atomic files, metrics, the allocator setting."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lorun_fast.apps import files, metrics, restoring, runtime, tables
from lorun_fast.apps.errors import UserError


def test_batches_hold_equal_keys():
    keys = ["a", "b", "a", "a", "b", "c"]
    assert list(restoring.batches(keys, 2)) == [[0, 2], [3], [1, 4], [5]]
    assert list(restoring.batches([], 2)) == []


def test_names_differ_also_where_case_does_not_count():
    paths = [Path(name) for name in ("a.png", "A.PNG", "b.png", "x/b.png", "b_png.tif", "c", "y/c", "d.e.png")]
    names = files.unique_names(paths)
    assert names == ["a_png", "A_PNG_2", "b_png_2", "b_png_3", "b_png", "c", "c_2", "d.e"]


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), files.replacing(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "before"
    with files.replacing(path) as f:
        f.write(b"after")
        assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(UserError, match="expected to write"), files.replacing(tmp_path / "no" / "a") as f:
        pass


def test_metrics_are_the_fields():
    rng = np.random.default_rng(0)
    original = rng.random((3, 20, 30), dtype=np.float32)
    image = original + 0.3 * rng.standard_normal(original.shape, dtype=np.float32)
    clipped = np.clip(image, 0, 1)
    psnr, ssim = metrics.score(image, original)
    assert abs(psnr - peak_signal_noise_ratio(original, clipped, data_range=1)) < 1e-5
    want = [structural_similarity(original[c] * 255.0, clipped[c] * 255.0, data_range=255) for c in range(3)]
    assert abs(ssim - np.mean(want)) < 1e-5
    assert psnr > metrics.psnr(image, original)  # clipping counts


def test_means_leave_out_what_is_not_finite():
    assert metrics.mean([1.0, None, float("inf"), 3.0]) == 2.0
    assert metrics.mean([None, float("inf")]) is None


def test_tables_align():
    text = tables.table(["name", "dB"], [["a", "1.00"], ["longer", "10.00"]], footer=["mean", "5.50"])
    assert text.splitlines() == [
        "name       dB",
        "------  -----",
        "a        1.00",
        "longer  10.00",
        "------  -----",
        "mean     5.50",
    ]


_FAULTS = """
import resource
import torch
from lorun_fast.apps.runtime import keep_freed_memory

torch.set_num_threads(1)
x = torch.zeros(2**23)

def faults():
    for _ in range(3):
        x + 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        x + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept():
    """A process of its own: the setting is for good. Without it, ten 32 MiB results touch new pages each."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUN"))}
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, env=environment)
    before, answer, after = done.stdout.split()
    assert answer == "True"
    assert 5 * int(after) < int(before), (before, after)


@pytest.mark.parametrize("variable", ["MALLOC_ARENA_MAX", "LD_PRELOAD", "GLIBC_TUNABLES"])
def test_the_users_own_allocator_setting_is_left_alone(variable, monkeypatch):
    def called(*_args):
        raise AssertionError("mallopt must not be looked up")

    monkeypatch.setattr(ctypes, "CDLL", called)
    monkeypatch.setenv(variable, "glibc.malloc.top_pad=1" if variable == "GLIBC_TUNABLES" else "4")
    assert runtime.keep_freed_memory() is False


def test_noise_that_fp32_does_not_hold_is_refused():
    assert runtime.not_negative("0") == 0
    assert runtime.not_negative("25.5") == 25.5
    for text in ("1e300", "-1", "nan", "inf"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=re.escape(f"expected a number from 0 to 1e+30, got '{text}'")
        ):
            runtime.not_negative(text)
