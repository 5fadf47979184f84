"""The LoRA layers as a GPU has them outside of the kernels: torch's differentiable ops, a merge for all stages at once.

Nothing in them asks for a GPU, so a CPU stands for one here.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from kernels_help import needs_triton
from lora_help import problem
from torch import nn
from torch.nn import functional as F
from torch.utils import _python_dispatch
from torch.utils.flop_counter import FlopCounterMode

import lorun_fast as lf
from lorun_fast import _native, adapters
from lorun_fast.layers import all_stage_weights, merged_weights
from lorun_fast.ops import _backends, _lora_autograd


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_lora_autograd, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setitem(_backends.TABLE, ("lora_conv2d", "cpu"), (_backends.Row("aten", "for a test"),))
    monkeypatch.setattr(_native, "WISH", "auto")


@pytest.fixture
def merges(monkeypatch):
    """The shapes of up at every merge."""
    seen = []
    merge = _lora_autograd.merge
    monkeypatch.setattr(
        _lora_autograd, "merge", lambda w, d, u, *rest: (seen.append(u.shape), merge(w, d, u, *rest))[1]
    )
    return seen


@pytest.mark.parametrize("stacked", [False, True], ids=["", "stacked"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("factors", [torch.float64, torch.float32], ids=["", "other factors"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("form", adapters.FORMS)
def test_merge(form, transposed, factors, last, stacked):
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    if last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    shapes = adapters.factor_shapes(weight.shape, 2, form, transposed=transposed)
    down, up = (torch.randn(*(3,) * stacked, *shape, dtype=factors) for shape in shapes)
    leaves = [t.requires_grad_() for t in (weight, down, up)]
    got = _lora_autograd.merge(weight, down, up, 0.5, transposed)
    want = adapters.merged_weight(weight, down, up, 0.5, transposed=transposed)
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_sixteen_bits_are_rounded_once():
    weight = torch.randn(32, 32, 3, 3).bfloat16()
    down, up = torch.randn(4, 32, 3, 3).bfloat16(), torch.randn(32, 4).bfloat16()
    for w in (weight, weight.contiguous(memory_format=torch.channels_last)):
        got = _lora_autograd.merge(w, down, up, 0.3, False)
        exact = weight.double() + 0.3 * adapters.delta(down.double(), up.double(), weight.shape)
        assert (got.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_call_and_its_gradients(form, activation, last, as_on_a_gpu, monkeypatch):
    p = problem(form)
    residual = torch.randn(4, 16, 7, 6, dtype=torch.float64)
    if last:
        p["x"], residual = (t.contiguous(memory_format=torch.channels_last) for t in (p["x"], residual))
    leaves = {name: t.requires_grad_() for name, t in p.items()}

    def results():
        y = lf.functional.lora_conv2d(**leaves, padding=1, scale=0.5, activation=activation, residual=residual)
        return [y, *torch.autograd.grad(y.square().sum(), leaves.values())]

    used = []
    conv2d = _lora_autograd.conv2d
    monkeypatch.setattr(_lora_autograd, "conv2d", lambda *args: (used.append(args), conv2d(*args))[1])
    got = results()
    assert len(used) == 1
    monkeypatch.setattr(_native, "WISH", "reference")
    for mine, theirs in zip(got, results(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert got[0].stride() == theirs_stride(p, residual, activation)
    assert len(used) == 1, "LORUN_BACKEND=reference is the definition"


def theirs_stride(p, residual, activation):
    """The op's layout: channels_last where x or the weight has it."""
    return lf.functional.lora_conv2d(**p, padding=1, activation=activation, residual=residual).stride()


def test_a_stage_per_sample_keeps_the_op(as_on_a_gpu, monkeypatch):
    p = problem(stages=3)
    monkeypatch.setattr(_lora_autograd, "conv2d", None)
    lf.functional.lora_conv2d(**p, stage=torch.tensor([0, 2, 1, 0]), padding=1)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("layer", ["conv", "transposed", "linear"])
def test_layers(layer, autocast, as_on_a_gpu, monkeypatch):
    torch.manual_seed(0)
    made = {
        "conv": lambda: (lf.LoRAConv2d(4, 6, 3, padding=1, stages=3, rank=2), torch.randn(2, 4, 5, 6)),
        "transposed": lambda: (lf.LoRAConvTranspose2d(4, 6, 2, stride=2, stages=3, rank=2), torch.randn(2, 4, 5, 6)),
        "linear": lambda: (lf.LoRALinear(4, 6, stages=3, rank=2), torch.randn(2, 5, 4)),
    }
    module, x = made[layer]()
    nn.init.normal_(module.up)
    x.requires_grad_()

    def results():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x, 1)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, module.down, module.up))]

    got = results()
    assert got[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    monkeypatch.setattr(_native, "WISH", "reference")
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for mine, theirs in zip(got, results(), strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, **tolerance)


def network(form: str, checkpoint: bool | int = False) -> lf.LoRun:
    torch.manual_seed(0)
    net = lf.LoRun(
        lf.BlockCS.gaussian(0.25, 8, learn=True), lf.ResUNet(channels=(4, 8), blocks=1), stages=3, form=form,
        checkpoint=checkpoint,
    )  # fmt: skip
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    return net.train()


def gradients(net: lf.LoRun, y: torch.Tensor, *, autocast: bool = False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = net(y)
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [x, *torch.autograd.grad(x.square().mean(), parameters)]


@pytest.mark.parametrize("checkpoint", [False, 2, True], ids=["", "2 recomputed", "recomputed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_network_merges_every_layer_once_for_a_pass(form, autocast, checkpoint, as_on_a_gpu, merges, monkeypatch):
    net = network(form, checkpoint)
    y = net.op(torch.rand(2, 1, 16, 16)).detach()
    got = gradients(net, y, autocast=autocast)
    layers = net.denoiser.adapted.values()
    assert sorted(merges) == sorted(layer.up.shape for layer in layers)
    monkeypatch.setattr(_lora_autograd, "DEVICES", ("cuda",))
    want = gradients(net, y, autocast=autocast)
    for mine, theirs in zip(got, want, strict=True):
        limit = 0.1 if autocast else 1e-4
        assert (mine - theirs).norm() <= limit * theirs.norm() + 1e-9


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", [lf.LoRAConv2d, lf.LoRAConvTranspose2d])
def test_weights_of_16_bits_lie_as_convolutions_read_them(kind, autocast, as_on_a_gpu):
    layer = kind(5, 6, 3, stages=3, rank=2)
    nn.init.normal_(layer.up)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weights = all_stage_weights([layer])[layer]
    assert len(weights) == 3
    for got, want in zip(weights, merged_weights([layer])[0], strict=True):
        torch.testing.assert_close(got, want.bfloat16() if autocast else want)
        assert got.is_contiguous(memory_format=torch.channels_last if autocast else torch.contiguous_format)


def test_a_merged_network_merges_nothing(as_on_a_gpu, merges):
    net = network("peft").eval()
    with torch.no_grad():
        net(net.op(torch.rand(1, 1, 16, 16)))
    assert not merges


def test_one_stage_by_itself_takes_the_factors_of_that_stage(as_on_a_gpu, merges):
    staged = network("loralib").denoiser
    copied = copy.deepcopy(staged).eval()
    copied.merge()
    z = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(staged(z, stage=2), copied(z, stage=2), rtol=1e-5, atol=1e-5)
    assert merges and all(len(shape) == 2 for shape in merges)


def test_it_is_differentiable_twice(as_on_a_gpu):
    p = {name: t.requires_grad_() for name, t in problem(n=1, in_=2, out=2, size=(3, 3), rank=1).items()}
    assert torch.autograd.gradgradcheck(
        lambda *tensors: lf.functional.lora_conv2d(*tensors, padding=1, activation="silu"), tuple(p.values())
    )


def test_compiled_there_is_no_op_of_ours(as_on_a_gpu):
    layer = lf.LoRAConv2d(4, 6, 3, padding=1, stages=3, rank=2)
    x = torch.randn(2, 4, 5, 6)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, 1), F.conv2d(x, layer.stage_weight(1), layer.bias, padding=1))
    assert seen and not any("lorun" in target for target in seen)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_large_batches_take_the_kernels_forward_pass(activation, bias, as_on_a_gpu, monkeypatch):
    """With the interpreter; large is what the test says."""
    needs_triton()
    monkeypatch.setattr(_lora_autograd, "_LARGE_BATCH", 1)
    p = problem(n=1, in_=16, out=16, size=(4, 5), dtype=torch.float16)
    p["x"] = p["x"].contiguous(memory_format=torch.channels_last)
    p["bias"] = p["bias"] if bias else None
    leaves = [t.requires_grad_() for t in p.values() if t is not None]
    residual = torch.randn(1, 16, 4, 5).half()

    def results(p):
        y = lf.functional.lora_conv2d(**p, padding=1, activation=activation, residual=residual.to(p["x"].dtype))
        wanted = [t for t in p.values() if t is not None]
        return [y, *torch.autograd.grad(y.float().square().mean(), wanted)]

    used = []
    kernel = _backends.BACKENDS["lora_conv2d"]["triton"]
    counted = replace(kernel, forward=lambda *args: (used.append(args), kernel.forward(*args))[1])
    monkeypatch.setitem(_backends.BACKENDS["lora_conv2d"], "triton", counted)
    got = results(p)
    assert len(used) == (activation != "silu")
    monkeypatch.setattr(_native, "WISH", "reference")
    wide = {name: None if t is None else t.detach().double().requires_grad_() for name, t in p.items()}
    for mine, theirs, leaf in zip(got, results(wide), [None, *leaves], strict=True):
        assert leaf is None or (mine.dtype == leaf.dtype and mine.shape == leaf.shape)
        assert (mine.double() - theirs).norm() <= 5e-3 * theirs.norm()


@pytest.mark.parametrize(
    ("channels", "bias", "activation", "dtype", "last", "pays"),
    [
        (64, True, None, torch.bfloat16, True, True),
        (64, False, "relu", torch.bfloat16, True, True),
        (64, False, None, torch.bfloat16, True, False),
        (32, False, None, torch.float16, True, True),
        (32, True, "gelu", torch.bfloat16, True, False),
        (64, True, None, torch.float32, True, False),
        (64, True, None, torch.bfloat16, False, False),
    ],
)
def test_where_the_kernel_pays(channels, bias, activation, dtype, last, pays):
    needs_triton()
    layout = torch.channels_last if last else torch.contiguous_format
    weight, bias = torch.zeros(channels, channels, 3, 3), torch.zeros(channels) if bias else None
    large, small = (
        torch.empty(n, channels, 256, 256, dtype=dtype, device="meta", memory_format=layout) for n in (16, 2)
    )
    assert _lora_autograd._kernel_pays(large, weight, bias, 1, activation) == pays
    assert not _lora_autograd._kernel_pays(small, weight, bias, 1, activation)
    with torch.autograd.forward_ad.dual_level():
        assert not _lora_autograd._kernel_pays(large, weight, bias, 1, activation)
    with FlopCounterMode(display=False):  # or another mode, which is to see a convolution
        assert not _lora_autograd._kernel_pays(large, weight, bias, 1, activation)


@pytest.fixture
def kernel(as_on_a_gpu, monkeypatch):
    """The calls of the Triton backend, which torch's convolution stands for; it takes every 16-bit batch."""
    calls = []

    def forward(x, weight, bias, down, up, stage, residual, scale, stride, padding, dilation, groups, activation, *_):
        assert down is up is stage is residual is None and groups == 1
        y = F.conv2d(x, weight, bias, stride, padding, dilation)
        assert not y.requires_grad, "it is called below autograd"
        calls.append(activation)
        return y.clamp(min=0) if activation == "relu" else y

    backend = replace(_backends.BACKENDS["lora_conv2d"]["triton"], forward=forward, missing=lambda: None)
    monkeypatch.setitem(_backends.BACKENDS["lora_conv2d"], "triton", backend)
    monkeypatch.setattr(_lora_autograd, "_LARGE_BATCH", 1)
    return calls


def narrow_problem() -> dict[str, torch.Tensor]:
    p = {name: t.bfloat16() for name, t in problem("peft").items()}
    p["x"] = p["x"].contiguous(memory_format=torch.channels_last)
    return {name: t.requires_grad_() for name, t in p.items()}


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_kernels_graph_nodes_are_torchs(activation, kernel):
    p = narrow_problem()
    y = lf.functional.lora_conv2d(**p, padding=1, stride=(2, 1), activation=activation)
    assert kernel == [activation] and not torch._C._len_torch_dispatch_stack()
    found = y.grad_fn.name(), y.grad_fn.next_functions[0][0].name()
    assert found[activation is not None] == "ConvolutionBackward0"
    assert activation is None or found[0] == "ReluBackward0"
    grads = torch.autograd.grad(y.float().square().mean(), p.values(), create_graph=True)
    again = torch.autograd.grad(sum(g.float().square().mean() for g in grads), p["x"])[0]
    wide = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    want = lf.functional.lora_conv2d(**wide, padding=1, stride=(2, 1), activation=activation)
    grads_want = torch.autograd.grad(want.square().mean(), wide.values(), create_graph=True)
    again_want = torch.autograd.grad(sum(g.square().mean() for g in grads_want), wide["x"])[0]
    for mine, theirs in zip((y, *grads, again), (want, *grads_want, again_want), strict=True):
        assert (mine.double() - theirs).norm() <= 0.03 * theirs.norm()
    assert len(kernel) == 1, "nothing of it comes back in a backward pass"


def test_nothing_is_recorded_where_nothing_learns(kernel, monkeypatch):
    monkeypatch.setattr(_lora_autograd, "_Kernel", None)
    p = narrow_problem()
    with torch.no_grad():
        lf.functional.lora_conv2d(**p, padding=1)
    with torch.inference_mode():
        lf.functional.lora_conv2d(**p, padding=1)
    lf.functional.lora_conv2d(**{name: t.detach() for name, t in p.items()}, padding=1)
    assert len(kernel) == 3


def test_hooks_for_saved_tensors_convolve_as_they_would(kernel):
    """They run while the kernel's mode is on."""
    p, kept = narrow_problem(), torch.randn(1, 1, 3, 3)
    seen = []

    def pack(t):
        seen.append((F.conv2d(kept, kept) - kept.square().sum()).abs() + F.conv2d(kept, -kept).relu_())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lf.functional.lora_conv2d(**p, padding=1, activation="relu")
    assert seen and max(abs(t.item()) for t in seen) < 1e-4
    assert len(kernel) == 1


def test_a_kernel_that_fails_leaves_no_mode_behind(kernel, monkeypatch):
    monkeypatch.setattr(_lora_autograd, "_by_kernel", mock.Mock(side_effect=RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        lf.functional.lora_conv2d(**narrow_problem(), padding=1)
    assert not torch._C._len_torch_dispatch_stack()


def test_threads_keep_their_kernels_apart(kernel):
    p = narrow_problem()
    want = lf.functional.lora_conv2d(**p, padding=1, activation="relu").detach()

    def work(_):
        y = lf.functional.lora_conv2d(**p, padding=1, activation="relu")
        return torch.equal(y, want) and len(torch.autograd.grad(y.sum(), p.values())) == 5

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(60)))
    assert len(kernel) == 61 and not _python_dispatch.is_in_torch_dispatch_mode()


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_network_learns_on_a_gpu(form, dtype, checkpoint, merges, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = network(form, checkpoint)
    y = net.op(torch.rand(2, 1, 16, 16)).detach()
    want = gradients(net, y)
    net, y = net.cuda(), y.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = gradients(net, y)
    assert len(merges) == len(net.denoiser.adapted)
    for mine, theirs in zip(got, want, strict=True):
        limit = 0.1 if dtype == torch.bfloat16 else 1e-4
        assert (mine.cpu() - theirs).norm() <= limit * theirs.norm() + 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_fresh_network_equals_the_tied_one_on_a_gpu(form, dtype):
    base = lf.ResUNet(channels=(16, 32), blocks=1)
    op = lf.BlockCS.gaussian(0.25, 8)
    lora, tied = (lf.LoRun(op, base, stages=3, form=form, sharing=kind).cuda() for kind in ("lora", "tied"))
    y = lora.op(torch.rand(2, 1, 32, 32, device="cuda"))
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        assert torch.equal(lora(y), tied(y))
        assert torch.equal(lora.eval()(y), tied.eval()(y))


@pytest.mark.gpu
@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_a_large_layer_learns_on_a_gpu(form, bias, monkeypatch):
    """Where the kernel convolves, if there is a bias, and torch's ops give the gradients."""
    layer = lf.LoRAConv2d(32, 32, 3, padding=1, bias=bias, stages=2, rank=4, form=form).cuda()
    nn.init.normal_(layer.up, std=0.1)
    layer.weight.requires_grad_(False)
    x = torch.randn(16, 32, 256, 256, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()

    def results():
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x, 1)
        return [y, *torch.autograd.grad(y.float().square().mean(), (x, layer.down, layer.up))]

    got = results()
    monkeypatch.setattr(_native, "WISH", "reference")
    for mine, theirs in zip(got, results(), strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()
