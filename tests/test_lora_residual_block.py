"""A residual block of two adapted convolutions as one op: results, gradients, what it keeps, where it serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lora_help import packed_anywhere, problem
from torch import nn
from torch.library import opcheck

import lorun_fast as lf
from lorun_fast import _native, _scope, adapters, convolutions
from lorun_fast.ops.lora import is_channels_last

op = torch.ops.lorun_fast.lora_residual_block.default
backward_op = torch.ops.lorun_fast.lora_residual_block_backward.default
K = 3
PER_SAMPLE = torch.tensor([2, 0, 0, 1])


def block(form="peft", stages=None, dtype=torch.float64, channels=8, middle=16, kernel=3, bias=True) -> dict:
    """x, first, second and residual of a block."""
    sizes = {"form": form, "kernel": kernel, "stages": stages, "dtype": dtype}
    layers = [problem(in_=channels, out=middle, **sizes), problem(in_=middle, out=channels, **sizes)]
    halves = [[p["weight"] / 2, p["bias"] if bias else None, p["down"], p["up"]] for p in layers]
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(4, channels, 7, 6, dtype=dtype, generator=generator)
    return {"x": layers[0]["x"], "first": halves[0], "second": halves[1], "residual": residual}


def leaves_of(p: dict) -> list[torch.Tensor]:
    return [t for t in (p["x"], *p["first"], *p["second"], p["residual"]) if t is not None]


def learning(p: dict, dtype: torch.dtype | None = None) -> dict:
    """The same block, in that dtype, whose tensors ask for gradients."""

    def fresh(t):
        return None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_()

    return {name: [fresh(t) for t in v] if isinstance(v, list) else fresh(v) for name, v in p.items()}


def dense(x, first, second, residual=None, *, scales=(1.0, 1.0), stage=None) -> torch.Tensor:
    """Sample by sample, each update added to its weight by hand."""
    out = []
    for n in range(len(x)):
        k = stage[n] if isinstance(stage, torch.Tensor) and stage.ndim else stage
        image = x[n : n + 1]
        for (weight, bias, down, up), scale, act in zip(
            (first, second), scales, (torch.relu, lambda t: t), strict=True
        ):
            if down is not None:
                d, u = (down, up) if k is None else (down[k], up[k])
                update = torch.einsum("or,r...->o...", u, d) if d.ndim == 4 else (u @ d).view(weight.shape)
                weight = weight + scale * update
            image = act(F.conv2d(image, weight, bias, padding=[size // 2 for size in weight.shape[2:]]))
        out.append(x[n : n + 1] + image + (0 if residual is None else residual[n : n + 1]))
    return torch.cat(out)


@pytest.fixture(params=["reference", "layers", "aten", "winograd"])
def backend(request, monkeypatch):
    monkeypatch.setattr(_native, "WISH", request.param)


@pytest.fixture
def tiles(monkeypatch):
    packed_anywhere(monkeypatch)
    monkeypatch.setattr(_native, "WISH", "packed")


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize(
    "stage", [None, 1, torch.tensor(1), PER_SAMPLE], ids=["factors", "stage", "a tensor's stage", "per sample"]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_and_gradients_equal_dense_weights_built_by_hand(backend, form, stage, bias, layout):
    p = block(form, None if stage is None else K, bias=bias)
    p["x"] = p["x"].contiguous(memory_format=layout)
    ours, theirs = learning(p), learning(p)
    y = lf.functional.lora_residual_block(**ours, scales=(0.7, 0.4), stage=stage)
    expected = dense(**theirs, scales=(0.7, 0.4), stage=stage)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), leaves_of(ours))
    want = torch.autograd.grad((expected * weights).sum(), leaves_of(theirs))
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, index=index: f"{index}: {text}")


def test_every_choice_of_gradients(backend):
    p = block("loralib")
    whole = torch.autograd.grad(lf.functional.lora_residual_block(**(q := learning(p))).square().sum(), leaves_of(q))
    count = len(whole)
    for asked in range(count):
        q = learning(p)
        for index, t in enumerate(leaves_of(q)):
            t.requires_grad_(index == asked)
        y = lf.functional.lora_residual_block(**q)
        (got,) = torch.autograd.grad(y.square().sum(), [leaves_of(q)[asked]])
        torch.testing.assert_close(got, whole[asked], msg=lambda text, asked=asked: f"{asked}: {text}")


def test_whole_weights_without_an_update(backend):
    p = block()
    for name in ("first", "second"):
        p[name][2:] = [None, None]
    ours, theirs = learning(p), learning(p)
    y, expected = lf.functional.lora_residual_block(**ours), dense(**theirs)
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y.square().sum(), leaves_of(ours))
    want = torch.autograd.grad(expected.square().sum(), leaves_of(theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", [*adapters.FORMS, None])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_matrix_tiles(tiles, form, residual, bias):
    """To the error of bf16, measured by the same pass in bf16 through torch's convolutions."""
    p = block(form or "peft", dtype=torch.float32, bias=bias)
    p["residual"] = p["residual"] if residual else None
    if form is None:
        p["first"][2:] = p["second"][2:] = [None, None]
    found = {}
    for wish, dtype in (("packed", torch.bfloat16), ("aten", torch.bfloat16), ("exact", torch.float64)):
        _native.WISH = wish  # the fixture puts it back
        q = learning(p, torch.float64 if wish == "exact" else None)
        if wish != "exact":
            q["x"] = q["x"].detach().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = lf.functional.lora_residual_block(**q, scales=(0.7, 1.0))
        assert y.dtype == dtype
        assert wish == "exact" or y.is_contiguous(memory_format=torch.channels_last)
        found[wish] = [y, *torch.autograd.grad(y.square().sum(), leaves_of(q))]
    for index, (ours, atens, exact) in enumerate(zip(*found.values(), strict=True)):
        largest = exact.abs().max()
        error, other = ((t.double() - exact).abs().max() / largest for t in (ours, atens))
        assert error <= 2 * other + 0.005, f"{index}: {error} of the largest value, torch's {other}"


def test_matrix_tiles_compute_the_same_middle_again(tiles):
    p = block(dtype=torch.float32)
    x = p["x"].bfloat16().contiguous(memory_format=torch.channels_last)
    whole = lf.functional.lora_residual_block(x, p["first"], p["second"])
    middle = lf.functional.lora_conv2d(x, *p["first"], padding=1, activation="relu")
    twice = lf.functional.lora_conv2d(middle, *p["second"], padding=1, residual=x)
    assert torch.equal(whole, twice)


def test_only_the_input_is_kept(backend):
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    p = block(dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lf.functional.lora_residual_block(x, p["first"], p["second"])
    images = [t for t in kept if t.ndim == 4 and t.shape[2:] == (16, 16)]
    assert len(images) == 1 and images[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("form", "stage"), [(None, None), *((form, stage) for form in adapters.FORMS for stage in (None, PER_SAMPLE))]
)
def test_opcheck(form, stage):
    p = block(form or "peft", None if stage is None else K, dtype=torch.float32, middle=6, channels=4)
    if form is None:
        p["first"][2:] = p["second"][2:] = [None, None]
    q = learning(p)
    opcheck(op, (q["x"], *q["first"], *q["second"], stage, q["residual"], 0.5, 1.0))
    mask = [True, *[t is not None for t in (*p["first"], *p["second"])]]
    tensors = (p["x"], *p["first"], *p["second"], stage)
    opcheck(backward_op, (torch.randn_like(p["x"]), *tensors, 0.5, 1.0, mask))


@pytest.mark.parametrize("form", adapters.FORMS)
def test_gradcheck(backend, form):
    p = block(form, channels=2, middle=3)
    x = p["x"][:2, :, :5, :4].clone().requires_grad_()
    factors = [t.requires_grad_() for half in ("first", "second") for t in p[half][2:]]

    def call(x, *factors):
        return lf.functional.lora_residual_block(x, [*p["first"][:2], *factors[:2]], [*p["second"][:2], *factors[2:]])

    assert torch.autograd.gradcheck(call, (x, *factors), fast_mode=True)


def test_differentiable_once():
    q = learning(block())
    (g,) = torch.autograd.grad(lf.functional.lora_residual_block(**q).square().sum(), q["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="lora_residual_block: expected one differentiation"):
        g.sum().backward()


@pytest.mark.parametrize("kernel", [1, 5])
def test_other_kernels(backend, kernel):
    p = block("loralib", kernel=kernel)
    torch.testing.assert_close(lf.functional.lora_residual_block(**p), dense(**p))


def test_slices_and_empty_batches(backend):
    p = block()
    x = torch.randn(4, 8, 14, 12, dtype=torch.float64)[:, :, ::2, ::2]
    torch.testing.assert_close(
        lf.functional.lora_residual_block(x, p["first"], p["second"]), dense(x, p["first"], p["second"])
    )
    q = learning(p)
    empty = lf.functional.lora_residual_block(q["x"][:0], q["first"], q["second"])
    assert empty.shape == (0, 8, 7, 6)
    empty.sum().backward()
    assert not q["first"][2].grad.any()


def test_an_empty_batch_by_matrix_tiles(tiles):
    q = learning(block(dtype=torch.float32))
    x = q["x"][:0].bfloat16().contiguous(memory_format=torch.channels_last)
    y = lf.functional.lora_residual_block(x, q["first"], q["second"])
    assert y.shape == (0, 8, 7, 6)
    y.sum().backward()
    assert not q["second"][3].grad.any()


def test_autocast(backend):
    p = block(dtype=torch.float32)
    exact = dense(**p)
    with torch.autocast("cpu", torch.bfloat16):
        y = lf.functional.lora_residual_block(**p)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_compiles_without_a_break():
    p = block()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: lf.functional.lora_residual_block(x, p["first"], p["second"]).relu(), fullgraph=True
    )
    x = p["x"].clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, dense(x, p["first"], p["second"]).relu())
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, 7)}, ValueError, r"x: expected \(N, C, H, W\), got \(4, 8, 7\)"),
        ({"x": torch.zeros(4, 5, 7, 6)}, ValueError, "x, first, second: expected"),
        ({"x": torch.zeros(4, 8, 7, 6, dtype=torch.int64)}, TypeError, "x: expected float32"),
        ({"residual": torch.zeros(4, 8, 7, 5)}, ValueError, "residual: expected the output's shape"),
        ({"first": [torch.zeros(16, 8, 2, 2), None, None, None], "stage": None}, ValueError, "first: .* of odd sizes"),
        ({"first": [torch.zeros(16, 8, 3, 3)]}, ValueError, r"first: expected \(weight, bias, down, up\), got 1"),
        ({"second": [torch.zeros(8, 9, 3, 3), None, None, None]}, ValueError, "down, up: expected two tensors"),
        ({"stage": 3}, IndexError, "stage: expected 0 to 2, got 3"),
        ({"stage": torch.tensor([0, 1])}, ValueError, "stage: expected one stage per sample"),
        ({"stage": None}, ValueError, "down, up: expected no stage axis"),
    ],
)
def test_what_does_not_fit(change, error, message):
    p = block(stages=K, dtype=torch.float32) | {"stage": 0}
    with pytest.raises(error, match=message):
        lf.functional.lora_residual_block(**(p | change))


def test_half_a_pair_of_factors():
    p = block(dtype=torch.float32)
    p["first"][3] = None
    with pytest.raises(ValueError, match="down, up: expected two tensors, or None for both and no stage"):
        lf.functional.lora_residual_block(**p)


class Pair(nn.Module):
    """A denoiser of one residual block, and how often it came by way of the one op."""

    def __init__(self, **first):
        super().__init__()
        settings = {"kernel_size": 3, "padding": 1} | first
        self.first = nn.Conv2d(4, 6, **settings)
        self.second = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        return convolutions.residual_block(self.first, self.second, x, residual=x)


def times_served(monkeypatch, staged, x, **call) -> int:
    calls = []
    of_layers = convolutions.lora_residual_block.of_layers
    with monkeypatch.context() as m:
        m.setattr(convolutions.lora_residual_block, "of_layers", lambda *a: calls.append(1) or of_layers(*a))
        staged(x, **call)
    return len(calls)


@pytest.mark.parametrize("form", adapters.FORMS)
def test_layers_that_learn_are_one_op(monkeypatch, form):
    torch.manual_seed(0)
    staged = lf.adapt(Pair(), stages=2, gamma=50, form=form)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(3, 4, 8, 8)
    for stage in (1, torch.tensor([1, 0, 1])):
        assert times_served(monkeypatch, staged, x, stage=stage) == 1
        got = staged(x, stage=stage)
        with monkeypatch.context() as m:
            m.setattr(convolutions, "_are_a_lora_block", lambda *layers: False)
            torch.testing.assert_close(got, staged(x, stage=stage))
    staged.merge()
    assert times_served(monkeypatch, staged, x, stage=1) == 0
    torch.testing.assert_close(staged(x, stage=1), staged(x, stage=torch.tensor([1, 1, 1])))


@pytest.mark.parametrize(
    "first",
    [
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": 5},
        {"kernel_size": (3, 2), "padding": "same"},
    ],
    ids=lambda first: next(iter(first)),
)
def test_layers_that_are_no_block(monkeypatch, first):
    staged = lf.adapt(Pair(**first), stages=2, form="peft")
    served = []
    monkeypatch.setattr(convolutions.lora_residual_block, "of_layers", lambda *a: served.append(1))
    x = torch.randn(1, 4, 8, 8)
    if first in ({"stride": 2}, {"kernel_size": 5}):
        with pytest.raises(RuntimeError, match="size of tensor"):
            staged(x, stage=0)
    else:
        staged(x, stage=0)
    assert not served


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_of_a_layer_are_called(monkeypatch, hook):
    staged = lf.adapt(Pair(), stages=2)
    seen = []
    handle = getattr(staged.base.second, hook)(lambda *a: seen.append(1))
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    staged(x, stage=0).sum().backward()
    assert seen
    handle.remove()
    assert times_served(monkeypatch, staged, x, stage=0) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert times_served(monkeypatch, staged, x, stage=0) == 0
    finally:
        handle.remove()


def test_a_networks_gradients_do_not_depend_on_it(monkeypatch):
    torch.manual_seed(0)
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), lf.ResUNet(channels=(8, 16), blocks=1), stages=2)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    x, found = torch.rand(2, 1, 16, 24), []
    for one_op in (True, False):
        if not one_op:
            monkeypatch.setattr(convolutions, "_are_a_lora_block", lambda *layers: False)
        net.zero_grad()
        (net(net.op(x), size=(16, 24)) - x).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert len(found[0]) > 10
    for name, g in found[0].items():
        torch.testing.assert_close(g, found[1][name], rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def test_its_layout_follows_either_weight():
    p = block(dtype=torch.float32)
    p["second"][0] = p["second"][0].contiguous(memory_format=torch.channels_last)
    assert is_channels_last(lf.functional.lora_residual_block(**p))


@pytest.mark.gpu
@pytest.mark.parametrize("wish", ["auto", "triton"])
@pytest.mark.parametrize("stage", [1, torch.tensor(1), PER_SAMPLE], ids=["stage", "a tensor's stage", "per sample"])
def test_on_a_gpu(monkeypatch, wish, stage):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default; rounds to 5e-4
    p = block("loralib", K)
    expected = dense(**(exact := learning(p)), stage=stage)
    want = torch.autograd.grad(expected.square().sum(), leaves_of(exact))
    monkeypatch.setattr(_native, "WISH", wish)
    q = learning({k: [t.cuda() for t in v] if isinstance(v, list) else v.cuda() for k, v in p.items()}, torch.float32)
    y = lf.functional.lora_residual_block(**q, stage=stage)
    got = torch.autograd.grad(y.square().sum(), leaves_of(q))
    for index, (a, b) in enumerate(zip([y, *got], [expected, *want], strict=True)):
        error = (a.cpu().double() - b).abs().max() / b.abs().max()
        assert error < 1e-4, f"{index}: {error} of the largest value"


@pytest.mark.parametrize("shape", [(1, 8, 0, 5), (1, 8, 5, 0)])
def test_images_without_rows_or_columns(shape):
    layer = (torch.rand(8, 8, 3, 3), None, None, None)
    with pytest.raises(ValueError, match=r"^x: expected an image with rows and columns, got"):
        lf.functional.lora_residual_block(torch.rand(shape), layer, layer)


def test_layers_of_other_numbers_of_stages_are_no_block():
    """They are called one by one, and raise what each by itself would."""
    a, b = (lf.LoRAConv2d(8, 8, 3, padding=1, rank=2, stages=stages) for stages in (3, 1))
    x = torch.rand(1, 8, 5, 5)
    with pytest.raises(IndexError, match="stage: expected 0 to 0, got 2"):
        _scope.call_at(2, {}, convolutions.residual_block, a, b, x)
    with pytest.raises(ValueError, match="stage: expected 0 to 2, got none"):
        convolutions.residual_block(b, a, x)


@pytest.mark.parametrize("make", [lambda conv: conv, convolutions.WinogradConv2d])
def test_what_is_no_activation(make):
    conv = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    with pytest.raises(ValueError, match="activation: expected None or 'relu', got 'gelu'"):
        convolutions.convolve(make(conv), torch.rand(1, 8, 5, 5), "gelu")
