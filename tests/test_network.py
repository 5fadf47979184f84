"""The unfolded network: what it computes, what is shared, merging, compiling, exporting, recomputing."""

from __future__ import annotations

import copy
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import lorun_fast as lf


def tiny(sharing="lora", stages=3, learn=True, **kwargs) -> lf.LoRun:
    torch.manual_seed(0)
    op = lf.BlockCS.gaussian(0.25, 8, learn=learn)
    net = lf.LoRun(op, lf.ResUNet(channels=(4, 8), blocks=1), stages=stages, sharing=sharing, **kwargs)
    return net


def trained(**kwargs) -> lf.LoRun:
    """A LoRun whose stages differ, as after training."""
    net = tiny(**kwargs)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        net.step_size.copy_(torch.linspace(0.5, 1.5, net.stages))
    return net


@pytest.fixture
def x():
    return torch.rand(2, 1, 20, 13, generator=torch.Generator().manual_seed(1))


SIZE = (20, 13)


@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_fresh_lora_equals_tied_to_the_last_bit(x, form):
    lora, tied = tiny(form=form), tiny("tied")
    y = tied.op(x)
    assert torch.equal(lora(y, size=SIZE), tied(y, size=SIZE))
    assert torch.equal(lora.eval()(y, size=SIZE), tied.eval()(y, size=SIZE))


def test_the_iteration_is_the_formula(x):
    net = trained()
    y = net.op(x)
    expected = [net.op.adjoint(y, SIZE)]
    for k in range(3):
        previous = expected[-1]
        z = previous - net.step_size[k] * net.op.adjoint(net.op(previous) - y, SIZE)
        expected.append(net.denoiser(z, stage=k))
    got = net(y, size=SIZE, return_stages=True)
    assert len(got) == 4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(got[-1], net(y, size=SIZE))


def test_size_defaults_to_whole_blocks(x):
    net = tiny()
    assert net(net.op(x)).shape == (2, 1, 24, 16)


def test_what_trains_under_each_sharing():
    lora, tied, untied = tiny(), tiny("tied"), tiny("untied")
    names = {n for n, p in lora.named_parameters() if p.requires_grad}
    assert {"step_size", "op.phi"} <= names
    assert all(n.endswith((".down", ".up")) for n in names - {"step_size", "op.phi"})
    assert all(p.requires_grad for p in tied.parameters())
    base = tied.parameter_report().base
    assert untied.parameter_report().total == 3 * base + 3
    assert untied.parameter_report().untied == tied.parameter_report().untied == 3 * base + 3
    assert lora.parameter_report().base == base
    assert lora.parameter_report().operator == 16 * 64


def test_eval_merges_and_train_unmerges(x):
    net = trained()
    y = net.op(x)
    before = net(y, size=SIZE)
    net.eval()
    assert net.denoiser.merged
    torch.testing.assert_close(net(y, size=SIZE), before)
    net.train()
    assert not net.denoiser.merged
    assert torch.equal(net(y, size=SIZE), before)


def test_moving_or_loading_in_eval_mode_merges_anew(x):
    net, other = trained().eval(), trained(stages=3)
    for p in other.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    y = net.op(x)
    stale = net(y, size=SIZE)
    net.load_state_dict(other.state_dict())
    assert net.denoiser.merged
    fresh = net(y, size=SIZE)
    torch.testing.assert_close(fresh, other(y, size=SIZE))
    assert not torch.allclose(fresh, stale, atol=1e-3)
    net.double()
    assert net.denoiser.merged
    torch.testing.assert_close(net(y.double(), size=SIZE).float(), fresh, atol=1e-4, rtol=1e-4)


def test_merged_in_inference_mode_it_serves_calls_outside(x):
    net = trained()
    y = net.op(x).requires_grad_()
    expected = torch.autograd.grad(net(y, size=SIZE).sum(), y)
    with torch.inference_mode():
        net.eval()
    torch.testing.assert_close(torch.autograd.grad(net(y, size=SIZE).sum(), y), expected)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_weights_are_evaluated_between_updates(x, use_buffers):
    class Normed(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3, padding=1))

    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), Normed(), stages=3)
    averaged, y = AveragedModel(net, use_buffers=use_buffers), net.op(x)
    for std in (0.1, 0.2):
        for p in net.denoiser.adapter_parameters():
            nn.init.normal_(p, std=std)
        averaged.update_parameters(net)
        got = averaged.eval()(y, size=SIZE)
        assert averaged.module.denoiser.merged
        unmerged = copy.deepcopy(averaged)
        unmerged.module.denoiser.unmerge()
        torch.testing.assert_close(got, unmerged(y, size=SIZE))


def test_checkpointing_changes_no_gradient(x):
    plain, recomputed = trained(), trained(checkpoint=True)
    recomputed.load_state_dict(plain.state_dict())
    for net in (plain, recomputed):
        net(net.op(x), size=SIZE).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


class Mixed(nn.Module):
    """Layers of several kinds, one of which is not reached."""

    def __init__(self):
        super().__init__()
        self.conv, self.back = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
        self.mix, self.volume = nn.Linear(6, 6), nn.Conv3d(1, 1, 3, padding=1)
        self.idle = nn.Conv2d(1, 1, 3)

    def forward(self, z):
        y = self.mix(self.conv(z).movedim(1, -1)).movedim(-1, 1)
        return z + self.back(y + self.volume(y[:, None])[:, 0])


@pytest.mark.parametrize("form", ["loralib", "peft"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("frozen", [None, "down", "up", "both"])
def test_a_pass_has_the_gradients_of_its_stages_one_by_one(x, form, checkpoint, frozen):
    """A pass takes the factors apart once, so that no stage writes its gradient into zeros for all of them."""
    torch.manual_seed(0)
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), Mixed(), stages=3, form=form, checkpoint=checkpoint)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.1)
    if frozen is not None:
        for name in ("down", "up") if frozen == "both" else (frozen,):
            getattr(net.denoiser.adapted["conv"], name).requires_grad_(False)
    y = net.op(x)

    def by_stages():
        z = net.op.initial(y, SIZE)
        for k in range(3):
            z = net.stage_step(k, z, y, net.op)
        return z

    factors = [p for p in net.denoiser.adapter_parameters() if p.requires_grad]
    found, sizes = {}, []
    for name, call in (("pass", lambda: net(y, size=SIZE)), ("stages", by_stages)):
        out = call()
        with Zeros() as zeros:
            found[name] = [out, *torch.autograd.grad(out.square().sum(), factors, allow_unused=True)]
        sizes.append(sum(n for shape, n in zeros.found.items() if any(shape[-p.ndim :] == p.shape for p in factors)))
    for ours, expected in zip(*found.values(), strict=True):
        assert (ours is None) == (expected is None) or not (ours is None or ours.any())
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert sizes[0] == 0 < sizes[1]


class Zeros(TorchDispatchMode):
    """Counts the tensors of zeros that are made, by shape."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zeros" in str(func) or "select_backward" in str(func):
            self.found[out.shape] += 1
        return out


def test_recomputing_some_stages_keeps_less_and_changes_no_gradient(x):
    held, grads = {}, {}
    for recomputed in (0, 2, True):
        net, saved = trained(checkpoint=recomputed), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = net(net.op(x), size=SIZE).square().mean()
            held[recomputed] = sum(saved)
        loss.backward()
        grads[recomputed] = [p.grad for p in net.parameters() if p.requires_grad]
    assert held[True] < held[2] < held[0]
    for recomputed in (2, True):
        assert all(torch.equal(a, b) for a, b in zip(grads[recomputed], grads[0], strict=True))


def test_gradients_reach_every_stage_step_size_and_phi(x):
    net = trained()
    net(net.op(x), size=SIZE).square().mean().backward()
    assert (net.step_size.grad != 0).all()
    assert net.op.phi.grad.abs().max() > 0
    for name, layer in net.denoiser.adapted.items():
        assert (layer.up.grad.flatten(1).abs().amax(1) > 0).all(), name
        assert layer.weight.grad is None


def test_another_operator_for_one_call(x):
    net, other = trained().eval(), lf.BlockCS.gaussian(0.25, 8, seed=7)
    swapped = copy.deepcopy(net)
    swapped.op.phi.data.copy_(other.phi)
    y = other(x)
    torch.testing.assert_close(net(y, op=other, size=SIZE), swapped(y, size=SIZE))
    assert not torch.allclose(net(y, size=SIZE), swapped(y, size=SIZE), atol=1e-3)


def test_bfloat16_denoiser_keeps_the_operator_and_the_iterate_wide(x):
    net = trained().eval()
    y = net.op(x)
    expected = net(y, size=SIZE)
    net.bfloat16()
    assert net.op.phi.dtype == torch.float32
    got = net(y, size=SIZE)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


def test_autocast_leaves_the_operator_in_fp32(x):
    net = trained().eval()
    y = net.op(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.op(x), y)
        z = net.op.gradient_step(x, y, 0.5)
        assert torch.equal(net.op.adjoint(y, SIZE), net(y, size=SIZE, return_stages=True)[0])
        got = net(y, size=SIZE)
    assert torch.equal(z, net.op.gradient_step(x, y, 0.5))
    torch.testing.assert_close(got, net(y, size=SIZE), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("merged", [False, True])
def test_compiles_into_one_graph_for_any_image(graph_counter, x, merged):
    net = trained(stages=9).train(not merged)
    compiled = torch.compile(net, fullgraph=True, backend=graph_counter)

    def restore():
        for image in (x, torch.rand(2, 1, 20, 13), torch.rand(2, 1, 20, 13)):
            y = net.op(image)
            torch.testing.assert_close(compiled(y, size=SIZE), net(y, size=SIZE))

    # On a thread of its own, which has called no stage yet: what a first call leaves behind must not compile the next.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(restore).result()
    assert graph_counter.graphs == 1


def test_export_round_trip(x, tmp_path):
    net = trained(learn=False).eval()
    y = net.op(x)
    program = torch.export.export(net, (y,), {"size": SIZE})
    torch.export.save(program, tmp_path / "net.pt2")
    got = torch.export.load(tmp_path / "net.pt2").module()(y, size=SIZE)
    torch.testing.assert_close(got, net(y, size=SIZE))


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
def test_staged_denoisers_are_taken_as_they_are(sharing):
    source = tiny(sharing, stages=4)
    net = lf.LoRun(source.op, source.denoiser, stages=2, sharing="tied" if sharing == "lora" else "lora")
    assert (net.stages, net.sharing) == (4, sharing)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lf.LoRun("phi", lf.ResUNet()), TypeError, "op: expected a SensingOperator, got str"),
        (lambda: tiny("half"), ValueError, "sharing: expected one of lora, tied, untied"),
        (lambda: tiny(stages=0), ValueError, "stages: expected at least 1"),
        (lambda: tiny("tied", stages=3.0), TypeError, "stages: expected a whole number, got 3.0"),
        (lambda: tiny(step_size=[1, 1]), TypeError, r"step_size: expected a number, got \[1, 1\]"),
        (lambda: tiny(step_size=1e300), ValueError, r"step_size: expected a number that float32 holds, got 1e\+300"),
        (lambda: tiny(step_size=float("nan")), ValueError, "step_size: expected a finite number, got nan"),
        (lambda: tiny(["lora"]), ValueError, r"sharing: expected one of lora, tied, untied, got \['lora'\]"),
        (lambda: tiny()(None), TypeError, "y: expected a tensor, got NoneType"),
        (
            lambda: tiny(checkpoint=4),
            ValueError,
            "checkpoint: expected True, False or a number of stages up to 3, got 4",
        ),
        (lambda: tiny(checkpoint=-1), ValueError, "checkpoint: expected True, False or .* up to 3, got -1"),
        (lambda: tiny(checkpoint="all"), ValueError, "checkpoint: expected True, False or .* up to 3, got 'all'"),
        (lambda: tiny()(torch.rand(1, 16, 2, 2), sigma=-0.1), ValueError, "sigma: expected at least 0, got -0.1"),
        (lambda: tiny()(torch.rand(1, 16, 2, 2), sigma=math.nan), ValueError, "sigma: expected at least 0, got nan"),
        (
            lambda: tiny()(torch.rand(1, 16, 2, 2), sigma=torch.tensor([-0.5])),
            ValueError,
            "sigma: expected at least 0, got -0.5",
        ),
        (
            lambda: tiny()(torch.rand(1, 16, 2, 2), sigma="a"),
            TypeError,
            "sigma: expected a number or a tensor, got str",
        ),
        (lambda: tiny()(torch.rand(1, 16, 2, 2), sigma=[0.1]), TypeError, "sigma: expected .* a tensor, got list"),
        (lambda: tiny()(torch.rand(1, 15, 2, 2)), ValueError, r"y: expected \(N, 16, 2, 2\)"),
        (lambda: tiny()(torch.rand(1, 16, 2, 2), op=nn.Identity()), ValueError, "operator for task 'cs', got Identity"),
        (
            lambda: tiny()(torch.rand(1, 4, 8), op=lf.CASSI(torch.rand(4, 4), 3)),
            ValueError,
            r"operator for task 'cs', got CASSI \(cassi\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
def test_a_denoiser_that_returns_more_than_an_image(x, sharing):
    class WithFeatures(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, z):
            return self.conv(z), z

    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), WithFeatures(), stages=2, sharing=sharing)
    with pytest.raises(TypeError, match="denoiser: expected an image from WithFeatures, got tuple"):
        net(net.op(x))
    if sharing == "untied":
        with pytest.raises(TypeError, match="denoiser: expected an image from WithFeatures, got tuple"):
            net.denoiser(torch.zeros(2, 1, 4, 4), stage=torch.tensor([0, 1]))


def test_checkpoint_takes_numpys_whole_numbers():
    net = tiny(checkpoint=np.int64(2))
    assert type(net.checkpoint) is int and net.checkpoint == 2
    assert tiny(checkpoint=True).checkpoint is True


def test_a_sigma_that_the_denoiser_does_not_take(x):
    class KeywordOnly(nn.Conv2d):
        def forward(self, z, *, level=None):
            return super().forward(z)

    for denoiser in (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)), KeywordOnly(1, 1, 3, padding=1)):
        net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), denoiser, stages=2, sharing="tied")
        with pytest.raises(ValueError, match=f"sigma: expected None, for {type(denoiser).__name__} takes no sigma"):
            net(net.op(x), size=x.shape[-2:], sigma=0.1)


def test_the_denoiser_passed_in_stays_as_it_is():
    for sharing in ("lora", "tied", "untied"):
        denoiser = nn.Conv2d(1, 1, 3, padding=1)
        lf.LoRun(lf.BlockCS.gaussian(0.5, 4), denoiser, stages=2, sharing=sharing).double().eval()
        assert denoiser.weight.dtype == torch.float32 and denoiser.training


def test_a_denoiser_without_parameters():
    op = lf.BlockCS.gaussian(0.5, 4)
    y = op(torch.rand(1, 1, 8, 8))
    net = lf.LoRun(op, nn.Identity(), stages=2, sharing="tied")
    step = op.gradient_step(op.initial(y), y, 1.0)
    torch.testing.assert_close(net(y), op.gradient_step(step, y, 1.0))
    with pytest.raises(TypeError, match=r"denoiser: expected an nn.Module, got function"):
        lf.LoRun(op, lambda z: z)


def test_a_conversion_between_backward_pass_and_update(x):
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8, learn=True), nn.Conv2d(1, 1, 3, padding=1), stages=2)
    net(net.op(x)).sum().backward()
    expected = net.step_size.grad.clone()
    net.bfloat16()
    assert torch.equal(net.step_size.grad, expected)
    assert all(p.grad.dtype == p.dtype for p in net.parameters() if p.grad is not None)
    torch.optim.Adam(p for p in net.parameters() if p.requires_grad).step()


def test_step_sizes_keep_their_precision():
    op = lf.BlockCS.gaussian(0.5, 4)
    net = lf.LoRun(op, nn.Conv2d(1, 1, 1), stages=1).double()
    y = torch.rand(1, 8, 2, 2, dtype=torch.float64)
    step = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: torch.func.functional_call(net, {"step_size": s}, (y,)), (step,))
    net = lf.LoRun(op, nn.Conv2d(1, 1, 1), stages=1, step_size=1.001).bfloat16()
    assert net.step_size.dtype == torch.float32 and net.step_size.item() == pytest.approx(1.001, abs=1e-6)
    assert net.denoiser.base.weight.dtype == torch.bfloat16


def test_a_staged_denoiser_brings_its_own_stages_and_form(tmp_path):
    staged = lf.adapt(lf.ResCNN(channels=8, blocks=1), stages=12, gamma=50, form="peft")
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), staged, checkpoint=12)
    assert net.stages == 12 and net.form == "peft" and net.gamma is None
    lf.save(net, tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors")
    assert again.form == "peft" and again.gamma is None
    with pytest.raises(ValueError, match="a number of stages up to 12, got 13"):
        lf.LoRun(net.op, staged, checkpoint=13)


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
def test_more_stages_than_were_trained(x, sharing, tmp_path):
    net = trained(sharing=sharing, checkpoint=2, learn=False)
    y = net.op(x)
    expected = net(y, size=SIZE, return_stages=True)
    grown = net.with_stages([0, 1, 2, 2, 2])
    assert grown.stages == len(grown.step_size) == 5 and grown.step_size.requires_grad
    got = grown(y, size=SIZE, return_stages=True)
    assert all(torch.equal(a, b) for a, b in zip(got[:4], expected, strict=True))
    step = net.stage_step(2, expected[-1], y)
    assert torch.equal(got[4], step) and torch.equal(got[5], net.stage_step(2, step, y))
    first = grown.with_stages([0])
    assert torch.equal(first(y, size=SIZE), expected[1])
    assert (net.checkpoint, grown.checkpoint, first.checkpoint) == (2, 2, 1)
    lf.save(grown, tmp_path / "grown.safetensors")
    again = lf.load(tmp_path / "grown.safetensors")
    torch.testing.assert_close(again(y, size=SIZE), got[-1])
    with pytest.raises(RuntimeError, match="with_stages: expected the network that was optimized"):
        again.optimize(dtype=torch.float32).with_stages([0])


def test_fresh_stages_of_a_network(x):
    net = trained().eval()
    y = net.op(x)
    grown = net.with_stages([0, None], step_size=0.25)
    assert not grown.training and grown.denoiser.merged
    assert grown.step_size.tolist() == [0.5, 0.25]
    z = net.op.gradient_step(net(y, size=SIZE, return_stages=True)[1], y, 0.25)
    torch.testing.assert_close(grown(y, size=SIZE), tiny().eval().denoiser(z, stage=0))
    assert grown.op.phi is not net.op.phi
    with pytest.raises(IndexError, match="order: expected stages 0 to 2, got 3"):
        net.with_stages(range(4))
    with pytest.raises(ValueError, match="step_size: expected a finite number, got nan"):
        net.with_stages([None], step_size=math.nan)


def test_step_sizes_are_wide_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), nn.Conv2d(1, 1, 1), stages=1, step_size=1.001)
    finally:
        torch.set_default_dtype(torch.float32)
    assert net.step_size.dtype == torch.float32 and net.step_size.item() == pytest.approx(1.001, abs=1e-6)


def test_a_sharded_network_is_evaluated_unmerged(x):
    """FSDP2: between calls a process holds parts of the parameters, which no op of ours takes."""
    expected, net = trained(learn=False).eval(), trained(learn=False)
    y = net.op(x)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(net)
        net(y, size=SIZE).sum().backward()
        net.eval()
        assert not net.denoiser.merged
        with torch.no_grad():
            torch.testing.assert_close(net(y, size=SIZE), expected(y, size=SIZE))
    finally:
        torch.distributed.destroy_process_group()


def test_a_sigma_for_other_samples():
    net = lf.LoRun(lf.BlurDownsample(torch.rand(3, 3), 2), nn.Conv2d(1, 1, 1), stages=2, data_step="prox")
    y = torch.rand(2, 1, 4, 4)
    for fits in (torch.tensor(0.1), torch.rand(1), torch.rand(2), torch.rand(2, 1, 1, 1)):
        assert net(y, sigma=fits).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"sigma: expected a number, 0-d or \(2,\), got shape \(3,\)"):
        net(y, sigma=torch.rand(3))


def test_a_noise_map_beside_an_image_of_another_dtype():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, z, sigma):
            sigma = sigma if isinstance(sigma, torch.Tensor) else z.new_tensor(sigma)
            return self.conv(torch.cat([z, sigma.reshape(-1, 1, 1, 1).expand_as(z)], 1))

    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), Mapped(), stages=2)
    y = net.op(torch.rand(2, 1, 8, 8))
    fast = net.optimize(images=torch.rand(1, 1, 8, 8), sigma=0.1, dtype=torch.bfloat16, convolutions="direct")
    with torch.no_grad():
        for sigma in (torch.tensor([0.1, 0.2]), torch.tensor(0.1).double()):
            torch.testing.assert_close(fast(y, sigma=sigma), net(y, sigma=sigma), rtol=0, atol=0.05)
