"""adapt() on foreign denoisers, and how a stage reaches their layers."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import lorun_fast as lf
from lorun_fast import adapters, layers
from lorun_fast.stages import TiedDenoiser, UntiedDenoiser


class Foreign(nn.Module):
    """Somebody else's denoiser: knows nothing of stages; a depthwise layer, a norm, a shared layer, a linear gate."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(2, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.mix
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(2, 8)
        self.gate = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.tail = nn.Conv2d(8, 2, 3, stride=2, padding=1)

    def forward(self, z):
        x = torch.relu(self.head(z))
        x = self.norm(self.alias(torch.relu(self.mix(x))) + self.depthwise(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return z + self.tail(self.up(x))


class WithSigma(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, z, sigma):
        level = torch.as_tensor(sigma).reshape(-1, 1, 1, 1).expand(z.shape[0], 1, *z.shape[2:])
        return self.conv(torch.cat([z, level], 1))


def staged_foreign(**kwargs) -> lf.StagedDenoiser:
    with pytest.warns(UserWarning, match="1 grouped layers keep their base weights"):
        staged = lf.adapt(Foreign(), **kwargs)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    return staged


Z = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_fresh_stages_equal_the_denoiser_to_the_last_bit(form):
    denoiser = Foreign()
    before = copy.deepcopy(denoiser.state_dict())
    with pytest.warns(UserWarning):
        staged = lf.adapt(denoiser, stages=4, form=form)
    expected = denoiser(Z)
    for k in range(4):
        assert torch.equal(staged(Z, stage=k), expected)
        assert torch.equal(staged[k](Z), expected)
    # Samples at different stages go through convolutions of their own: equal but for the batch's rounding.
    torch.testing.assert_close(staged(Z, stage=torch.tensor([0, 3, 1])), expected)
    assert torch.equal(staged(Z, stage=torch.tensor([2, 2, 2])), expected)
    assert type(denoiser.head) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())


def test_what_is_adapted_and_what_is_left_alone():
    staged = staged_foreign(stages=2)
    assert set(staged.adapted) == {"head", "mix", "gate", "up", "tail"}
    assert "grouped (groups=8)" in staged.skipped["depthwise"]
    assert staged.base.alias is staged.base.mix


def test_stages_differ_and_views_agree():
    staged = staged_foreign(stages=3)
    outputs = [staged(Z, stage=k) for k in range(3)]
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    for k, view in enumerate(staged):
        assert torch.equal(view(Z), outputs[k])
    assert len(staged) == 3
    assert torch.equal(staged[-1](Z), outputs[2])
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"stage: expected 0 to 2, got {wrong}"):
            staged[wrong]
    with pytest.raises(TypeError, match="stage: expected an int, got slice"):
        staged[:2]
    mixed = staged(Z, stage=torch.tensor([2, 0, 1]))
    torch.testing.assert_close(mixed, torch.stack([outputs[2][0], outputs[0][1], outputs[1][2]]))


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_a_default_device_is_no_place_for_samples_of_another(backend):
    """meta stands for a GPU that torch.set_default_device names."""
    staged, stage = staged_foreign(stages=3), torch.tensor([2, 0, 1])
    with lf.use_backend(backend):
        expected = staged(Z, stage=stage)
        with torch.device("meta"):
            torch.testing.assert_close(staged(Z, stage=stage), expected)


def test_include_and_exclude_patterns():
    staged = lf.adapt(Foreign(), stages=2, include=["head", "depthwise"])
    assert set(staged.adapted) == {"head", "depthwise"}
    with pytest.warns(UserWarning):
        staged = lf.adapt(Foreign(), stages=2, exclude="[gu]*")
    assert set(staged.adapted) == {"head", "mix", "tail"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": "encoder.*"}, r"pattern 'encoder.\*' matches no layer; the layers are: head"),
        ({"include": "depthwise", "form": "peft"}, "depthwise: form 'peft' cannot express groups=8"),
        ({"exclude": "*"}, "expected a convolution, Linear or attention layer to adapt in Foreign, got none"),
        ({"stages": 0}, "^stages: expected at least 1"),
        ({"form": "lokr"}, "form: expected one of loralib, peft"),
        ({"scale": float("nan")}, "^scale: expected a finite number, got nan"),
        ({"gamma": 1000}, "^gamma: expected at most 100"),
    ],
)
def test_adapt_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lf.adapt(Foreign(), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": 3}, "include: expected a pattern or several, got 3"),
        ({"exclude": ["head", 3]}, r"exclude: expected a pattern or several, got \['head', 3\]"),
        ({"scale": "a"}, "scale: expected a number, got 'a'"),
    ],
)
def test_adapt_takes_no_others(kwargs, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        lf.adapt(Foreign(), **kwargs)


@pytest.mark.parametrize("kind", [lambda base, stages: lf.adapt(base, stages), TiedDenoiser, UntiedDenoiser])
def test_what_is_no_image(kind):
    with pytest.raises(TypeError, match="z: expected a tensor, got list"):
        kind(nn.Conv2d(1, 1, 1), 2)([1.0], stage=1)


def test_stages_are_whole_numbers():
    staged = lf.adapt(Foreign(), stages=np.int64(3), exclude="[gu]*")
    assert type(staged.stages) is int
    assert staged[np.int64(-1)].stage == 2
    with pytest.raises(TypeError, match="stages: expected a whole number, got '3'"):
        lf.adapt(Foreign(), stages="3")


def test_weights_computed_by_a_parametrization_are_left_alone():
    denoiser = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 3))
    staged = lf.adapt(denoiser, stages=2)
    assert set(staged.adapted) == {"1"}
    assert "0" in staged.skipped


def test_subclasses_of_layers_are_left_alone():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    denoiser = nn.Sequential(Doubled(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    with pytest.warns(UserWarning, match=r"1 layers that are more than plain ones keep their base weights .*\(0\): "):
        staged = lf.adapt(denoiser, stages=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in ({"exclude": "0"}, {"include": "1"}):
            lf.adapt(denoiser, stages=2, **asked)
    assert set(staged.adapted) == {"1"} and "Doubled is a subclass" in staged.skipped["0"]
    assert torch.equal(staged(Z, stage=1), denoiser(Z))


@pytest.mark.parametrize("convolutions", ["direct", "winograd"])
def test_layers_called_by_keyword(convolutions):
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last, self.token = nn.ConvTranspose2d(8, 1, 1), nn.Linear(1, 1)

        def forward(self, z):
            x = self.last(input=self.second(input=self.first(input=z)))
            return self.token(input=x.movedim(1, -1)).movedim(-1, 1)

    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), ByKeyword(), stages=2)
    y = net.op(torch.rand(1, 1, 8, 8))
    expected = net(y)
    torch.testing.assert_close(net.eval()(y), expected)
    torch.testing.assert_close(net.optimize(dtype=torch.float32, convolutions=convolutions)(y), expected)


def test_a_staged_denoiser_within_another_keeps_its_own_stage():
    inner = lf.adapt(nn.Conv2d(2, 2, 3, padding=1), stages=3)
    outer = lf.adapt(nn.Sequential(inner[2], nn.Conv2d(2, 2, 3, padding=1)), stages=2)
    within, last = outer.base
    for p in (*within.staged.adapter_parameters(), *outer.adapter_parameters()):
        nn.init.normal_(p)
    assert set(outer.adapted) == {"1"}
    got = outer(Z, stage=1)  # merges in another op than a layer by itself, which may round otherwise
    torch.testing.assert_close(got, last(within.staged(Z, stage=2), 1))
    assert not torch.allclose(got, last(within.staged(Z, stage=1), 1))


def test_a_single_layer_is_a_denoiser_too():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    staged = lf.adapt(conv, stages=2)
    assert torch.equal(staged(Z, stage=1), conv(Z))


def test_modules_keep_the_mode_they_are_in():
    """A denoiser that was loaded for inference does not drop out again because it is adapted."""
    denoiser = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Dropout(0.5), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    staged = lf.adapt(denoiser.eval(), stages=2)
    assert staged.training and not staged.merged
    assert torch.equal(staged(Z, stage=1), denoiser(Z))
    staged.freeze_base(False)
    assert staged.base[2].training and not staged.base[1].training
    staged.freeze_base()
    assert staged.train().base[1].training and not staged.base[2].training
    assert not any(m.training for m in staged.eval().modules())
    merged = lf.adapt(denoiser, stages=2)
    merged.merge()
    merged.freeze_base(False)
    assert not merged.merged


def test_freezing():
    staged = staged_foreign(stages=2)
    factors = {id(p) for p in staged.adapter_parameters()}
    assert len(factors) == 2 * len(staged.adapted)
    assert all(p.requires_grad == (id(p) in factors) for p in staged.parameters())
    staged.freeze_base(False)
    assert all(p.requires_grad for p in staged.parameters())


def test_gradients_reach_only_the_stage_that_ran():
    staged = staged_foreign(stages=3)
    staged(Z, stage=1).square().mean().backward()
    for layer in staged.adapted.values():
        for factor in (layer.down, layer.up):
            assert factor.grad[1].abs().max() > 0
            assert not factor.grad[[0, 2]].any()
        assert layer.weight.grad is None


def test_sigma_is_passed_through():
    staged = lf.adapt(WithSigma(), stages=2)
    z = torch.randn(2, 2, 6, 6)
    assert torch.equal(staged(z, stage=0, sigma=0.1), staged[0](z, 0.1))
    assert not torch.allclose(staged(z, stage=0, sigma=0.1), staged(z, stage=0, sigma=0.5))


def test_sigma_may_have_to_be_named():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, z, *, sigma=0.0):
            return self.conv(z) * (1 + sigma)

    z, op = torch.rand(1, 1, 8, 8), lf.BlockCS.gaussian(0.25, 8)
    for sharing in ("lora", "tied", "untied"):
        net = lf.LoRun(op, Named(), stages=2, sharing=sharing)
        assert torch.equal(net.denoiser(z, stage=1, sigma=0.5), 1.5 * net.denoiser(z, stage=1))
        assert not torch.equal(net(op(z), sigma=0.5), net(op(z)))


def _bare(net: nn.Module, z, k, weight) -> torch.Tensor:
    down, up = (t[k] for t in (net.base.down, net.base.up))
    return nn.functional.conv2d(z, weight + (up @ down).view(weight.shape), net.base.bias, padding=1)


def test_weights_that_a_hook_computes_are_those_of_the_call():
    z = torch.rand(2, 2, 8, 8)

    def staged():
        found = lf.adapt(nn.Conv2d(2, 4, 3, padding=1), stages=2)
        nn.init.normal_(found.base.up)
        return found

    pruned = staged()
    prune.l1_unstructured(pruned.base, "down", 0.5)
    for training in (True, False):
        pruned.train(training)
        with torch.no_grad():
            pruned.base.down_orig.mul_(2)
        out = pruned(z, stage=1)
        torch.testing.assert_close(out, _bare(pruned, z, 1, pruned.base.weight))
        mask = pruned.base.down_mask[1]
        assert not mask.all() and torch.equal(pruned.base.down[1], pruned.base.down_orig[1] * mask)
    pruned.train()(z, stage=1).sum().backward()
    assert pruned.base.down_orig.grad[1].any()

    normed = staged()
    nn.utils.parametrizations.weight_norm(normed.base, "weight")
    normed.freeze_base(False)
    for _ in range(2):  # a second step has a graph of its own
        out = normed(z, stage=1)
        torch.testing.assert_close(out, _bare(normed, z, 1, normed.base.weight))
        out.sum().backward()
        with torch.no_grad():
            normed.base.parametrizations.weight.original0.mul_(2)
    normed.eval().merge()
    torch.testing.assert_close(normed(z, stage=1), _bare(normed, z, 1, normed.base.weight))


def test_other_parameters_in_place_of_merged_ones():
    staged = lf.adapt(nn.Conv2d(2, 2, 3, padding=1), stages=2)
    staged.merge()
    z, other = torch.rand(2, 2, 8, 8), {name: torch.randn_like(p) for name, p in staged.named_parameters()}

    def call(parameters, z):
        return torch.func.functional_call(staged, parameters, (z,), {"stage": 1})

    expected = nn.functional.conv2d(
        z,
        other["base.weight"] + (other["base.up"][1] @ other["base.down"][1]).view(2, 2, 3, 3),
        other["base.bias"],
        padding=1,
    )
    torch.testing.assert_close(call(other, z), expected)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(other, z), expected)
    torch.testing.assert_close(compiled(dict(staged.named_parameters()), z), staged(z, stage=1))


@pytest.mark.parametrize("merged", [False, True])
def test_a_stage_per_sample_under_vmap(merged):
    staged = lf.adapt(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Linear(8, 8)), stages=3)
    for p in staged.adapter_parameters():
        nn.init.normal_(p)
    if merged:
        staged.merge()
    stage = torch.tensor([2, 0, 2])
    found = torch.vmap(lambda z, k: staged(z[None], stage=k)[0])(Z, stage)
    torch.testing.assert_close(found, staged(Z, stage=stage), rtol=1e-4, atol=1e-4)


def test_a_traced_graph_is_a_denoiser():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()))
    assert torch.equal(lf.adapt(traced, stages=2)(Z, stage=1), traced(Z))


def test_recomputed_stages_compile():
    """In one graph where Dynamo is told so, see docs/stages.md."""
    op = lf.BlockCS.gaussian(0.25, 8)
    net = lf.LoRun(op, nn.Conv2d(1, 1, 3, padding=1), stages=2, checkpoint=True)
    y, learned = op(torch.rand(1, 1, 16, 16)), list(net.denoiser.adapter_parameters())
    (expected, *found) = [
        torch.autograd.grad(run(y).square().sum(), learned) for run in (net, torch.compile(net, backend="aot_eager"))
    ]
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        whole = torch.compile(net, fullgraph=True, backend="aot_eager")
        found.append(torch.autograd.grad(whole(y).square().sum(), learned))
    for grads in found:
        torch.testing.assert_close(grads, expected)


def test_parameter_report_of_the_published_sizes():
    small = lf.adapt(lf.ResUNet(in_channels=4, out_channels=3), stages=9, gamma=10).parameter_report()
    assert (small.base, small.per_stage, small.total) == (588_784, 131_167, 1_769_287)
    large = lf.adapt(lf.ResUNet(channels=(32, 64, 96, 128)), stages=9, gamma=10).parameter_report()
    assert (large.base, large.per_stage, large.total) == (1_786_432, 371_538, 5_130_274)
    peft = lf.adapt(lf.ResUNet(in_channels=4, out_channels=3), stages=9, gamma=10, form="peft").parameter_report()
    assert round(peft.total / 1e6, 2) == 1.25
    assert small.ratio == pytest.approx(1_769_287 / 5_299_056)
    assert "1,769,287" in str(small)


def test_compile_without_graph_breaks_over_nine_stages(graph_counter):
    staged = staged_foreign(stages=9)
    compiled = torch.compile(staged, fullgraph=True, backend=graph_counter)
    for k in range(9):
        torch.testing.assert_close(compiled(Z, stage=k), staged(Z, stage=k))
    assert graph_counter.graphs == 2  # stage 0, and the stage as a symbol


@pytest.mark.parametrize("merged", [False, True])
def test_views_of_nine_stages_compile_into_two_graphs(graph_counter, merged):
    """Stage 0, and one with the stage as a symbol: torch keeps eight graphs of a function at most."""
    staged = staged_foreign(stages=9)
    if merged:
        staged.merge()
    for stage in staged:
        compiled = torch.compile(stage, fullgraph=True, backend=graph_counter)
        torch.testing.assert_close(compiled(Z), stage(Z))
    assert graph_counter.graphs == 2


def test_merged_stages_are_plain_aten_and_no_size_compiles_again_for_ever(graph_counter):
    """One graph for stage 0 and one for all others; torch makes two more until sizes are symbols, and then none."""
    staged = lf.adapt(lf.ResUNet(channels=(4,), blocks=1), stages=9)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    staged.merge()
    ours = []

    def backend(graph, example_inputs):
        ours.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "lorun" in str(n.target))
        return graph_counter(graph, example_inputs)

    compiled = torch.compile(staged, fullgraph=True, backend=backend)

    def check(*sizes):
        for n, height, width in sizes:
            z = torch.randn(n, 1, height, width)
            for k in range(9):
                torch.testing.assert_close(compiled(z, stage=k), staged(z, stage=k))
        return graph_counter.graphs

    with torch.no_grad():
        assert check((2, 8, 8)) == 2
        assert check((3, 8, 8)) == 3  # the batch becomes a symbol
        assert check((2, 12, 16)) == 4  # height and width do
        assert check((4, 8, 8), (5, 20, 12), (2, 16, 24)) == 4
    assert ours == []


def test_compile_with_one_stage_per_sample(graph_counter):
    staged = staged_foreign(stages=9)
    compiled = torch.compile(staged, fullgraph=True, backend=graph_counter)
    for stages in ([0, 8, 4], [1, 1, 2], [7, 3, 0]):
        stage = torch.tensor(stages)
        torch.testing.assert_close(compiled(Z, stage=stage), staged(Z, stage=stage))
    assert graph_counter.graphs == 1


@pytest.mark.parametrize("merged", [False, True])
def test_a_stage_on_the_device_is_one_graph_for_all_stages(graph_counter, merged):
    staged = staged_foreign(stages=9)
    if merged:
        staged.merge()
    compiled = torch.compile(staged, fullgraph=True, backend=graph_counter)
    for k in range(9):
        torch.testing.assert_close(compiled(Z, stage=torch.tensor(k)), staged(Z, stage=k))
    assert graph_counter.graphs == 1


@pytest.mark.parametrize("merged", [False, True])
def test_one_exported_program_takes_every_stage(merged, tmp_path):
    staged = staged_foreign(stages=4)
    if merged:
        staged.merge()
    program = torch.export.export(staged, (Z,), {"stage": torch.tensor(2)})
    torch.export.save(program, tmp_path / "staged.pt2")
    loaded = torch.export.load(tmp_path / "staged.pt2").module()
    for k in range(4):
        torch.testing.assert_close(loaded(Z, stage=torch.tensor(k)), staged(Z, stage=k))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("sharing", ["loralib", "peft", "tied", "untied"])
def test_a_stage_of_all_samples_may_be_a_tensor(sharing, dtype):
    """Results and gradients are those of the number: of convolutions, a transposed one, a linear layer, blocks."""
    for denoiser, grouped in ((Foreign(), ["depthwise"]), (lf.ResUNet(2, 2, (4, 8), 1), None)):
        if sharing in ("tied", "untied"):
            staged = (TiedDenoiser if sharing == "tied" else UntiedDenoiser)(denoiser, 3)
        else:
            staged = lf.adapt(denoiser, stages=3, form=sharing, exclude=grouped)
            for p in staged.adapter_parameters():
                nn.init.normal_(p, std=0.2)
        for k in range(3):
            found = []
            for stage in (k, torch.tensor(k, dtype=dtype)):
                staged.zero_grad()
                out = staged(Z, stage=stage)
                out.square().sum().backward()
                found.append([out, *(p.grad for p in staged.parameters() if p.grad is not None)])
            torch.testing.assert_close(*found)
        staged.merge()
        with torch.no_grad():
            torch.testing.assert_close(staged(Z, stage=torch.tensor(1, dtype=dtype)), staged(Z, stage=1))
        for wrong in (-1, 3):
            with pytest.raises(IndexError, match=f"stage: expected 0 to 2, got {wrong}"):
                staged(Z, stage=torch.tensor(wrong))
        with pytest.raises(TypeError, match=r"stage: expected an int or an int64 tensor, got torch\.float32"):
            staged(Z, stage=torch.tensor(1.0))


def test_a_tensor_is_checked_where_there_is_one_stage_alone():
    with pytest.raises(IndexError, match="stage: expected 0 to 0, got 5"):
        lf.adapt(nn.Conv2d(1, 1, 3, padding=1), stages=1)(torch.rand(1, 1, 4, 4), stage=torch.tensor(5))


@pytest.mark.parametrize("strict", [False, True])
def test_export_round_trip(strict, tmp_path):
    staged = staged_foreign(stages=3)
    program = torch.export.export(staged[2], (Z,), strict=strict)
    torch.export.save(program, tmp_path / "stage.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "stage.pt2").module()(Z), staged(Z, stage=2))


@pytest.mark.parametrize("merged", [False, True])
def test_threads_at_different_stages_do_not_meet(merged):
    staged = staged_foreign(stages=4)
    if merged:
        staged.merge()
    expected = [staged(Z, stage=k) for k in range(4)]
    wrong = []

    def work(k):
        with torch.no_grad():
            wrong.extend(k for _ in range(100) if not torch.equal(staged(Z, stage=k), expected[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.parametrize("form", adapters.FORMS)
def test_threads_that_train_different_stages_do_not_meet(form):
    """Gradients of the forward and the backward pass, which runs after the stage's scope has ended."""
    torch.manual_seed(0)
    staged = lf.adapt(lf.ResUNet(2, 2, channels=(4, 8), blocks=1), stages=4, form=form)
    staged.freeze_base(False)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    parameters = list(staged.parameters())

    def step(k):
        y = staged(Z, stage=k)
        return [y, *torch.autograd.grad(y.square().mean(), parameters)]

    expected = [step(k) for k in range(4)]
    for layer_grad, other in zip(expected[0][1:], expected[1][1:], strict=True):
        assert not torch.equal(layer_grad, other)
    start = threading.Barrier(4)

    def work(k):
        start.wait()
        for _ in range(10):
            torch.testing.assert_close(step(k), expected[k])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_the_scope_ends_with_the_call_even_after_an_error():
    staged = staged_foreign(stages=2)
    with pytest.raises(ValueError, match=r"x: expected \(N, 2, H, W\)"):
        staged(torch.randn(1, 5, 8, 8), stage=1)
    with pytest.raises(ValueError, match="stage: expected 0 to 1, got none"):
        staged.base(Z)


def test_deepcopy_and_state_dict_round_trip():
    staged = staged_foreign(stages=3)
    twin = copy.deepcopy(staged)
    assert torch.equal(twin(Z, stage=2), staged(Z, stage=2))
    assert twin.training and not copy.deepcopy(staged.eval()).training
    for p in twin.adapter_parameters():
        nn.init.zeros_(p)
    assert not torch.allclose(twin(Z, stage=2), staged(Z, stage=2))
    twin.load_state_dict(staged.state_dict())
    assert torch.equal(twin(Z, stage=2), staged(Z, stage=2))


def test_deepcopy_keeps_hooks_and_attributes():
    staged, seen = staged_foreign(stages=2), []
    staged.register_forward_hook(lambda *_: seen.append("called"))
    staged.note = "of the user"
    twin = copy.deepcopy(staged)
    assert twin.note == "of the user"
    twin(Z, stage=1)
    assert seen == ["called"]
    layers = dict(twin.base.named_modules())
    assert all(layers[name] is layer for name, layer in twin.adapted.items())


def test_merge_and_unmerge_of_all_layers():
    staged = staged_foreign(stages=3)
    before = staged(Z, stage=1)
    staged.merge()
    assert staged.merged
    torch.testing.assert_close(staged(Z, stage=1), before)
    staged.base.tail.unmerge()
    assert not staged.merged
    staged.merge()
    staged.train()
    assert not staged.merged


def merges(monkeypatch) -> list[int]:
    """How many layers each call of the one op merges."""
    counts = []
    merge = layers.lora_merge_stage
    monkeypatch.setattr(
        layers,
        "lora_merge_stage",
        lambda weights, *rest, **named: counts.append(len(weights)) or merge(weights, *rest, **named),
    )
    return counts


def drawn(form: str, **settings):
    torch.manual_seed(0)
    staged = lf.adapt(lf.ResUNet(channels=(4, 8), blocks=1), stages=2, form=form, **settings)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    return staged


@pytest.mark.parametrize("form", adapters.FORMS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_call_merges_all_its_layers_at_once(monkeypatch, form, frozen):
    staged, z, found = drawn(form), torch.randn(2, 1, 8, 8), []
    staged.freeze_base(frozen)
    count = sum(p.requires_grad for p in staged.parameters())
    counts = merges(monkeypatch)
    for at_once in (True, False):
        with monkeypatch.context() as m:
            if not at_once:
                m.setattr(type(staged), "_merged_at", lambda self, stage: {})
            y = staged(z, stage=1)
            grads = torch.autograd.grad(y.square().sum(), [p for p in staged.parameters() if p.requires_grad])
        found.append([y, *grads])
    assert len(found[0]) == 1 + count
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    # The factors of the peft form have gradients of their own, which take no merged weight's.
    assert counts == ([] if form == "peft" and frozen else [len(staged.adapted)])


@pytest.mark.parametrize("form", adapters.FORMS)
def test_where_nothing_learns_a_call_merges_all_its_layers_at_once(monkeypatch, form):
    staged, z, counts = drawn(form), torch.randn(2, 1, 8, 8), merges(monkeypatch)
    with torch.no_grad():
        y = staged(z, stage=1)
        assert counts == [len(staged.adapted)]
        torch.testing.assert_close(y, staged(z, stage=torch.tensor([1, 1])))
        staged.merge()
        torch.testing.assert_close(y, staged(z, stage=1))
    assert len(counts) == 1


def test_a_layer_that_is_given_its_own_stage_takes_that():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, z):
            return self.conv(z, 0) if isinstance(self.conv, lf.LoRAConv2d) else self.conv(z)

    staged = lf.adapt(Stubborn(), stages=2)
    for p in staged.adapter_parameters():
        nn.init.normal_(p)
    z = torch.randn(1, 2, 5, 5)
    assert torch.equal(staged(z, stage=1), staged(z, stage=0))
    assert torch.equal(staged(z, stage=1), staged.base.conv(z, 0))


def test_one_staged_denoiser_inside_another(monkeypatch):
    inner, z = drawn("loralib"), torch.randn(1, 1, 8, 8)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, z):
            return self.last(inner(self.conv(z), stage=1))

    outer = lf.adapt(Outer(), stages=3)
    for p in outer.adapter_parameters():
        nn.init.normal_(p, std=0.3)
    conv, last = outer.base.conv, outer.base.last
    expected = last(inner(conv(z, 2), stage=1), 2)
    torch.testing.assert_close(outer(z, stage=2), expected)


def test_tied_and_untied():
    denoiser = Foreign()
    tied, untied = TiedDenoiser(denoiser, 3), UntiedDenoiser(denoiser, 3)
    for k in range(3):
        assert torch.equal(tied(Z, stage=k), untied(Z, stage=k))
    nn.init.normal_(untied.copies[1].tail.weight)
    outputs = [untied(Z, stage=k) for k in range(3)]
    mixed = untied(Z, stage=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(mixed, torch.stack([outputs[1][0], outputs[0][1], outputs[1][2]]))
    told = UntiedDenoiser(WithSigma(), 2)
    nn.init.normal_(told.copies[1].conv.weight)
    stages, sigma = torch.tensor([1, 0, 1]), torch.tensor([0.1, 0.2, 0.3])
    each = [told(Z[i : i + 1], stage=int(stages[i]), sigma=sigma[i]) for i in range(3)]
    torch.testing.assert_close(told(Z, stage=stages, sigma=sigma), torch.cat(each))
    for one in (0.2, torch.tensor(0.2), torch.tensor([0.2])):
        assert torch.equal(told(Z, stage=stages, sigma=one), told(Z, stage=stages, sigma=torch.full((3,), 0.2)))
    assert untied.parameter_report().total == 3 * tied.parameter_report().total
    assert list(tied.adapter_parameters()) == []


def test_a_staged_denoiser_is_not_adapted_twice():
    with pytest.raises(TypeError, match="got one that is staged already"):
        lf.adapt(staged_foreign(stages=2))


def test_torchs_transformer_layers_keep_their_adapters_at_inference():
    """Their fast path reads the weights of the layers inside, past the adapters."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    tokens = torch.randn(2, 5, 8)
    for denoiser in (layer, encoder):
        staged = lf.adapt(denoiser, stages=2)
        with torch.no_grad():
            torch.testing.assert_close(staged.eval()(tokens, stage=1), denoiser.eval()(tokens))
            for p in staged.adapter_parameters():
                nn.init.normal_(p)
            expected = staged.train()(tokens, stage=1)
            assert (expected - denoiser(tokens)).abs().max() > 0.1
            torch.testing.assert_close(staged.eval()(tokens, stage=1), expected)
            staged.merge()
            torch.testing.assert_close(staged(tokens, stage=1), expected)


def test_padded_tokens_of_torchs_transformer():
    """The encoder packs such tokens into nested tensors for the fast path, which the layers inside do not take."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder, self.padding = (
                nn.TransformerEncoder(layer, 1),
                torch.tensor([[False] * 5, [False, True] + [True] * 3]),
            )

        def forward(self, z):
            return self.encoder(z, src_key_padding_mask=self.padding)

    staged, tokens = lf.adapt(Masked(), stages=2), torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(staged.eval()(tokens, stage=1), staged.train()(tokens, stage=1))


@pytest.mark.parametrize("positional", [False, True])
def test_output_sizes_of_transposed_convolutions(positional):
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(4, 1, 3, 2, 2, dilation=2)

        def forward(self, z):
            small = self.down(z)
            return self.up(small, z.size()) if positional else self.up(small, output_size=z.shape[2:])

    denoiser, z = UNet(), torch.rand(1, 1, 7, 8)
    staged = lf.adapt(denoiser, stages=2)
    for merged in (False, True):
        if merged:
            staged.merge()
        for stage in (1, torch.tensor([1])):
            torch.testing.assert_close(staged(z, stage=stage), denoiser(z))


def test_running_statistics_of_a_frozen_base_stand_still():
    denoiser = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3, padding=1)).eval()
    assert not lf.adapt(copy.deepcopy(denoiser).train(), stages=2).base[1].training
    staged, x = lf.adapt(denoiser, stages=2), torch.rand(2, 1, 6, 6)
    copies = [staged, copy.deepcopy(staged)]
    for one in copies:
        one.train()(5 + x, stage=0)
        assert one.base[0].training and not one.base[1].training
        assert torch.equal(one.eval()(x, stage=1), denoiser(x))
    staged.freeze_base(False)
    staged.train()(5 + x, stage=0)
    assert staged.base[1].training and not torch.equal(staged.eval()(x, stage=1), denoiser(x))


def test_hooks_move_to_the_adapted_layers():
    denoiser, x = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)), torch.rand(1, 1, 5, 5)
    denoiser[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    denoiser[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    staged = lf.adapt(denoiser, stages=2)
    assert torch.equal(staged(x, stage=0), denoiser(x))
    assert torch.equal(copy.deepcopy(staged)(x, stage=0), denoiser(x))
    plain = staged.adapted["0"].plain(denoiser[0].weight, denoiser[0].bias)
    assert torch.equal(plain(x), denoiser(x))


def test_hooks_of_every_kind_move():
    denoiser, seen = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)), []
    layer = denoiser[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, kwargs, output: seen.append("after"), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: seen.append("always"), always_call=True)
    layer.register_full_backward_pre_hook(lambda module, grad: seen.append("back"))
    layer.register_full_backward_hook(lambda module, grad, out: seen.append("done"))
    staged, x = lf.adapt(denoiser, stages=2), torch.rand(1, 1, 5, 5, requires_grad=True)
    for call in (denoiser, staged[1], staged.adapted["0"].plain(layer.weight, layer.bias)):
        call(x).sum().backward()
        assert seen == ["before", "after", "always", "back", "done"]
        seen.clear()
    with pytest.raises(ValueError, match="x: expected"):
        staged[1](torch.rand(1, 2, 5, 5))
    assert seen == ["before", "always"]


class Gained(nn.Module):
    """Reads what it has put on its layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.plain = layer, nn.Conv2d(1, 1, 1)

    def forward(self, z):
        return self.plain(self.layer(z) * self.layer.gain)


def test_attributes_of_a_layer_go_along():
    denoiser, x = Gained(nn.Conv2d(1, 1, 3, padding=1)), torch.rand(2, 1, 8, 8)
    denoiser.layer.gain = 0.5
    staged = lf.adapt(denoiser, stages=2)
    assert torch.equal(staged(x, stage=1), denoiser(x))
    assert torch.equal(copy.deepcopy(staged)(x, stage=1), denoiser(x))
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), staged).eval()
    fast = net.optimize(dtype=torch.float32)
    torch.testing.assert_close(fast(net.op(x)), net(net.op(x)))
    assert not hasattr(fast.denoiser.copies[0].layer, "rank")


def _own_forward(layer):
    call = layer.forward
    layer.forward = lambda z: 2 * call(z)
    layer.gain = 1.0


def _computed_bias(layer):
    layer.gain, layer.origin = 1.0, layer.bias
    del layer.bias
    layer.bias = 2 * layer.origin.detach()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_own_forward, "its forward is one of its own"),
        (_computed_bias, "its weight or bias is computed"),
        (lambda layer: layer.register_buffer("gain", torch.tensor(0.5)), "it holds gain beside its weight"),
        (lambda layer: layer.register_parameter("gain", nn.Parameter(torch.tensor(0.5))), "it holds gain beside"),
        (lambda layer: vars(layer).update(gain=0.5, scale=3), "its attribute scale has another meaning"),
    ],
)
def test_layers_that_are_more_than_a_plain_one_are_left_alone(change, reason):
    denoiser, x = Gained(nn.Conv2d(1, 1, 3, padding=1)), torch.rand(2, 1, 8, 8)
    change(denoiser.layer)
    staged = lf.adapt(denoiser, stages=2)
    assert reason in staged.skipped["layer"]
    assert set(staged.adapted) == {"plain"}
    assert torch.equal(staged(x, stage=1), denoiser(x))


def test_a_layer_without_a_weight_yet():
    denoiser, x = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.Conv2d(4, 1, 1)), torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"0\.weight: expected its values, got a lazy one: call the denoiser once"):
        lf.adapt(denoiser, stages=2)
    denoiser(x)
    assert torch.equal(lf.adapt(denoiser, stages=2)(x, stage=1), denoiser(x))


@dataclass
class Middle:
    call: Callable


class Ends(NamedTuple):
    middle: Middle
    last: nn.Module


class Kept(nn.Module):
    """Keeps its layers once more, outside its registered modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)
        pair = (self.second,)
        self.order, self._by_name = [self.first, pair], {"last": self.third, "pair": pair}
        self.order.append(self.order)
        self.more = Ends(Middle(functools.partial(self._fourth, self.first)), self.third)

    @staticmethod
    def _fourth(layer, z):
        return layer(z)

    def forward(self, z):
        z = self._by_name["last"](self.order[1][0](self.order[0](z)))
        return self.more.last(self.order[1][0](self.more.middle.call(z)))


def test_layers_kept_beside_the_registered_modules_are_the_adapted_ones():
    denoiser, z = Kept(), torch.rand(2, 1, 4, 4)
    staged = lf.adapt(denoiser, stages=2)
    assert type(denoiser.order[0]) is nn.Conv2d
    staged(z, stage=1).sum().backward()
    for name, layer in staged.adapted.items():
        assert layer.up.grad is not None, name
    assert staged.base.order[1] is staged.base._by_name["pair"]
    assert staged.base.more.middle.call.args == (staged.adapted["first"],)
    assert staged.base.more.last is staged.adapted["third"]
    with torch.no_grad():
        for p in staged.adapter_parameters():
            nn.init.normal_(p)
        expected = staged(z, stage=1)
        for other in (copy.deepcopy(staged), staged.with_stages([0, 1])):
            assert torch.equal(other(z, stage=1), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_holds_weights_and_has_no_adapters_is_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pairs = nn.Conv2d(1, 1, 3, padding=1), nn.Bilinear(2, 2, 2)
            self.memory, self.script = nn.LSTMCell(4, 1), torch.jit.script(nn.PReLU(1))
            self.kernel, self.more = nn.Parameter(torch.rand(2, 2, 3, 3)), nn.ParameterList([torch.rand(2, 2)])
            self.gain, self.norm = nn.Parameter(torch.rand(1, 4, 1, 1)), nn.LayerNorm(4)
            self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))

        def forward(self, z):
            return self.script(self.conv(z))

    denoiser, z = Mixed(), torch.rand(2, 1, 8, 8)
    staged = lf.adapt(denoiser, stages=2)
    assert torch.equal(staged(z, stage=1), denoiser(z))
    wanted = {
        "pairs": "there are no adapters for Bilinear",
        "memory": "there are no adapters for LSTMCell",
        "script": "scripted or traced",
        "kernel": "a parameter by itself",
        "more.0": "a parameter by itself",
        "spectral": "a subclass of its own",
    }
    assert staged.skipped.keys() == wanted.keys()
    for name, reason in wanted.items():
        assert reason in staged.skipped[name], name
    with pytest.raises(ValueError, match=r"got none .*weight: a parameter by itself"):
        lf.adapt(torch.export.export(nn.Conv2d(1, 1, 3), (z,)).module(), stages=2)
    with pytest.raises(ValueError, match=r"got none .denoiser: scripted or traced"):
        lf.adapt(torch.jit.script(nn.Conv2d(1, 1, 3)), stages=2)


class KeepsFeatures(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.second = norm(nn.Conv2d(1, 4, 3, padding=1)), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, z):
        self.last = {"features": [self.first(z)]}
        return self.second(self.last["features"][0])


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm")
@pytest.mark.parametrize("norm", [nn.Identity, nn.utils.weight_norm, nn.utils.spectral_norm, pruned])
def test_what_a_module_keeps_of_its_last_call_does_not_stop_a_copy(norm):
    denoiser, z = KeepsFeatures((lambda layer: layer) if norm is nn.Identity else norm), torch.rand(2, 1, 8, 8)
    denoiser.train()(z)
    expected = denoiser.eval()(z)
    staged = lf.adapt(denoiser, stages=2)
    assert torch.equal(staged(z, stage=1), expected)
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), staged)
    y = net.op(z)
    net(y)
    expected = net.eval()(y)
    torch.testing.assert_close(net.optimize(dtype=torch.float32)(y), expected)
    torch.testing.assert_close(net.with_stages([0, 1])(y), expected)
    for sharing in ("tied", "untied"):
        torch.testing.assert_close(lf.LoRun(net.op, denoiser, 2, sharing=sharing).eval()(y), expected)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norms_of_a_frozen_base_stand_still(norm):
    denoiser = nn.Sequential(norm(nn.Conv2d(1, 4, 3, padding=1)), nn.Conv2d(4, 1, 3, padding=1))
    staged, x = lf.adapt(denoiser, stages=2).train(), torch.rand(2, 1, 6, 6)
    first = staged(x, stage=0)
    assert torch.equal(staged(x, stage=0), first)
    staged.freeze_base(False)
    staged(x, stage=0)
    assert not torch.equal(staged(x, stage=0), first)


def test_a_network_whose_denoiser_starts_with_complex_weights():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.conv = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64)), nn.Conv2d(1, 1, 3, 1, 1)

        def forward(self, z):
            assert not z.is_complex()
            return self.conv(z) + torch.fft.irfft2(torch.fft.rfft2(z) * self.weight, s=z.shape[-2:])

    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), Spectrum(), 2).eval()
    images = torch.rand(1, 1, 8, 8)
    y = net.op(images)
    assert net(y).dtype == torch.float32
    for settings in ({}, {"images": images}):  # bf16 has no Fourier transform
        fast = net.optimize(**settings)
        assert fast.report["dtype"][0] == "float32"
        torch.testing.assert_close(fast(y), net(y))


def test_weights_of_other_kinds_are_left_alone():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.tail = nn.Conv2d(1, 2, 3, padding=1, dtype=torch.complex64), nn.Conv2d(2, 1, 1)

        def forward(self, z):
            return self.tail(self.mix(z.to(torch.complex64)).abs())

    denoiser, x = Complex(), torch.rand(1, 1, 8, 8)
    staged = lf.adapt(denoiser, stages=2)
    assert staged.skipped == {"mix": "its weight is complex64: adapters are for float32, float64, bfloat16 or float16"}
    assert torch.equal(staged(x, stage=1), denoiser(x))
    with pytest.raises(ValueError, match=r"got none .*its weight is complex64"):
        lf.adapt(denoiser.mix, stages=2)


@pytest.mark.parametrize("stage", ["1", 1.0, True, [0, 1], None])
def test_what_is_no_stage(stage):
    staged = lf.adapt(nn.Conv2d(1, 1, 3, padding=1), stages=2)
    error, message = (ValueError, "got none") if stage is None else (TypeError, "expected an int or an int64 tensor")
    with pytest.raises(error, match=f"stage: .*{message}"):
        staged(torch.rand(1, 1, 5, 5), stage=stage)
    assert staged(torch.rand(1, 1, 5, 5), stage=np.int64(1)).shape == (1, 1, 5, 5)


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
@pytest.mark.parametrize("merged", [False, True])
def test_stages_per_sample_out_of_range(sharing, merged):
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), nn.Conv2d(1, 1, 1), stages=3, sharing=sharing)
    staged, z = net.denoiser, torch.rand(2, 1, 4, 4)
    if merged:
        staged.merge()
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match=f"stage: expected 0 to 2, got {wrong}"):
            staged(z, stage=torch.tensor([0, wrong]))
    assert staged(z[:0], stage=torch.zeros(0, dtype=torch.long)).shape == (0, 1, 4, 4)


def test_a_denoiser_is_a_module():
    with pytest.raises(TypeError, match=r"denoiser: expected an nn.Module, got function"):
        lf.adapt(lambda z: z)


class PassesFeatures(nn.Module):
    """As in unfolding networks whose stages hand features on: several inputs, a dict among them, several results."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.inject = nn.Conv2d(4, 4, 1)

    def forward(self, z, features=None, sigma=0.0, *, context=None):
        x = torch.relu(self.head(z)) + sigma
        if features is not None:
            x = x + self.inject(features)
        if context is not None:
            x = x * context["gain"]
        return z + self.tail(x), {"features": x, "skip": None}


@pytest.mark.parametrize("kind", [lambda base, stages: lf.adapt(base, stages), TiedDenoiser, UntiedDenoiser])
def test_further_inputs_go_by_name_and_results_come_as_they_are(kind):
    denoiser = PassesFeatures()
    staged = kind(denoiser, 3)
    given = {"features": torch.rand(3, 4, 8, 8), "context": {"gain": 0.5}}
    for named in ({}, given, {"sigma": 0.3}, given | {"sigma": 0.3}, given | {"features": None}):
        for (got, rest), view in ((staged(Z, stage=1, **named), False), (staged[1](Z, **named), True)):
            expected, other = denoiser(Z, **named)
            assert torch.equal(got, expected), (named, view)
            assert torch.equal(rest["features"], other["features"]) and rest["skip"] is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'feature'"):
        staged(Z, stage=1, feature=given["features"])


def test_features_from_stage_to_stage_compile_into_few_graphs(graph_counter):
    staged = lf.adapt(PassesFeatures(), stages=9)
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.2)

    def restore(call):
        z, features = Z, None
        for k in range(9):
            z, rest = call(z, stage=k, features=features)
            features = rest["features"]
        return z

    torch.testing.assert_close(restore(torch.compile(staged, fullgraph=True, backend=graph_counter)), restore(staged))
    assert graph_counter.graphs == 2  # without features, and with them and the stage as a symbol
    mixed, rest = staged(Z, stage=torch.tensor([2, 0, 1]), features=torch.rand(3, 4, 8, 8))
    assert mixed.shape == Z.shape and rest["features"].shape == (3, 4, 8, 8)


def test_untied_copies_cannot_tell_whose_sample_an_input_is():
    untied = UntiedDenoiser(PassesFeatures(), 2)
    with pytest.raises(TypeError, match="features: expected none beside one stage per sample of untied copies"):
        untied(Z, stage=torch.tensor([0, 1, 1]), features=torch.rand(3, 4, 8, 8))


@pytest.mark.parametrize("form", adapters.FORMS)
def test_more_stages_than_were_trained(form):
    staged = drawn(form)
    staged.adapted["head"].register_forward_hook(lambda layer, args, y: y + 1)
    z, state = torch.randn(3, 1, 8, 8), copy.deepcopy(staged.state_dict())
    random = torch.get_rng_state()
    grown = staged.with_stages([0, 1, 1, np.int64(-1)])
    assert torch.equal(torch.get_rng_state(), random)  # nothing is drawn where nothing is fresh
    assert (len(grown), type(grown)) == (4, type(staged))
    for k, source in enumerate([0, 1, 1, 1]):
        assert torch.equal(grown(z, stage=k), staged(z, stage=source))
    grown(z, stage=2).sum().backward()
    assert all(p.requires_grad == (p in set(grown.adapter_parameters())) for p in grown.parameters())
    with torch.no_grad():
        for p in grown.adapter_parameters():
            p -= p.grad
    torch.testing.assert_close(grown(z, stage=1), staged(z, stage=1))
    assert not torch.allclose(grown(z, stage=2), staged(z, stage=1))
    assert all(torch.equal(t, state[name]) for name, t in staged.state_dict().items())
    fewer = grown.with_stages([2])
    torch.testing.assert_close(fewer(z), grown(z, stage=2))
    torch.testing.assert_close(grown(z, stage=torch.tensor([3, 2, 0]))[1:2], grown(z, stage=2)[1:2])


def test_fresh_stages_beside_trained_ones_equal_the_base():
    staged, z = drawn("loralib"), torch.randn(2, 1, 8, 8)
    base = copy.deepcopy(staged)
    for layer in base.adapted.values():
        layer.reset_adapter()
    for merged in (False, True):
        grown = staged.with_stages(k for k in (None, 1, None))
        assert grown.merged == merged
        torch.testing.assert_close(grown(z, stage=0), base(z, stage=0))
        torch.testing.assert_close(grown(z, stage=1), staged(z, stage=1))
        first, last = grown.base.head.down[0], grown.base.head.down[2]
        assert not torch.equal(first, last) and first.abs().max() > 0
        staged.merge()


def test_stages_of_tied_and_untied_denoisers():
    denoiser = nn.Conv2d(2, 2, 3, padding=1)
    tied, untied = TiedDenoiser(denoiser, 2).with_stages([0, None, 1]), UntiedDenoiser(denoiser, 2)
    assert len(tied) == 3 and torch.equal(tied(Z, stage=2), denoiser(Z))
    nn.init.normal_(untied.copies[1].weight)
    three = untied.with_stages([1, 0, 1])
    assert len({id(c.weight) for c in three.copies} | {id(c.weight) for c in untied.copies}) == 5
    for k, source in enumerate([1, 0, 1]):
        assert torch.equal(three(Z, stage=k), untied(Z, stage=source))
    with pytest.raises(ValueError, match="order: expected stages of untied copies, got None"):
        untied.with_stages([0, None])


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 2], IndexError, "order: expected stages 0 to 1, got 2"),
        ([-3], IndexError, "order: expected stages 0 to 1, got -3"),
        ([], ValueError, "order: expected one stage or more, got none"),
        (9, TypeError, "order: expected numbers of stages, got 9"),
        ("01", TypeError, "order: expected numbers of stages, got '01'"),
        ([0.0], TypeError, "order: expected numbers of stages, or None for a fresh one, got 0.0"),
    ],
)
def test_what_is_no_choice_of_stages(order, error, message):
    with pytest.raises(error, match=f"^{message}"):
        drawn("loralib").with_stages(order)


def test_adapters_go_to_another_base_by_their_names():
    """As docs/stages.md tells."""
    staged, other = drawn("loralib"), drawn("loralib")
    nn.init.normal_(other.base.head.weight)
    for p in other.adapter_parameters():
        nn.init.zeros_(p)
    adapters = {name: t for name, t in staged.state_dict().items() if name.endswith((".down", ".up"))}
    assert len(adapters) == len(list(staged.adapter_parameters()))
    weight = other.base.head.weight.clone()
    missing, unexpected = other.load_state_dict(adapters, strict=False)
    assert not unexpected and not any(name.endswith((".down", ".up")) for name in missing)
    assert torch.equal(other.base.head.weight, weight)
    assert torch.equal(other.base.head.up, staged.base.head.up)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_denoiser_that_recomputes_its_own_activations(reentrant):
    class Recomputing(nn.Sequential):
        def forward(self, z):
            return checkpoint(super().forward, z, use_reentrant=reentrant)

    staged = lf.adapt(Recomputing(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)), stages=2)
    z = Z.clone().requires_grad_()
    with pytest.raises(ValueError, match="outside its stage; checkpoint the call of the staged denoiser"):
        staged(z, stage=1).sum().backward()
    plain = lf.adapt(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)), stages=2)
    parameters = list(plain.adapter_parameters())
    expected = torch.autograd.grad(plain(z, stage=1).sum(), parameters)
    checkpoint(plain, z, 1, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, expected, strict=True))
