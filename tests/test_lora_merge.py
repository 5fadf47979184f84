"""lora_merge: all layers and stages in one op, against dense weights in float64."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from variants_help import check_under, lesser_variants

import lorun_fast as lf
from lorun_fast import _native, adapters
from lorun_fast.ops.lora_merge import lora_merge_stage

op = torch.ops.lorun_fast.lora_merge.default
K = 3
# weight shape, form, rank, transposed, groups
LAYERS = [
    ((6, 4, 3, 3), "loralib", 2, False, 1),
    ((6, 4, 3, 3), "peft", 2, False, 1),
    ((4, 6, 2, 2), "loralib", 1, True, 1),
    ((4, 6, 3, 2), "peft", 3, True, 1),
    ((6, 2, 3, 3), "loralib", 1, False, 2),
    ((6, 3, 2, 2), "loralib", 2, True, 2),
    ((7, 5), "peft", 2, False, 1),
    ((37, 70, 1, 1), "peft", 7, False, 1),
    ((1, 1, 3, 3), "peft", 1, False, 1),
]


def problem(dtype=torch.float64, layers=LAYERS):
    weights, downs, ups, flipped = [], [], [], []
    for shape, form, rank, transposed, groups in layers:
        down, up = adapters.factor_shapes(shape, rank, form, groups=groups, transposed=transposed)
        weights.append(torch.randn(shape, dtype=dtype))
        downs.append(torch.randn(K, *down, dtype=dtype))
        ups.append(torch.randn(K, *up, dtype=dtype))
        flipped.append(transposed)
    return weights, downs, ups, [0.5 + 0.25 * i for i in range(len(layers))], flipped


def dense(weights, downs, ups, scales, flipped) -> list[torch.Tensor]:
    """Entry by entry of the factors."""
    out = []
    for weight, down, up, scale, transposed in zip(weights, downs, ups, scales, flipped, strict=True):
        stages = []
        for d, u in zip(down, up, strict=True):
            if d.ndim == 4 and transposed:
                update = sum(d[:, r, None] * u[None, :, r, None, None] for r in range(u.shape[1]))
            elif d.ndim == 4:
                update = sum(u[:, r, None, None, None] * d[r][None] for r in range(u.shape[1]))
            else:
                update = sum(torch.outer(u[:, r], d[r]) for r in range(u.shape[1])).reshape(weight.shape)
            stages.append(weight + scale * update)
        out.append(torch.stack(stages))
    return out


def merge(weights, downs, ups, scales, flipped, **settings):
    return lf.functional.lora_merge(weights, downs, ups, scales=scales, transposed=flipped, **settings)


def test_equals_dense_weights_built_by_hand():
    p = problem()
    for got, expected in zip(merge(*p), dense(*p), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [None, True, False])
def test_rounded_once_in_the_wanted_dtype_and_layout(dtype, target, channels_last):
    weights, downs, ups, scales, flipped = problem(dtype)
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    got = merge(weights, downs, ups, scales, flipped, dtype=target, channels_last=channels_last)
    truth = dense(
        [w.double() for w in weights], [d.double() for d in downs], [u.double() for u in ups], scales, flipped
    )
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        assert a.dtype == (target or dtype)
        unit = torch.finfo(a.dtype).eps / 2
        # Half a unit of the storage type, and fp32 rounding of a sum of a few products.
        assert ((a.double() - b).abs() <= unit * b.abs() + 2e-6 * (1 + b.abs())).all()
        last = channels_last if channels_last is not None else i == 0
        if a.ndim == 5 and a.shape[2] > 1 and a.shape[3] > 1:
            assert (a[1].stride(1) == 1) == bool(last)
            assert a[1].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_zero_factors_leave_the_weight_to_the_last_bit():
    weights, downs, ups, scales, flipped = problem(torch.float32)
    for weight, merged in zip(
        weights, merge(weights, downs, [torch.zeros_like(u) for u in ups], scales, flipped), strict=True
    ):
        assert all(torch.equal(weight, stage) for stage in merged)


def test_strided_factors_and_one_setting_for_all_layers():
    weights, downs, ups, _, _ = problem(layers=LAYERS[:2])
    strided = ([torch.stack([t, t], -1)[..., 0] for t in ts] for ts in (weights, downs, ups))
    got = lf.functional.lora_merge(*strided, scales=0.5)
    for a, b in zip(got, dense(weights, downs, ups, [0.5, 0.5], [False, False]), strict=True):
        torch.testing.assert_close(a, b)
    assert lf.functional.lora_merge([], [], []) == []


def test_gradients_are_those_of_the_dense_form():
    weights, downs, ups, scales, flipped = problem()
    leaves = [[t.requires_grad_() for t in ts] for ts in (weights, downs, ups)]
    got, expected = merge(*leaves, scales, flipped), dense(*leaves, scales, flipped)
    wanted = [t for ts in leaves for t in ts]
    noise = [torch.randn_like(t) for t in expected]
    grads = [
        torch.autograd.grad([(a * n).sum() for a, n in zip(ts, noise, strict=True)], wanted) for ts in (got, expected)
    ]
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, i=i: f"{i}: {text}")


def test_gradcheck_and_opcheck():
    weights, downs, ups, scales, flipped = problem(layers=LAYERS[:3])
    n = len(weights)
    leaves = [t.requires_grad_() for t in (*weights, *downs, *ups)]

    def call(*leaves):
        return tuple(merge(leaves[:n], leaves[n : 2 * n], leaves[2 * n :], scales, flipped))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    weights, downs, ups, scales, flipped = problem(torch.float32, layers=LAYERS[:3])
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    ups[0].requires_grad_()
    opcheck(op, (weights, downs, ups, scales, flipped, None, None))
    opcheck(op, (weights, downs, ups, scales, flipped, torch.bfloat16, True), test_utils="test_faketensor")


def leaves(problem) -> list[torch.Tensor]:
    return [t.requires_grad_() for tensors in problem[:3] for t in tensors]


@pytest.mark.parametrize("stage", range(K))
def test_one_stage_alone(stage):
    ours, theirs = problem(), None
    theirs = [[t.clone() for t in tensors] for tensors in ours[:3]] + list(ours[3:])
    own, other = leaves(ours), leaves(theirs)
    got = lora_merge_stage(*ours, stage)
    want = [t[stage] for t in dense(*theirs)]
    torch.testing.assert_close(got, want)
    weights = [torch.randn_like(t) for t in want]
    found, expected = (
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(merged, weights, strict=True)), inputs)
        for merged, inputs in ((got, own), (want, other))
    )
    torch.testing.assert_close(found, expected)


def test_layers_of_a_stage_that_nothing_came_of():
    args = problem()
    weights, downs, ups = args[:3]
    for t in downs:
        t.requires_grad_()
    merged = lora_merge_stage(*args, 1)
    assert not any(t.requires_grad for t in weights + ups)
    merged[2].sum().backward()
    assert downs[2].grad[1].any() and not downs[2].grad[[0, 2]].any()
    assert all(t.grad is None for index, t in enumerate(downs) if index != 2)


def test_opcheck_of_one_stage():
    args = problem(torch.float32, [*LAYERS[:3], LAYERS[1]])
    leaves(args)
    opcheck(torch.ops.lorun_fast.lora_merge_stage.default, (*args, 2))
    weights, *factors = problem(torch.float32, LAYERS[:3])
    opcheck(torch.ops.lorun_fast.lora_merge_stage_backward.default, (weights, *factors, 2))


def test_a_stage_is_differentiable_twice():
    weights, *factors, scales, flipped = problem(layers=LAYERS[:3])
    flat = [t.requires_grad_() for ts in factors for t in ts]

    def call(*flat):
        return tuple(lora_merge_stage(weights, flat[:3], flat[3:], scales, flipped, 1))

    assert torch.autograd.gradgradcheck(call, flat, fast_mode=True)


def test_stages_compile_into_two_graphs(graph_counter):
    args = problem(torch.float32)
    leaves(args)
    compiled = torch.compile(lambda stage: lora_merge_stage(*args, stage), fullgraph=True, backend=graph_counter)
    for stage in range(K):
        torch.testing.assert_close(compiled(stage), [t[stage] for t in dense(*args)], rtol=1e-5, atol=1e-5)
    assert graph_counter.graphs <= 2


def test_compiles_into_one_graph(graph_counter):
    p = problem(torch.float32)
    compiled = torch.compile(lambda *p: merge(*p), fullgraph=True, backend=graph_counter)
    for a, b in zip(compiled(*p), merge(*p), strict=True):
        assert torch.equal(a, b)
    assert graph_counter.graphs == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ups": []}, ValueError, r"expected lists of one length, got \[1, 1, 0, 1, 1\]"),
        (
            {"downs": [torch.randn(K, 2, 4, 3, 2)]},
            ValueError,
            r"layer 0: down, up: expected \(2, 4, 3, 3\)",
        ),
        ({"ups": [torch.randn(2, 6, 2)]}, ValueError, "layer 0: down, up: expected one number of stages, got 3 and 2"),
        ({"ups": [torch.randn(6, 2)]}, ValueError, "layer 0: down, up: expected a leading stage axis"),
        (
            {"weights": [torch.randn(6, 4, 3, 3).long()]},
            TypeError,
            "layer 0: weight: expected .* got torch.int64",
        ),
        ({"ups": [torch.randn(K, 6, 2, device="meta")]}, ValueError, "layer 0: up is on meta"),
        ({"scales": [float("nan")]}, ValueError, "scales: expected a finite number, got nan"),
        ({"transposed": None}, TypeError, "transposed: expected True or False, or one of them per layer, got"),
        ({"transposed": ["a", "b"]}, TypeError, "transposed: expected True or False, or one of them per layer, got"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected float32, float64, bfloat16 or float16, got torch.int8"),
    ],
)
def test_errors_name_the_layer_and_the_argument(change, error, message):
    names = ("weights", "downs", "ups", "scales", "transposed")
    arguments = dict(zip(names, problem(torch.float32, LAYERS[1:2]), strict=True)) | change
    with pytest.raises(error, match=message):
        lf.functional.lora_merge(**arguments)


def test_a_gradient_of_one_layer_alone():
    weights, downs, ups, scales, flipped = problem(layers=LAYERS[:2])
    ups[1].requires_grad_()
    grads = [torch.autograd.grad(f(weights, downs, ups, scales, flipped)[1].sum(), ups[1])[0] for f in (merge, dense)]
    torch.testing.assert_close(*grads)


# Beyond the blocks in which the gradients are summed: ranks, rows, columns, and all of them in a batch of products.
LARGE = [
    ((70, 300), "peft", 67, False, 1),
    ((300, 70), "peft", 33, False, 1),
    ((5, 40, 10, 10), "peft", 17, True, 1),
    ((70, 64, 3, 3), "loralib", 7, False, 1),
]


compiled = pytest.mark.skipif(not _native.available(), reason="lorun_fast._C is not built")


@compiled
def test_a_stage_is_one_of_those_that_are_there():
    weights, *rest = problem(torch.float32, LAYERS[:2])
    for op in (torch.ops.lorun_fast.lora_merge_stage, torch.ops.lorun_fast.lora_merge_stage_backward):
        for stage in (-1, K):
            with pytest.raises(RuntimeError, match=f"stage: expected 0 to {K - 1}, got {stage}"):
                op(weights, *rest, stage)


VARIANT_SCRIPT = """
from lorun_fast import adapters
from lorun_fast.reference import lora as reference
for shape, form, rank, transposed, groups in layers:
    factors = adapters.factor_shapes(shape, rank, form, groups=groups, transposed=transposed)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight, down, up = (torch.randn(s, dtype=dtype) for s in (shape, *((3, *f) for f in factors)))
        for target in (None, torch.bfloat16):
            args = ([weight], [down], [up], [0.7], [transposed], target, None)
            got, want = torch.ops.lorun_fast.lora_merge(*args)[0], reference.lora_merge(*args)[0]
            close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[got.dtype]
            torch.testing.assert_close(got, want, rtol=close, atol=close)
        args = ([weight], [down], [up], [0.7], [transposed], 1)
        wide = [[t.double() for t in ts] for ts in args[:3]]
        for name in ("lora_merge_stage", "lora_merge_stage_backward"):
            got = getattr(torch.ops.lorun_fast, name)(*args)
            for t, truth in zip(got, getattr(reference, name)(*wide, *args[3:]), strict=True):
                assert t.dtype == dtype
                rounding = torch.finfo(dtype).eps + 40 * torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps
                assert (t - truth).abs().max() <= rounding * (1 + truth.abs().max())
"""


@compiled
def test_this_processor_s_variant():
    check_under(_native.build_info()["cpu_active"], VARIANT_SCRIPT, layers=LAYERS + LARGE)


@lesser_variants
def test_lesser_cpu_variants(variant):
    check_under(variant, VARIANT_SCRIPT, layers=LAYERS + LARGE)
