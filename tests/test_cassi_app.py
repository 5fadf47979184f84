"""measure, restore, evaluate and demo for spectral imaging, against explicit matrices; and what they refuse."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from apps_help import accepted, contents, refused
from cassi_help import BANDS, HEIGHT, STEP, WIDTH, cube, mask, matrix, tiny_network
from PIL import Image
from scipy.io import savemat

import lorun_fast as lf
from lorun_fast.apps import tiling
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.tasks.cassi import colour, cubes, pictures, scores, sensor, synthetic


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_network(tmp_path_factory.mktemp("cassi") / "tiny.safetensors")


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "mask.npy", mask(seed=3))
    np.save(tmp_path / "a.npy", cube(seed=1))
    savemat(tmp_path / "b.mat", {"img": np.moveaxis(cube(seed=2), 0, -1)})
    return tmp_path


def measured(capsys, folder, *more) -> dict[str, np.ndarray]:
    accepted(capsys, "measure", "cassi", *more, "-o", folder / "y.npz")
    with np.load(folder / "y.npz") as loaded:
        return dict(loaded)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("per_band", [False, True])
def test_measurement_is_the_explicit_matrix(step, per_band, files, capsys):
    own = mask(seed=3)
    if per_band:
        own = np.stack([mask(seed=i) for i in range(BANDS)])
        np.save(files / "mask.npy", np.moveaxis(own, 0, -1))
    got = measured(capsys, files, files / "a.npy", files / "b.mat", "--mask", files / "mask.npy", "--step", step)
    phi = matrix(own, BANDS, step)
    for i in range(2):
        want = (phi @ cube(seed=i + 1).ravel()).reshape(HEIGHT, -1)
        np.testing.assert_allclose(got["y"][i], want, rtol=1e-5, atol=1e-6)
    assert np.array_equal(got["mask"], own)
    assert (str(got["task"]), int(got["bands"]), int(got["step"])) == ("cassi", BANDS, step)
    assert got["name"].tolist() == ["a", "b"] and got["size"].tolist() == [[HEIGHT, WIDTH]] * 2


def test_phi_on_the_detector(files, capsys):
    per_band = np.stack([mask(seed=i) for i in range(BANDS)])
    phi = lf.CASSI(torch.from_numpy(per_band), step=STEP).phi.numpy()
    savemat(files / "phi.mat", {"mask_3d_shift": np.moveaxis(phi, 0, -1)})
    got = measured(capsys, files, files / "a.npy", "--mask", files / "phi.mat", "--shifted")
    want = (matrix(per_band, BANDS, STEP) @ cube(seed=1).ravel()).reshape(HEIGHT, -1)
    np.testing.assert_allclose(got["y"][0], want, rtol=1e-5, atol=1e-6)
    line = refused(
        capsys, "measure", "cassi", files / "a.npy", "--mask", files / "mask.npy", "--shifted", "-o", files / "z.npz"
    )
    assert "expected Phi of shape (L, H, W + step*(L-1)) for --shifted, got (12, 16)" in line


def test_windows_of_a_larger_cube_and_corners_of_a_larger_mask(files, capsys):
    big = cube(2 * HEIGHT + 1, WIDTH + 5)
    np.save(files / "big.npy", big)
    options = (files / "big.npy", "--mask", files / "mask.npy")
    got = measured(capsys, files, *options, "--windows", "all")
    assert got["name"].tolist() == ["big_00", "big_10"]
    op = lf.CASSI(torch.from_numpy(mask(seed=3)), BANDS, STEP)
    want = op(torch.from_numpy(np.stack([big[:, :HEIGHT, :WIDTH], big[:, HEIGHT : 2 * HEIGHT, :WIDTH]])))
    np.testing.assert_allclose(got["y"], want.numpy(), rtol=1e-6)
    got = measured(capsys, files, *options, "--windows", "middle")
    want = op(torch.from_numpy(big[None, :, 6 : 6 + HEIGHT, 2 : 2 + WIDTH].copy()))
    np.testing.assert_allclose(got["y"], want.numpy(), rtol=1e-6)
    assert "expected a mask of at least 25 x 21" in refused(capsys, "measure", "cassi", *options, "-o", files / "z.npz")
    np.save(files / "mask.npy", mask(50, 60, seed=4))
    got = measured(capsys, files, *options)
    assert np.array_equal(got["mask"], mask(50, 60, seed=4)[:25, :21])
    np.save(files / "other.npy", cube(7, 9))
    line = refused(capsys, "measure", "cassi", *options[:1], files / "other.npy", *options[1:], "-o", files / "z.npz")
    assert "expected 25 x 21 pixels as the cubes before it" in line


def test_noise_of_a_sensor(files, capsys):
    options = (files / "a.npy", "--mask", files / "mask.npy")
    clean = measured(capsys, files, *options)["y"]
    noisy = measured(capsys, files, *options, "--sensor-noise", "--seed", 1)["y"]
    level = BANDS / STEP / 2048
    np.testing.assert_allclose(noisy / level, np.rint(noisy / level), atol=1e-3)
    # What is brighter than BANDS / STEP saturates.
    assert 0 < abs(noisy - np.clip(clean, 0, BANDS / STEP)).max() < 0.25
    assert np.array_equal(noisy, measured(capsys, files, *options, "--sensor-noise", "--seed", 1)["y"])
    y = torch.full((200_000,), 0.5)
    source = torch.Generator().manual_seed(0)
    exposed = sensor.expose(y, full_scale=1.0, generator=source).double()
    # Binomial(2560, 0.4): mean 1024 levels, variance 614.4.
    assert abs(exposed.mean() * 2048 - 1024) < 0.3
    assert abs(exposed.var() * 2048**2 / 614.4 - 1) < 0.02
    assert sensor.expose(torch.tensor([-1.0, 0.0, 9.0]), 2.0, generator=source).tolist()[:2] == [0.0, 0.0]
    assert sensor.expose(torch.full((99,), 9.0), 2.0, generator=source).max() <= 2.0


def test_measured_and_restored(files, model, capsys):
    """The files of both commands, against the network called directly."""
    measured(capsys, files, files / "a.npy", files / "b.mat", "--mask", files / "mask.npy", "--step", 1)
    out = accepted(capsys, "restore", files / "y.npz", "-o", files / "out", "--model", model, "--cube", "mat")
    assert "4 bands, step 1, mask 12 x 16" in out
    names = {f"{n}{end}" for n in "ab" for end in (".mat", ".png", "_bands.png")}
    assert set(contents(files / "out")) == names
    op = lf.CASSI(torch.from_numpy(mask(seed=3)), BANDS, 1)
    with torch.no_grad():
        want = lf.load(model)(op(torch.from_numpy(cube(seed=2))[None]), op=op)[0].numpy()
    got = cubes.load_variables(files / "out" / "b.mat", "")["img"]
    np.testing.assert_allclose(got, np.moveaxis(want, 0, -1), atol=1e-5)
    with Image.open(files / "out" / "b.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)


def test_a_real_measurement_with_its_own_mask(files, model, capsys):
    """A .mat with y alone, in its own units, and the mask beside it."""
    op = lf.CASSI(torch.from_numpy(mask(seed=3)), BANDS, STEP)
    y = op(torch.from_numpy(cube(seed=1))[None])
    savemat(files / "real.mat", {"meas_real": 0.1 * y[0].numpy()})
    options = (files / "real.mat", "--model", model, "--mask", files / "mask.npy")
    accepted(capsys, "restore", *options, "-o", files / "one", "--scale", 10)
    with torch.no_grad():
        want = lf.load(model)(y, op=op)[0].numpy()
    np.testing.assert_allclose(np.load(files / "one" / "real.npy"), want, atol=1e-5)
    accepted(capsys, "restore", *options, "-o", files / "two", "--scale", "auto")
    brightest = 0.8 * BANDS / STEP / float(y.max())
    with torch.no_grad():
        want = lf.load(model)(y * brightest, op=op)[0].numpy()
    np.testing.assert_allclose(np.load(files / "two" / "real.npy"), want, atol=1e-5)

    savemat(files / "two.mat", {"meas": y[0].numpy(), "other": np.ones((2, 2)), "exposure": 3.0})
    options = ("--model", model, "--mask", files / "mask.npy", "-o", files / "three")
    line = refused(capsys, "restore", files / "two.mat", *options)
    assert "two.mat: expected one variable (or --key), got exposure, meas, other" in line
    assert "expected a variable 'x' (--key), got" in refused(
        capsys, "restore", files / "two.mat", *options, "--key", "x"
    )
    accepted(capsys, "restore", files / "two.mat", *options, "--key", "meas", "--tile", 64)
    (files / "cut.mat").write_bytes((files / "two.mat").read_bytes()[:-100])
    assert "expected a complete .mat file, got" in refused(capsys, "restore", files / "cut.mat", *options)


def test_a_folder_of_real_measurements(files, model, capsys):
    """Each file in its own units, all through one mask, by one command; not over the measurements themselves."""
    op = lf.CASSI(torch.from_numpy(mask(seed=3)), BANDS, STEP)
    real = files / "real"
    real.mkdir()
    ys = {n: op(torch.from_numpy(cube(seed=n)[None])) for n in range(3)}
    for n, y in ys.items():
        savemat(real / f"scene{n}.mat", {"meas": (10.0**n * y[0]).numpy()})
    options = (real, "--model", model, "--mask", files / "mask.npy", "--scale", "auto")
    text = accepted(capsys, "restore", *options, "-o", files / "out", "--batch", 2)
    assert "3 images of 3 files" in text and "4 bands, step 2, mask 12 x 16" in text and "more" not in text
    for n, y in ys.items():
        with torch.no_grad():
            want = lf.load(model)(y * (0.8 * BANDS / STEP / float(y.max())), op=op)[0].numpy()
        np.testing.assert_allclose(np.load(files / "out" / f"scene{n}.npy"), want, atol=1e-4)
    before = contents(real)
    line = refused(capsys, "restore", *options, "-o", real, "--cube", "mat")
    assert f"expected another folder to write into, got {real}: scene0.mat is in use" in line
    assert contents(real) == before


def test_restore_refuses_what_does_not_fit(files, model, capsys):
    measured(capsys, files, files / "a.npy", "--mask", files / "mask.npy")
    with np.load(files / "y.npz") as loaded:
        arrays = dict(loaded)

    def line(*more, **changed):
        np.savez(files / "z.npz", **{k: v for k, v in {**arrays, **changed}.items() if v is not None})
        before = contents(files)
        text = refused(capsys, "restore", files / "z.npz", "-o", files / "out", "--model", model, *more)
        assert contents(files) == before and not (files / "out").exists()
        return text

    assert (
        "expected y of 12 x 22 (rows x columns) for the 12 x 16 mask (its mask), 4 bands and step 2, got 12 x 20"
        in line(y=arrays["y"][:, :, 2:])
    )
    assert "expected y of 10 x 22 (rows x columns) for the 10 x 16 mask" in line(mask=arrays["mask"][:10])
    assert "for the 12 x 16 mask (that of" in line(mask=None, y=arrays["y"][:, 1:])
    assert "expected 4 bands as in" in line(bands=np.int64(5))
    assert "mask: expected (H, W) or (4, H, W), got shape (3, 12, 16)" in line(mask=np.ones((3, HEIGHT, WIDTH)))
    assert "step: expected one whole number of at least 0, got [-1]" in line(step=np.int64(-1))
    assert "expected finite values, got 1 NaN" in line(
        y=np.where(arrays["y"] == arrays["y"].max(), np.nan, arrays["y"])
    )
    assert "expected size (12, 16) as the mask, got (12, 15)" in line(size=np.array([HEIGHT, WIDTH - 1]))
    np.save(files / "small.npy", mask(5, 5))
    assert "for the 5 x 5 mask (--mask)" in line("--mask", files / "small.npy")
    assert "--scale: expected a number" in line("--scale", "0")
    assert "expected 4 numbers, or the first and the last, got 3" in refused_wavelengths(capsys, files, model)


def refused_wavelengths(capsys, files, model):
    return refused(
        capsys, "evaluate", model, files / "a.npy", "--mask", files / "mask.npy", "--wavelengths", "1", "2", "3"
    )


def test_evaluate(files, model, capsys):
    out = accepted(
        capsys, "evaluate", model, files / "b.mat", files / "a.npy", "--mask", files / "mask.npy",
        "--json", files / "scores.json", "--save", files / "pictures", "--mst-psnr",
    )  # fmt: skip
    report = json.loads((files / "scores.json").read_text())
    assert [row["name"] for row in report["cubes"]] == ["b", "a"]
    op = lf.CASSI(torch.from_numpy(mask(seed=3)), BANDS, STEP)
    truth = cube(seed=1)
    with torch.no_grad():
        x = lf.load(model)(op(torch.from_numpy(truth)[None]), op=op)[0].numpy()
    error = ((np.clip(x, 0, 1) - truth).astype(np.float64) ** 2).mean((1, 2))
    row = report["cubes"][1]
    np.testing.assert_allclose(row["psnr_bands"], -10 * np.log10(error), rtol=1e-4)
    np.testing.assert_allclose(row["psnr"], np.mean(row["psnr_bands"]))
    for key in ("psnr", "psnr_mst", "ssim", "sam"):
        np.testing.assert_allclose(report["mean"][key], np.mean([r[key] for r in report["cubes"]]))
    assert "PSNR dB (MST)" in out and f"{row['psnr_mst']:.2f}" in out
    assert set(contents(files / "pictures")) == {f"{n}{end}.png" for n in "ab" for end in ("", "_bands", "_colour")}
    tiled = accepted(capsys, "evaluate", model, files / "a.npy", "--mask", files / "mask.npy", "--tile", 64)
    assert f"{row['psnr']:.2f}" in tiled


@pytest.mark.parametrize("name", ["a$_$b", os.fsdecode(b"\xe9")])
def test_a_file_name_is_a_title(name, tmp_path):
    pictures.overview(tmp_path / "o.png", [("truth", cube())], np.linspace(450, 650, BANDS), name, [(1, 1)])
    assert (tmp_path / "o.png").stat().st_size


def test_cubes_and_pictures_of_others_stay(files, model, capsys):
    (files / "b.png").write_bytes(b"mine")
    measured(capsys, files, files / "a.npy", "--mask", files / "mask.npy")
    before = contents(files)
    line = refused(capsys, "restore", files / "y.npz", "-o", files, "--model", model, "--mask", files / "mask.npy")
    assert f"(--overwrite replaces them), got {files} with a.npy" in line
    line = refused(capsys, "evaluate", model, files / "b.mat", "--mask", files / "mask.npy", "--save", files)
    assert f"(--overwrite replaces them), got {files} with b.png" in line
    assert contents(files) == before


def test_evaluate_refuses_another_band_count_before_it_works(files, model, capsys):
    np.save(files / "c.npy", cube(bands=5))
    line = refused(
        capsys, "evaluate", model, files / "a.npy", files / "c.npy", "--mask", files / "mask.npy",
        "--json", files / "s.json", "--save", files / "pictures",
    )  # fmt: skip
    assert "c.npy: expected 4 bands as (L, H, W) or (H, W, L), got a cube of shape (5, 12, 16)" in line
    assert not (files / "s.json").exists() and not (files / "pictures").exists()


def test_scores():
    truth = np.full((2, 8, 8), 0.5, np.float32)
    off = truth + np.array([0.1, 0.01], np.float32)[:, None, None]
    got = scores.score(off, truth)
    np.testing.assert_allclose(got["psnr_bands"], [20, 40], rtol=1e-5)
    np.testing.assert_allclose(got["psnr"], 30, rtol=1e-5)
    # 0.6 * 256 = 153.6 -> 154 against 128; 0.51 * 256 = 130.56 -> 131 against 128; peak 255.
    np.testing.assert_allclose(got["psnr_mst"], np.mean([20 * np.log10(255 / 26), 20 * np.log10(255 / 3)]), rtol=1e-6)
    np.testing.assert_allclose(got["sam"], np.degrees(np.arctan2(0.6, 0.51) - np.pi / 4), rtol=1e-4)
    assert scores.spectral_angle(0 * truth, truth) == 90
    assert scores.spectral_angle(truth, 0 * truth) is None
    assert scores.score(truth, truth)["psnr"] == np.inf


def test_colours():
    nm = colour.default_wavelengths(28)
    assert nm[0] == 453.5 and nm[-1] == 648 and len(colour.default_wavelengths(31)) == 31
    white = colour.to_srgb(np.ones((28, 1, 1)), nm)
    np.testing.assert_allclose(white, 1, atol=1e-6)
    # The standard observer's tables (CIE 1931) at 450, 550 and 600 nm.
    table = np.array([[0.3362, 0.4334, 1.0622], [0.0380, 0.9950, 0.6310], [1.7721, 0.0087, 0.0008]])
    np.testing.assert_allclose(colour.matching(np.array([450.0, 550.0, 600.0])), table, atol=0.03)
    for wavelength, channel in ((450, 2), (530, 1), (640, 0)):
        assert np.argmax(colour.of_wavelength(wavelength)) == channel
        line = np.exp(-0.5 * ((nm - wavelength) / 8) ** 2)[:, None, None]
        assert np.argmax(colour.to_srgb(line, nm)[:, 0, 0]) == channel


def test_points_and_strip():
    truth = np.zeros((3, 64, 64), np.float32) + 0.01
    truth[0, 8:16, 8:16] = 1.0
    truth[2, 40:48, 40:48] = 0.8
    points = pictures.spread_points(truth, 2)
    assert 8 <= points[0][0] < 16 and 8 <= points[0][1] < 16 and 40 <= points[1][0] < 48 and 40 <= points[1][1] < 48
    assert pictures.spread_points(np.zeros((2, 4, 4)), 2)
    assert pictures.strip(truth, np.array([450.0, 550.0, 650.0])).shape == (3, 64, 3 * 64 + 2 * 2)
    assert pictures.strip(truth[:1, :, :1].repeat(600, 2), np.array([500.0])).shape == (3, 22, 200)


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(7, 24, 8), (24, 24, 8), (25, 24, 8), (32, 24, 8), (101, 40, 16), (321, 128, 16)]
)
def test_tiles_keep_every_pixel_once_and_see_beyond_it(length, tile, overlap):
    cuts = tiling.cuts(length, tile, overlap)
    assert [p for _, (first, end) in cuts for p in range(first, end)] == list(range(length))
    for (first, end), (kept, kept_end) in cuts:
        assert first % tiling.CELL == 0 and first >= 0 and end <= length
        assert end - first == min(tile, length) or (end == length and tile < end - first < tile + tiling.CELL)
        assert kept - first >= overlap or kept == 0
        assert end - kept_end >= overlap or kept_end == length


def test_tiles_give_what_the_whole_image_gives():
    """A convolutional denoiser that sees 5 pixels far, 8 pixels of overlap: no difference but rounding."""
    op = lf.CASSI(torch.from_numpy(mask(40, 50)), BANDS, STEP)
    net = lf.LoRun(op, lf.ResCNN(BANDS, BANDS, channels=4, blocks=1), stages=3, sharing="tied", step_size=0.3).eval()
    y = op(torch.from_numpy(cube(40, 50))[None])
    with torch.no_grad():
        torch.testing.assert_close(tiling.Tiled(net, 24, 8)(y), net(y), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="--tile: expected at least 40 pixels, got 39"):
        tiling.Tiled(net, 39)


@pytest.mark.parametrize("tile", [48, 53])
def test_tiles_see_the_cells_of_the_whole_image(tile):
    """A denoiser that reduces its input, at a length that neither the cell nor the tile divides."""
    denoiser = lf.ResUNet(BANDS, BANDS, channels=(4, 4, 4, 4), blocks=1)
    op = lf.CASSI(torch.from_numpy(mask(40, 93)), BANDS, STEP)
    net = lf.LoRun(op, denoiser, stages=1, sharing="tied").eval()
    y = op(torch.from_numpy(cube(40, 93))[None])
    with torch.no_grad():
        z = net.data_update(0, op.initial(y), y, op, None)
        correction = net(y) - z
        difference = tiling.Tiled(net, tile)(y) - net(y)
    assert difference.abs().max() < 0.02 * correction.abs().max()


def test_synthetic_cube():
    made = synthetic.cube(40, 32)
    assert made.shape == (28, 40, 32) and made.min() >= 0 and made.max() == 1
    assert np.linalg.matrix_rank(made.reshape(28, -1), tol=1e-3 * np.linalg.norm(made)) <= 3
    curvature = np.abs(np.diff(made, 2, axis=0)).max()
    assert curvature < 0.2


def test_demo(model, capsys, tmp_path):
    out = accepted(capsys, "demo", "cassi", "--model", model, "-o", tmp_path / "demo")
    assert set(contents(tmp_path / "demo")) == {
        "comparison.png", "cassi_bands.png", "cassi_colour.png", "cassi.npy",
    }  # fmt: skip
    truth = synthetic.cube(HEIGHT, WIDTH, colour.default_wavelengths(BANDS))
    psnr = scores.score(np.load(tmp_path / "demo" / "cassi.npy"), truth)["psnr"]
    assert f"{psnr:.2f}" in out.split("restored")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "zeros.npy"], "zeros.npy: expected a mask with some values other than zero, got none"),
        (["--mask", "absent.mat"], "expected a mask (.mat, .npy or .npz), got absent.mat: no such file"),
        ([], "expected one of --mask and --model, got neither"),
        (["--step", "-1"], "--step: expected a whole number of at least 0, got '-1'"),
        (["--bands", "7"], "expected 7 bands as (L, H, W) or (H, W, L), got a cube of shape (4, 12, 16)"),
        (["--model", "cs-25"], "--model: expected a network for task 'cassi', got cs-25 for 'cs'"),
    ],
)
def test_measure_refuses(arguments, message, files, capsys):
    np.save(files / "zeros.npy", np.zeros((HEIGHT, WIDTH)))
    arguments = [files / "zeros.npy" if a == "zeros.npy" else a for a in arguments]
    before = contents(files)
    command = ("measure", "cassi", files / "a.npy", "-o", files / "y.npz")
    assert message in refused(capsys, *command, *arguments)
    assert refused(capsys, *command, "--mask", files).endswith(f"got {files}")  # which is there, but no file
    assert contents(files) == before
