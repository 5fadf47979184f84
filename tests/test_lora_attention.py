"""LoRAMultiheadAttention beside attention written out with dense weights, by itself and in a denoiser."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorun_fast as lf
from lorun_fast import adapters
from lorun_fast.layers import current_weight

EMBED, HEADS, N, L, S = 8, 2, 3, 5, 4
KINDS = {
    "packed": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim": {"kdim": 6},
    "kdim vdim batch_first": {"kdim": 6, "vdim": 7, "batch_first": True},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def drawn(module: nn.Module) -> nn.Module:
    for name, p in module.named_parameters():
        if name.endswith((".down", ".up", "bias")) or name in ("down", "up"):
            nn.init.normal_(p, std=0.4)
    return module


def layer_of(kind: str, dtype=torch.float64, **settings):
    return drawn(
        lf.LoRAMultiheadAttention(EMBED, HEADS, dtype=dtype, stages=3, rank=2, scale=0.5, **KINDS[kind] | settings)
    )


def inputs_of(layer, dtype=torch.float64):
    shapes = ((N, L, EMBED), (N, S, layer.kdim), (N, S, layer.vdim))
    found = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return tuple(t if layer.batch_first else t.transpose(0, 1).contiguous() for t in found)


def dense(layer, k: int):
    """(W_q, W_k, W_v, W_o) of a stage, by hand."""
    update = layer.scale * layer.up[k] @ layer.down[k]
    if layer.in_proj_weight is not None:
        into = list((layer.in_proj_weight + update).chunk(3))
    else:
        base = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        parts = update.split([w.shape[1] for w in base], 1)
        into = [w + part for w, part in zip(base, parts, strict=True)]
    out = layer.out_proj
    return *into, out.weight + (out.scale * out.up[k] @ out.down[k] if hasattr(out, "up") else 0)


def by_hand(layer, k: int, query, key, value, mask=None):
    """(result, weights of each head) of torch's definition; mask: added to q k^T, (..., L, S) for all heads."""
    if not layer.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    *into, out = dense(layer, k)
    biases = (0, 0, 0) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    q, key, value = (t @ w.mT + b for t, w, b in zip((query, key, value), into, biases, strict=True))
    if layer.bias_k is not None:
        key, value = (torch.cat([t, b.expand(N, 1, -1)], 1) for t, b in ((key, layer.bias_k), (value, layer.bias_v)))
    if layer.add_zero_attn:
        key, value = (F.pad(t, (0, 0, 0, 1)) for t in (key, value))
    q, key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, key, value))
    products = q @ key.mT / math.sqrt(EMBED // HEADS)
    if mask is not None:
        products = products + F.pad(mask, (0, products.shape[-1] - S))
    weights = products.softmax(-1)
    y = (weights @ value).transpose(1, 2).flatten(2) @ out.mT
    y = y if layer.out_proj.bias is None else y + layer.out_proj.bias
    return y if layer.batch_first else y.transpose(0, 1), weights


def at(layer, y, picked):
    return y[picked] if layer.batch_first else y[:, picked]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_attention_with_dense_weights(kind, form, merged):
    layer, stages = layer_of(kind, form=form), torch.tensor([2, 0, 1])
    inputs = inputs_of(layer)
    expected = [by_hand(layer, k, *inputs) for k in range(3)]
    if merged:
        layer.merge()
        layer.out_proj.merge()
    for mode in (True, False):
        layer.train(mode and not merged)
        mixed, shares = layer(*inputs, stage=stages, average_attn_weights=False)
        for k in range(3):
            for stage in (k, torch.tensor(k)):
                y, weights = layer(*inputs, stage=stage)
                torch.testing.assert_close(y, expected[k][0])
                torch.testing.assert_close(weights, expected[k][1].mean(1))
                y, weights = layer(*inputs, need_weights=False, stage=stage)
                torch.testing.assert_close(y, expected[k][0])
                assert weights is None
            own = stages == k
            torch.testing.assert_close(at(layer, mixed, own), at(layer, expected[k][0], own))
            torch.testing.assert_close(shares[own], expected[k][1][own])
            alone = tuple(at(layer, t, 0) for t in inputs)  # torch's takes a sample alone
            torch.testing.assert_close(layer(*alone, stage=k)[0], at(layer, expected[k][0], 0))
            torch.testing.assert_close(layer(*alone, stage=torch.tensor([k]))[0], at(layer, expected[k][0], 0))
        mixed, shares = layer(*inputs, need_weights=False, stage=stages)
        torch.testing.assert_close(at(layer, mixed, 0), at(layer, expected[2][0], 0))
        assert shares is None


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["packed", "kdim vdim batch_first", "more keys"])
def test_masks(kind, mixed):
    layer = layer_of(kind)
    inputs, stage = inputs_of(layer), torch.tensor([1, 1, 1]) if mixed else 1
    padding = torch.tensor([[False] * S, [False, True, False, True], [False, False, True, True]])
    added = torch.randn(N * HEADS, L, S, dtype=torch.float64)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    lowest = -math.inf
    cases = [
        ({"key_padding_mask": padding}, padding[:, None, None].double().masked_fill(padding[:, None, None], lowest)),
        ({"attn_mask": added}, added.unflatten(0, (N, HEADS))),
        ({"attn_mask": causal}, torch.zeros(L, S).double().masked_fill(causal, lowest)),
    ]
    both = {"attn_mask": added, "key_padding_mask": torch.zeros(N, S).double().masked_fill(padding, lowest)}
    cases.append((both, cases[0][1] + cases[1][1]))
    for masks, mask in cases:
        expected, weights = by_hand(layer, 1, *inputs, mask)
        for need_weights in (True, False):
            y, found = layer(*inputs, stage=stage, need_weights=need_weights, average_attn_weights=False, **masks)
            torch.testing.assert_close(y, expected)
            if need_weights:
                torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("kind", ["packed", "kdim vdim batch_first"])
def test_gradients(kind):
    layer = layer_of(kind)
    inputs = tuple(t[:2, :2].clone().requires_grad_() for t in inputs_of(layer))
    for stage in (1, torch.tensor(1), torch.tensor([2, 0])):
        for need_weights in (True, False):

            def call(*_, stage=stage, need_weights=need_weights):
                return layer(*inputs, stage=stage, need_weights=need_weights)[0]

            assert torch.autograd.gradcheck(call, (*inputs, *layer.parameters()), fast_mode=True)
    layer(*inputs, stage=1)[0].square().sum().backward()
    for factor in (layer.up, layer.down, layer.out_proj.up, layer.out_proj.down):
        assert factor.grad[1].any() and not factor.grad[[0, 2]].any()


@pytest.mark.parametrize("kind", ["batch_first", "kdim"])
def test_dtypes(kind):
    layer = layer_of(kind, torch.float32).eval()
    inputs = inputs_of(layer, torch.float32)
    for merged in (False, True):
        if merged:
            layer.merge()
        expected = layer(*inputs, stage=1)[0]
        narrow = layer(*(t.bfloat16() for t in inputs), stage=1)[0]
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), expected, rtol=0.05, atol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            for stage in (1, torch.tensor([1, 1, 1])):
                y = layer(*inputs, stage=stage, attn_mask=torch.zeros(L, S))[0]
                assert y.dtype == torch.bfloat16
                torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.down.dtype == half.out_proj.up.dtype == torch.bfloat16 and not half.merged
    assert half(*(t.bfloat16() for t in inputs), stage=1)[0].dtype == torch.bfloat16


def test_errors():
    layer = layer_of("kdim vdim batch_first")
    query, key, value = inputs_of(layer)
    for merged in (False, True):
        if merged:
            layer.merge()
        with pytest.raises(
            ValueError, match=r"query: expected \(8,\) as its last of two or three axes, got \(3, 5, 7\)"
        ):
            layer(query[..., :7], key, value, stage=0)
        with pytest.raises(ValueError, match=r"key: expected \(6,\) as its last .* got \(3, 4, 7\)"):
            layer(query, value, value, stage=0)
        with pytest.raises(ValueError, match=r"value: expected \(7,\) as its last .* got \(1, 3, 4, 7\)"):
            layer(query, key, value[None], stage=0)
        with pytest.raises(TypeError, match="query: expected float32, float64"):
            layer(query.int(), key, value, stage=0)
        with pytest.raises(TypeError, match="key: expected a tensor"):
            layer(query, None, value, stage=0)
        with pytest.raises(IndexError, match="stage: expected 0 to 2, got 3"):
            layer(query, key, value, stage=3)
        with pytest.raises(IndexError, match="stage: expected 0 to 2, got 3"):
            layer(query, key, value, stage=torch.tensor([0, 1, 3]))
        with pytest.raises(ValueError, match="stage: expected one stage per sample"):
            layer(query, key, value, stage=torch.tensor([0, 1, 2, 0, 1]))  # as many as tokens
        with pytest.raises(ValueError, match=r"stage: expected 0 to 2, got none: pass layer\(\.\.\., stage=k\)"):
            layer(query, key, value)
    with pytest.raises(TypeError, match="dtype: expected float32"):
        lf.LoRAMultiheadAttention(8, 2, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"base: expected an nn\.MultiheadAttention, got Linear"):
        lf.LoRAMultiheadAttention.from_base(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"base: expected a weight of float32, .* got torch.float8_e5m2"):
        lf.LoRAMultiheadAttention.from_base(nn.MultiheadAttention(8, 2).to(torch.float8_e5m2))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_and_no_samples(kind):
    layer = layer_of(kind, torch.float32)
    empty = torch.zeros(0, dtype=torch.int64)
    none = (at(layer, t, slice(0, 0)) for t in inputs_of(layer, torch.float32))
    y, weights = layer(*none, stage=empty)
    assert 0 in y.shape and weights.shape[0] == 0
    meta, inputs = copy.deepcopy(layer).to("meta"), inputs_of(layer, torch.float32)
    for stage in (1, torch.tensor([0, 1, 2])):
        y, weights = layer(*inputs, stage=stage)
        on_meta = stage.to("meta") if isinstance(stage, torch.Tensor) else stage
        shapes = [t.shape for t in meta(*(t.to("meta") for t in inputs), stage=on_meta)]
        assert shapes == [y.shape, weights.shape]


def test_words_and_copies_of_a_layer():
    layer = layer_of("batch_first")
    assert "stages=3, rank=2" in repr(layer) and "(, " not in repr(layer)
    inputs = inputs_of(layer)
    more = layer.with_stages([2, None, 2])
    assert more.stages == more.out_proj.stages == 3 and not more.out_proj.up[1].any()
    for k, was in enumerate((2, None, 2)):
        if was is not None:
            assert torch.equal(more(*inputs, stage=k)[0], layer(*inputs, stage=was)[0])
    one = layer.with_stages([1])
    assert torch.equal(one(*inputs)[0], layer(*inputs, stage=1)[0])


class Tokens(nn.Module):
    """Pixels as tokens, which look at one another and at a smaller image."""

    def __init__(self, heads=2, **settings):
        super().__init__()
        self.head, self.tail = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.small = nn.Conv2d(1, 6, 2, 2)
        self.same = nn.MultiheadAttention(8, heads, batch_first=True, **settings)
        self.other = nn.MultiheadAttention(8, heads, kdim=6, vdim=6, batch_first=True, **settings)

    def forward(self, z):
        y = self.head(z)
        tokens, few = y.flatten(2).mT, self.small(z).flatten(2).mT
        tokens = tokens + self.same(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.other(tokens, few, few)[0]
        return z + self.tail(tokens.mT.unflatten(2, y.shape[2:]))


NAMES = {"head", "tail", "small", "same", "same.out_proj", "other", "other.out_proj"}


@torch.no_grad()
def with_dense_weights(staged, k: int, denoiser=None):
    """The plain denoiser with the weights of a stage, by hand, in float64."""
    plain = Tokens().double() if denoiser is None else copy.deepcopy(denoiser).double()
    plain.load_state_dict(staged.base.state_dict(), strict=False)
    for name, layer in staged.adapted.items():
        target = plain.get_submodule(name)
        down, up = layer.down[k].double(), layer.up[k].double()
        if isinstance(target, nn.MultiheadAttention):
            update = layer.scale * up @ down
            if target.in_proj_weight is not None:
                target.in_proj_weight += update
            else:
                q, key, value = update.split([target.embed_dim, target.kdim, target.vdim], 1)
                target.q_proj_weight += q
                target.k_proj_weight += key
                target.v_proj_weight += value
        else:
            target.weight += layer.scale * adapters.delta(down, up, target.weight.shape)
    return plain


@pytest.mark.parametrize("form", adapters.FORMS)
def test_in_a_denoiser(form, graph_counter):
    z, stages = torch.rand(3, 1, 4, 6), torch.tensor([2, 0, 1])
    staged = drawn(lf.adapt(Tokens(), stages=3, gamma=40, form=form, scale=0.5))
    assert set(staged.adapted) == NAMES and not staged.skipped
    assert staged.adapted["same"].rank == staged.adapted["other"].rank == staged.adapted["same.out_proj"].rank == 4
    assert staged.base.same.out_proj is staged.adapted["same.out_proj"]
    expected = [with_dense_weights(staged, k)(z.double()) for k in range(3)]
    mixed = torch.stack([expected[k][i] for i, k in enumerate(stages)])
    for k in range(3):
        torch.testing.assert_close(staged(z, stage=k).double(), expected[k], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(staged(z, stage=stages).double(), mixed, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in staged.base_parameters())
    staged(z, stage=1).square().sum().backward()
    for name, layer in staged.adapted.items():
        assert layer.up.grad[1].any() and layer.down.grad[1].any(), name
    for mode in (True, False):
        graph_counter.graphs = 0
        torch._dynamo.reset()
        compiled = torch.compile(staged.train(mode), fullgraph=True, backend=graph_counter)
        with torch.set_grad_enabled(mode):
            for k in range(3):
                torch.testing.assert_close(compiled(z, stage=k).double(), expected[k], rtol=1e-4, atol=1e-5)
            assert graph_counter.graphs == 2
            torch.testing.assert_close(compiled(z, stage=stages).double(), mixed, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        program = torch.export.export(staged, (z,), {"stage": torch.tensor(0)}).module()
        torch.testing.assert_close(program(z, stage=torch.tensor(2)).double(), expected[2], rtol=1e-4, atol=1e-5)
        more = copy.deepcopy(staged.with_stages([1, None, 0]))
        for k, was in ((0, 1), (2, 0)):
            assert torch.equal(more(z, stage=k), staged(z, stage=was))
        staged.merge()
        assert staged.merged
        for k in range(3):
            torch.testing.assert_close(staged(z, stage=k).double(), expected[k], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(staged(z, stage=stages).double(), mixed, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(staged, fullgraph=True, backend=graph_counter)
        torch.testing.assert_close(compiled(z, stage=2).double(), expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"heads": 1}, {"bias": False}, {"add_bias_kv": True}, {"dropout": 0.2}])
def test_a_fresh_network_equals_the_tied_one(settings):
    """Frozen: torch multiplies a batch another way where a weight could have a gradient, which rounds otherwise."""
    denoiser, z = Tokens(**settings).requires_grad_(False), torch.rand(2, 1, 6, 6)
    for module in denoiser.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None:
            nn.init.normal_(module.in_proj_bias)
    staged = lf.adapt(denoiser, stages=2)
    assert set(staged.adapted) == NAMES
    with torch.no_grad():
        for merged in (False, True):
            if merged:
                staged.merge()
            for mode in (False,) if merged else (True, False):
                torch.manual_seed(1)
                expected = denoiser.train(mode)(z)
                torch.manual_seed(1)
                assert torch.equal(staged.train(mode)(z, stage=1), expected)


def test_torchs_fast_path_takes_the_weights_of_the_stage(monkeypatch):
    """Without gradients torch's attention is one call that is given the weights, in_proj's and out_proj's."""
    calls, own = [], torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(args) or own(*args))
    staged, z = drawn(lf.adapt(Tokens(), stages=2, gamma=40)).eval(), torch.rand(2, 1, 4, 4)
    with torch.no_grad():
        for merged in (False, True):
            if merged:
                staged.merge()
            for k in range(2):
                expected = with_dense_weights(staged, k)(z.double())
                calls.clear()
                torch.testing.assert_close(staged(z, stage=k).double(), expected, rtol=1e-4, atol=1e-5)
                (args,) = calls  # keys of other widths go the long way
                for given, name in ((args[5], "same"), (args[7], "same.out_proj")):
                    torch.testing.assert_close(given, staged.adapted[name].stage_weight(k))


@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_transformer_layers(batch_first):
    settings = {"dropout": 0.0, "batch_first": batch_first}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, **settings), 1, enable_nested_tensor=False)
    tokens = torch.randn(3, 5, 8)
    staged = drawn(lf.adapt(encoder, stages=2, gamma=40))
    assert {"layers.0.self_attn", "layers.0.self_attn.out_proj"} < set(staged.adapted) and not staged.skipped
    expected = with_dense_weights(staged, 1, encoder).eval()(tokens.double())
    with torch.no_grad():
        for mode in (True, False):
            y = staged.train(mode)(tokens, stage=1)
            torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
        staged.merge()
        torch.testing.assert_close(staged(tokens, stage=1).double(), expected, rtol=1e-4, atol=1e-5)
        if batch_first:
            mixed = staged(tokens, stage=torch.tensor([1, 0, 1]))
            torch.testing.assert_close(mixed[2].double(), expected[2], rtol=1e-4, atol=1e-5)


def test_which_of_its_layers_are_adapted():
    z = torch.rand(2, 1, 4, 4)
    without = lf.adapt(Tokens(), stages=2, exclude="same.out_proj")
    assert set(without.adapted) == NAMES - {"same.out_proj"}
    without = drawn(without)
    expected = with_dense_weights(without, 1)(z.double())
    torch.testing.assert_close(without(z, stage=1).double(), expected, rtol=1e-4, atol=1e-5)
    # Its attention computes with out_proj's weight and would never see an adapter there.
    without = lf.adapt(Tokens(), stages=2, exclude="same")
    assert set(without.adapted) == NAMES - {"same", "same.out_proj"}
    assert without.skipped["same.out_proj"] == without.skipped["same"] == "excluded by pattern"
    with pytest.warns(UserWarning, match="same.out_proj"):
        without = lf.adapt(Tokens(), stages=2, include=["same.out_proj", "head"])
    assert set(without.adapted) == {"head"}
    assert "its attention, which computes with its weight, has no adapter" in without.skipped["same.out_proj"]

    class Own(nn.MultiheadAttention):
        pass

    denoiser = Tokens()
    denoiser.same = Own(8, 2, batch_first=True)
    denoiser.other.out_proj = nn.utils.parametrizations.weight_norm(denoiser.other.out_proj)
    with pytest.warns(UserWarning, match="more than plain ones"):
        staged = lf.adapt(denoiser, stages=2)
    assert set(staged.adapted) == {"head", "tail", "small", "other"}
    assert "Own is a subclass of its own" in staged.skipped["same"]
    assert "its attention" in staged.skipped["same.out_proj"]
    torch.testing.assert_close(staged(z, stage=1), denoiser(z))


def test_an_attention_that_is_more_than_a_plain_one():
    changes = {
        "its forward is one of its own": lambda layer: setattr(layer, "forward", layer.forward),
        "it holds gain beside its weight and bias": lambda layer: layer.register_buffer("gain", torch.ones(1)),
        "its weight or bias is computed": lambda layer: layer._parameters.pop("in_proj_weight"),
        "its attribute weight has another meaning": lambda layer: setattr(layer, "weight", 0.5),
        "its weight is complex64": lambda layer: setattr(
            layer, "in_proj_weight", nn.Parameter(layer.in_proj_weight.to(torch.complex64))
        ),
    }
    for reason, change in changes.items():
        denoiser = Tokens()
        change(denoiser.same)
        with pytest.warns(UserWarning, match="more than plain ones"):
            staged = lf.adapt(denoiser, stages=2)
        assert reason in staged.skipped["same"] and "same.out_proj" in staged.skipped


def test_code_that_reads_the_weights_of_an_attention():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.heads = nn.MultiheadAttention(8, 2), 2

        def forward(self, z):
            return F.linear(z, self.attention.in_proj_weight) + self.attention.in_proj_weight.shape[0]

    with pytest.warns(UserWarning, match=r"computes with the weight of attention \("):
        lf.adapt(Reads(), stages=2)

    class Asks(Reads):
        def forward(self, z):
            return F.linear(z, current_weight(self.attention))

    staged, z = drawn(lf.adapt(Asks(), stages=2)), torch.randn(4, 8)
    layer = staged.adapted["attention"]
    torch.testing.assert_close(staged(z, stage=1), z @ (layer.in_proj_weight + layer.up[1] @ layer.down[1]).mT)
    plain = Tokens()
    assert current_weight(plain.same) is plain.same.in_proj_weight and current_weight(plain.other).shape == (8, 20)


def network(**settings):
    net = lf.LoRun(lf.CASSI(torch.rand(4, 6), bands=1, step=0), Tokens(), stages=3, gamma=40, **settings)
    return drawn(net)


def test_in_a_network(tmp_path):
    net = network(checkpoint=1)
    y = net.op(torch.rand(2, 1, 4, 6))
    net(y).square().sum().backward()
    assert all(p.grad.any() for p in net.denoiser.adapter_parameters())
    expected = net.eval()(y)
    lf.save(net, tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors", denoiser=Tokens())
    assert torch.equal(again(y), expected) and set(again.denoiser.adapted) == NAMES

    base = Tokens()
    base.load_state_dict(net.denoiser.base.state_dict(), strict=False)
    lf.save(net, tmp_path / "adapters.safetensors", base=False)
    assert torch.equal(lf.load(tmp_path / "adapters.safetensors", denoiser=base)(y), expected)
    with pytest.raises(ValueError, match="expected the base that its adapters were saved with"):
        lf.load(tmp_path / "adapters.safetensors", denoiser=Tokens())

    more = net.with_stages([0, 1, 2, None])
    assert more.denoiser.merged and more.denoiser.adapted["same.out_proj"].stages == 4
    fast = net.optimize(dtype=torch.float32)
    assert type(fast.denoiser.copies[2].same) is nn.MultiheadAttention
    assert type(fast.denoiser.copies[2].same.out_proj) is type(base.same.out_proj)
    torch.testing.assert_close(fast(y), expected, rtol=1e-4, atol=1e-5)
    program = lf.interop.export.program(net, y)
    torch.testing.assert_close(program.module()(y), expected, rtol=1e-4, atol=1e-5)
    narrow = net.optimize(dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.denoiser.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(narrow(y), expected, rtol=0.1, atol=0.1)


def test_optimized_attention_with_parts_that_are_not_adapted():
    """bias_k, and an out_proj without an adapter, follow the network's dtype, and the network itself stays as it is."""
    staged = lf.adapt(Tokens(add_bias_kv=True), stages=2, exclude="*.out_proj")
    net = drawn(lf.LoRun(lf.CASSI(torch.rand(4, 6), bands=1, step=0), staged))
    y = net.op(torch.rand(2, 1, 4, 6))
    expected = net.eval()(y)
    narrow = net.optimize(dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.denoiser.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(narrow(y), expected, rtol=0.1, atol=0.1)
    assert {p.dtype for p in net.parameters()} == {torch.float32} and torch.equal(net(y), expected)


def test_merged_weights_are_dropped_with_what_they_were_made_of():
    staged, z = drawn(lf.adapt(Tokens(), stages=2, gamma=40)).eval(), torch.rand(2, 1, 4, 4)
    staged.merge()
    first = staged(z, stage=1)
    for name in ("other.k_proj_weight", "same.in_proj_weight", "same.out_proj.weight"):
        changed = {f"base.{name}": 2 * staged.base.get_parameter(name)}
        assert not torch.equal(torch.func.functional_call(staged, changed, (z,), {"stage": 1}), first), name
    assert torch.equal(staged(z, stage=1), first)
    assert not staged.train().merged and not staged.base.same.out_proj.merged


def test_threads_at_different_stages():
    staged, z = drawn(lf.adapt(Tokens(), stages=4, gamma=40, include="same*")).eval(), torch.rand(2, 1, 4, 4)
    with torch.no_grad():
        expected, wrong = [staged(z, stage=k) for k in range(4)], []

    def run(k):
        with torch.no_grad():
            wrong.extend(k for _ in range(20) if not torch.equal(staged(z, stage=k), expected[k]))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_gradient_per_sample():
    """torch.func's transforms take the layers."""
    staged, z = drawn(lf.adapt(Tokens(), stages=2, gamma=40)), torch.rand(3, 1, 4, 4)
    up = staged.adapted["same"].up

    def loss(value, sample):
        name = "base.same.up"
        return torch.func.functional_call(staged, {name: value}, (sample[None],), {"stage": 1}).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(up, z)
    for sample, grad in zip(z, found, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(loss(up, sample), up)[0], rtol=1e-4, atol=1e-4)
