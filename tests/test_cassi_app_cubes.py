"""Spectral cubes and masks from files: every format, orientation, scale; and what is refused, in one line."""

from __future__ import annotations

import json
import lzma
import time
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from apps_help import contents, refused
from PIL import Image
from scipy.io import savemat

from lorun_fast.apps.errors import UserError
from lorun_fast.apps.tasks.cassi import cubes, scenes

L, H, W = 3, 6, 8


@pytest.fixture
def cube() -> np.ndarray:
    return np.random.default_rng(0).random((L, H, W)).astype(np.float32)


def write_hdf5(path, **arrays):
    """As MATLAB 7.3 does: columns first, a 512-byte header before the HDF5 data."""
    with h5py.File(path, "w", userblock_size=512) as f:
        for name, values in arrays.items():
            f[name] = np.asarray(values).T
    with path.open("r+b") as f:
        f.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def write_bands(folder, planes):
    folder.mkdir(parents=True)
    for i, plane in enumerate(planes):
        Image.fromarray(plane).save(folder / f"scene_{i + 9}.png")  # 9, 10, 11: by number, not by letter


WRITERS = {
    "v5.mat": lambda path, cube: savemat(path, {"img": np.moveaxis(cube, 0, -1)}),
    "v5-compressed.mat": lambda path, cube: savemat(path, {"img": np.moveaxis(cube, 0, -1)}, do_compression=True),
    "v5-other-name.mat": lambda path, cube: savemat(path, {"x_bands_first": cube, "exposure": 3.0}),
    "v7.3.mat": lambda path, cube: write_hdf5(path, img=np.moveaxis(cube, 0, -1)),
    "plain.npy": np.save,
    "hwl.npy": lambda path, cube: np.save(path, np.moveaxis(cube, 0, -1)),
    "fortran.npy": lambda path, cube: np.save(path, np.asfortranarray(cube)),
    "keyed.npz": lambda path, cube: np.savez(path, cube=cube, mask=np.ones((H, W))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(name, cube, tmp_path):
    WRITERS[name](tmp_path / name, cube)
    read = cubes.load_cube(tmp_path / name, bands=L)
    assert np.array_equal(read.values, cube)
    assert read.values.dtype == np.float32 and read.values.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(("dtype", "peak"), [(np.uint8, 255), (np.uint16, 65535)])
def test_integers_are_divided_by_their_largest_value(dtype, peak, cube, tmp_path):
    levels = np.rint(cube * peak).astype(dtype)
    np.save(tmp_path / "a.npy", levels)
    write_bands(tmp_path / "bands", levels)
    Image.new("RGB", (W, H), "red").save(tmp_path / "bands" / "preview.png")
    for path in (tmp_path / "a.npy", tmp_path / "bands"):
        np.testing.assert_allclose(cubes.load_cube(path, bands=L).values, levels / peak, rtol=1e-6)
    np.testing.assert_allclose(
        cubes.load_cube(tmp_path / "a.npy", peak=peak / 0.5).values, levels * 0.5 / peak, rtol=1e-6
    )


def test_orientation(tmp_path):
    def shape(array, **how):
        np.save(tmp_path / "a.npy", np.zeros(array))
        return cubes.load_cube(tmp_path / "a.npy", **how).values.shape

    assert shape((4, 8, 6), bands=4) == (4, 8, 6)
    assert shape((8, 6, 4), bands=4) == (4, 8, 6)
    assert shape((8, 6, 9), bands=9) == (9, 8, 6)  # the band count decides, not the length
    assert shape((8, 6, 4)) == shape((4, 8, 6)) == (4, 8, 6)
    assert shape((4, 6, 4), axes="hwl") == (4, 4, 6)
    for how in ({}, {"bands": 4}):
        with pytest.raises(UserError, match=r"expected --axes lhw or hwl for a cube of shape \(4, 6, 4\), got neither"):
            shape((4, 6, 4), **how)
    with pytest.raises(
        UserError, match=r"expected 5 bands as \(L, H, W\) or \(H, W, L\), got a cube of shape \(4, 8, 6\)"
    ):
        shape((4, 8, 6), bands=5)
    with pytest.raises(UserError, match="expected 8 bands, got 4"):
        shape((4, 6, 8), bands=8, axes="lhw")


def test_masks(tmp_path):
    mask = np.random.default_rng(0).random((H, W)).astype(np.float32)
    savemat(tmp_path / "a.mat", {"mask": mask, "other": mask})
    write_hdf5(tmp_path / "b.mat", mask=mask)
    np.save(tmp_path / "c.npy", mask)
    np.savez(tmp_path / "d.npz", whatever=mask)
    for name in ("a.mat", "b.mat", "c.npy", "d.npz"):
        assert np.array_equal(cubes.load_mask(tmp_path / name), mask), name
    Image.fromarray((mask > 0.5).astype(np.uint8) * 255).save(tmp_path / "e.png")
    assert np.array_equal(cubes.load_mask(tmp_path / "e.png"), mask > 0.5)
    savemat(tmp_path / "f.mat", {"mask_3d_shift": np.stack([mask] * L, -1)})
    assert cubes.load_mask(tmp_path / "f.mat", bands=L).shape == (L, H, W)
    savemat(tmp_path / "g.mat", {"one": mask, "two": mask})
    assert np.array_equal(cubes.load_mask(tmp_path / "g.mat", "two"), mask)
    with pytest.raises(
        UserError, match=r"expected one variable with 2 or 3 axes \(or --mask-key\), got one \(6, 8\), two"
    ):
        cubes.load_mask(tmp_path / "g.mat")
    with pytest.raises(UserError, match=r"expected a variable 'three' \(--mask-key\), got one, two"):
        cubes.load_mask(tmp_path / "g.mat", "three")


def truncated(path, cube):
    savemat(path, {"img": np.moveaxis(cube, 0, -1)})
    path.write_bytes(path.read_bytes()[:-200])


def truncated_hdf5(path, cube):
    write_hdf5(path, img=np.moveaxis(cube, 0, -1))
    path.write_bytes(path.read_bytes()[:1200])


def with_nan(path, cube):
    cube[1, 2, 3] = np.nan
    np.save(path, cube)


REFUSED = {
    "truncated.mat": (truncated, "expected a complete .mat file, got"),
    "truncated73.mat": (truncated_hdf5, "expected a complete .mat file, got"),
    "empty.mat": (lambda path, cube: path.write_bytes(b""), "expected a complete .mat file, got"),
    "nan.npy": (with_nan, "expected finite values, got 1 NaN or infinite of 144"),
    "loud.npy": (lambda path, cube: np.save(path, cube * 900), "expected values in [0, 1] (--peak VALUE names what"),
    "flat.npy": (lambda path, cube: np.save(path, cube[0]), "expected 3 axes, got shape (6, 8)"),
    "text.npy": (lambda path, cube: np.save(path, cube.astype(str)), "expected real numbers, got <U"),
    "objects.npy": (lambda path, cube: np.save(path, np.array([{}]), allow_pickle=True), "holds Python objects"),
    "two.npz": (
        lambda path, cube: np.savez(path, a=cube, b=cube),
        "expected one variable with 3 axes (or --key), got a (3",
    ),
    "cube.txt": (lambda path, cube: path.write_text("1 2 3"), "expected a spectral cube (.mat, .npy or .npz), got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(name, cube, tmp_path, capsys):
    write, message = REFUSED[name]
    write(tmp_path / name, cube)
    np.save(tmp_path / "mask.npy", np.ones((H, W)))
    before = contents(tmp_path)
    line = refused(
        capsys, "measure", "cassi", tmp_path / name, "--mask", tmp_path / "mask.npy", "-o", tmp_path / "y.npz"
    )
    assert message in line and name in line
    assert contents(tmp_path) == before


def test_band_images_that_do_not_fit(tmp_path):
    write_bands(tmp_path / "a", np.zeros((2, H, W), np.uint8))
    Image.new("L", (W, H + 1)).save(tmp_path / "a" / "scene_12.png")
    with pytest.raises(UserError, match=r"scene_12.png: expected a band of \(6, 8\) pixels as before, got \(7, 8\)"):
        cubes.load_cube(tmp_path / "a")
    write_bands(tmp_path / "b", np.zeros((2, H, W), np.uint8))
    with pytest.raises(UserError, match="expected 3 bands, got 2 band images"):
        cubes.load_cube(tmp_path / "b", bands=3)


def test_find(cube, tmp_path):
    for name in ("b.npy", "a.npy"):
        np.save(tmp_path / name, cube)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "._b.npy").write_text("of macOS")
    write_bands(tmp_path / "many" / ".trash", np.zeros((2, H, W), np.uint8))
    write_bands(tmp_path / "many" / "x" / "x_ms", np.zeros((2, H, W), np.uint8))
    write_bands(tmp_path / "many" / "y", np.zeros((2, H, W), np.uint8))
    (tmp_path / "none").mkdir()
    assert [p.name for p in cubes.find_cubes([tmp_path, tmp_path / "a.npy"])] == ["a.npy", "b.npy"]
    assert [p.name for p in cubes.find_cubes([tmp_path / "many"])] == ["x_ms", "y"]
    with pytest.raises(UserError, match=r"or band images in .*, got none"):
        cubes.find_cubes([tmp_path / "none"])
    with pytest.raises(UserError, match="no such file"):
        cubes.find_cubes([tmp_path / "absent"])


@pytest.mark.parametrize("kind", ["npy", "mat"])
def test_saved_cubes_are_read_again(kind, cube, tmp_path):
    path = cubes.save_cube(tmp_path / "a.b", cube, kind)
    assert path.name == f"a.b.{kind}"
    assert np.array_equal(cubes.load_cube(path, bands=L).values, cube)


def packed(folder, codes, peak=0.5, bands=(500, 520, 560)):
    """A scene as scenes.companded reads it."""
    meta = {"bands_nm": bands, "scenes": {"s": {"peak": peak}}}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "train").mkdir()
    with lzma.open(folder / "train" / "s.npy.xz", "wb") as f:
        np.save(f, np.diff(codes, axis=0, prepend=np.uint8(0)))
    return folder / "train" / "s.npy.xz"


def test_companded_scenes(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (3, H, W), dtype=np.uint8)
    path = packed(tmp_path, codes)
    scene = scenes.companded(path, np.array([490.0, 510.0, 560.0]))
    values = (codes / 255.0) ** 2 * 0.5
    want = np.stack([values[0], (values[0] + values[1]) / 2, values[2]])
    np.testing.assert_allclose(scene.crop(1, 2, 4, 5), want[:, 1:5, 2:7], rtol=1e-6, atol=1e-7)
    read = cubes.load_cube(path, bands=3)  # 400, 550, 700 nm
    assert read.name == "s"
    np.testing.assert_allclose(
        read.values, np.stack([values[0], 0.25 * values[1] + 0.75 * values[2], values[2]]), atol=1e-6
    )
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"expected a scene that .* describes, got .*s\.npy\.xz"):
        scenes.companded(path, np.array([500.0]))


def test_quantised_scenes(cube):
    scene = scenes.quantised(0.7 * cube)
    np.testing.assert_allclose(scene.crop(0, 0, H, W), 0.7 * cube, atol=0.7 / 65535)
    assert not scenes.quantised(0 * cube).crop(0, 0, H, W).any()


def test_library_holds_what_fits_and_the_sampler_draws_from_a_window_of_it(cube):
    reads = []

    def read(path):
        reads.append(path)
        return scenes.quantised(np.full((2, 8, 8), (path + 1) / 8, np.float32))

    size = 2 * 8 * 8 * 2
    library = scenes.Library(range(6), read, memory=2 * size)
    sampler = scenes.CropSampler(library, (4, 4), batch=2, seed=0, mosaic=0.5, window=10)
    first = [sampler(step) for step in range(30)]
    assert len(reads) <= 1 + 3 * 2 + 2 and len(library._held) <= 2
    again = scenes.CropSampler(scenes.Library(range(6), read, memory=100 * size), (4, 4), 2, 0)
    assert len({float(v) for step in range(40) for v in again(step)[:, 0, 0, 0]}) == 6
    reads.clear()
    fresh = scenes.CropSampler(scenes.Library(range(6), read, memory=2 * size), (4, 4), 2, 0, mosaic=0.5, window=10)
    assert np.array_equal(fresh(29), first[29])  # a function of seed and step alone, whatever was drawn before


def test_a_library_lets_go_of_the_oldest_scene_alone():
    read = []

    def scene(index):
        read.append(index)
        return scenes.quantised(np.ones((2, 4, 4 * (1 + index // 3)), np.float32))

    library = scenes.Library(range(6), scene, memory=3 * scene(0).codes.nbytes)
    read.clear()
    for index in (0, 1, 2, 0, 4, 4, 0, 1):  # the fifth, twice as large, takes the place of the second and third
        assert library[index].width == (8 if index == 4 else 4)
    assert read == [0, 1, 2, 4, 1]


def test_threads_share_a_library():
    """Each scene is read once, however many ask for it meanwhile."""
    read = []

    def slowly(index):
        read.append(index)
        time.sleep(0.02)
        return scenes.quantised(np.ones((2, 4, 4)) * (index + 1))

    library = scenes.Library([0, 1], slowly, 2**20)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(library.__getitem__, [0, 1, 0, 1] * 4))
    assert sorted(read) == [0, 1]
    assert all(scene is library[index] for index, scene in zip([0, 1, 0, 1] * 4, found, strict=True))


def test_crops_are_turned_and_mosaics_have_four_parts():
    ramp = np.arange(1, 1 + 2 * 16 * 16, dtype=np.float32).reshape(2, 16, 16) / 600
    library = scenes.Library([0], lambda _: scenes.quantised(ramp), 2**20)
    sampler = scenes.CropSampler(library, (4, 6), 1, 0, mosaic=0.0)
    steps = set()
    for step in range(60):
        crop = np.rint(sampler(step)[0] * 600)
        assert crop.shape == (2, 4, 6)
        np.testing.assert_array_equal(crop[1] - crop[0], 256)
        steps.add((crop[0, 1, 0] - crop[0, 0, 0], crop[0, 0, 1] - crop[0, 0, 0]))
    assert steps == {(a, b) for a in (16, -16) for b in (1, -1)} | {(b, a) for a in (16, -16) for b in (1, -1)}
    flat = [scenes.quantised(np.full((1, 16, 16), (i + 1) / 300, np.float32)) for i in range(255)]
    many = scenes.Library(range(255), lambda i: flat[i], 2**20)
    mosaic = scenes.CropSampler(many, (4, 6), 1, 0, mosaic=1.0)(0)[0, 0]
    parts = {float(mosaic[i : i + 2, j : j + 3].min()) for i in (0, 2) for j in (0, 3)}
    assert len(parts) == 4 and {float(v) for v in mosaic.ravel()} == parts
    with pytest.raises(UserError, match="expected scenes of at least 20 x 20 pixels, got 16 x 16"):
        scenes.CropSampler(library, (20, 20), 1, 0, mosaic=0.0)
    mixed = scenes.Library([16, 8], lambda side: scenes.quantised(ramp[:, :side]), 2**20)
    sampler = scenes.CropSampler(mixed, (12, 12), 1, 0, mosaic=0.0)
    with pytest.raises(UserError, match="expected scenes of at least 12 x 12 pixels, got 8 x 16"):
        [sampler(step) for step in range(20)]
