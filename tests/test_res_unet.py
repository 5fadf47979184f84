"""The ResUNet base: sizes, noise map, counts, configuration."""

from __future__ import annotations

import pytest
import torch

import lorun_fast as lf
from lorun_fast.denoisers._inputs import whole_cells


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    assert count(lf.ResUNet(in_channels=4, out_channels=3)) == 588_784
    assert count(lf.ResUNet(channels=(32, 64, 96, 128))) == 1_786_432


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (16, 33)])
def test_any_size(size):
    net = lf.ResUNet(channels=(4, 4, 4), blocks=1)
    z = torch.randn(2, 1, *size)
    assert net(z).shape == z.shape


def test_inside_padding_does_not_reach_an_image_of_whole_cells():
    net = lf.ResUNet(channels=(4, 4), blocks=1).double()
    z = torch.randn(1, 1, 8, 6, dtype=torch.float64)
    odd = z[:, :, :7, :5]
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(net(odd), net(padded)[:, :, :7, :5])


def test_noise_level_map():
    net = lf.ResUNet(in_channels=3, out_channels=3, channels=(4, 4), blocks=1, noise_level=True)
    z = torch.randn(2, 3, 6, 6)
    same = net(z, 0.1)
    torch.testing.assert_close(net(z, torch.tensor([0.1, 0.1])), same)
    assert not torch.allclose(net(z, torch.tensor([0.1, 0.9]))[1], same[1])
    with pytest.raises(ValueError, match="pass sigma"):
        net(z)
    with pytest.raises(ValueError, match="takes no sigma"):
        lf.ResUNet(channels=(4, 4))(torch.randn(1, 1, 4, 4), 0.1)


def test_residual_starts_near_the_identity_and_can_be_left_out():
    z = torch.rand(1, 1, 16, 16)
    assert (lf.ResUNet()(z) - z).abs().max() < 0.1
    with pytest.raises(ValueError, match="residual needs out_channels <= in_channels"):
        lf.ResUNet(in_channels=1, out_channels=3)
    assert lf.ResUNet(in_channels=1, out_channels=3, residual=False)(z).shape == (1, 3, 16, 16)


def test_config_rebuilds():
    net = lf.ResUNet(in_channels=3, out_channels=2, channels=(4, 8), blocks=1, noise_level=True, residual=False)
    again = lf.ResUNet(**net.config())
    again.load_state_dict(net.state_dict())
    z = torch.randn(1, 3, 8, 8)
    assert torch.equal(again(z, 0.2), net(z, 0.2))


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"z: expected \(N, 1, H, W\), got shape \(1, 2, 4, 4\)"):
        lf.ResUNet(channels=(4, 4))(torch.randn(1, 2, 4, 4))


def test_without_blocks_the_skips_remain():
    net, z = lf.ResUNet(channels=(4, 8), blocks=0, residual=False), torch.rand(1, 1, 6, 8)
    x = net.head(z)
    torch.testing.assert_close(net(z), net.tail(net.up[0](net.down[0](x)) + x))


def test_sizes_that_are_filled_up_keep_their_dtype_under_autocast():
    x = torch.rand(1, 2, 5, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        filled = whole_cells(x, 4)
    assert filled.dtype == torch.bfloat16 and filled.shape == (1, 2, 8, 8)
    assert torch.equal(filled[:, :, 5:], filled[:, :, 4:5].expand(1, 2, 3, 8))
