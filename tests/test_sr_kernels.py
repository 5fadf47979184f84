"""Kernel files of users: what is read, what is refused."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from sr_help import random_kernels

from lorun_fast.apps.errors import UserError
from lorun_fast.apps.tasks.sr import kernels

SIZES = ((5, 5), (4, 7), (9, 3))


def cell(parts) -> np.ndarray:
    array = np.empty((1, len(parts)), dtype=object)
    for i, part in enumerate(parts):
        array[0, i] = part
    return array


def assert_same(found, want):
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_matlab_files(tmp_path):
    want = random_kernels(*SIZES)
    savemat(tmp_path / "cell.mat", {"kernels": cell(want)})
    assert_same(kernels.load(tmp_path / "cell.mat"), want)
    savemat(tmp_path / "matrix.mat", {"PSF": want[1].astype(np.float64)})
    assert_same(kernels.load(tmp_path / "matrix.mat"), want[1:2])
    stack = random_kernels((4, 7), (4, 7), (4, 7))
    savemat(tmp_path / "stack.mat", {"k": np.stack(stack, axis=-1), "other": np.zeros(3)})
    assert_same(kernels.load(tmp_path / "stack.mat"), stack)
    savemat(tmp_path / "two.mat", {"a": want[0], "b": want[1]})
    assert_same(kernels.load(tmp_path / "two.mat", "b"), want[1:2])


def test_matlab_7_3_files_are_transposed_and_may_hold_cells(tmp_path):
    want = random_kernels(*SIZES)
    with h5py.File(tmp_path / "new.mat", "w") as f:
        references = f.create_dataset("kernels", (len(want), 1), dtype=h5py.ref_dtype)
        for i, kernel in enumerate(want):
            references[i, 0] = f.create_dataset(f"#refs#/{'abc'[i]}", data=kernel.T).ref
        f["single"] = want[1].T
    assert_same(kernels.load(tmp_path / "new.mat"), want)
    assert_same(kernels.load(tmp_path / "new.mat", "single"), want[1:2])


def test_numpy_files(tmp_path):
    want = random_kernels((4, 7), (4, 7))
    np.save(tmp_path / "one.npy", want[0])
    assert_same(kernels.load(tmp_path / "one.npy"), want[:1])
    np.save(tmp_path / "many.npy", np.stack(want))
    assert_same(kernels.load(tmp_path / "many.npy"), want)
    np.savez(tmp_path / "named.npz", first=want[0], kernel=want[1])
    assert_same(kernels.load(tmp_path / "named.npz"), want[1:])
    assert_same(kernels.load(tmp_path / "named.npz", "first"), want[:1])


def test_a_picture_of_a_kernel_is_divided_by_its_sum(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "k.png")
    (kernel,) = kernels.load(tmp_path / "k.png")
    np.testing.assert_allclose(kernel, levels / levels.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a.npy", np.full((3, 3), np.nan), "expected finite values, got 9 NaN"),
        ("a.npy", np.zeros((3, 3)), "expected some values other than zero"),
        ("a.npy", np.ones(3), r"expected a matrix, got shape \(3,\)"),
        ("a.npy", np.ones((3, 3)) > 0, "expected real numbers, got bool"),
        ("a.npy", np.array([{}], dtype=object), "plain arrays"),
        ("a.npz", {"a": np.ones((2, 2)), "b": np.ones((2, 2))}, "expected one variable, or one named kernels"),
        ("a.mat", {"a": np.ones((2, 2)), "b": np.ones((2, 2))}, "expected one variable, or one named kernels"),
        ("a.mat", {"kernels": cell([np.ones((2, 2)), np.full((2, 2), np.inf)])}, "kernel 2: expected finite values"),
        ("a.mat", b"MATLAB 5.0 MAT-file, cut off", "expected a complete .mat file"),
        ("a.png", b"nothing", "not an image"),
        ("a.txt", b"1 2", "expected a file of kernels"),
        ("a.mat", None, "no such file"),
    ],
)
def test_what_is_refused(tmp_path, name, values, message):
    path = tmp_path / name
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif isinstance(values, dict):
        savemat(path, values) if path.suffix == ".mat" else np.savez(path, **values)
    elif values is not None:
        np.save(path, values)
    with pytest.raises(UserError, match=message):
        kernels.load(path)


def test_a_missing_variable_is_named(tmp_path):
    savemat(tmp_path / "a.mat", {"k": np.ones((2, 2))})
    with pytest.raises(UserError, match=r"expected a variable .x.*got k"):
        kernels.load(tmp_path / "a.mat", "x")


def test_normalising():
    kernel = np.array([[1.0, 2.0], [3.0, -1.0]], dtype=np.float32)
    np.testing.assert_allclose(kernels.normalised(kernel), kernel / 5, rtol=1e-6)
    with pytest.raises(UserError, match="a kernel whose sum is not zero"):
        kernels.normalised(np.array([[1.0, -1.0]], dtype=np.float32))
