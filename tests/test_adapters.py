"""The adapter algebra against dense matrices built by hand, and the rank rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from lorun_fast import adapters


@pytest.mark.parametrize(
    ("in_", "out", "gamma", "expected"),
    [
        (64, 64, 10, 7),
        (16, 32, 10, 2),
        (30, 30, 10, 3),
        (1, 16, 10, 1),
        (10, 10, 100, 10),
        (7, 100, 1, 1),
        (250, 250, 64.4, 161),
        (8, 8, 1e-9, 1),
    ],
)
def test_rank_rule(in_, out, gamma, expected):
    assert adapters.rank(in_, out, gamma) == expected


@pytest.mark.parametrize("gamma", [0, -1, float("nan"), "10", None])
def test_rank_rejects_what_is_not_a_positive_percentage(gamma):
    with pytest.raises(ValueError, match="gamma: expected a positive percentage"):
        adapters.rank(8, 8, gamma)


@pytest.mark.parametrize("gamma", [100.1, 1000, float("inf")])
def test_no_rank_is_higher_than_the_layer(gamma):
    with pytest.raises(ValueError, match=f"gamma: expected at most 100, .* got {gamma}"):
        adapters.rank(8, 8, gamma)


def test_loralib_convolution_is_the_reshaped_product():
    out, in_, k, r = 4, 3, 3, 2
    (down_shape, up_shape) = adapters.factor_shapes((out, in_, k, k), r, "loralib")
    assert (down_shape, up_shape) == ((r * k, in_ * k), (out * k, r * k))
    down, up = torch.randn(down_shape, dtype=torch.float64), torch.randn(up_shape, dtype=torch.float64)
    got = adapters.delta(down, up, (out, in_, k, k))
    expected = torch.zeros(out, in_, k, k, dtype=torch.float64)
    for o, i, u, v in itertools.product(range(out), range(in_), range(k), range(k)):
        flat = ((o * in_ + i) * k + u) * k + v
        row, column = divmod(flat, in_ * k)
        expected[o, i, u, v] = sum(up[row, j] * down[j, column] for j in range(r * k))
    torch.testing.assert_close(got, expected)


def test_peft_convolution_is_a_convolution_then_a_1x1():
    down, up = torch.randn(2, 3, 3, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64)
    got = torch.nn.functional.conv2d(x, adapters.delta(down, up, (5, 3, 3, 3)))
    low = torch.nn.functional.conv2d(x, down)
    torch.testing.assert_close(got, torch.nn.functional.conv2d(low, up[:, :, None, None]))


def test_peft_transposed_convolution_is_a_transposed_convolution_then_a_1x1():
    (down_shape, up_shape) = adapters.factor_shapes((3, 5, 2, 2), 2, "peft", transposed=True)
    down, up = torch.randn(down_shape, dtype=torch.float64), torch.randn(up_shape, dtype=torch.float64)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    got = torch.nn.functional.conv_transpose2d(x, adapters.delta(down, up, (3, 5, 2, 2), transposed=True), stride=2)
    low = torch.nn.functional.conv_transpose2d(x, down, stride=2)
    torch.testing.assert_close(got, torch.nn.functional.conv2d(low, up[:, :, None, None]))


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("weight_shape", [(6, 4), (6, 4, 3, 3)])
def test_stacked_factors_give_one_update_per_stage(form, weight_shape):
    down_shape, up_shape = adapters.factor_shapes(weight_shape, 2, form)
    down, up = torch.randn(3, *down_shape), torch.randn(3, *up_shape)
    stacked = adapters.delta(down, up, weight_shape)
    assert stacked.shape == (3, *weight_shape)
    for k in range(3):
        torch.testing.assert_close(stacked[k], adapters.delta(down[k], up[k], weight_shape))


def test_grouped_loralib_factors_fit_the_grouped_weight():
    down_shape, up_shape = adapters.factor_shapes((8, 2, 3, 3), 2, "loralib", groups=4)
    assert (down_shape, up_shape) == ((6, 24), (6, 6))
    assert adapters.delta(torch.randn(down_shape), torch.randn(up_shape), (8, 2, 3, 3)).shape == (8, 2, 3, 3)


def test_what_a_form_cannot_express_raises():
    with pytest.raises(ValueError, match=r"'peft' cannot express groups=2"):
        adapters.factor_shapes((4, 2, 3, 3), 1, "peft", groups=2)
    with pytest.raises(ValueError, match="needs a square kernel, got 3x5"):
        adapters.factor_shapes((4, 2, 3, 5), 1, "loralib")
    with pytest.raises(ValueError, match="form: expected one of loralib, peft, got 'dora'"):
        adapters.factor_shapes((4, 2), 1, "dora")
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        adapters.factor_shapes((4, 2), 0, "peft")


def test_merging_is_fp32_inside_under_autocast_and_for_half_weights():
    weight = torch.randn(8, 4, 3, 3)
    down, up = torch.randn(6, 12), torch.randn(24, 6)
    exact = weight.double() + 0.5 * adapters.delta(down.double(), up.double(), weight.shape)
    with torch.autocast("cpu", torch.bfloat16):
        merged = adapters.merged_weight(weight, down, up, 0.5)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-5)
    half = adapters.merged_weight(weight.bfloat16(), down.bfloat16(), up.bfloat16(), 0.5)
    inside = weight.bfloat16().float() + 0.5 * adapters.delta(
        down.bfloat16().float(), up.bfloat16().float(), weight.shape
    )
    assert torch.equal(half, inside.bfloat16())
