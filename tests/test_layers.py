"""LoRA layers: the base at first, every stage its own after, merged or not, one for all or per sample."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import lorun_fast as lf
from lorun_fast import adapters

LAYERS = {
    "conv": (lambda **kw: lf.LoRAConv2d(4, 6, 3, padding=1, **kw), (5, 4, 7, 9)),
    "conv strided dilated": (lambda **kw: lf.LoRAConv2d(4, 6, 3, stride=2, padding=2, dilation=2, **kw), (5, 4, 9, 8)),
    "conv reflect": (lambda **kw: lf.LoRAConv2d(4, 6, 3, padding=1, padding_mode="reflect", **kw), (5, 4, 7, 9)),
    "conv same": (lambda **kw: lf.LoRAConv2d(4, 6, 3, padding="same", bias=False, **kw), (5, 4, 7, 9)),
    "conv same even": (lambda **kw: lf.LoRAConv2d(4, 6, 4, padding="same", **kw), (5, 4, 7, 9)),
    "conv transposed": (lambda **kw: lf.LoRAConvTranspose2d(4, 6, 2, stride=2, **kw), (5, 4, 5, 3)),
    "conv transposed dilated": (
        lambda **kw: lf.LoRAConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, **kw),
        (5, 4, 5, 3),
    ),
    "linear": (lambda **kw: lf.LoRALinear(4, 6, **kw), (5, 3, 4)),
}


def randomise(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.down, std=0.3)
    nn.init.normal_(layer.up, std=0.3)
    return layer


def plain_twin(layer: nn.Module, stage: int | None) -> nn.Module:
    """The nn layer whose weight is this stage's merged weight."""
    base = {lf.LoRAConv2d: nn.Conv2d, lf.LoRAConvTranspose2d: nn.ConvTranspose2d, lf.LoRALinear: nn.Linear}[type(layer)]
    twin = base(**type(layer)._base_arguments(layer))
    weight = layer.weight.detach()
    if stage is not None:
        transposed = isinstance(layer, nn.ConvTranspose2d)
        weight = weight + layer.scale * adapters.delta(
            layer.down[stage].detach(), layer.up[stage].detach(), weight.shape, transposed=transposed
        )
    twin.weight = nn.Parameter(weight)
    twin.bias = layer.bias
    return twin


@pytest.fixture(params=LAYERS)
def case(request):
    return LAYERS[request.param]


@pytest.mark.parametrize("form", adapters.FORMS)
def test_fresh_layer_is_its_base_at_every_stage(case, form):
    make, shape = case
    layer, x = make(stages=3, rank=2, form=form), torch.randn(shape)
    expected = plain_twin(layer, None)(x)
    for stage in range(3):
        assert torch.equal(layer(x, stage), expected)


@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_fresh_factor_is_drawn_as_a_layers_weight(case, form):
    """Uniformly within 1 / sqrt(fan in), the sum of whose values each of its results is."""
    down = case[0](stages=60, rank=2, form=form).down
    bound = down[0, 0].numel() ** -0.5
    assert 0.98 * bound < down.abs().max() <= bound and abs(down.mean()) < 0.1 * bound


@pytest.mark.parametrize("form", adapters.FORMS)
def test_each_stage_is_the_layer_with_its_merged_weight(case, form):
    make, shape = case
    layer, x = randomise(make(stages=3, rank=2, form=form, scale=0.7)), torch.randn(shape)
    outputs = []
    for stage in range(3):
        outputs.append(layer(x, stage))
        torch.testing.assert_close(outputs[-1], plain_twin(layer, stage)(x))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_one_stage_per_sample_equals_one_call_per_sample(case, merged, dtype):
    make, shape = case
    layer, x = randomise(make(stages=4, rank=2)), torch.randn(shape)
    if merged:
        layer.merge()
    stages = torch.tensor([3, 0, 2, 0, 1], dtype=dtype)
    expected = torch.cat([layer(x[n : n + 1], int(k)) for n, k in enumerate(stages)])
    torch.testing.assert_close(layer(x, stages), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_an_empty_batch_with_a_stage_per_sample(case, merged):
    make, shape = case
    layer, x = randomise(make(stages=3, rank=2)), torch.randn(shape)
    if merged:
        layer.merge()
    assert layer(x[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, *layer(x, 0).shape[1:])


def test_merged_equals_unmerged_and_keeps_the_base(case):
    make, shape = case
    layer, x = randomise(make(stages=3, rank=2)), torch.randn(shape)
    base = layer.weight.clone()
    before = [layer(x, k) for k in range(3)]
    layer.merge()
    assert layer.merged
    for k in range(3):
        torch.testing.assert_close(layer(x, k), before[k])
    assert torch.equal(layer.weight, base)
    layer.unmerge()
    assert not layer.merged
    for k in range(3):
        assert torch.equal(layer(x, k), before[k])


@pytest.mark.parametrize(
    "invalidate",
    [
        lambda layer: layer.train(),
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.reset_adapter(),
    ],
    ids=["train", "to", "load", "reset"],
)
def test_what_drops_merged_weights(invalidate):
    layer = randomise(lf.LoRAConv2d(4, 4, 3, stages=2, rank=1))
    layer.merge()
    invalidate(layer)
    assert not layer.merged


def test_a_replica_on_another_device_does_not_keep_merged_weights(monkeypatch):
    layer = randomise(lf.LoRAConv2d(4, 4, 3, stages=2, rank=1))
    layer.merge()
    replica = layer._replicate_for_data_parallel()
    assert layer.merged and not replica.merged
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # then the parameters are not looked at
    assert layer.merged and not replica.merged


@pytest.mark.parametrize("form", adapters.FORMS)
def test_gradients_at_rank_one_and_channels_last(form):
    """A small image by torch's own loops, which take few strides for an axis of one entry."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layer = randomise(lf.LoRAConv2d(16, 3, 3, padding=1, rank=1, stages=2, form=form)).to(memory_format=layout)
        x = torch.rand(1, 16, 32, 32).to(memory_format=layout)
        found.append(torch.autograd.grad(layer(x, stage=1).square().sum(), [layer.down, layer.up]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", adapters.FORMS)
def test_gradients_in_bf16_of_an_image_narrower_than_the_stride(form):
    """oneDNN leaves them unwritten: freed memory of large numbers is what would be found."""
    layer = randomise(lf.LoRAConv2d(16, 24, 3, stride=2, padding=1, rank=2, stages=2, form=form)).bfloat16()
    x = torch.randn(3, 16, 4, 1, dtype=torch.bfloat16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        junk = [torch.full((30000,), 1e30, dtype=dtype) for _ in range(20)]
        del junk
        y = layer.to(dtype)(x.to(dtype), stage=1)
        grads.append([g.double() for g in torch.autograd.grad(y.sum(), [layer.down, layer.up])])
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 0.03 * want.abs().max()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("settings", "size"), [({}, 2), ({"dilation": 2, "padding": 1}, 2), ({"padding": "valid", "dilation": 3}, 6)]
)
def test_an_image_smaller_than_the_kernel(settings, size, merged):
    layer = lf.LoRAConv2d(3, 4, 3, stages=2, rank=1, **settings)
    if merged:
        layer.merge()
    with pytest.raises(
        ValueError, match=rf"x: expected an image that the kernel fits into, got \(1, 3, {size}, {size}\)"
    ):
        layer(torch.rand(1, 3, size, size), stage=0)


@pytest.mark.parametrize("form", adapters.FORMS)
def test_conversion_to_channels_last_reaches_the_merged_weights(form):
    layer, x = randomise(lf.LoRAConv2d(4, 6, 3, padding=1, stages=2, rank=2, form=form)), torch.randn(2, 4, 7, 9)
    expected = layer(x, 1)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x, 1), expected)
    layer.merge()
    assert layer.stage_weight(1).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x, 1), expected)


def test_other_parameters_in_place_are_used(case):
    make, shape = case
    one, other = (randomise(make(stages=2, rank=1)) for _ in range(2))
    x = torch.randn(shape)
    expected = other(x, 1)
    one.merge()
    torch.testing.assert_close(torch.func.functional_call(one, dict(other.named_parameters()), (x, 1)), expected)
    assert copy.deepcopy(one).merged
    assert pickle.loads(pickle.dumps(one)).merged


def test_an_ensemble_of_merged_layers(case):
    make, shape = case
    layers = [randomise(make(stages=2, rank=1)) for _ in range(2)]
    for layer in layers:
        layer.merge()
    x, state = torch.randn(shape), torch.func.stack_module_state(layers)

    def call(parameters, buffers):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x, 1))

    torch.testing.assert_close(torch.func.vmap(call)(*state), torch.stack([layer(x, 1) for layer in layers]))


def test_merged_weights_stay_out_of_the_state_dict():
    layer = lf.LoRAConv2d(4, 4, 3, stages=2, rank=1)
    layer.merge()
    assert set(layer.state_dict()) == {"weight", "bias", "down", "up"}


def test_gradients_match_finite_differences(case):
    make, shape = case
    layer = randomise(make(stages=2, rank=1)).double()
    x = torch.randn(2, *[min(s, 6) for s in shape[1:]], dtype=torch.float64, requires_grad=True)

    def call(x, down, up):
        return torch.func.functional_call(layer, {"down": down, "up": up}, (x, 1))

    down, up = layer.down.detach().clone().requires_grad_(), layer.up.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, down, up))


def test_stage_may_be_left_out_only_for_one_stage():
    x = torch.randn(1, 4, 5, 5)
    lf.LoRAConv2d(4, 4, 3, stages=1, rank=1)(x)
    with pytest.raises(ValueError, match="stage: expected 0 to 1, got none"):
        lf.LoRAConv2d(4, 4, 3, stages=2, rank=1)(x)
    with pytest.raises(ValueError, match="stages: expected at least 1, got 0"):
        lf.LoRAConv2d(4, 4, 3, stages=0, rank=1)


def test_stages_and_rank_are_whole_numbers():
    layer = lf.LoRALinear(4, 4, stages=np.int64(3), rank=np.int64(2))
    assert type(layer.stages) is int
    assert type(layer.rank) is int
    with pytest.raises(TypeError, match=r"stages: expected a whole number, got 3\.0"):
        lf.LoRALinear(4, 4, stages=3.0)
    with pytest.raises(TypeError, match="rank: expected a whole number, got '2'"):
        lf.LoRALinear(4, 4, rank="2")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_is_its_bias():
    layer = lf.LoRALinear(0, 4, stages=2, rank=1)
    assert torch.equal(layer(torch.ones(3, 0), 1), layer.bias.expand(3, 4))


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        (2, IndexError, "stage: expected 0 to 1, got 2"),
        (-1, IndexError, "stage: expected 0 to 1, got -1"),
        (torch.tensor([0.0, 1.0]), TypeError, "expected an int or an int64 tensor, got torch.float32"),
        (torch.tensor([0, 1, 1]), ValueError, r"one stage per sample, shape \(2,\)"),
        (np.array([0, 1]), TypeError, "expected an int or an int64 tensor, got ndarray"),
    ],
)
def test_bad_stages(stage, error, message):
    layer = lf.LoRAConv2d(4, 4, 3, stages=2, rank=1)
    with pytest.raises(error, match=message):
        layer(torch.randn(2, 4, 5, 5), stage)


def test_functional_epilogue_and_plain_factors():
    x, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    down, up = torch.randn(3, 9), torch.randn(12, 3)
    residual = torch.randn(2, 4, 6, 6)
    got = lf.functional.lora_conv2d(
        x, weight, bias, down, up, scale=0.5, padding=1, activation="leaky_relu", residual=residual
    )
    dense = weight + 0.5 * (up @ down).view(weight.shape)
    expected = nn.functional.leaky_relu(nn.functional.conv2d(x, dense, bias, padding=1), 0.01) + residual
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 5, 6, 6)}, r"x: expected \(N, 3, H, W\)"),
        ({"down": torch.randn(3, 8)}, r"down, up: expected \(3, 9\) and \(12, 3\)"),
        ({"stage": 0}, "a leading stage axis"),
        ({"activation": "tanh"}, "activation: expected one of None, 'relu'"),
    ],
)
def test_functional_errors_name_the_argument(change, message):
    arguments = {
        "x": torch.randn(2, 3, 6, 6), "weight": torch.randn(4, 3, 3, 3), "bias": None,
        "down": torch.randn(3, 9), "up": torch.randn(12, 3),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lf.functional.lora_conv2d(**arguments)


def test_arrays_are_no_images(case):
    make, shape = case
    with pytest.raises(TypeError, match=r"x: expected a tensor, got ndarray|must be Tensor, not numpy"):
        make(stages=2)(np.zeros(shape, np.float32), 1)


def test_from_base_shares_the_base_parameters():
    base = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    layer = lf.LoRAConv2d.from_base(base, stages=2, rank=1)
    assert layer.weight is base.weight
    assert layer.bias is None
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(layer(x, 1), base(x))
    assert layer.training and layer.plain(base.weight).training
    assert not lf.LoRAConv2d.from_base(base.eval()).training and not layer.eval().plain(base.weight).training


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["conv loralib", "linear"])
def test_what_is_no_image_merged_or_not(name, merged):
    layer = lf.LoRALinear(4, 4, stages=2) if name == "linear" else lf.LoRAConv2d(4, 4, 3, stages=2)
    if merged:
        layer.merge()
    for x, error, message in (
        (None, TypeError, "expected a tensor, got NoneType"),
        ([1.0], TypeError, "expected a tensor, got list"),
        (np.zeros((2, 4, 4, 4), np.float32), TypeError, "expected a tensor, got ndarray"),
        (torch.zeros(()), ValueError, r"expected .*, got shape \(\)"),
        (torch.zeros(2, 4, 4, 5)[:, :3, :, :3], ValueError, r"expected \(.*4.*\), got \(2, 3, 4, 3\)"),
    ):
        for stage in (1, torch.tensor([0, 1])):
            if not (isinstance(stage, torch.Tensor) and isinstance(x, torch.Tensor) and not x.ndim):
                with pytest.raises(error, match=f"x: {message}"):
                    layer(x, stage)


@pytest.mark.parametrize("scale", ["1", None, float("nan"), float("inf")])
def test_a_scale_is_a_finite_number(scale):
    with pytest.raises((TypeError, ValueError), match=f"scale: expected a (finite )?number, got '?{scale}"):
        lf.LoRALinear(4, 4, scale=scale)


def test_a_base_of_another_kind():
    with pytest.raises(TypeError, match=r"base: expected an nn.Conv2d, got Linear"):
        lf.LoRAConv2d.from_base(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"base: expected a weight of float32, .*, got torch.complex64"):
        lf.LoRALinear.from_base(nn.Linear(4, 4, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_layers_are_of_dtypes_that_learn(case, dtype):
    with pytest.raises(TypeError, match=r"dtype: expected float32, .* or None, got '?(torch\.)?\w+'?$"):
        case[0](dtype=dtype)
    assert case[0](dtype=float).up.dtype == torch.float64


def test_a_layer_on_the_meta_device(case):
    """Shapes, gradients' too, without memory: to count a network's operations, or to see that it fits together."""
    layer, x = case[0](stages=3, device="meta"), torch.empty(case[1], device="meta", requires_grad=True)
    want = case[0](stages=3)(torch.randn(case[1]), 1).shape
    for stage in (1, torch.zeros(len(x), dtype=torch.int64, device="meta")):
        out = layer(x, stage)
        assert out.is_meta and out.shape == want
        out.sum().backward()
    assert x.grad.shape == x.shape and layer.up.grad.shape == layer.up.shape


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_images_of_another_dtype(name, merged):
    """The result has x's dtype, merged or not; whole numbers are refused."""
    make, shape = LAYERS[name]
    layer, x = randomise(make(stages=2)), torch.rand(shape)
    layer.eval()
    expected = layer(x, 1)
    if merged:
        layer.merge()
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float64, 1e-5)):
        y = layer(x.to(dtype), 1)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
            again = layer(x.to(dtype), 1)
        assert again.dtype == dtype
        torch.testing.assert_close(again, y, rtol=0.01, atol=0.01)
    for stage in (1, torch.ones(len(x), dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"x: expected float32, float64, bfloat16 or float16, got torch.uint8"):
            layer((255 * x).byte(), stage)


def test_the_one_stage_of_a_layer_is_no_part_of_its_factors():
    """A part's gradient is written into zeros of the whole, launches that a GPU's host waits for."""
    one, two = (lf.LoRAConv2d(4, 6, 3, stages=stages, rank=2) for stages in (1, 2))
    for layer, name in ((one, "SqueezeBackward1"), (two, "SelectBackward0")):
        _, down, up, stage = layer.operands(0, None)
        assert stage is None and down.grad_fn.name() == up.grad_fn.name() == name
        assert torch.equal(down, layer.down[0]) and torch.equal(up, layer.up[0])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ("a", TypeError, "stage: expected an int or an int64 tensor, got str"),
        (1.0, TypeError, "stage: expected an int or an int64 tensor, got float"),
        (None, TypeError, "stage: expected an int or an int64 tensor, got NoneType"),
        (3, IndexError, "stage: expected 0 to 2, got 3"),
        (torch.tensor([0.5]), TypeError, "stage: expected an int or an int64 tensor, got torch.float32"),
        (torch.tensor([[1]]), ValueError, "stage: expected one stage per sample"),
        (torch.tensor(-1), IndexError, "stage: expected 0 to 2, got -1"),
    ],
)
def test_a_stage_weight_of_no_stage(merged, stage, error, message):
    layer = lf.LoRAConv2d(4, 4, 3, stages=3, rank=2).train(not merged)
    with pytest.raises(error, match=message):
        layer.stage_weight(stage)
