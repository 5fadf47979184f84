"""Our operators and stages inside deepinv, against deepinv's own solvers and against LoRun."""

from __future__ import annotations

import copy

import pytest
import torch
from optional_packages import interop_module
from own_operator_help import Coils, Inpainting
from torch import nn

import lorun_fast as lf
from lorun_fast.operators import OPERATORS

interop, deepinv = interop_module("deepinv")

L2 = deepinv.optim.data_fidelity.L2
PGD = deepinv.optim.PGD


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# One entry per operator that the library has: name -> (operator, image shape).
OPERATOR_CASES = {
    "BlockCS": (lambda: lf.BlockCS.gaussian(0.3, 8, dtype=torch.float64), (2, 1, 16, 24)),
    "CASSI": (lambda: lf.CASSI(draw(12, 10).abs(), bands=5, step=2), (2, 5, 12, 10)),
    "BlurDownsample": (lambda: lf.BlurDownsample(draw(5, 4).abs(), scale=2), (2, 3, 12, 10)),
}


@pytest.fixture(params=list(OPERATORS))
def case(request):
    make, shape = OPERATOR_CASES[request.param]
    return make(), draw(*shape, seed=1)


def test_the_physics_is_the_operator(case):
    op, x = case
    physics = interop.physics(op)
    y = physics.A(x)
    assert y.ndim == 4
    expected = op(x)
    assert torch.equal(y.reshape(expected.shape), expected)
    assert torch.equal(physics(x), y)
    assert torch.equal(physics.A_adjoint(y), op.adjoint(expected))
    assert torch.equal(physics.initial(y), op.initial(expected))


def test_adjointness_and_norm_by_deepinv_itself(case):
    op, x = case
    physics = interop.physics(op)
    assert abs(float(physics.adjointness_test(x))) < 1e-10
    estimate = physics.compute_sqnorm(x[:1], max_iter=2000, tol=1e-10, verbose=False)
    exact = op.norm(x.shape[-2:]) if isinstance(op, lf.BlurDownsample) else physics.norm()
    assert float(estimate) == pytest.approx(float(exact) ** 2, rel=1e-3)


def test_measurements_of_three_axes_stay_as_they_are():
    """Those of CASSI alone have no channel axis."""

    class Rows(lf.SensingOperator):
        def __init__(self, matrix):
            super().__init__()
            self.register_buffer("matrix", matrix)

        def forward(self, x):
            return x.flatten(2) @ self.matrix.mT

        def adjoint(self, y, size=None):
            return (y @ self.matrix).unflatten(-1, size)

    physics, x = interop.physics(Rows(draw(5, 16)), (3, 4, 4)), draw(2, 3, 4, 4, seed=1)
    y = physics(x)
    assert y.shape == (2, 3, 5) and physics.A_adjoint(y).shape == x.shape
    assert abs(float(physics.adjointness_test(x))) < 1e-10
    torch.testing.assert_close(physics.A(physics.A_dagger(y)), y, rtol=1e-3, atol=1e-3)


def test_an_operator_of_two_methods_is_a_physics_too():
    mask, x = (draw(12, 10) > 0).double(), draw(2, 3, 12, 10, seed=1)
    physics = interop.physics(Inpainting(mask), max_iter=100, tol=1e-12)
    assert torch.equal(physics.A(x), mask * x) and torch.equal(physics.initial(x), mask * x)
    assert abs(float(physics.adjointness_test(x))) < 1e-10
    closed = (mask * x + x / 2) / (mask + 1 / 2)  # of gamma 2; by deepinv's solver
    torch.testing.assert_close(physics.prox_l2(x, x, torch.tensor(2.0, dtype=torch.float64)), closed)


def test_the_proximal_step_is_what_deepinvs_solver_finds(case):
    op, x = case
    physics = interop.physics(op, max_iter=500, tol=1e-12)
    y = physics.A(x) + 0.1
    z = draw(*x.shape, seed=2)
    for gamma in (0.3, torch.tensor(2.0, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)):
        closed = physics.prox_l2(z, y, gamma)
        weight = gamma if isinstance(gamma, float) else gamma.reshape(-1, 1, 1, 1)
        gradient = weight * physics.A_adjoint(physics.A(closed) - y) + (closed - z)
        assert float(gradient.abs().max()) < 1e-10
        solved = deepinv.physics.LinearPhysics.prox_l2(physics, z, y, gamma)
        torch.testing.assert_close(closed, solved, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(physics.prox_l2(None, y, 0.3), physics.prox_l2(torch.zeros_like(z), y, 0.3))
    torch.testing.assert_close(physics.prox_l2(1, y, 0.3), physics.prox_l2(torch.ones_like(z), y, 0.3))


def test_the_closed_form_is_used_where_there_is_one(case, monkeypatch):
    op, x = case
    physics = interop.physics(op)
    monkeypatch.setattr(deepinv.physics.LinearPhysics, "prox_l2", None)
    assert torch.isfinite(physics.prox_l2(x, physics.A(x), 1.0)).all()


@pytest.mark.parametrize("gamma", [0.3, torch.tensor([0.5, 4.0], dtype=torch.float64)], ids=["shared", "each"])
def test_without_a_closed_form_deepinvs_solver_is_used_and_agrees_with_ours(gamma):
    op = Coils(draw(2, 3, 6, 8), torch.tensor([1.0, 0.0, 1.0, 1.0] * 2, dtype=torch.float64))
    physics = interop.physics(op, max_iter=200, tol=1e-12)
    x, z = draw(2, 2, 6, 8), draw(2, 2, 6, 8, seed=1)
    with torch.no_grad():
        y = op(x)
        ours = op.prox(z, y, 1 / gamma, iterations=200, tolerance=1e-12)
        # deepinv adds 1e-8 to its denominators.
        torch.testing.assert_close(physics.prox_l2(z, y, gamma), ours, rtol=0, atol=1e-5)
        rough = physics.prox_l2(z, y, gamma, max_iter=2)  # its own settings hold
    assert not torch.allclose(rough, ours, atol=1e-3)


def test_any_phi_has_a_closed_form(monkeypatch):
    physics = interop.physics(lf.BlockCS(draw(10, 64), 8))
    monkeypatch.setattr(deepinv.physics.LinearPhysics, "prox_l2", None)
    x, z = draw(1, 1, 8, 16), draw(1, 1, 8, 16, seed=1)
    v = physics.prox_l2(z, physics.A(x), 0.5)
    torch.testing.assert_close(0.5 * physics.A_adjoint(physics.A(x - v)), v - z)


def test_block_cs_of_a_size_that_y_does_not_tell():
    op = lf.BlockCS.gaussian(0.3, 8, dtype=torch.float64)
    x = draw(1, 1, 13, 11)
    physics = interop.physics(op, img_size=(1, 13, 11))
    assert physics.A_adjoint(physics.A(x)).shape == x.shape
    assert abs(float(physics.adjointness_test(x))) < 1e-10
    v = physics.prox_l2(torch.zeros_like(x), physics.A(x), 2.0)
    torch.testing.assert_close(2 * physics.A_adjoint(physics.A(x - v)), v)
    with pytest.raises(ValueError, match=r"got \(13, 11\): use physics\(op, img_size=\(1, 13, 11\)\)"):
        interop.physics(op).A(x)
    with pytest.raises(ValueError, match=r"expected images of \(13, 11\), got \(16, 16\)"):
        physics.A(draw(1, 1, 16, 16))


def test_noise_clone_dtype_and_state(case):
    op, x = case
    physics = interop.physics(op, noise_model=deepinv.physics.GaussianNoise(sigma=0.1))
    clean, noisy = physics.A(x), physics(x)
    assert float((noisy - clean).std()) == pytest.approx(0.1, rel=0.5)
    clone = physics.clone()
    assert torch.equal(clone.A(x), clean)
    assert {f"operator.{name}" for name in op.state_dict()} <= set(physics.state_dict())
    # Casting leaves the operator's parameters wide, as it does in our networks.
    assert {t.dtype for t in physics.to(torch.bfloat16).operator.state_dict().values()} == {torch.float64}


def test_a_learned_operator_gets_its_gradient_through_deepinv():
    op = lf.BlockCS.gaussian(0.3, 8, learn=True)
    x = draw(1, 1, 16, 16).float()
    physics = interop.physics(op)
    physics.A_adjoint(physics.A(x)).square().sum().backward()
    assert float(op.phi.grad.norm()) > 0


def staged_dncnn(stages: int, **kwargs) -> lf.StagedDenoiser:
    denoiser = deepinv.models.DnCNN(1, 1, depth=4, nf=12, pretrained=None).eval()
    return lf.adapt(denoiser, stages=stages, gamma=20, **kwargs)


def unfolded(net: lf.LoRun) -> nn.Module:
    """deepinv's PGD with LoRun's stages, step sizes and start."""
    return PGD(
        unfold=True,
        data_fidelity=L2(),
        prior=interop.prior(net.denoiser),
        params_algo={"stepsize": net.step_size.detach().tolist(), "lambda": 1.0, "g_param": None},
        trainable_params=["stepsize"],
        max_iter=net.stages,
        custom_init=lambda y, physics: physics.initial(y),
    )


def test_pgd_with_our_stages_is_lorun(case):
    op, x = case
    stages, channels = 3, x.shape[1]
    denoiser = deepinv.models.DnCNN(channels, channels, depth=3, nf=12, pretrained=None)
    net = lf.LoRun(op.float(), denoiser, stages=stages, gamma=30)
    x = x.float()
    with torch.no_grad():
        net.step_size.copy_(torch.tensor([0.9, 0.5, 0.7]) / float(op.norm()) ** 2)
        for p in net.denoiser.adapter_parameters():
            nn.init.normal_(p, std=0.1)
    physics = interop.physics(op)
    y = physics.A(x)
    model = unfolded(net)
    with torch.no_grad():
        expected = net(op(x))
        torch.testing.assert_close(model(y, physics), expected, rtol=1e-4, atol=1e-4)
        # The stages matter: with the last for all, the result is another.
        model.prior[0] = model.prior[2]
        assert not torch.allclose(model(y, physics), expected, rtol=1e-2, atol=1e-2)


def test_pgd_with_our_stages_trains():
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 8), staged_dncnn(3))
    physics, model = interop.physics(net.op), unfolded(net)
    base = copy.deepcopy({name: p for name, p in net.named_parameters() if not p.requires_grad})
    trained = [p for p in model.parameters() if p.requires_grad]
    # K step sizes of deepinv's own, and the two factors of each layer once, not once per prior.
    assert len(trained) == 3 + 2 * len(net.denoiser.adapted)
    optimiser = torch.optim.Adam(trained, lr=3e-3)
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    y = physics.A(x)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = (model(y, physics) - x).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for k in range(3):
        assert all(float(layer.up.grad[k].norm()) > 0 for layer in net.denoiser.adapted.values())
    assert all(torch.equal(dict(net.named_parameters())[name], p) for name, p in base.items())


def test_a_noise_level_reaches_the_stages():
    seen = []

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, z, sigma):
            seen.append(sigma.item())
            return self.conv(z)

    staged = lf.adapt(Denoiser(), stages=2)
    physics = interop.physics(lf.BlockCS.gaussian(0.5, 8))
    x = torch.rand(1, 1, 8, 8)
    model = PGD(
        unfold=True,
        data_fidelity=L2(),
        prior=interop.prior(staged),
        params_algo={"stepsize": [1.0, 1.0], "g_param": [0.3, 0.1], "lambda": 1.0},
        max_iter=2,
    )
    model(physics.A(x), physics)
    assert seen == pytest.approx([0.3, 0.1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: deepinv.models.DnCNN(2, 2, depth=4, nf=8, pretrained=None),
        lambda: deepinv.models.UNet(2, 2, scales=2, batch_norm=False),
        lambda: deepinv.models.DRUNet(2, 2, nc=[8, 8, 16, 16], nb=1, pretrained=None),
    ],
    ids=["DnCNN", "UNet", "DRUNet"],
)
def test_a_deepinv_denoiser_is_a_base(make):
    denoiser = make().eval()
    staged = lf.adapt(denoiser, stages=2).eval()
    x = torch.rand(1, 2, 32, 32)
    with torch.no_grad():
        expected = denoiser(x, 0.1)
        assert torch.equal(staged(x, stage=1, sigma=0.1), expected)
        for p in staged.adapter_parameters():
            p[1].normal_(std=0.1)
        assert torch.equal(staged(x, stage=0, sigma=0.1), expected)
        changed = staged(x, stage=1, sigma=0.1)
        assert not torch.allclose(changed, expected, atol=1e-3)
        staged.merge()
        torch.testing.assert_close(staged(x, stage=1, sigma=0.1), changed, rtol=1e-3, atol=1e-4)


def test_bad_arguments():
    with pytest.raises(TypeError, match="op: expected a SensingOperator, got Blur"):
        interop.physics(deepinv.physics.Blur(torch.ones(1, 1, 3, 3)))
    with pytest.raises(TypeError, match="staged: expected a staged denoiser, as adapt"):
        interop.prior(nn.Conv2d(1, 1, 3))
