"""The "triton" backend of the LoRA ops: what it serves, why it does not, and that it gives what the others give."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from kernels_help import channels_last, needs_triton

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.adapters import factor_shapes
from lorun_fast.ops import _backends, _lora_triton

OPS = ("lora_conv2d", "lora_linear", "lora_merge")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets the backend serve CPU tensors, which the interpreter can, and puts it before the tables."""
    needs_triton()
    monkeypatch.setattr(_native, "WISH", "triton")
    for op in OPS:
        backend = _backends.BACKENDS[op]["triton"]
        monkeypatch.setitem(_backends.BACKENDS[op], "triton", dataclasses.replace(backend, devices=("cpu", "cuda")))


@pytest.mark.parametrize("form", ["peft", "loralib"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["one stage", "stage per sample"])
def test_a_layer_trains_on_it(form, per_sample, on_the_cpu, monkeypatch):
    layer = lf.LoRAConv2d(3, 4, 1, stages=3, rank=2, form=form)
    torch.nn.init.normal_(layer.up)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = channels_last(torch.randn(2, 3, 4, 5)).requires_grad_()
    stage = torch.tensor([2, 0]) if per_sample else 1

    def step():
        y = layer(x, stage)
        return y, *torch.autograd.grad(y.square().sum(), (x, layer.down, layer.up))

    served = []
    forward = _lora_triton.conv2d
    backend = _backends.BACKENDS["lora_conv2d"]["triton"]
    spied = dataclasses.replace(backend, forward=lambda *args: (served.append(args), forward(*args))[1])
    monkeypatch.setitem(_backends.BACKENDS["lora_conv2d"], "triton", spied)
    got = step()
    assert len(served) == 1
    monkeypatch.setattr(_native, "WISH", "reference")
    for mine, theirs in zip(got, step(), strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("op", ["lora_conv2d", "lora_linear"])
def test_the_saved_output_reaches_the_kernels_where_its_sign_tells(op, activation, residual, on_the_cpu, monkeypatch):
    from lorun_fast.kernels import lora_conv2d_backward

    given = []
    backward = lora_conv2d_backward.backward
    monkeypatch.setattr(
        lora_conv2d_backward, "backward", lambda *a, **more: (given.append(more["output"]), backward(*a, **more))[1]
    )
    image = op == "lora_conv2d"
    x = channels_last(torch.randn(2, 3, 4, 5)) if image else torch.randn(2, 6, 3)
    shapes = ((4, 3, 1, 1), (2, 3, 1, 1), (4, 2)) if image else ((4, 3), (2, 3), (4, 2))
    weight, *factors = (torch.randn(shape) for shape in shapes)
    leaves = [t.requires_grad_() for t in (x, *factors)]
    beside = channels_last(torch.randn(2, 4, 4, 5)) if image else torch.randn(2, 6, 4)

    def gradients():
        y = getattr(lf.functional, op)(
            x, weight, None, *factors, activation=activation, residual=beside if residual else None
        )
        return y.detach(), torch.autograd.grad(y.square().sum(), leaves)

    y, got = gradients()
    if activation == "silu" or residual:
        assert given == [None]
    else:
        (saved,) = given
        assert torch.equal(saved if image else saved.permute(0, 2, 3, 1).reshape(y.shape), y)
    monkeypatch.setattr(_native, "WISH", "reference")
    for mine, theirs in zip(got, gradients()[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_trainable_base_gets_its_gradient(on_the_cpu, monkeypatch):
    layer = lf.LoRALinear(3, 4, stages=2, rank=2)
    x = torch.randn(2, 3)
    (grad,) = torch.autograd.grad(layer(x, 1).sum(), (layer.weight,))
    torch.testing.assert_close(grad, x.sum(0).expand(4, 3))


def _conv(**changes) -> str | None:
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3)
    arguments = {
        "x": x, "weight": weight, "bias": None, "down": torch.zeros(2, 4, 3, 3), "up": torch.zeros(4, 2), "stage": None,
        "residual": None, "scale": 1.0, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
        "activation": None, "transposed": False, "output_padding": [0, 0],
    }  # fmt: skip
    return _backends.BACKENDS["lora_conv2d"]["triton"].supports(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"groups": 2}, "groups=2"),
        ({"transposed": True}, "transposed"),
        ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(0, 4, 5, 5)}, "empty"),
        ({"x": torch.empty(1, 4, 2**15, 2**14, device="meta")}, r"2\^31"),
    ],
)
def test_what_it_does_not_serve_it_says(changes, reason):
    said = _conv(**changes)
    assert said is None if reason is None else said is not None and re.search(reason, said)


def test_show_config_names_the_reason():
    assert _backends.served("lora_conv2d", "cuda")[0] == "triton"
    reasons = {op: _backends.served(op, "cuda")[1] for op in OPS if op != "lora_conv2d"}
    assert all("triton: " in reason for reason in reasons.values()), reasons


@pytest.mark.parametrize(
    ("form", "mixed"), [("peft", False), ("loralib", False), (None, False), ("peft", True), ("loralib", True)]
)
def test_what_the_table_gives_to_the_kernels(form, mixed):
    x = torch.empty(16, 32, 256, 256, dtype=torch.bfloat16, device="meta")
    weight = torch.zeros(32, 32, 3, 3)
    down, up = (torch.zeros(s) for s in factor_shapes(weight.shape, 1, form)) if form else (None, None)
    stage = torch.tensor([1, 0] * 8) if mixed else None
    if mixed:
        down, up = (t.expand(2, *t.shape) for t in (down, up))
    call = (x, weight, None, down, up, stage, None, 1.0, [1, 1], [1, 1], [1, 1], 1, None, False, [0, 0])
    assert _backends.choose("lora_conv2d", "cuda", call).name == ("triton" if mixed else "aten")


def test_without_triton_the_library_imports_and_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import lorun_fast as lf, torch\n"
        "from lorun_fast.ops import _backends\n"
        "lf.LoRAConv2d(3, 4, 3, stages=2)(torch.zeros(1, 3, 5, 5), 1)\n"
        "print(_backends.served('lora_conv2d', 'cuda'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Triton cannot be imported" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("form", ["peft", "loralib"])
def test_everything_is_launched_on_the_tensors_device(form, on_the_cpu, monkeypatch):
    """The merge before a loralib layer too: launched on another GPU it would read addresses of this one there."""
    from lorun_fast.kernels._launch import Launch

    inside, outside = [], []
    run, state = Launch.run, {"on": False}

    class On:
        def __init__(self, x):
            pass

        def __enter__(self):
            state["on"] = True

        def __exit__(self, *_):
            state["on"] = False

    monkeypatch.setattr(_lora_triton, "_on", On)
    monkeypatch.setattr(Launch, "run", lambda self: ((inside if state["on"] else outside).append(self), run(self))[1])
    layer = lf.LoRAConv2d(3, 4, 1, stages=2, rank=2, form=form)
    layer.weight.requires_grad_(False)
    x = channels_last(torch.randn(1, 3, 2, 3)).requires_grad_()
    torch.autograd.grad(layer(x, 1).sum(), (x, layer.down))
    assert inside and not outside


def test_stages_on_the_cpu_are_taken_to_the_image():
    stage = torch.tensor([2, 0])
    assert _lora_triton._beside(torch.empty(2, device="meta"), stage).device.type == "meta"
    assert _lora_triton._beside(torch.empty(2), stage) is stage and _lora_triton._beside(stage, None) is None


# On a GPU: what no interpreter shows.


@pytest.fixture
def on_a_gpu(monkeypatch):
    needs_triton()
    monkeypatch.setattr(_native, "WISH", "triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


STAGE = {"one stage": 1, "stage per sample": torch.tensor([2, 0]), "stages on the device": torch.tensor([2, 0])}


def _gpu_layer(form: str, stage: str, device: str = "cuda"):
    """(layer, x, stage) on a GPU."""
    layer = lf.LoRAConv2d(16, 24, 3, padding=1, stages=3, rank=2, form=form, device=device)
    torch.nn.init.normal_(layer.up, std=0.1)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    layer.to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, 16, 20, 50, device=device)).requires_grad_()
    k = STAGE[stage]
    return layer, x, k.to(device) if stage == "stages on the device" else k


def _step(call, layer, x):
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), (x, layer.down, layer.up))]


def _assert_close(got, want, tolerance: float) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.stride() == theirs.stride() and mine.dtype == theirs.dtype
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["peft", "loralib"])
@pytest.mark.parametrize("stage", STAGE)
def test_a_layer_trains_on_a_gpu(form, stage, on_a_gpu, monkeypatch):
    layer, x, k = _gpu_layer(form, stage)

    def call(x):
        return layer(x, k)

    def narrow(x):
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x, k)

    got, in_bf16 = _step(call, layer, x), _step(narrow, layer, x)
    again = _step(call, layer, x)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    compiled = _step(torch.compile(call, backend="aot_eager", fullgraph=True), layer, x)
    monkeypatch.setattr(_native, "WISH", "reference")
    want = _step(call, layer, x)
    _assert_close(got, want, 1e-5)
    _assert_close(compiled, want, 1e-5)
    _assert_close(in_bf16, _step(narrow, layer, x), 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["peft", "loralib"])
def test_the_op_is_what_its_schema_says_on_a_gpu(form, on_a_gpu):
    layer, x, k = _gpu_layer(form, "stages on the device")
    geometry = (1.0, [1, 1], [1, 1], [1, 1], 1, "relu", False, [0, 0])
    args = (x, layer.weight, layer.bias, layer.down, layer.up, k, None, *geometry)
    torch.library.opcheck(torch.ops.lorun_fast.lora_conv2d.default, args)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["peft", "loralib"])
def test_a_layer_is_recorded_in_a_cuda_graph_with_its_backward_pass(form, on_a_gpu):
    layer, x, k = _gpu_layer(form, "stages on the device")

    def step():
        return _step(lambda x: layer(x, k), layer, x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        x.mul_(2)
        k.copy_(torch.tensor([1, 2]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, step(), strict=True))


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream(on_a_gpu):
    layer, x, k = _gpu_layer("loralib", "one stage")
    with torch.no_grad():
        want, side = layer(x, k), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # A long wait on this stream only: a kernel on another one would read what is about to be overwritten.
            late = torch.full_like(x, torch.nan)
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            got = layer(late, k)
        torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_merged_weights_of_a_network_on_a_gpu(on_a_gpu, monkeypatch):
    staged = lf.adapt(lf.ResUNet(channels=(8, 16)), stages=3, form="loralib").cuda()
    for p in staged.adapter_parameters():
        torch.nn.init.normal_(p, std=0.1)
    layers = list(staged.adapted.values())
    from lorun_fast.layers import merged_weights

    got = merged_weights(layers)
    monkeypatch.setattr(_native, "WISH", "reference")
    _assert_close(got, merged_weights(layers), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["peft", "loralib"])
def test_a_layer_on_a_second_gpu(form, on_a_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    layer, x, k = _gpu_layer(form, "stages on the device", "cuda:1")
    got = _step(lambda x: layer(x, k), layer, x)
    with torch.cuda.device(1):
        want = _step(lambda x: layer(x, k), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
