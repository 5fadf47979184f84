"""The merge kernel: every layer and stage in one launch, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from kernels_help import DEVICE, assert_as_good_as_torch, channels_last, needs_triton

from lorun_fast import adapters
from lorun_fast.reference import lora as reference

needs_triton()

from lorun_fast.kernels import lora_merge  # noqa: E402


def _layers(dtype):
    shapes = [
        ((7, 5, 3, 3), "peft", False),
        ((6, 4, 3, 3), "loralib", True),
        ((40, 33), "peft", False),
        ((5, 6, 1, 2), "peft", True),
    ]
    weights, downs, ups = [], [], []
    for shape, form, last in shapes:
        weight = torch.randn(shape).to(DEVICE, dtype)
        weights.append(channels_last(weight) if last else weight)
        for factors, s in zip((downs, ups), adapters.factor_shapes(shape, 3, form), strict=True):
            factors.append(torch.randn(2, *s, device=DEVICE))
    return weights, downs, ups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_layers_and_stages_in_one_launch(dtype, monkeypatch):
    scales, flat = [0.5, 1.0, 2.0, 0.3], [False] * 4
    launched = []
    run = lora_merge.Launch.run
    monkeypatch.setattr(lora_merge.Launch, "run", lambda self: (launched.append(self), run(self)))
    weights, downs, ups = _layers(dtype)
    outs = [reference.empty_merged(w, 2, dtype, None).fill_(torch.nan) for w in weights]
    lora_merge.forward(weights, downs, ups, scales, outs)
    assert len(launched) == 1
    wide = [[t.double() for t in ts] for ts in (weights, downs, ups)]
    truth = reference.lora_merge(*wide, scales, flat)
    own = reference.lora_merge(weights, downs, ups, scales, flat)
    assert_as_good_as_torch(outs, own, truth)


def test_new_values_at_the_same_addresses_are_seen():
    """The table of addresses is kept; the values behind it are read every time."""
    weights, downs, ups = _layers(torch.float32)
    outs = [reference.empty_merged(w, 2, torch.float32, None) for w in weights[2:]]
    layers = (weights[2:], downs[2:], ups[2:], [1.0, 1.0], outs)
    lora_merge.forward(*layers)
    for t in (*weights[2:], *ups[2:]):
        t.zero_()
    lora_merge.forward(*layers)
    assert all((out == 0).all() for out in outs)


def _no_table(*_):
    raise AssertionError("a table was copied to the device")


@pytest.mark.parametrize("index", range(4))
def test_a_layer_alone_needs_no_table(index, monkeypatch):
    """A copy from the host waits for the device, and cannot be recorded in a CUDA graph."""
    monkeypatch.setattr(lora_merge, "_table", _no_table)
    one = slice(index, index + 1)
    weights, downs, ups = (ts[one] for ts in _layers(torch.float32))
    outs = [reference.empty_merged(weights[0], 2, torch.float32, None).fill_(torch.nan)]
    lora_merge.forward(weights, downs, ups, [0.7], outs)
    truth = reference.lora_merge(*([t.double() for t in ts] for ts in (weights, downs, ups)), [0.7], [False])
    assert_as_good_as_torch(outs, reference.lora_merge(weights, downs, ups, [0.7], [False]), truth)


def test_no_table_while_a_graph_is_recorded(monkeypatch):
    monkeypatch.setattr(lora_merge, "_table", _no_table)
    weights, downs, ups = _layers(torch.float32)
    layers = [
        lora_merge.Layer(w, d, u, reference.empty_merged(w, 2, w.dtype, None), 1.0)
        for w, d, u in zip(weights, downs, ups, strict=True)
    ]
    assert len(lora_merge.launches(layers, recording=True)) == len(layers)


def test_layers_of_other_dtypes_and_layouts():
    """Each combination of dtypes is a launch of its own; strided factors and weights are read all the same."""
    weights, downs, ups = _layers(torch.float32)
    weights[0] = torch.randn(7, 5, 3, 6, device=DEVICE)[..., ::2].mT  # taps at unequal distances
    downs[2], ups[2] = (torch.stack([t, t], -1)[..., 0] for t in (downs[2], ups[2]))
    ups[0] = ups[0].half()
    outs = [
        reference.empty_merged(w, 2, dtype, None).fill_(torch.nan)
        for w, dtype in zip(weights, (torch.float32, torch.float16, torch.float32, torch.float16), strict=True)
    ]
    scales, flat = [0.5, 1.0, 2.0, 0.3], [False] * 4
    lora_merge.forward(weights, downs, ups, scales, outs)
    for out, truth in zip(outs, reference.lora_merge(weights, downs, ups, scales, flat), strict=True):
        torch.testing.assert_close(out, truth.to(out.dtype), rtol=2e-3, atol=2e-3)
    irregular = torch.empty(2, 7, 5, 3, 6, device=DEVICE)[..., ::2].mT
    with pytest.raises(ValueError, match="out: expected equally spaced taps, got strides"):
        lora_merge.forward(weights[:1], downs[:1], ups[:1], scales[:1], [irregular])
