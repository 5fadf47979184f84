"""lora_conv2d as an op: every backend against dense weights in float64, gradients, layouts, tracing, refusals."""

from __future__ import annotations

import lora_help
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import lorun_fast as lf
from lorun_fast import _native, adapters
from lorun_fast.ops import _backends, _lora_aten
from lorun_fast.ops import lora_conv2d as conv_ops
from lorun_fast.reference import lora as reference

op = torch.ops.lorun_fast.lora_conv2d.default
BACKENDS = [name for name, b in _backends.BACKENDS["lora_conv2d"].items() if "cpu" in b.devices]
K = 3

GEOMETRY = {
    "padded": {"padding": 1},
    "strided dilated": {"stride": 2, "padding": (2, 1), "dilation": (2, 1)},
    "same": {"padding": "same", "dilation": (1, 2)},
}
DENSE = {
    None: lambda t: t,
    "relu": torch.relu,
    "leaky_relu": lambda t: torch.where(t > 0, t, 0.01 * t),
    "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5)),
    "silu": lambda t: t * torch.sigmoid(t),
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setattr(_native, "WISH", request.param)
    if request.param == "packed":
        lora_help.packed_anywhere(monkeypatch)
    return request.param


def problem(form="peft", n=5, in_=4, out=6, k=3, stages: int | None = K, **rest) -> dict:
    return lora_help.problem(form, n=n, in_=in_, out=out, kernel=k, stages=stages, **rest)


def dense(x, weight, bias, down, up, *, scale=1.0, stage=None, activation=None, residual=None, **geometry):
    """Sample by sample, with the update of each stage built as a dense matrix."""
    out = []
    for n in range(len(x)):
        k = stage[n] if isinstance(stage, torch.Tensor) and stage.ndim else stage
        d, u = (down, up) if k is None else (down[k], up[k])
        if d.ndim == 4:
            update = sum(u[:, r, None, None, None] * d[r][None] for r in range(u.shape[1]))
        else:
            update = torch.stack([sum(row[r] * d[r] for r in range(len(d))) for row in u]).view(weight.shape)
        y = DENSE[activation](F.conv2d(x[n : n + 1], weight + scale * update, bias, **geometry))
        out.append(y if residual is None else y + residual[n : n + 1])
    return torch.cat(out)


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("geometry", GEOMETRY)
def test_equals_dense_weights_built_by_hand(backend, form, geometry):
    p, settings = problem(form), GEOMETRY[geometry]
    for stage in (1, torch.tensor(1), torch.tensor([2, 0, 0, 1, 2]), torch.tensor([1, 1, 1, 1, 1], dtype=torch.int32)):
        got = lf.functional.lora_conv2d(**p, stage=stage, scale=0.7, **settings)
        torch.testing.assert_close(got, dense(**p, stage=stage, scale=0.7, **settings))


@pytest.mark.parametrize("activation", DENSE)
@pytest.mark.parametrize("stage", [None, torch.tensor([2, 0, 0, 1, 2])], ids=["one", "per sample"])
def test_activation_residual_and_gradients_equal_autograd_of_the_dense_form(backend, activation, stage):
    p = problem("loralib", stages=None if stage is None else K)
    residual = torch.randn(5, 6, 7, 6, dtype=torch.float64)
    for extra in ({}, {"residual": residual}):
        leaves = {name: t.clone().requires_grad_() for name, t in (p | extra).items()}
        settings = {"stage": stage, "scale": 0.7, "padding": 1, "activation": activation}
        y = lf.functional.lora_conv2d(**leaves, **settings)
        expected = dense(**leaves, **settings)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        got = torch.autograd.grad((y * weights).sum(), leaves.values())
        want = torch.autograd.grad((expected * weights).sum(), leaves.values())
        for name, a, b in zip(leaves, got, want, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_weight_without_an_update(backend, activation):
    """As a staged denoiser calls it, which has merged the weights of all layers before."""
    p = problem(stages=None)
    leaves = {name: p[name].clone().requires_grad_() for name in ("x", "weight", "bias")}
    y = lf.functional.lora_conv2d(**leaves, down=None, up=None, padding=1, activation=activation)
    expected = DENSE[activation](F.conv2d(**{"input" if n == "x" else n: t for n, t in leaves.items()}, padding=1))
    torch.testing.assert_close(y, expected)
    for wanted in (["x", "weight", "bias"], ["x"], ["weight"], ["bias"]):
        inputs = [leaves[name] for name in wanted]
        got, want = (torch.autograd.grad(t.square().sum(), inputs, retain_graph=True) for t in (y, expected))
        torch.testing.assert_close(got, want)
    opcheck(op, (*leaves.values(), None, None, None, None, 1.0, [1, 1], [1, 1], [1, 1], 1, activation, False, [0, 0]))


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("stage", [None, torch.tensor([0, 1, 0])], ids=["one", "per sample"])
def test_gradcheck_with_a_frozen_base(backend, form, stage):
    p = problem(form, n=3, in_=2, out=3, rank=1, stages=None if stage is None else 2)
    x, down, up = (p[name].requires_grad_() for name in ("x", "down", "up"))

    def call(x, down, up):
        return lf.functional.lora_conv2d(
            x[:, :, :5, :4], p["weight"], p["bias"], down, up, stage=stage, padding=1, stride=(2, 1), activation="silu"
        )

    assert torch.autograd.gradcheck(call, (x, down, up), fast_mode=True)


def test_grouped_loralib(backend):
    p = problem("loralib", groups=2)
    got = lf.functional.lora_conv2d(**p, stage=2, groups=2, padding=1)
    torch.testing.assert_close(got, dense(**p, stage=2, groups=2, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_error_is_that_of_torch_with_the_merged_weight(backend, dtype, layout):
    p = problem(in_=16, out=8, rank=4, dtype=torch.float32)
    x = p["x"].to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(5, 16, 9, 12).to(dtype)[:, :, 1:8, ::2]
    stage = torch.tensor([2, 0, 0, 1, 2])
    truth = dense(**{name: t.double() for name, t in (p | {"x": x}).items()}, stage=stage, padding=1)
    got = lf.functional.lora_conv2d(**(p | {"x": x}), stage=stage, padding=1)
    merged = p["weight"] + adapters.delta(p["down"], p["up"], p["weight"].shape)
    own = torch.cat(
        [F.conv2d(x[n : n + 1], merged[k].to(dtype), p["bias"].to(dtype), padding=1) for n, k in enumerate(stage)]
    )
    assert got.dtype == dtype
    assert got.is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    # Minimal filtering loses a digit of the values' size, however well torch's own convolution sums on this CPU.
    least = 1e-5 if backend == "winograd" else 1e-6
    assert (got - truth).abs().max() <= 2 * (own - truth).abs().max() + least * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": 1, "stride": 2}, {}])
def test_of_one_channel_the_result_is_channels_last_in_16_bits(backend, dtype, sliced, geometry):
    """Such an image has both layouts, and what follows a network's first layer learns faster in that one."""
    p = problem(in_=1, out=16, rank=1, dtype=torch.float32)
    p["x"] = torch.randn(5, 1, 8, 14).to(dtype)[..., :: 2 if sliced else 1].requires_grad_()
    got = lf.functional.lora_conv2d(**p, stage=1, **geometry)
    last = dtype != torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    exact = {name: t.detach().double().requires_grad_(name == "x") for name, t in p.items()}
    truth = dense(**exact, stage=torch.ones(5, dtype=torch.int64), **geometry)
    weights = torch.randn(truth.shape)
    (grad,) = torch.autograd.grad((got * weights).sum(), p["x"])
    (expected,) = torch.autograd.grad((truth * weights).sum(), exact["x"])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for found, right in ((got, truth), (grad, expected)):
        assert (found - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("stage", [None, torch.tensor([1, 0, 1])], ids=["one", "per sample"])
def test_opcheck(form, stage):
    p = problem(form, n=3, stages=None if stage is None else 2, dtype=torch.float32)
    tensors = [t.requires_grad_(name in ("x", "down", "up")) for name, t in p.items()]
    tensors[0] = tensors[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    opcheck(op, (*tensors, stage, None, 0.5, [1, 2], [1, 1], [1, 1], 1, "relu", False, [0, 0]))


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": (0, 3), "dilation": (2, 1)}, {"padding": (4, 0)}])
def test_gradients_of_large_channels_last_images_by_matrix_products(monkeypatch, form, geometry):
    monkeypatch.setattr(_lora_aten, "_PRODUCTS_PAY", True)
    monkeypatch.setattr(_lora_aten, "_LARGE_IMAGE", 1)
    monkeypatch.setattr(_lora_aten, "_UNFOLDED", 400)  # several pieces, the last one smaller
    calls = []
    products = _lora_aten._weight_gradient_by_products
    monkeypatch.setattr(_lora_aten, "_weight_gradient_by_products", lambda *args: calls.append(1) or products(*args))
    p = problem(form, n=2, stages=None, dtype=torch.float32)
    p["x"] = p["x"].contiguous(memory_format=torch.channels_last)
    leaves = {name: t.requires_grad_() for name, t in p.items() if name in ("x", "down", "up")}
    y, expected = lf.functional.lora_conv2d(**p, **geometry), dense(**p, **geometry)
    noise = torch.randn_like(y)
    got = torch.autograd.grad((y * noise).sum(), leaves.values())
    want = torch.autograd.grad((expected * noise).sum(), leaves.values())
    assert len(calls) == 1
    for name, a, b in zip(leaves, got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("geometry", [{"stride": 2, "padding": 1}, {"groups": 2}])
def test_matrix_products_leave_other_geometries_alone(monkeypatch, geometry):
    monkeypatch.setattr(_lora_aten, "_PRODUCTS_PAY", True)
    monkeypatch.setattr(_lora_aten, "_LARGE_IMAGE", 1)
    p = problem("loralib", n=2, stages=None, dtype=torch.float32, groups=geometry.get("groups", 1))
    p["x"] = p["x"].contiguous(memory_format=torch.channels_last)
    leaves = [p[name].requires_grad_() for name in ("weight", "down", "up")]
    y, expected = lf.functional.lora_conv2d(**p, **geometry), dense(**p, **geometry)
    noise = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad((t * noise).sum(), leaves) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_opcheck_of_a_transposed_convolution():
    x, weight = torch.randn(2, 4, 5, 3, requires_grad=True), torch.randn(4, 6, 2, 2)
    down, up = torch.randn(4, 4, requires_grad=True)[:, :4] @ torch.randn(4, 8), torch.randn(12, 4, requires_grad=True)
    opcheck(op, (x, weight, None, down, up, None, None, 1.0, [2, 2], [0, 0], [1, 1], 1, None, True, [1, 0]))


def test_compiles_without_graph_breaks_forward_and_backward(graph_counter):
    p = problem(dtype=torch.float32)
    p["down"].requires_grad_()

    def call(x, stage, k):
        y = lf.functional.lora_conv2d(x, *list(p.values())[1:], stage=stage, padding=1, activation="relu")
        return y + lf.functional.lora_conv2d(x, *list(p.values())[1:], stage=k, padding=1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = (p["x"], torch.tensor([2, 0, 0, 1, 2]), 1)
    got, expected = compiled(*arguments), call(*arguments)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), p["down"])[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_a_frozen_base_keeps_x_alone_and_gets_no_gradient():
    p = problem(dtype=torch.float32, stages=None)
    x = p["x"].requires_grad_()
    p["down"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lf.functional.lora_conv2d(**p, padding=1)
    inputs = {t.data_ptr() for t in p.values()}
    assert kept and all(t.data_ptr() in inputs for t in kept)
    y.sum().backward()
    assert p["weight"].grad is None and x.grad is not None
    assert torch.equal(p["up"], p["up"].detach()) and p["up"].grad is None


def test_autocast_narrows_the_image_and_rounds_the_merged_weight_once():
    p = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = lf.functional.lora_conv2d(**p, stage=1, padding=1)
    expected = lf.functional.lora_conv2d(**(p | {"x": p["x"].bfloat16()}), stage=1, padding=1)
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)
    wide = {name: t.double() for name, t in p.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert lf.functional.lora_conv2d(**wide, stage=1).dtype == torch.float64


def test_gradients_of_a_batch_whose_stages_lie_on_the_cpu():
    """Beside factors on another device, which meta stands for."""
    weight, down, up = (torch.zeros(shape, device="meta") for shape in ((4, 3, 3, 3), (3, 2, 3, 3, 3), (3, 4, 2)))
    grad_w = weight.expand(2, *weight.shape)
    found = reference._weight_gradients(grad_w, weight, down, up, torch.tensor([2, 0]), 1.0, False)
    assert [found[i].shape for i in (1, 3, 4)] == [weight.shape, down.shape, up.shape]


def test_an_empty_batch_stays_empty(backend):
    p = problem(n=0)
    for stage in (1, torch.zeros(0, dtype=torch.int64)):
        assert lf.functional.lora_conv2d(**p, stage=stage, padding=1).shape == (0, 6, 7, 6)
        leaves = [t.clone().requires_grad_() for t in p.values()]
        y = lf.functional.lora_conv2d(*leaves, stage=stage, padding=1, activation="gelu")
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 5, 6, 6)}, ValueError, r"x: expected \(N, 4, H, W\) for weight \(6, 4, 3, 3\)"),
        ({"x": torch.randn(4, 6, 6)}, ValueError, "x, weight: expected four axes each"),
        ({"x": torch.randn(5, 4, 2, 2)}, ValueError, "an image that the kernel fits into"),
        ({"x": torch.ones(5, 4, 7, 6, dtype=torch.int64)}, TypeError, "x: expected float32, .* got torch.int64"),
        ({"weight": torch.randn(6, 4, 3, 3, device="meta")}, ValueError, "weight is on meta, but x is on cpu"),
        (
            {"weight": torch.randn(6, 4, 0, 3), "down": torch.randn(K, 6, 12), "up": torch.randn(K, 18, 6)},
            ValueError,
            "a square kernel, got 0x3",
        ),
        ({"bias": torch.randn(4)}, ValueError, r"bias: expected \(6,\), got \(4\)"),
        ({"down": torch.randn(K, 2, 4, 3, 2)}, ValueError, r"down, up: expected \(2, 4, 3, 3\) and \(6, 2\)"),
        ({"down": torch.randn(2, 2, 4, 3, 3)}, ValueError, "expected one number of stages, got 2 and 3"),
        ({"stage": None}, ValueError, "no stage axis"),
        ({"stage": 3}, IndexError, "stage: expected 0 to 2, got 3"),
        ({"stage": torch.tensor([0, 1])}, ValueError, r"one stage per sample, shape \(5,\)"),
        ({"stage": torch.tensor([0, 1, 2, 3, 0])}, IndexError, "stage: expected 0 to 2, got 3"),
        ({"stage": torch.tensor([0, 1, -1, 0, 0])}, IndexError, "stage: expected 0 to 2, got -1"),
        ({"stage": torch.rand(5)}, TypeError, "expected an int or an int64 tensor, got torch.float32"),
        ({"groups": 2}, ValueError, "form 'peft' cannot express groups=2"),
        ({"groups": 0}, ValueError, "groups: expected at least 1"),
        ({"groups": 1.0}, TypeError, "groups: expected a whole number, got 1.0"),
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"up": 3}, TypeError, "down, up: expected two tensors, .* got Tensor and int"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got '1'"),
        ({"scale": None}, TypeError, "scale: expected a number, got None"),
        ({"scale": 1e300}, ValueError, r"scale: expected a number that float32 holds, got 1e\+300"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        ({"stride": 1.5}, TypeError, "stride: expected one or two whole numbers of at least 1, got 1.5"),
        ({"stride": (1, 1.5)}, TypeError, r"stride: expected one or two whole numbers .* got \(1, 1.5\)"),
        ({"padding": None}, TypeError, "padding: expected one or two whole numbers of at least 0, got None"),
        ({"activation": ["relu"]}, ValueError, r"activation: expected one of .*, got \['relu'\]"),
        ({"stride": 0}, ValueError, "stride: expected one or two whole numbers of at least 1"),
        ({"padding": -1}, ValueError, "padding: expected one or two whole numbers of at least 0"),
        ({"padding": "full"}, ValueError, "'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding: expected numbers with stride"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of None, 'relu'"),
        ({"residual": torch.randn(5, 6, 7, 6)}, ValueError, r"residual: expected the output's shape \(5, 6, 5, 4\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    fitting = {**problem(dtype=torch.float32), "stage": 0}
    lf.functional.lora_conv2d(**fitting)
    for _ in range(2):  # neither what passed before nor what failed changes the next call's check
        with pytest.raises(error, match=message):
            lf.functional.lora_conv2d(**(fitting | change))


def test_what_fits_is_checked_once(monkeypatch):
    checks, check = [], conv_ops._check
    monkeypatch.setattr(conv_ops, "_check", lambda *args: (checks.append(1), check(*args))[1])
    monkeypatch.setattr(conv_ops, "_FITTING", {(n,) for n in range(1023)})
    p = problem(dtype=torch.float32, stages=None)
    for padding in (1, 1, (1, 1), 0, 1):
        lf.functional.lora_conv2d(**p, padding=padding)
    assert len(checks) == 3 and len(conv_ops._FITTING) == 2, "forgotten where there are too many"


def test_a_second_differentiation_is_refused():
    p = problem(stages=None)
    x = p["x"].requires_grad_()
    (grad,) = torch.autograd.grad(lf.functional.lora_conv2d(**p).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_conv2d: expected one differentiation, got a second"):
        grad.sum().backward()


class _Recorder:
    """A backend that computes nothing of its own and remembers that it was asked."""

    def __init__(self, monkeypatch, missing=None, supports=None):
        self.calls = 0
        reference = _backends.BACKENDS["lora_conv2d"]["reference"]

        def forward(*args):
            self.calls += 1
            return reference.forward(*args)

        backend = _backends.Backend(
            "triton", ("cpu",), forward, reference.backward, lambda: missing, lambda *args: supports
        )
        monkeypatch.setitem(_backends.BACKENDS["lora_conv2d"], "triton", backend)


def test_the_table_decides_unless_a_backend_is_named(monkeypatch):
    p = problem(stages=None)
    recorder = _Recorder(monkeypatch)
    lf.functional.lora_conv2d(**p)
    assert recorder.calls == 0
    rows = (_backends.Row("triton", "measured", lambda x, *rest: x.shape[0] == 5),)
    monkeypatch.setitem(_backends.TABLE, ("lora_conv2d", "cpu"), rows)
    lf.functional.lora_conv2d(**p)
    assert recorder.calls == 1
    lf.functional.lora_conv2d(**problem(stages=None, n=4))
    assert recorder.calls == 1
    monkeypatch.setattr(_native, "WISH", "triton")
    lf.functional.lora_conv2d(**problem(stages=None, n=4))
    assert recorder.calls == 2


def test_a_named_backend_that_is_missing_is_an_error_and_one_that_declines_is_not(monkeypatch):
    p = problem(stages=None)
    monkeypatch.setattr(_native, "WISH", "triton")
    recorder = _Recorder(monkeypatch, supports="too small")
    lf.functional.lora_conv2d(**p)
    assert recorder.calls == 0
    _Recorder(monkeypatch, missing="no compiler")
    with pytest.raises(RuntimeError, match=r"LORUN_BACKEND=triton: expected .* no compiler"):
        lf.functional.lora_conv2d(**p)
    served = lf.show_config(quiet=True)["ops"]["lora_conv2d"]["cpu"]
    assert served["backend"] in ("aten", "packed") and "triton: no compiler" in served["reason"]


def test_a_named_backend_without_its_device_is_an_error_where_there_is_no_such_device(monkeypatch):
    p = problem(stages=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = (
        "LORUN_BACKEND=triton: expected a backend that runs here, got none: it needs cuda, which torch does not find"
    )
    with lf.use_backend("triton"):
        for call in (lambda: lf.functional.lora_conv2d(**p), lambda: _backends.choose("lora_merge", "cpu", ())):
            with pytest.raises(RuntimeError, match=message):
                call()
        served = lf.show_config(quiet=True)["ops"]["lora_conv2d"]["cpu"]
        assert served["backend"] in ("aten", "packed") and "triton: it needs cuda" in served["reason"]
        # Where the device exists, what lies on another goes by the table.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        lf.functional.lora_conv2d(**p)
        assert "triton" not in lf.show_config(quiet=True)["ops"]["lora_conv2d"]["cpu"]["reason"]
    lf.functional.lora_conv2d(**p)


def test_what_the_variable_may_say(monkeypatch):
    monkeypatch.setattr(_native, "WISH", "reference")
    served = lf.show_config(quiet=True)["ops"]["lora_conv2d"]["cpu"]
    assert served["backend"] == "reference (PyTorch)" and "LORUN_BACKEND=reference" in served["reason"]
    monkeypatch.setattr(_native, "WISH", "fastest")
    known = "auto, reference, aten, packed, triton, winograd"
    with pytest.raises(ValueError, match=f"LORUN_BACKEND: expected one of {known}, got 'fastest'"):
        _native._load()
    monkeypatch.setattr(_native, "WISH", "auto")
    monkeypatch.setenv("LORUN_CPU", "sse9")
    with pytest.raises(ValueError, match="LORUN_CPU: expected one of baseline, avx2, avx512, got 'sse9'"):
        _native._load()
