"""The proximal step of operators without a closed form."""

from __future__ import annotations

import warnings

import pytest
import torch
from own_operator_help import Coils, Inpainting
from torch import nn

import lorun_fast as lf
from lorun_fast.operators.conjugate_gradients import conjugate_gradients


class Dense(lf.SensingOperator):
    """Any matrix (m, C*H*W)."""

    def __init__(self, matrix, shape=(2, 4, 3)):
        super().__init__()
        self.matrix, self.shape = nn.Parameter(matrix), shape

    def forward(self, x):
        return x.flatten(1) @ self.matrix.mT

    def adjoint(self, y, size=None):
        return (y @ self.matrix).unflatten(1, self.shape)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coils(dtype: torch.dtype = torch.float64, size: int = 4) -> Coils:
    lines = (torch.arange(size) % 3 != 1).to(dtype)
    return Coils(draw(2, 3, size, size, dtype=dtype), lines)


# Their images are (N, 2, 4, 3) and (N, 2, 4, 4).
MAKE = {
    "inpainting": lambda: (Inpainting(draw(4, 3)), (2, 4, 3)),
    "dense": lambda: (Dense(draw(9, 24)), (2, 4, 3)),
    "more measurements than pixels": lambda: (Dense(draw(30, 24)), (2, 4, 3)),
    "coils": lambda: (coils(), (2, 4, 4)),
}


@pytest.fixture(params=MAKE)
def problem(request):
    """An operator in fp64, images and measurements that have nothing to do with each other."""
    op, shape = MAKE[request.param]()
    x = draw(3, *shape, seed=1)
    measured = op(x)
    return op, x, draw(*measured.shape, dtype=measured.dtype, seed=2)


def reals(y: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1)


def solved(op, x: torch.Tensor, y: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """By a dense matrix, sample by sample. mu (N, C or 1, 1, 1)."""
    n = x[0].numel()
    with torch.no_grad():
        matrix = reals(op(torch.eye(n, dtype=x.dtype).reshape(n, *x.shape[1:]))).mT
        found = []
        for one, measured, weight in zip(x, reals(y), mu.expand_as(x), strict=True):
            weight = weight.flatten()
            right = matrix.mT @ measured + weight * one.flatten()
            found.append(torch.linalg.solve(matrix.mT @ matrix + weight.diag(), right).reshape(one.shape))
    return torch.stack(found)


WEIGHTS = [
    0.3,
    torch.tensor(0.3, dtype=torch.float64),
    torch.tensor([0.2, 3.0, 40.0], dtype=torch.float64),
    torch.tensor([0.2, 3.0, 40.0]).reshape(3, 1, 1, 1),
    torch.tensor([0.2, 3.0]).reshape(2, 1, 1),
    torch.rand(3, 2, 1, 1, generator=torch.Generator().manual_seed(0)),
]


@pytest.mark.parametrize("mu", WEIGHTS, ids=lambda mu: str(tuple(getattr(mu, "shape", "f"))))
def test_against_a_dense_solve(problem, mu):
    op, x, y = problem
    wide = torch.as_tensor(mu, dtype=torch.float64)
    wide = wide.reshape(-1, 1, 1, 1) if wide.ndim < 2 else wide
    want = solved(op, x, y, wide)
    torch.testing.assert_close(op.prox(x, y, mu, iterations=100, tolerance=1e-12), want, rtol=1e-9, atol=1e-9)

    def residual(v):
        return (op.adjoint(op(v) - y) + wide * (v - x)).flatten(1).norm(dim=1)

    assert (residual(op.prox(x, y, mu, iterations=100)) <= 1.01e-4 * residual(x)).all()


def test_the_gradient_is_the_minimisers(problem):
    op, x, y = problem
    mu = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def prox(x, y, mu, *_):
        return op.prox(x, y, mu, iterations=100, tolerance=1e-13)

    assert torch.autograd.gradcheck(prox, (x.requires_grad_(), y.requires_grad_(), mu, *op.parameters()))


def test_what_phi_is_made_of_learns():
    """A buffer that another network made, for one."""
    seed = draw(9).requires_grad_()

    def prox(seed):
        op = Inpainting((seed.repeat(2)[:12].reshape(4, 3)).sin())
        return op.prox(draw(2, 2, 4, 3, seed=1), draw(2, 2, 4, 3, seed=2), 0.5, iterations=100, tolerance=1e-13)

    assert torch.autograd.gradcheck(prox, (seed,))


def test_the_gradient_is_that_of_the_iterations_where_these_have_arrived():
    op = Dense(draw(20, 24, dtype=torch.float32) / 5)
    x, y = draw(2, 2, 4, 3, dtype=torch.float32, seed=1).requires_grad_(), draw(2, 20, dtype=torch.float32, seed=2)
    mu = torch.tensor(0.5, requires_grad=True)
    leaves = (x, mu, op.matrix)
    got = torch.autograd.grad(op.prox(x, y, mu, tolerance=1e-6).sin().sum(), leaves)
    d, _ = conjugate_gradients(lambda p: op.adjoint(op(p)) + mu * p, op.adjoint(y - op(x)), 30, 0)
    want = torch.autograd.grad((x + d).sin().sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_iterations(problem):
    op, x, y = problem

    def kept(iterations: int) -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            op.prox(x.requires_grad_(), y, 0.1, iterations=iterations, tolerance=0)
        return sum(saved)

    assert kept(3) == kept(12) > 0


@pytest.mark.parametrize("wrt", ["x", "mu", "matrix"])
def test_a_second_derivative_is_refused(wrt):
    op, x, y = Dense(draw(9, 24)), draw(2, 2, 4, 3).requires_grad_(), draw(2, 9)
    mu = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, "mu": mu, "matrix": op.matrix}
    for loss in (torch.sum, lambda v: v.square().sum()):
        v = op.prox(x, y, mu, tolerance=1e-10)
        (first,) = torch.autograd.grad(loss(v), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="prox: expected one derivative, got a second"):
            torch.autograd.grad(first.square().sum(), leaves[wrt])


def test_results_do_not_depend_on_batch_mates():
    """Easy samples, hard ones, one that is there already, an empty one, and one of another size of values."""
    op = Dense(draw(20, 24, dtype=torch.float32))
    x = draw(6, 2, 4, 3, dtype=torch.float32, seed=1)
    y = draw(6, 20, dtype=torch.float32, seed=2)
    mu = torch.tensor([1e3, 1e-3, 0.1, 0.1, 0.1, 0.1])
    with torch.no_grad():
        y[2] = op(x[2:3])
        x[3], y[3] = 0, 0
        x[4], y[4] = 1e-25 * x[4], 1e-25 * y[4]  # whose squares vanish
        together = op.prox(x, y, mu, iterations=200)
        for i in range(6):
            alone = op.prox(x[i : i + 1], y[i : i + 1], mu[i : i + 1], iterations=200)
            size = alone.abs().max().clamp(min=1e-30)
            torch.testing.assert_close(together[i : i + 1] / size, alone / size, rtol=0, atol=1e-4)
        torch.testing.assert_close(together[2], x[2])
        assert torch.equal(together[3], x[3])
        small = 1e25 * together[4].double()
        want = op.prox(1e25 * x[4:5], 1e25 * y[4:5], 0.1, iterations=200)
        torch.testing.assert_close(small[None].float(), want, rtol=1e-3, atol=1e-3)


def test_nan_stays_in_its_sample():
    op = coils(torch.float32)
    x, y = draw(3, 2, 4, 4, dtype=torch.float32), draw(3, 3, 4, 4, dtype=torch.complex64)
    want = op.prox(x, y, 0.5)
    x[1, 0, 0, 0] = torch.nan
    got = op.prox(x, y, 0.5)
    assert got[1].isnan().any()
    torch.testing.assert_close(got[::2], want[::2])


@pytest.mark.parametrize("make", ["inpainting", "dense"])  # torch's FFT takes no empty batch
def test_no_samples(make):
    op, shape = MAKE[make]()
    x = draw(0, *shape).requires_grad_()
    v = op.prox(x, op(x).detach(), 0.5)
    v.sum().backward()
    assert v.shape == x.shape == x.grad.shape


def test_the_step_of_an_exact_image_is_that_image():
    op = coils()
    x = draw(2, 2, 4, 4).requires_grad_()
    v = op.prox(x, op(x).detach(), 0.5)
    torch.testing.assert_close(v, x)
    v.square().sum().backward()
    assert x.grad.isfinite().all()


def test_it_ends_where_all_have_arrived():
    class Counted(Dense):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    op, x, y = Counted(2 * torch.eye(24, dtype=torch.float64)), draw(2, 2, 4, 3), draw(2, 24, seed=1)

    def calls(**settings) -> int:
        op.calls = 0
        with torch.no_grad():
            op.prox(x, y, 0.5, **settings)
        return op.calls

    assert calls() == 2  # for the residual, and for one iteration
    op.matrix.data = draw(24, 24)
    assert calls(tolerance=0, iterations=7) == 8
    op.prox_iterations, op.prox_tolerance = 3, 0
    assert calls() == 4
    assert calls(iterations=100, tolerance=0.9) < 10
    with torch.no_grad():
        y = op(x)
    assert calls(tolerance=1e-4) == 1


def test_it_tells_who_has_not_arrived():
    op, x, y = Dense(draw(20, 24)), draw(2, 2, 4, 3).requires_grad_(), draw(2, 20)
    said = "Dense's conjugate gradients have not come to tolerance 0.0001 in 3 iterations"
    with pytest.warns(UserWarning, match=f"^prox: {said}"):
        v = op.prox(x, y, 1e-3, iterations=3)
    with pytest.warns(UserWarning, match=f"^prox, its gradient: {said}"):
        v.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.prox(x, y, 1e-3, iterations=3, tolerance=0).sum().backward()
        op.prox(x, y, 1e-3, iterations=100).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_16_bits_are_iterated_in_32(dtype):
    op = Dense(draw(20, 24, dtype=torch.float32))
    x, y = draw(2, 2, 4, 3, dtype=torch.float32).to(dtype), draw(2, 20, dtype=torch.float32).to(dtype)
    got = op.prox(x, y, torch.tensor(0.1, dtype=dtype))
    want = op.prox(x.float(), y.float(), torch.tensor(0.1, dtype=dtype).float())
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))
    x = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = op.prox(x, y.float(), 0.1)
        narrow.sum().backward()
    found, x.grad = x.grad, None
    plain = op.prox(x, y.float(), 0.1)
    plain.sum().backward()
    assert torch.equal(narrow, plain) and torch.equal(found, x.grad)


def test_what_it_does_not_take():
    op, x, y = Inpainting(torch.ones(4, 3)), torch.rand(2, 1, 4, 3), torch.rand(2, 1, 4, 3)
    for mu in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"mu: expected a positive number, got {mu}"):
            op.prox(x, y, mu)
    with pytest.raises(ValueError, match=r"mu: expected a number, .* got shape \(3, 1, 1, 1\)"):
        op.prox(x, y, torch.rand(3))
    with pytest.raises(TypeError, match="mu: expected a number, got 'a'"):
        op.prox(x, y, "a")
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        op.prox(x, y, 0.5, iterations=0)
    for tolerance in (-1.0, 1.0):
        with pytest.raises(ValueError, match=rf"tolerance: expected a number in \[0, 1\), got {tolerance}"):
            op.prox(x, y, 0.5, tolerance=tolerance)
    with pytest.raises(TypeError, match="y: expected a tensor, got NoneType"):
        op.prox(x, None, 0.5)
    with pytest.raises(ValueError, match=r"x: expected \(N, C, H, W\), got shape \(4, 3\)"):
        op.prox(x[0, 0], y, 0.5)


def test_transforms_of_torch_func():
    op, x, y = Inpainting(draw(4, 3)), draw(3, 2, 1, 4, 3), draw(3, 2, 1, 4, 3, seed=1)

    def prox(x, y):
        return op.prox(x, y, 0.5, tolerance=1e-12)

    want = torch.stack([prox(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.vmap(prox)(x, y), want)
    factor = 0.5 / (op.mask.square() + 0.5)
    torch.testing.assert_close(torch.func.grad(lambda x: prox(x, y[0]).sum())(x[0]), factor.expand_as(x[0]))
    _, tangent = torch.func.jvp(lambda x: prox(x, y[0]), (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent, factor.expand_as(x[0]))


class Net(nn.Module):
    """Two stages of steps and a learned layer between them."""

    def __init__(self, op):
        super().__init__()
        self.op, self.layer, self.mu = op, nn.Conv2d(2, 2, 3, padding=1), nn.Parameter(torch.tensor(0.5))

    def forward(self, y):
        x = self.op.adjoint(y)
        for _ in range(2):
            x = torch.tanh(self.layer(self.op.prox(x, y, self.mu, iterations=3, tolerance=0)))
        return x


@pytest.mark.parametrize("make", ["coils", "dense"])
def test_a_network_compiles_and_exports(make, graph_counter):
    torch.manual_seed(0)
    op = coils(torch.float32) if make == "coils" else Dense(draw(9, 32, dtype=torch.float32), (2, 4, 4))
    net = Net(op)
    y = op(torch.rand(3, 2, 4, 4)).detach()
    with torch.no_grad():
        want = net(y)
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend=graph_counter)(y), want)
        assert graph_counter.graphs == 1
        program = torch.export.export(net, (y,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        torch.testing.assert_close(program(y[:2]), net(y[:2]))

    def gradients(call):
        net.zero_grad()
        call(y).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    want = gradients(net)
    torch.testing.assert_close(gradients(torch.compile(net, fullgraph=True, backend="aot_eager")), want)
