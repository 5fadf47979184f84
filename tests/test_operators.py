"""What the sensing operators have in common: what they take as arguments, and under what they work."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import lorun_fast as lf


def cassi():
    return lf.CASSI(torch.rand(6, 8), 3, 1), torch.rand(2, 3, 6, 8)


def block_cs():
    return lf.BlockCS.gaussian(0.5, 4), torch.rand(2, 1, 8, 8)


def blur():
    return lf.BlurDownsample(torch.rand(3, 3), 2), torch.rand(2, 3, 8, 8)


every_operator = pytest.mark.parametrize("make", [cassi, block_cs, blur])


@every_operator
def test_what_is_no_image(make):
    op, x = make()
    y = op(x)
    with pytest.raises(TypeError, match="x: expected a tensor, got ndarray"):
        op(x.numpy())
    for call in (op, lambda none: op.gradient_step(none, y, 1.0), lambda none: op.prox(none, y, 1.0)):
        with pytest.raises(TypeError, match="x: expected a tensor, got NoneType"):
            call(None)
    for call in (op.adjoint, op.initial, lambda none: op.gradient_step(x, none, 1.0)):
        with pytest.raises(TypeError, match="y: expected a tensor, got NoneType"):
            call(None)
    for method in (op.adjoint, op.initial):
        with pytest.raises(TypeError, match=r"y: expected float32, float64, bfloat16 or float16, got torch.uint8"):
            method(y.byte())
        with pytest.raises(ValueError, match=r"y: expected .*, got shape"):
            method(y[0, 0])
        with pytest.raises(ValueError, match=r"size: expected .*H, W.*, got 7"):
            method(y, size=7)
    with pytest.raises(TypeError, match=r"y: expected .*, got torch.uint8"):
        op.gradient_step(x, y.byte(), 1.0)
    with pytest.raises(TypeError, match="y: expected a tensor, got ndarray"):
        op.gradient_step(x, y.numpy(), 1.0)
    with pytest.raises(ValueError, match=r"rho: expected a number, .*, got shape \(1, 1, 1, 1, 1\)"):
        op.gradient_step(x, y, torch.ones(1, 1, 1, 1, 1))
    for rho in (None, "a"):
        with pytest.raises(TypeError, match=f"rho: expected a number or a tensor, got {type(rho).__name__}"):
            op.gradient_step(x, y, rho)


@every_operator
def test_the_proximal_steps_weight(make):
    op, x = make()
    y = op(x)
    for mu in (-0.5, float("nan")):
        with pytest.raises(ValueError, match=f"mu: expected .*, got {mu}"):
            op.prox(x, y, mu)
    for mu in (None, "a"):
        with pytest.raises(TypeError, match=f"mu: expected a number, got {mu!r}"):
            op.prox(x, y, mu)
    with pytest.raises(TypeError, match=r"mu: expected a floating-point tensor, got torch.int64"):
        op.prox(x, y, torch.tensor(1))
    mu = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    each = torch.cat([op.prox(x[i : i + 1], y[i : i + 1], mu[i].item()) for i in range(2)])
    torch.testing.assert_close(op.prox(x, y, mu), each)
    torch.testing.assert_close(op.prox(x, y, mu.flatten()), each)


@every_operator
def test_the_proximal_step_compiles_and_exports(make):
    op, x = make()
    y = op(x)
    expected = op.prox(x, y, 0.5)
    torch.testing.assert_close(torch.compile(op.prox, fullgraph=True, backend="aot_eager")(x, y, 0.5), expected)

    class Prox(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.op = op

        def forward(self, x, y):
            return self.op.prox(x, y, 0.5)

    torch.testing.assert_close(torch.export.export(Prox(), (x, y)).module()(x, y), expected)


@every_operator
@pytest.mark.parametrize("step", ["prox", "gradient_step"])
def test_a_step_size_tensor_serves_any_batch_in_one_graph(make, step):
    op, x = make()
    y = op(x)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.op = op

        def forward(self, x, y, weight):
            return getattr(self.op, step)(x, y, weight)

    weight, batch = torch.full((1, 1, 1, 1), 0.5), torch.export.Dim("batch", max=8)
    sizes = {"x": {0: batch}, "y": {0: batch}, "weight": None}
    exported = torch.export.export(Step(), (x, y, weight), dynamic_shapes=sizes, strict=True).module()
    more = (x.repeat(2, 1, 1, 1), torch.cat([y, y]))
    torch.testing.assert_close(exported(*more, weight), Step()(*more, weight))


@pytest.fixture
def reads(monkeypatch) -> list:
    """The values that are read to the host."""
    found, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda t: found.append(item(t)) or found[-1])
    return found


def is_exact(op, x, y) -> bool:
    v = op.prox(x, y, 0.5)
    return torch.allclose(op.adjoint(op(v) - y) + 0.5 * (v - x), torch.zeros_like(x), atol=1e-5)


@pytest.mark.parametrize("learn", [False, True])
@torch.no_grad()
def test_orthonormal_rows_are_looked_at_once(learn, reads):
    op, x = lf.BlockCS.gaussian(0.5, 4, learn=learn), torch.rand(2, 1, 8, 8)
    y = 3 * op(x)
    for _ in range(3):
        assert is_exact(op, x, y)
    assert len(reads) == 1
    for again in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        torch.testing.assert_close(again.prox(x, y, 0.5), op.prox(x, y, 0.5))
    op.phi.mul_(2)
    assert is_exact(op, x, y)
    op.phi.div_(2)
    assert is_exact(op, x, y)
    op.phi = nn.Parameter(2 * op.phi) if learn else 2 * op.phi
    assert is_exact(op, x, y)


def test_what_learns_is_not_looked_at(reads):
    op, x = lf.BlockCS.gaussian(0.5, 4, learn=True), torch.rand(2, 1, 8, 8)
    assert is_exact(op, x, 3 * op(x)) and not reads


@pytest.mark.parametrize("learn", [False, True])
@torch.no_grad()
def test_a_program_is_exact_for_rows_of_any_kind(learn):
    for phi in (lf.BlockCS.gaussian(0.5, 4).phi, torch.randn(5, 16)):
        op, x = lf.BlockCS(phi, 4, learn=learn), torch.rand(2, 1, 8, 8)
        y = torch.rand_like(op(x))
        for _ in range(2):
            program = torch.compile(op.prox, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(program(x, y, 0.5), op.prox(x, y, 0.5))  # the second time it was looked at
            torch._dynamo.reset()


@every_operator
def test_a_copy_of_a_compiled_operator_is_its_own(make):
    op, x = make()
    name, held = next(iter(op.state_dict().items()))
    op.compile(backend="eager")
    for again in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        again.load_state_dict({name: 2 * held})
        torch.testing.assert_close(again(x), 2 * op(x))


def test_orthonormal_rows_that_count_no_changes(reads):
    """An inference tensor: a learned one is looked at every time, a fixed one until it is another."""
    x = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        learned, fixed = (lf.BlockCS.gaussian(0.5, 4, learn=learn) for learn in (True, False))
        y = fixed(x)
        for _ in range(2):
            learned.prox(x, y, 0.5)
            fixed.prox(x, y, 0.5)
        assert len(reads) == 3
        learned.phi.mul_(2)
        fixed.load_state_dict({"phi": 2 * fixed.phi})
        assert is_exact(learned, x, y) and is_exact(fixed, x, y)


def test_orthonormal_rows_under_vmap():
    op, x = lf.BlockCS.gaussian(0.5, 4, learn=True), torch.rand(3, 2, 1, 8, 8)
    y = torch.stack([op(one) for one in x]).detach()
    for _ in range(2):
        together = torch.vmap(lambda x, y: op.prox(x, y, 0.5))(x, y)
        torch.testing.assert_close(together, torch.stack([op.prox(*one, 0.5) for one in zip(x, y, strict=True)]))


def test_orthonormal_rows_are_looked_at_again_where_phi_changes():
    op, x = block_cs()
    y = op(x)
    op.prox(x, y, 0.5)
    op.load_state_dict({"phi": 2 * op.phi})
    assert is_exact(op, x, y)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: lf.CASSI(t, 3, learn=True),
        lambda t: lf.BlurDownsample(t, learn=True),
        lambda t: lf.BlockCS(t, 4, learn=True),
    ],
)
def test_what_learns_is_a_copy(make):
    given = torch.rand(4, 16)
    before = given.clone()
    (learned,) = make(given).parameters()
    with torch.no_grad():
        learned.zero_()
    assert torch.equal(given, before)


@every_operator
def test_autocast_changes_no_start(make):
    op, x = make()
    y = op(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op.initial(y), make_start(op, y))


def make_start(op, y):
    with torch.autocast("cpu", enabled=False):
        return op.initial(y)


@pytest.mark.parametrize("change", [lambda a: a[::-1, ::-1], lambda a: a.astype(">f4"), np.asfortranarray])
def test_any_array_of_numbers(change):
    array = np.random.default_rng(0).random((4, 16)).astype(np.float32)
    expected = np.ascontiguousarray(change(array)).astype(np.float32)
    assert np.array_equal(lf.BlockCS(change(array), 4).phi.numpy(), expected)
    assert np.array_equal(lf.CASSI(change(array), 3).mask.numpy(), expected)
    assert np.array_equal(lf.BlurDownsample(change(array)).kernel.numpy(), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lf.CASSI(torch.rand(4, 4), 3, 1.5), TypeError, "step: expected a whole number, got 1.5"),
        (lambda: lf.CASSI(torch.rand(4, 4), 3.7), TypeError, "bands: expected a whole number, got 3.7"),
        (lambda: lf.CASSI(torch.rand(4, 4), 3, -1), ValueError, "step: expected at least 0, got -1"),
        (lambda: lf.CASSI.from_phi(torch.rand(3, 4, 4), 2), ValueError, r"phi: expected more than step\*\(L-1\) = 4"),
        (lambda: lf.BlockCS(torch.rand(4, 16), 4.0), TypeError, "block_size: expected a whole number, got 4.0"),
        (
            lambda: lf.BlockCS.gaussian(0.25, 8).initial(torch.rand(1, 16, 2, 2), (16.0, 16.0)),
            ValueError,
            r"size: expected two whole numbers \(H, W\), got \(16.0, 16.0\)",
        ),
        (lambda: lf.BlockCS(torch.rand(4, 16), -4), ValueError, "block_size: expected at least 1, got -4"),
        (lambda: lf.BlockCS.gaussian(0.25, -4), ValueError, "block_size: expected at least 1, got -4"),
        (lambda: lf.BlockCS.gaussian("a"), TypeError, "ratio: expected a number, got 'a'"),
        (
            lambda: lf.functional.block_cs(torch.rand(1, 1, 4, 4), torch.rand(4, 16), block_size=4.0),
            TypeError,
            "block_size: expected a whole number, got 4.0",
        ),
        (
            lambda: lf.functional.cassi(torch.rand(1, 2, 4, 4), torch.rand(4, 4), step="a"),
            TypeError,
            "step: expected a whole number, got 'a'",
        ),
        (
            lambda: lf.functional.cassi_adjoint(torch.rand(1, 4, 5), torch.rand(4, 4), bands="a", step=1),
            TypeError,
            "bands: expected a whole number, got 'a'",
        ),
        (
            lambda: lf.functional.cassi_adjoint(torch.rand(1, 4, 5), torch.rand(4, 4), bands=2.0, step=1),
            TypeError,
            "bands: expected a whole number, got 2.0",
        ),
        (
            lambda: lf.functional.cassi_step(
                torch.rand(1, 2, 4, 4), torch.rand(1, 4, 5), torch.rand(4, 4), 1, step=1.0
            ),
            TypeError,
            "step: expected a whole number, got 1.0",
        ),
        (
            lambda: lf.functional.block_cs(torch.rand(1, 1, 4, 4), torch.rand(3, 16), block_size=4.0),
            TypeError,
            "block_size: expected a whole number, got 4.0",
        ),
        (
            lambda: lf.functional.block_cs_adjoint(
                torch.rand(1, 3, 1, 1), torch.rand(3, 16), block_size=4.0, size=(4, 4)
            ),
            TypeError,
            "block_size: expected a whole number, got 4.0",
        ),
        (
            lambda: lf.functional.blur_downsample(torch.rand(1, 2, 4, 4), None, scale=2),
            TypeError,
            "kernel: expected a tensor, got NoneType",
        ),
        (lambda: lf.BlurDownsample(torch.rand(3, 3), 1.5), ValueError, "scale: expected an integer of at least 1"),
    ],
)
def test_whole_numbers(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_whole_numbers_of_numpy():
    x = torch.rand(1, 1, 6, 4)
    op = lf.BlurDownsample(torch.rand(3, 3), np.int64(2))
    assert op(x).shape == (1, 1, 3, 2)
    assert type(op.config()["scale"]) is int


@every_operator
def test_shapes_without_values(make):
    op, x = make()
    x = x.to("meta")
    y = op.to("meta")(x)
    for image in (op.initial(y), op.adjoint(y), op.gradient_step(x, y, 0.5), op.prox(x, y, 0.5)):
        assert image.is_meta
        assert image.shape == x.shape


@every_operator
def test_a_default_device_is_for_what_has_none(make):
    """meta stands for a GPU that torch.set_default_device names."""
    op = make()[0]
    name, held = next(iter(op.state_dict().items()))
    norm = op.norm()
    with torch.device("meta"):
        torch.testing.assert_close(op.norm(), norm)
        assert type(op).from_config(op.config(), {name: held}).state_dict()[name].device == held.device
        assert make()[0].state_dict()[name].is_meta


@every_operator
def test_the_parameter_that_it_holds_now(make):
    """Wherever nn.Module would find it: swapped for a call, in another dtype, behind a parametrization."""

    class Twice(torch.nn.Module):
        def forward(self, t):
            return 2 * t

    op, x = make()
    name, held = next(iter(op.state_dict().items()))
    want = op(x)
    torch.testing.assert_close(torch.func.functional_call(op, {name: 2 * held}, (x,)), 2 * want)
    assert op(x.double()).dtype == torch.float64
    learned = type(op).from_config(op.config() | {"learn": True}, op.state_dict())
    torch.testing.assert_close(learned(x), want)
    torch.nn.utils.parametrize.register_parametrization(op, name, Twice())
    torch.testing.assert_close(op(x), 2 * want)


@every_operator
def test_a_size_of_something_else(make):
    op, x = make()
    y = op(x)
    for size in ((None, 8), ([6], 8), (6.0, 8), "68", (6, 8, 1)):
        with pytest.raises(ValueError, match=r"size: expected two whole numbers \(H, W\), got"):
            op.adjoint(y, size)
    with pytest.raises(ValueError, match=r"y: expected \(N, .*, got shape \(3"):
        op.initial(torch.ones(3))


def test_block_cs_adjoint_says_what_a_size_is():
    op, x = block_cs()
    for size in (None, 8, ("a", 8)):
        with pytest.raises(ValueError, match=r"size: expected two whole numbers \(H, W\), got"):
            lf.functional.block_cs_adjoint(op(x), op.phi, block_size=4, size=size)


def test_blur_downsample_adjoint_of_no_tensor_with_a_size():
    op, _ = blur()
    with pytest.raises(TypeError, match="y: expected a tensor, got NoneType"):
        op.adjoint(None, (8, 8))


def test_gaussian_phi_of_a_wrong_seed_or_dtype():
    for seed in ("a", None, 1.5):
        with pytest.raises(TypeError, match=f"seed: expected a whole number, got {seed!r}"):
            lf.BlockCS.gaussian(0.5, 4, seed=seed)
    with pytest.raises(ValueError, match="seed: expected a whole number of 64 bits, got"):
        lf.BlockCS.gaussian(0.5, 4, seed=2**64)
    for dtype in (torch.int32, torch.float16, "float32"):
        with pytest.raises(TypeError, match=f"dtype: expected float32 or float64, got {dtype}"):
            lf.BlockCS.gaussian(0.5, 4, dtype=dtype)


def test_a_sparse_phi():
    with pytest.raises(TypeError, match=r"phi: expected a dense tensor, got torch.sparse_coo"):
        lf.BlockCS(torch.eye(16).to_sparse(), 4)


@every_operator
def test_a_number_that_the_dtype_does_not_hold(make):
    op, x = make()
    y = op(x)
    for call, name in ((op.gradient_step, "rho"), (op.prox, "mu")):
        with pytest.raises(ValueError, match=rf"{name}: expected a number that float32 holds, got 1e\+300"):
            call(x, y, 1e300)
        assert call(x.double(), y.double(), 1e300).isfinite().all()
    with pytest.raises(TypeError, match="rho: expected a real number, got 1j"):
        op.gradient_step(x, y, 1j)


def test_a_size_may_be_an_array():
    op = lf.BlockCS.gaussian(0.25, 8)
    y = op(torch.rand(1, 1, 20, 13))
    assert torch.equal(op.adjoint(y, np.array([20, 13])), op.adjoint(y, (20, 13)))
    for wrong in (np.array([20.0, 13.0]), np.array([20]), np.array(20)):
        with pytest.raises(ValueError, match=r"size: expected two whole numbers \(H, W\), got"):
            op.adjoint(y, wrong)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda phi: lf.BlurDownsample(phi, 2), (2, 5, 5)),
        (lambda phi: lf.BlockCS(phi, 4), (4, 16)),
        (lambda phi: lf.CASSI(phi, step=1), (3, 8, 8)),
    ],
)
def test_an_operator_made_of_a_networks_input(make, shape):
    """Of a kernel per sample, for one: it is built where the network is traced, and has no values to look at there."""

    class Net(nn.Module):
        def forward(self, x, phi):
            op = make(phi)
            return op.gradient_step(x, op(x).float(), 0.1)

    net, x = Net(), torch.rand(2, 3 if len(shape) == 3 else 1, 8, 8)
    phi, other = torch.rand(shape), torch.rand(shape)
    program = torch.export.export(net, (x, phi)).module()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for call in (program, compiled):
        for given in (phi, other):
            torch.testing.assert_close(call(x, given), net(x, given))
