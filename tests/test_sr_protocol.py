"""The protocols of super-resolution against scipy and against cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage
from sr_help import random_kernels

from lorun_fast.apps.errors import UserError
from lorun_fast.apps.tasks.sr import kernels, protocol

NO_NOISE = np.random.default_rng(0)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[100:177, 150:241])


def as_image(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "kernel",
    [
        kernels.gaussian(1.6),
        kernels.motion(np.random.default_rng(1)),
        *random_kernels((4, 4), (6, 3), (31, 44)),
        np.full((2, 2), 0.25, np.float32),
        np.ones((1, 1), np.float32),
    ],
    ids=["gaussian", "motion", "even", "even-odd", "large", "quarter", "delta"],
)
def test_usrnet_measures_as_scipy_on_uint8(photograph, kernel, scale):
    cell = math.lcm(scale, 8)
    pixels = photograph[: 77 // cell * cell, : 91 // cell * cell]
    want = ndimage.convolve(pixels, kernel.astype(np.float64)[..., None], mode="wrap")[::scale, ::scale]
    assert want.dtype == np.uint8
    x = protocol.original(as_image(photograph), scale)
    y = protocol.measure(x, kernel, scale, 0.0, NO_NOISE, "usrnet")
    np.testing.assert_array_equal(y, as_image(want))


def test_truncation_by_hand():
    # Means of neighbouring columns 10 and 13: 11.5 becomes 11, never 12.
    pixels = np.tile(np.array([10, 13], np.uint8), (8, 4))[None]
    x = protocol.original(np.repeat(pixels, 3, 0).astype(np.float32) / 255, 1)
    kernel = np.array([[0.5, 0.5]], np.float32)
    np.testing.assert_array_equal(
        protocol.measure(x, kernel, 1, 0.0, NO_NOISE, "usrnet"), np.full((3, 8, 8), np.float32(11) / np.float32(255))
    )
    np.testing.assert_allclose(protocol.measure(x, kernel, 1, 0.0, NO_NOISE, "float"), 11.5 / 255, rtol=1e-6)


def test_a_kernel_with_negative_parts_clips():
    pixels = np.tile(np.array([0, 0, 255, 255], np.uint8), (8, 4))[None]
    x = protocol.original(np.repeat(pixels, 3, 0).astype(np.float32) / 255, 1)
    y = protocol.measure(x, np.array([[-0.5, 2.0, -0.5]], np.float32), 1, 0.0, NO_NOISE, "usrnet")
    assert y.min() == 0 and y.max() == 1


def test_truncation_takes_half_a_level_off(photograph):
    x = protocol.original(as_image(photograph), 2)
    kernel = kernels.gaussian(1.2)
    truncated = protocol.measure(x, kernel, 2, 0.0, NO_NOISE, "usrnet")
    exact = protocol.measure(x, kernel, 2, 0.0, NO_NOISE, "float")
    difference = 255 * (exact - truncated).astype(np.float64)
    assert difference.min() > -1e-3 and difference.max() < 1 + 1e-3
    assert difference.mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("scale", "size"), [(2, (72, 88)), (3, (72, 72)), (4, (72, 88))])
def test_the_crop_is_to_multiples_of_lcm_of_s_and_8(photograph, scale, size):
    x = protocol.original(as_image(photograph), scale)
    assert x.shape == (3, *size)
    np.testing.assert_array_equal(x, as_image(photograph)[:, : size[0], : size[1]])


def test_an_image_that_leaves_nothing_to_score_is_refused(photograph):
    with pytest.raises(UserError, match="more than 50 pixels a side after its crop to multiples of 40"):
        protocol.original(as_image(photograph), 5)


def test_psnr_by_hand():
    x = np.zeros((3, 24, 24), np.float32)
    restored = x.copy()
    restored[:, :4] = 1  # inside the border of 2^2 pixels: not counted
    restored[0, 10, 10] = 102 / 255 + 0.3 / 255  # rounds to 102
    restored[1, 10, 10] = -0.4  # clipped to 0
    restored[2, 10, 10] = 1.7  # clipped to 1
    scored = 3 * 16 * 16
    usrnet = ((102 / 255) ** 2 + 1) / scored
    exact = ((102.3 / 255) ** 2 + 1) / scored
    assert protocol.psnr(restored, x, 2, "usrnet") == pytest.approx(-10 * math.log10(usrnet), abs=1e-9)
    assert protocol.psnr(restored, x, 2, "float") == pytest.approx(-10 * math.log10(exact), abs=1e-6)


def test_psnr_of_what_rounds_to_the_original_is_infinite(photograph):
    x = protocol.original(as_image(photograph), 2)
    near = x + np.float32(0.4 / 255) * np.sign(0.5 - x)
    assert protocol.psnr(near, x, 2, "usrnet") == math.inf
    assert protocol.psnr(near, x, 2, "float") < 60


def test_gray_counts_as_three_equal_channels(photograph):
    gray = as_image(photograph)[:1]
    x = protocol.original(gray, 2)
    assert x.shape == (3, 72, 88)
    y = protocol.measure(x, kernels.gaussian(1.0), 2, 0.0, NO_NOISE, "float")
    assert (y == y[:1]).all() and y.std() > 0.1


def test_noise_is_added_after_the_rounding(photograph):
    x = protocol.original(as_image(photograph), 2)
    kernel = kernels.gaussian(1.0)
    clean = protocol.measure(x, kernel, 2, 0.0, NO_NOISE, "usrnet")
    noisy = protocol.measure(x, kernel, 2, 0.1, np.random.default_rng(5), "usrnet")
    assert (noisy - clean).std() == pytest.approx(0.1, rel=0.05)
    assert np.abs(255 * noisy - np.rint(255 * noisy)).mean() > 0.2
    again = protocol.measure(x, kernel, 2, 0.1, np.random.default_rng(5), "usrnet")
    np.testing.assert_array_equal(noisy, again)
