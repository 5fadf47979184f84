"""lf.CASSI: construction, state, start, norm, layouts of other networks, use inside LoRun."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lorun_fast as lf
from lorun_fast.operators.cassi import shift_bands, unshift_bands


def image(n=2, bands=4, height=5, width=11, dtype=torch.float64, seed=0):
    return torch.randn(n, bands, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rolled_v1(x, step):
    """V1 state by the usual route: pad on the right, then roll each band."""
    wide = nn.functional.pad(x, (0, step * (x.shape[1] - 1)))
    return torch.stack([torch.roll(wide[:, c], c * step, -1) for c in range(x.shape[1])], 1)


@pytest.mark.parametrize("step", [0, 1, 2, 5])
@pytest.mark.parametrize("bands", [1, 4])
def test_v1_and_v2_convert_both_ways(step, bands):
    x = image(bands=bands)
    v1 = shift_bands(x, step)
    assert torch.equal(v1, rolled_v1(x, step))
    noisy = torch.randn_like(v1)  # content outside the windows, as circular rolls leave it
    back = torch.stack([torch.roll(noisy[:, c], -c * step, -1) for c in range(bands)], 1)[..., : x.shape[-1]]
    assert torch.equal(unshift_bands(noisy, step), back)
    assert torch.equal(unshift_bands(v1, step), x)
    sliced = torch.stack([noisy, noisy], -1)[..., 1]
    assert torch.equal(unshift_bands(sliced, step), back)
    op = lf.CASSI(torch.rand(5, 11), bands, step)
    assert torch.equal(op.from_v1(op.to_v1(x)), x)


@pytest.mark.parametrize("step", [0, 2])
def test_v1_conversion_has_gradients(step):
    x = image(1, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: shift_bands(t, step), x)
    v = image(1, 3, 2, 4 + 2 * step).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: unshift_bands(t, step), v)
    assert torch.autograd.gradcheck(lambda t: unshift_bands(t.flip(-1).mT.contiguous().mT, step), v)
    compiled = torch.compile(lambda t: unshift_bands(shift_bands(t, step), step), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("per_band", [False, True])
def test_matches_the_usual_formulas_on_v1(step, per_band):
    x = image()
    mask = torch.rand(*((4,) if per_band else ()), 5, 11, dtype=torch.float64)
    op = lf.CASSI(mask, 4, step)
    phi = op.phi
    assert phi.shape == (4, 5, 11 + 3 * step)
    y = op(x)
    torch.testing.assert_close(y, (rolled_v1(x, step) * phi).sum(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(op.to_v1(op.adjoint(y)), y[:, None] * phi, rtol=1e-13, atol=1e-13)
    phi_s = phi.square().sum(0)
    torch.testing.assert_close(op.energy(), phi_s, rtol=1e-13, atol=1e-13)
    phi_s[phi_s == 0] = 1
    v = rolled_v1(x, step)
    other = torch.rand_like(y)
    v = v + phi * ((other - (v * phi).sum(1)) / (0.3 + phi_s))[:, None]
    torch.testing.assert_close(op.prox(x, other, 0.3), op.from_v1(v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_initial(step):
    op = lf.CASSI(torch.rand(5, 11), 4, step)
    y = torch.randn(2, 5, 11 + 3 * step)
    scale = step / 4 if step else 1 / 4
    want = torch.stack([y[..., c * step : c * step + 11] for c in range(4)], 1) * scale
    got = op.initial(y)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert op.initial(y.bfloat16(), size=(5, 11)).dtype == torch.bfloat16


@pytest.mark.parametrize(("bands", "step", "width"), [(3, 2, 6), (4, 1, 3), (3, 4, 2), (1, 2, 5), (3, 0, 4)])
def test_norm_is_the_largest_singular_value(bands, step, width):
    op = lf.CASSI(torch.rand(bands, 3, width, dtype=torch.float64), step=step)
    basis = torch.eye(bands * 3 * width, dtype=torch.float64).reshape(-1, bands, 3, width)
    matrix = op(basis).flatten(1)
    assert op.norm().ndim == 0
    torch.testing.assert_close(op.norm(), torch.linalg.svdvals(matrix)[0], rtol=1e-12, atol=0)


def test_from_phi_ignores_what_lies_outside_the_windows():
    inside = lf.CASSI(torch.rand(4, 5, 11, dtype=torch.float64), step=2)
    noise = torch.rand(4, 5, 17, dtype=torch.float64)
    window = shift_bands(torch.ones(1, 4, 5, 11, dtype=torch.float64), 2)[0]
    op = lf.CASSI.from_phi(torch.where(window == 1, inside.phi, noise), step=2)
    assert op.bands == 4 and op.step == 2
    assert torch.equal(op.mask, inside.mask)
    assert torch.equal(op.phi, inside.phi)
    x, y = image(), torch.randn(2, 5, 17, dtype=torch.float64)
    assert torch.equal(op.prox(x, y, 0.1), inside.prox(x, y, 0.1))


def test_construction():
    assert lf.CASSI(torch.rand(8, 9)).bands == 28
    assert lf.CASSI(np.random.rand(3, 8, 9)).bands == 3
    assert lf.CASSI(np.random.rand(8, 9)).mask.dtype == torch.float64
    assert lf.CASSI((np.random.rand(8, 9) > 0.5).astype(np.uint8), 3).mask.dtype == torch.float32
    assert "bands=28, step=2" in repr(lf.CASSI(torch.rand(8, 9)))
    mask = torch.rand(8, 9)
    mask[2, 3] = float("nan")
    bad = [
        (ValueError, "mask: expected finite values, got 1 NaN", lambda: lf.CASSI(mask)),
        (ValueError, r"mask: .* for bands=28, or .*, got shape \(3, 8, 9\)", lambda: lf.CASSI(torch.rand(3, 8, 9), 28)),
        (ValueError, r"N, 1 or 5, H, W\), got shape \(2, 3, 8, 9\)", lambda: lf.CASSI(torch.rand(2, 3, 8, 9), 5)),
        (ValueError, "mask: expected a non-empty 2-D or 3-D or 4-D", lambda: lf.CASSI(torch.rand(8))),
        (TypeError, "mask: expected real numbers", lambda: lf.CASSI(torch.rand(8, 9) > 0.5)),
        (TypeError, "mask: expected a tensor or an array", lambda: lf.CASSI("mask.mat")),
        (ValueError, "step: expected at least 0, got -2", lambda: lf.CASSI(torch.rand(8, 9), step=-2)),
        (ValueError, "bands: expected at least 1, got 0", lambda: lf.CASSI(torch.rand(8, 9), 0)),
        (ValueError, r"more than step\*\(L-1\) = 54 columns", lambda: lf.CASSI.from_phi(torch.rand(28, 8, 54))),
    ]
    for kind, message, make in bad:
        with pytest.raises(kind, match=message):
            make()


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("per_band", [False, True])
def test_one_mask_per_sample_is_one_operator_per_sample(per_band, step):
    masks = torch.rand(3, 4 if per_band else 1, 5, 11, dtype=torch.float64)
    op = lf.CASSI(masks, 4, step)
    each = [lf.CASSI(m if per_band else m[0], 4, step) for m in masks]
    x, other, mu = image(3), torch.rand(3, 5, 11 + 3 * step, dtype=torch.float64), torch.rand(3, 1, 1, 1) + 0.1
    for together, alone in (
        (op(x), [o(x[i, None]) for i, o in enumerate(each)]),
        (op.adjoint(other), [o.adjoint(other[i, None]) for i, o in enumerate(each)]),
        (
            op.gradient_step(x, other, 0.3),
            [o.gradient_step(x[i, None], other[i, None], 0.3) for i, o in enumerate(each)],
        ),
        (op.prox(x, other, 0.2), [o.prox(x[i, None], other[i, None], 0.2) for i, o in enumerate(each)]),
        (op.prox(x, other, mu), [o.prox(x[i, None], other[i, None], mu[i]) for i, o in enumerate(each)]),
        (op.initial(other), [o.initial(other[i, None]) for i, o in enumerate(each)]),
        (op.energy(), [o.energy()[None] for o in each]),
        (op.phi, [o.phi[None] for o in each]),
    ):
        assert torch.equal(together, torch.cat(alone))
    assert op.norm() == max(o.norm() for o in each)
    assert torch.equal(lf.CASSI.from_phi(op.phi, step).mask, masks.expand(-1, 4, -1, -1))
    assert f"mask=(3, {'L' if per_band else 1}, H, W), one per sample" in repr(op)
    again = lf.CASSI.from_config(op.config(), op.state_dict())
    assert torch.equal(again(x), op(x))
    with pytest.raises(ValueError, match="mask: expected one per sample, 2 of them, got 3"):
        op(x[:2])
    with pytest.raises(ValueError, match="y: expected 3 samples, one for each mask, got 2"):
        op.initial(other[:2])


def test_a_network_restores_each_sample_behind_its_own_mask():
    """The step size learns, in one call for the batch and in one for each sample alike."""
    net = lf.LoRun(lf.CASSI(torch.rand(16, 16), 4), lf.ResUNet(4, 4, channels=(8, 8), blocks=1), stages=2)
    masks, x = torch.rand(3, 1, 16, 16), torch.rand(3, 4, 16, 16)
    op = lf.CASSI(masks, 4)
    y = op(x)
    together = net(y, op=op)
    together.square().sum().backward()
    gradient, net.step_size.grad = net.step_size.grad, None
    alone = torch.cat([net(y[i, None], op=lf.CASSI(masks[i, 0], 4)) for i in range(3)])
    alone.square().sum().backward()
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(gradient, net.step_size.grad, rtol=1e-4, atol=1e-4)


def test_snapshot_video_is_step_0():
    """Frames add up on one place of the detector, each behind its own mask."""
    masks, frames = torch.rand(8, 5, 7, dtype=torch.float64), torch.rand(2, 8, 5, 7, dtype=torch.float64)
    op = lf.CASSI(masks, step=0)
    torch.testing.assert_close(op(frames), (masks * frames).sum(1))
    y = op(frames)
    v = op.prox(frames.flip(1), y, 0.0)  # the projection onto Phi v = y
    torch.testing.assert_close(op(v), y)


def test_wrong_sizes_name_the_mask():
    op = lf.CASSI(torch.rand(5, 11), 4)
    with pytest.raises(ValueError, match=r"x: expected \(N, L, 5, 11\)"):
        op(torch.rand(1, 4, 6, 11))
    with pytest.raises(ValueError, match=r"y: expected \(N, 5, 17\)"):
        op.initial(torch.rand(1, 5, 15))
    with pytest.raises(ValueError, match=r"size: expected the mask's \(5, 11\)"):
        op.adjoint(torch.rand(1, 5, 17), size=(6, 11))


def test_band_count_of_the_image_must_be_the_operators():
    op = lf.CASSI(torch.rand(5, 11), 4)
    y = torch.rand(1, 5, 15)
    for call in (op, lambda x: op.gradient_step(x, y, 1.0), lambda x: op.prox(x, y, 1.0), op.to_v1, op.from_v1):
        with pytest.raises(ValueError, match="x: expected 4 bands, got 3"):
            call(torch.rand(1, 3, 5, 11))


def test_parameters_stay_wide_and_follow_fp64_images():
    op = lf.CASSI(torch.rand(5, 11), 4)
    assert op.half().bfloat16().mask.dtype == torch.float32
    x = image()
    assert op(x).dtype == torch.float64
    assert op(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = op.gradient_step(x.float(), op(x.float()), 0.5)
    assert z.dtype == torch.float32


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("per_band", [False, True])
def test_config_and_state_rebuild_the_operator(per_band, learn):
    op = lf.CASSI(torch.rand(*((4,) if per_band else ()), 5, 11), 4, 3, learn=learn)
    again = lf.CASSI.from_config(op.config(), op.state_dict())
    x = image(dtype=torch.float32)
    assert torch.equal(op(x), again(x))
    assert isinstance(again.mask, nn.Parameter) == learn
    assert set(op.state_dict()) == {"mask"} and op.mask.dtype == torch.float32


def test_a_learned_mask_gets_its_gradient():
    op = lf.CASSI(torch.rand(5, 11), 4, learn=True)
    x = image(dtype=torch.float32)
    y = op(x)
    op.gradient_step(op.initial(y), y, 0.5).square().sum().backward()
    assert op.mask.grad.shape == (5, 11) and op.mask.grad.abs().max() > 0


def test_network_trains_and_comes_back_from_its_file(tmp_path):
    op = lf.CASSI(torch.rand(16, 16), 4)
    net = lf.LoRun(op, lf.ResUNet(4, 4, channels=(8, 8), blocks=1), stages=2)
    y = op(torch.rand(2, 4, 16, 16))
    net(y).square().mean().backward()
    assert net.step_size.grad.abs().min() > 0
    net.eval()
    lf.save(net, tmp_path / "cassi.safetensors")
    with torch.no_grad():
        assert torch.equal(lf.load(tmp_path / "cassi.safetensors")(y), net(y))


def test_exports():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.op = lf.CASSI(torch.rand(5, 11), 4)

        def forward(self, x, y):
            return self.op.prox(self.op.gradient_step(x, y, 0.5), y, 0.1)

    module, x = Step(), image(dtype=torch.float32)
    y = module.op(x)
    program = torch.export.export(module, (x, y))
    assert torch.equal(program.module()(x, y), module(x, y))


def test_a_mask_that_a_network_makes_under_vmap():
    masks, y = torch.rand(3, 6, 5), torch.rand(3, 1, 6, 8)

    def restored(mask, y):
        return lf.CASSI(mask, bands=4, step=1).adjoint(y)

    together = torch.vmap(restored)(masks, y)
    for i in range(3):
        torch.testing.assert_close(together[i], restored(masks[i], y[i]))
