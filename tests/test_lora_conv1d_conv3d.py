"""Convolutions of one and three axes, transposed too, beside torch's with merged weights, and in a denoiser."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import lorun_fast as lf
from lorun_fast import adapters

KINDS = {
    "1": (nn.Conv1d, lf.LoRAConv1d),
    "3": (nn.Conv3d, lf.LoRAConv3d),
    "transposed 1": (nn.ConvTranspose1d, lf.LoRAConvTranspose1d),
    "transposed 3": (nn.ConvTranspose3d, lf.LoRAConvTranspose3d),
}
GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"dilation": 2, "padding": "same"},
    {"padding": 1, "padding_mode": "replicate"},
    {"padding": 1, "groups": 2, "form": "loralib"},
]
TRANSPOSED = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1, "bias": False},
    {"dilation": 2, "stride": 3},
    {"groups": 2, "stride": 2, "form": "loralib"},
]
CASES = [(kind, geometry) for kind in KINDS for geometry in (TRANSPOSED if "transposed" in kind else GEOMETRIES)]


def layer_of(kind: str, dtype=torch.float64, **geometry):
    layer = KINDS[kind][1](4, 6, 3, dtype=dtype, stages=3, rank=2, scale=0.5, **geometry)
    nn.init.normal_(layer.up)
    return layer


def image(kind: str, n=4, dtype=torch.float64):
    return torch.randn(n, 4, *(7, 6, 5)[: int(kind[-1])], dtype=dtype)


def exact(kind: str, layer, x, k: int):
    update = torch.einsum("ar,rb...->ab...", layer.up[k], layer.down[k])  # in and out change places if transposed
    plain = layer.plain(layer.weight + 0.5 * update, layer.bias)
    assert type(plain) is KINDS[kind][0]
    return plain(x)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("kind", "geometry"), CASES)
@torch.no_grad()
def test_equals_the_convolution_with_the_merged_weight(kind, geometry, merged):
    layer, x, stages = layer_of(kind, **geometry), image(kind), torch.tensor([2, 0, 1, 2])
    expected = [exact(kind, layer, x, k) for k in range(3)]
    if merged:
        layer.merge()
    mixed = layer(x, stages)
    for k in range(3):
        torch.testing.assert_close(layer(x, k), expected[k])
        torch.testing.assert_close(layer(x, torch.tensor(k)), expected[k])
        torch.testing.assert_close(layer(x[0], k), expected[k][0])  # torch's take a sample alone
        torch.testing.assert_close(mixed[stages == k], expected[k][stages == k])
    assert layer(x[:0], stages[:0]).shape == (0, *expected[0].shape[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    layer, x = layer_of(kind, padding=1), image(kind, 2).requires_grad_()
    for stage in (1, torch.tensor(1), torch.tensor([2, 0])):
        inputs = (x, *layer.parameters())
        assert torch.autograd.gradcheck(lambda *_, stage=stage: layer(x, stage), inputs, fast_mode=True)
    layer(x, 1).sum().backward()
    assert layer.up.grad[1].any() and not layer.up.grad[[0, 2]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind):
    layer, x = layer_of(kind, torch.float32, padding=1), image(kind, dtype=torch.float32)
    for merged in (False, True):
        if merged:
            layer.merge()
        expected = layer(x, 1)
        narrow = layer(x.bfloat16(), 1)
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), expected, rtol=0.05, atol=0.2)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x, 1).dtype == layer(x, torch.tensor([0, 1, 2, 0])).dtype == torch.bfloat16
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16(), 1).dtype == half.down.dtype == torch.bfloat16
    if kind[-1] == "3":
        spread = copy.deepcopy(layer).to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(spread(x, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind):
    layer, x = layer_of(kind), image(kind)
    with pytest.raises(ValueError, match="form 'peft' cannot express groups=2: use form='loralib'"):
        KINDS[kind][1](4, 6, 3, groups=2)
    for merged in (False, True):
        if merged:
            layer.merge()
        with pytest.raises(ValueError, match=rf"x: expected \(N, 4, ...\) with {kind[-1]} axes of space, got"):
            layer(x[:, :2], 0)
        with pytest.raises(ValueError, match=r"x: expected .* axes of space"):
            layer(torch.randn(2, dtype=torch.float64), 0)
        with pytest.raises(TypeError, match="x: expected float32, float64"):
            layer(x.int(), 0)
        with pytest.raises(IndexError, match="stage: expected 0 to 2"):
            layer(x, torch.tensor([0, 1, 3, 0]))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["transposed 1", "transposed 3"])
@torch.no_grad()
def test_sizes_of_transposed_convolutions(kind, merged):
    layer, x = layer_of(kind, stride=2), image(kind)
    if merged:
        layer.merge()
    size = [2 * side + 2 for side in x.shape[2:]]
    plain = layer.plain(layer.weight + 0.5 * torch.einsum("ar,rb...->ab...", layer.up[1], layer.down[1]), layer.bias)
    for stage in (1, torch.tensor([1] * 4)):
        torch.testing.assert_close(layer(x, stage, size), plain(x, size))
    one = layer.with_stages([1])
    torch.testing.assert_close(one(x, size), plain(x, size))  # as a denoiser that knows no stages passes it
    torch.testing.assert_close(one(x, output_size=size), plain(x, size))


class Video(nn.Module):
    """Frames as an axis of their own, and attention over channels as ECA has it."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 1, (3, 1, 1), padding=(1, 0, 0))
        self.attend, self.flat = nn.Conv1d(1, 2, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.small, self.large = nn.Conv3d(4, 4, 2, 2, groups=2), nn.ConvTranspose3d(4, 4, 2, 2)
        self.wide = nn.ConvTranspose1d(2, 2, 3, padding=1)

    def forward(self, z):
        y = self.head(z[:, None]).relu()
        y = y + self.large(self.small(y), output_size=y.shape[2:])
        weight = self.wide(self.attend(y.mean((2, 3, 4))[:, None])).prod(1).sigmoid()
        y = self.flat((y * weight[:, :, None, None, None]).flatten(2, 3)).unflatten(2, y.shape[2:4])
        return z + self.tail(y)[:, 0]


def trained(**settings):
    staged = lf.adapt(Video(), stages=3, gamma=60, include="*", **settings)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.3)
    return staged


@pytest.mark.parametrize("form", adapters.FORMS)
def test_in_a_denoiser(form, graph_counter, tmp_path):
    z, stages = torch.rand(3, 4, 6, 5), torch.tensor([2, 0, 1])
    denoiser = Video()
    grouped = {"small"} if form == "loralib" else set()
    staged = lf.adapt(denoiser, stages=3, gamma=60, form=form, include="*" if grouped else None)
    assert set(staged.adapted) == {"head", "tail", "attend", "flat", "large", "wide"} | grouped
    assert set(staged.skipped) == {"small"} - grouped
    torch.testing.assert_close(staged(z, stage=2), denoiser(z))
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.3)
    weights = {
        f"{name}.weight": (layer.weight + adapters.delta(layer.down[1], layer.up[1], layer.weight.shape)).double()
        for name, layer in staged.adapted.items()
    }
    expected = functional_call(copy.deepcopy(denoiser).double(), weights, (z.double(),))
    torch.testing.assert_close(staged(z, stage=1).double(), expected, rtol=1e-4, atol=1e-5)
    staged(z, stage=1).square().sum().backward()
    grads = {name: torch.autograd.grad(expected.square().sum(), layer.up, retain_graph=True)[0]
             for name, layer in staged.adapted.items()}  # fmt: skip
    for name, layer in staged.adapted.items():
        torch.testing.assert_close(layer.up.grad, grads[name], rtol=1e-3, atol=1e-4)
    mixed = staged(z, stage=stages)
    for i, k in enumerate(stages.tolist()):
        torch.testing.assert_close(mixed[i : i + 1], staged(z[i : i + 1], stage=k), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(staged, fullgraph=True, backend=graph_counter)
    with torch.no_grad():
        for k in range(3):
            torch.testing.assert_close(compiled(z, stage=k), staged(z, stage=k), rtol=1e-4, atol=1e-5)
        assert graph_counter.graphs == 2
        program = torch.export.export(staged, (z,), {"stage": torch.tensor(0)}).module()
        torch.testing.assert_close(program(z, stage=torch.tensor(2)), staged(z, stage=2), rtol=1e-4, atol=1e-5)
        more = staged.with_stages([1, None])
        assert torch.equal(more(z, stage=0), staged(z, stage=1))
        unmerged = [staged(z, stage=k) for k in range(3)]
        staged.merge()
        for k in range(3):
            torch.testing.assert_close(staged(z, stage=k), unmerged[k], rtol=1e-4, atol=1e-5)


def test_in_a_network(tmp_path):
    net = lf.LoRun(lf.CASSI(torch.rand(6, 5), bands=4, step=0), trained(), checkpoint=1)
    y = net.op(torch.rand(2, 4, 6, 5))
    net(y).square().sum().backward()
    assert all(p.grad.any() for p in net.denoiser.adapter_parameters())
    grad = net.denoiser.adapted["head"].up.grad
    assert all(grad[k].any() for k in range(3))
    expected = net.eval()(y)
    lf.save(net, tmp_path / "net.safetensors")
    assert torch.equal(lf.load(tmp_path / "net.safetensors", denoiser=Video())(y), expected)
    fast = net.optimize(dtype=torch.float32)
    assert type(fast.denoiser.copies[2].head) is nn.Conv3d
    assert type(fast.denoiser.copies[2].large) is nn.ConvTranspose3d
    torch.testing.assert_close(fast(y), expected, rtol=1e-4, atol=1e-5)
