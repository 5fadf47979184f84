"""Sensing operators of somebody else: what a subclass needs, what a network does with it, and what is found wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
from own_operator_help import Inpainting
from torch import nn

import lorun_fast as lf
from lorun_fast.operators import OPERATORS, check_operator, register_operator
from lorun_fast.optimize import fast_bf16


class Fourier(lf.SensingOperator):
    """Samples of the Fourier transform of a complex image, which x holds as two channels; y is complex."""

    task = "mri"

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def transform(self, x):
        return torch.fft.fft2(torch.complex(x[:, 0], x[:, 1]), norm="ortho")

    def back(self, k):
        image = torch.fft.ifft2(k, norm="ortho")
        return torch.stack([image.real, image.imag], 1)

    def forward(self, x):
        return self.mask * self.transform(x)

    def adjoint(self, y, size=None):
        return self.back(self.mask * y)

    def norm(self):
        return self.mask.max()

    def prox(self, x, y, mu):
        mu = mu[:, 0] if isinstance(mu, torch.Tensor) else mu
        return self.back((self.mask * y + mu * self.transform(x)) / (self.mask.square() + mu))


def mask(height=16, width=16):
    return (torch.rand(height, width, generator=torch.Generator().manual_seed(0)) < 0.5).float()


KINDS = {
    "inpainting": (Inpainting, 1, "gradient"),
    "inpainting, exact": (Inpainting, 1, "prox"),
    "mri": (Fourier, 2, "gradient"),
    "mri, exact": (Fourier, 2, "prox"),
}


@pytest.fixture(params=KINDS)
def problem(request):
    """An operator, a network of it with adapters as after training, images and their measurements."""
    kind, channels, data_step = KINDS[request.param]
    torch.manual_seed(0)
    op = kind(mask())
    op.prox_iterations = 3  # as many as a compiled network has
    net = lf.LoRun(op, lf.ResUNet(channels, channels, (8, 8), 1), stages=3, data_step=data_step)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.05)
    x = torch.rand(2, channels, 16, 16)
    return op, net, x, op(x)


@pytest.fixture
def registry():
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Inpainting(mask()), (2, 3, 16, 16)),
        (Fourier(mask()), (2, 2, 16, 16)),
        (lf.BlockCS.gaussian(0.25, 8, seed=0), (2, 1, 16, 24)),
        (lf.BlockCS(torch.rand(5, 64), 8), (2, 1, 16, 24)),
        (lf.CASSI(torch.rand(9, 12), 4), (2, 4, 9, 12)),
        (lf.CASSI(torch.rand(2, 4, 9, 12)), (2, 4, 9, 12)),
        (lf.BlurDownsample(torch.rand(5, 5), 2), (2, 3, 16, 12)),
        (lf.BlurDownsample(torch.rand(2, 4, 3), 3), (2, 3, 15, 12)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_sound_operators_pass_the_check(op, shape):
    before = {name: t.clone() for name, t in op.state_dict().items()}
    check_operator(op, shape)
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in op.state_dict().items())


def test_complex_parameters_keep_their_imaginary_part():
    def fresh():
        torch.manual_seed(0)
        op = Inpainting(mask())
        op.register_buffer("phase", torch.randn(4, dtype=torch.complex64))
        return op

    phase = fresh().phase
    for change, dtype in ((torch.float32, phase.dtype), (torch.float64, torch.complex128), (torch.half, phase.dtype)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            moved = fresh().to(change).phase
        assert moved.dtype == dtype and torch.equal(moved, phase.to(dtype))


def test_what_two_methods_give():
    op, x, y = Inpainting(mask()), torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
    assert op.task == "Inpainting" and Fourier.task == "mri"
    torch.testing.assert_close(op.gradient_step(x, y, 0.7), x - 0.7 * op.mask * (op.mask * x - y))
    rho = torch.rand(2, 1, 1, 1)
    torch.testing.assert_close(op.gradient_step(x, y, rho), x - rho * op.mask * (op.mask * x - y))
    assert op.gradient_step(x.bfloat16(), y.bfloat16(), rho).dtype == torch.bfloat16
    assert torch.equal(op.initial(y), op.mask * y)
    assert op.half().mask.dtype == torch.float32  # as all parameters of an operator stay
    with pytest.raises(NotImplementedError, match="Inpainting does not tell its norm"):
        op.norm()
    torch.testing.assert_close(op.prox(x, y, 0.5), (op.mask * y + 0.5 * x) / (op.mask + 0.5))


def test_a_network_learns_and_restores(problem, graph_counter):
    op, net, x, y = problem
    net.train()
    (net(y) - x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    assert net.step_size.grad.abs().max() > 0
    recomputing = lf.LoRun(op, net.denoiser, checkpoint=True, data_step=net.data_step)
    torch.testing.assert_close(recomputing(y), net(y))
    net.eval()
    with torch.no_grad():
        want = net(y)
        assert want.shape == x.shape and not torch.equal(want, op.initial(y))
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend=graph_counter)(y), want)
        assert graph_counter.graphs == 1
        torch.testing.assert_close(torch.export.export(net, (y,)).module()(y), want)
        torch.testing.assert_close(net.optimize(dtype=torch.float32)(y), want, rtol=1e-4, atol=1e-4)
        assert "on 2 images" in str(net.optimize(dtype=torch.bfloat16, images=x).report)
        assert net.with_stages([0, 1, 2, 2])(y).shape == x.shape
        other = type(op)(torch.ones(16, 16))
        assert not torch.equal(net(y, op=other), want)
    with pytest.raises(ValueError, match=f"op: expected an operator for task '{op.task}', got BlockCS"):
        net(y, op=lf.BlockCS.gaussian(0.25, 8))


def test_optimize_where_photographs_are_no_images_of_the_operator():
    """scikit-image's are 240 pixels wide: without a score the network stays in fp32, and says why."""

    class Wide(Fourier):
        def __init__(self):
            super().__init__(torch.ones(16, 16))
            self.lines = self.mask
            del self.mask

        def forward(self, x):
            return self.lines * self.transform(x)

        def adjoint(self, y, size=None):
            return self.back(self.lines * y)

    net = lf.LoRun(Wide(), lf.ResUNet(2, 2, (8, 8), 1), stages=2)
    fast, x = net.optimize(), torch.rand(2, 2, 16, 16)
    assert next(fast.denoiser.parameters()).dtype == torch.float32
    if fast_bf16(torch.device("cpu"))[0]:
        assert "bf16 not chosen: score not checked, pass images=" in str(fast.report)
    assert "on 2 images" in str(net.optimize(dtype=torch.bfloat16, images=x).report)
    with pytest.raises(
        RuntimeError, match="images: expected what the network's operator measures, got others: The siz"
    ):
        net.optimize(images=torch.rand(2, 2, 15, 15))


def test_a_registered_operator_comes_back_from_its_file(problem, registry, tmp_path):
    op, net, _, y = problem
    assert register_operator(type(op)) is type(op)
    lf.save(net.eval(), tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors")
    assert type(again.op) is type(op) and torch.equal(again.op.mask, op.mask)
    assert (again.op.prox_iterations, "prox_tolerance" in vars(again.op)) == (3, False)
    with torch.no_grad():
        assert torch.equal(again(y), net(y))


def test_another_operator_is_handed_over(problem, tmp_path):
    op, net, _, y = problem
    path = tmp_path / "net.safetensors"
    lf.save(net.eval(), path)
    with pytest.raises(ValueError, match=rf"its operator {type(op).__name__} is not registered: pass load\(path, op="):
        lf.load(path)
    own = type(op)(torch.zeros(16, 16))
    again = lf.load(path, op=own)
    assert torch.equal(again.op.mask, op.mask) and not own.mask.any()  # a copy, whose tensors are the file's
    assert (again.op.prox_iterations, own.prox_iterations) == (3, 30)
    with torch.no_grad():
        assert torch.equal(again(y), net(y))
    with pytest.raises(TypeError, match="op: expected a SensingOperator, got Conv2d"):
        lf.load(path, op=nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"expected the tensors of this ResUNet, got others: .*op\.mask"):
        lf.load(path, op=type(op)(torch.ones(3, 3)))


def test_what_cannot_be_rebuilt_is_not_saved(registry, tmp_path):
    @register_operator
    class Scaled(Inpainting):
        def __init__(self, mask, factor):
            super().__init__(mask)
            self.factor = factor

    path = tmp_path / "net.safetensors"
    net = lf.LoRun(Scaled(mask(), 2.0), lf.ResCNN(channels=8, blocks=1), stages=2)
    with pytest.raises(ValueError, match=r"that Scaled\.from_config\(\) rebuilds .*, got TypeError: .*'factor'"):
        lf.save(net, path)
    assert not path.exists()
    Scaled.config = lambda self: {"factor": self.factor}
    lf.save(net, path)
    assert lf.load(path).op.factor == 2.0


def test_what_is_no_operator_to_register(registry):
    with pytest.raises(TypeError, match="expected a subclass of SensingOperator, got Conv2d"):
        register_operator(nn.Conv2d)
    with pytest.raises(ValueError, match="expected another name than CASSI"):
        register_operator(type("CASSI", (Inpainting,), {}))
    assert register_operator(lf.CASSI) is lf.CASSI


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


BROKEN = {
    "forward: expected a tensor, got NoneType": {"forward": lambda self, x: None},
    r"forward: expected a y of 2 samples, got shape \(16, 16\)": {"forward": lambda self, x: x.sum((0, 1))},
    r"forward: Phi \(2 x \+ u\): expected 2 Phi x \+ Phi u": {"forward": lambda self, x: self.mask * x + 1},
    r"adjoint: expected an image \(2, 1, 16, 16\) of torch.float64": {"adjoint": lambda self, y, size=None: y[..., 1:]},
    r"adjoint: expected <x, Phi\^T y> = <Phi x, y> =": {"adjoint": lambda self, y, size=None: y * self.mask * 1.01},
    "initial: expected an image": {"initial": lambda self, y, size=None: y[:1]},
    r"gradient_step: expected x - rho Phi\^T \(Phi x - y\), got": {
        "gradient_step": lambda self, x, y, rho: x + rho * self.mask * (self.mask * x - y)
    },
    "gradient_step: expected a result with gradients for x": {
        "gradient_step": lambda self, x, y, rho: (x - rho * self.mask * (self.mask * x - y)).detach()
    },
    "gradient_step: its gradient for x: expected that of the formula": {
        "gradient_step": lambda self, x, y, rho: WrongGradient.apply(x) - rho * self.mask * (self.mask * x - y)
    },
    "gradient_step: its gradient for rho: expected that of the formula": {
        "gradient_step": lambda self, x, y, rho: (
            x - (rho.detach() if isinstance(rho, torch.Tensor) else rho) * self.mask * (self.mask * x - y)
        )
    },
    r"gradient_step: expected x's dtype, torch\.float32, got torch\.float64": {
        "gradient_step": lambda self, x, y, rho: (x - rho * self.mask * (self.mask * x - y)).double()
    },
    "norm: expected at least 1": {"norm": lambda self: 0.9 * self.mask.max()},
    r"prox: mu \(x - v\): expected Phi\^T \(Phi v - y\)": {"prox": lambda self, x, y, mu: x},
}


@pytest.mark.parametrize("message", BROKEN)
def test_the_check_names_what_is_wrong(message):
    broken = type("Broken", (Inpainting,), BROKEN[message])(mask())
    with pytest.raises(ValueError, match=f"^{message}"):
        check_operator(broken, (2, 1, 16, 16))


def test_the_check_takes_operators_and_shapes():
    with pytest.raises(TypeError, match="op: expected a SensingOperator, got Conv2d"):
        check_operator(nn.Conv2d(1, 1, 1), (2, 1, 8, 8))
    with pytest.raises(ValueError, match="shape: expected at least 1, got 0"):
        check_operator(Inpainting(mask()), (0, 1, 16, 16))
