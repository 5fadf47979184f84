"""What is kept between calls of the kernels: never the launches of another call, and no tensor."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from kernels_help import channels_last, needs_triton
from torch import Tensor

needs_triton()

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from lorun_fast.kernels import _geometry, _launch, configs, lora_conv2d, lora_conv2d_backward, lora_merge  # noqa: E402
from lorun_fast.kernels.configs import BackwardTile, FactorTile, Tile  # noqa: E402

KEPT = (lora_conv2d.plan, lora_conv2d_backward.plan, lora_merge._direct, lora_merge._numbers)
TILE = Tile(4, 8, 16, 16, 4, 2, True)
BACK = BackwardTile(TILE, TILE, FactorTile(4, 8, 16, 1, 16), 2)


@pytest.fixture
def launched(monkeypatch):
    """Launches that were asked for; none runs. Tensors on "meta" are taken for those of a newer GPU."""
    monkeypatch.setattr(configs, "architecture", lambda device: {"cpu": 80, "meta": 90}[device.type])
    found: list[_launch.Launch] = []
    monkeypatch.setattr(_launch.Launch, "run", lambda self: found.append(self))
    return found


def draw(*shape, dtype=torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def image(*shape, dtype=torch.float16) -> Tensor:
    return channels_last(draw(*shape, dtype=dtype))


def moved(t: Tensor) -> Tensor:
    """The same strides at an address that is no multiple of 16 bytes."""
    out = t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1)
    assert out.data_ptr() % 16
    return out


def padded(t: Tensor) -> Tensor:
    return _geometry.padded_like(t, (t.shape[0], t.shape[1] + 8, *t.shape[2:]))[:, : t.shape[1]]


def base() -> dict:
    """Arguments of lora_conv2d.forward, and those of the backward pass under "dy", "output" and "need"."""
    return {
        "x": image(2, 16, 6, 7), "weight": image(8, 16, 3, 3), "bias": None, "down": image(2, 16, 3, 3),
        "up": draw(8, 2), "scale": 1.0, "stage": None, "stride": 1, "padding": 1, "dilation": 1, "activation": "relu",
        "residual": None, "out": None, "tf32": False, "tile": TILE, "dy": image(2, 8, 6, 7), "output": None,
        "need": (True, True, False),
    }  # fmt: skip


def with_stages(call: dict, stage, count: int = 3) -> dict:
    stacked = {name: torch.stack([call[name]] * count) for name in ("down", "up")}
    return call | stacked | {"stage": stage}


# What tells two calls apart: (a change of the base call that both have, the change) or the latter alone.
BOTH = {
    "another size": lambda c: c | {"x": image(2, 16, 9, 7), "dy": image(2, 8, 9, 7)},
    "another batch": lambda c: c | {"x": image(1, 16, 6, 7), "dy": image(1, 8, 6, 7)},
    "x strides": lambda c: c | {"x": padded(c["x"])},
    "x alignment": lambda c: c | {"x": moved(c["x"])},
    "x dtype": lambda c: c | {"x": c["x"].bfloat16(), "dy": c["dy"].bfloat16()},
    "output channels": lambda c: c | {"weight": image(4, 16, 3, 3), "up": draw(4, 2), "dy": image(2, 4, 6, 7)},
    "kernel": lambda c: c | {"weight": image(8, 16, 1, 3), "down": image(2, 16, 1, 3), "padding": (0, 1)},
    "bias": lambda c: c | {"bias": draw(8)},
    "rank": lambda c: c | {"down": image(3, 16, 3, 3), "up": draw(8, 3)},
    "no adapter": lambda c: c | {"down": None, "up": None},
    "scale": lambda c: c | {"scale": 0.5},
    "a stage of three": lambda c: with_stages(c, 2),
    "a stage per sample": lambda c: with_stages(c, torch.tensor([0, 0]), 1),
    "stages": (
        lambda c: with_stages(c, torch.tensor([2, 0])),
        lambda c: c | {name: torch.cat([c[name]] * 2) for name in ("down", "up")},
    ),
    "stride": lambda c: c | {"stride": 2, "dy": image(2, 8, 3, 4)},
    "padding": lambda c: c | {"padding": 2, "dy": image(2, 8, 8, 9)},
    "dilation": lambda c: c | {"dilation": 2, "dy": image(2, 8, 4, 5)},
    "activation": lambda c: c | {"activation": "silu"},
    "device": (
        lambda c: c | {"tile": None},
        lambda c: {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in c.items()},
    ),
    "products in tf32": (
        lambda c: c | {"x": c["x"].float(), "dy": c["dy"].float()},
        lambda c: c | {"tf32": True},
    ),
}
FORWARD = BOTH | {
    "tile": lambda c: c | {"tile": Tile(8, 8, 16, 16, 4, 2, True)},
    "dtype of the factors": (
        lambda c: c | {"tile": Tile(1, 16, 16, 16, 4, 2, rows=4)},
        lambda c: c | {"down": c["down"].float(), "up": c["up"].float()},
    ),
    "residual": lambda c: c | {"residual": c["dy"]},
    "residual strides": (lambda c: c | {"residual": c["dy"]}, lambda c: c | {"residual": padded(c["dy"])}),
    "out": lambda c: c | {"out": c["dy"]},
    "out strides": (lambda c: c | {"out": c["dy"]}, lambda c: c | {"out": padded(c["dy"])}),
}
BACKWARD = BOTH | {
    "tile": lambda c: c | {"tile": BackwardTile(TILE, TILE, FactorTile(4, 8, 16, 2, 16), 2)},
    "dy strides": lambda c: c | {"dy": padded(c["dy"])},
    "dy alignment": (lambda c: c | {"activation": None}, lambda c: c | {"dy": moved(c["dy"])}),
    "a saved output": lambda c: c | {"output": c["dy"]},
    "output strides": (lambda c: c | {"output": c["dy"]}, lambda c: c | {"output": padded(c["dy"])}),
    "need": lambda c: c | {"need": (False, True, False)},
    "d bias": lambda c: c | {"need": (True, True, True)},
    "dtype of d bias": (
        lambda c: c | {"need": (True, True, True), "bias": draw(8)},
        lambda c: c | {"bias": c["bias"].float()},
    ),
    "dtype of d down": lambda c: c | {"down": c["down"].float()},
    "dtype of d up": lambda c: c | {"up": c["up"].float()},
}


def forward(call: dict):
    return lora_conv2d.forward(**{name: call[name] for name in call if name not in ("dy", "output", "need")})


def backward(call: dict):
    call = call | {"tile": BACK if isinstance(call["tile"], Tile) else call["tile"]}
    return lora_conv2d_backward.backward(**{name: call[name] for name in call if name not in ("residual", "out")})


def outline(launches, call: dict, results) -> list:
    """Everything about these launches but the addresses of new tensors; tensors of the call by their names."""
    names = {t.data_ptr(): name for name, t in call.items() if isinstance(t, Tensor)}

    def described(value):
        if isinstance(value, TensorDescriptor):
            return described(value.base), value.shape, value.strides, value.block_shape
        if isinstance(value, Tensor):
            return names.get(value.data_ptr(), tuple(value.shape)), value.dtype
        return value

    found = [
        (one.kernel, one.programs, one.constants, one.warps, one.stages, one.options)
        + tuple((name, described(value)) for name, value in one.args.items())
        for one in launches
    ]
    return found + [None if t is None else (t.shape, t.stride(), described(t)) for t in results]


def forget() -> None:
    for kept in KEPT:
        kept.cache_clear()


def assert_served_as_if_alone(serve, first: dict, second: dict, launched: list) -> None:
    """The second call after the first one launches what it launches by itself."""

    def served(call: dict) -> list:
        launched.clear()
        results = serve(call)
        return outline(launched, call, results if isinstance(results, tuple) else (results,))

    forget()
    alone = served(second)
    forget()
    before, after = served(first), served(second)
    assert after == alone
    assert before != after, "the change changes nothing: a wrong plan would not show"


def _calls(change) -> tuple[dict, dict]:
    *before, change = change if isinstance(change, tuple) else (change,)
    first = base()
    for one in before:
        first = one(first)
    return first, change(first)


@pytest.mark.parametrize("change", FORWARD)
def test_a_forward_pass_is_not_served_by_the_plan_of_another(change, launched):
    assert_served_as_if_alone(forward, *_calls(FORWARD[change]), launched)


@pytest.mark.parametrize("change", BACKWARD)
def test_a_backward_pass_is_not_served_by_the_plan_of_another(change, launched):
    assert_served_as_if_alone(backward, *_calls(BACKWARD[change]), launched)


MERGES = {
    "shapes": lambda c: c | {"weight": draw(8, 4, 3, 3), "down": draw(2, 2, 36), "out": draw(2, 8, 4, 3, 3)},
    "rank": lambda c: c | {"down": draw(2, 3, 45), "up": draw(2, 8, 3)},
    "stages": lambda c: c | {"down": draw(1, 2, 45), "up": draw(1, 8, 2), "out": draw(1, 8, 5, 3, 3)},
    "weight strides": lambda c: c | {"weight": channels_last(c["weight"])},
    "out strides": lambda c: c | {"out": c["out"].movedim(2, -1).contiguous().movedim(-1, 2)},
    "scale": lambda c: c | {"scale": 0.5},
}


def merge(call: dict, count: int = 1):
    outs = [call["out"]] * count
    names = ("weight", "down", "up", "scale")
    lora_merge.forward(*([call[name]] * count for name in names), outs)
    return tuple(outs)


@pytest.mark.parametrize("change", MERGES)
@pytest.mark.parametrize("count", [1, 2], ids=["one layer", "a table"])
def test_a_merge_is_not_served_by_the_plan_of_another(change, count, launched, monkeypatch):
    monkeypatch.setattr(lora_merge, "_table", lambda rows, programs, device: (rows, programs))
    first = {"weight": draw(8, 5, 3, 3), "down": draw(2, 2, 45), "up": draw(2, 8, 2), "scale": 1.0}
    first["out"] = draw(2, 8, 5, 3, 3)
    assert_served_as_if_alone(lambda call: merge(call, count), first, MERGES[change](first), launched)


def test_a_launch_may_be_changed_without_the_next_call_noticing(launched):
    call = base()
    for serve in (forward, backward):
        serve(call)
        for one in launched:
            one.programs = 0
            one.args.clear()
        launched.clear()
        serve(call)
        assert launched and all(one.programs and one.args for one in launched)


def test_what_is_kept_keeps_no_tensor_alive_and_is_bounded(launched):
    call = with_stages(base(), torch.tensor([2, 0])) | {"bias": draw(8), "output": image(2, 8, 6, 7)}
    call |= {"residual": call["output"], "out": image(2, 8, 6, 7), "need": (True, True, True)}
    layer = {"weight": draw(8, 5), "down": draw(2, 2, 5), "up": draw(2, 8, 2), "scale": 1.0, "out": draw(2, 8, 5)}
    results = [forward(call), *backward(call), *merge(layer)]
    given = [t for t in (*call.values(), *layer.values(), *results) if isinstance(t, Tensor)]
    given += [v for one in launched for v in one.args.values() if isinstance(v, Tensor)]
    seen = [weakref.ref(t) for t in given]
    assert all(kept.cache_info().currsize and kept.cache_info().maxsize for kept in KEPT)
    launched.clear()
    del call, layer, results, given
    gc.collect()
    assert not any(ref() is not None for ref in seen)


class Compiled:
    """Stands for what Triton returns from a launch on a GPU; what it is run with is kept."""

    function, packed_metadata = 17, (4, 0)

    def __init__(self):
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


@pytest.fixture
def compiled(monkeypatch):
    """What Triton's own launcher was given and gave, in order: (launch, Compiled)."""
    found: list[tuple[_launch.Launch, Compiled]] = []

    def run(self):
        found.append((self, Compiled()))
        return found[-1][1]

    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    monkeypatch.setattr(_launch.Launch, "run", run)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    forget()
    yield found
    forget()


def _signature(launch: _launch.Launch) -> list:
    """The kernel's arguments in order; descriptors as what they are made of."""
    known = launch.args | launch.constants
    return [_parts(known[name]) for name in launch.kernel.arg_names]


def _parts(value):
    if isinstance(value, TensorDescriptor):
        return value.base.data_ptr(), value.shape, value.strides, value.block_shape, value.padding
    return (value.data_ptr(), value.dtype) if isinstance(value, Tensor) else value


def test_later_calls_run_the_compiled_kernels_over_their_own_tensors(compiled):
    first = with_stages(base(), torch.tensor([2, 0])) | {"bias": draw(8), "tile": None}
    results = forward(first), *backward(first)
    # One forward launch, three backward ones; each later call asks Triton for none.
    assert len(compiled) == 4
    second = {name: t.clone() if isinstance(t, Tensor) else t for name, t in first.items()}
    again = forward(second), *backward(second)
    assert len(compiled) == 4
    fresh = {t.data_ptr() for t in results if t is not None}
    assert not fresh & {t.data_ptr() for t in again if t is not None}
    given = {first[name].data_ptr(): second[name].data_ptr() for name in first if isinstance(first[name], Tensor)}
    for launch, kernel in compiled:
        (run,) = kernel.runs
        assert run[:9] == (launch.programs, 1, 1, 5, 17, (4, 0), None, None, None)
        then, now = _signature(launch), [_parts(value) for value in run[9:]]
        assert len(then) == len(now)
        for before, after in zip(then, now, strict=True):
            pointer = isinstance(before, tuple) and isinstance(before[0], int) and len(before) in (2, 5)
            if pointer:
                # The call's own tensor, else one that the launcher made, of the same dtype and box.
                assert given.get(before[0], after[0]) == after[0] and before[1:] == after[1:]
            else:
                assert before == after


OTHERWISE = {
    "weight dtype": lambda c: c | {"weight": c["weight"].float()},
    "weight alignment": lambda c: c | {"weight": moved(c["weight"])},
    "stage dtype": lambda c: c | {"stage": c["stage"].int()},
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_what_is_compiled_anew_is_launched_by_triton(change, compiled):
    """A plan does not tell these calls apart, but Triton compiles them differently."""
    first = with_stages(base(), torch.tensor([2, 0])) | {"tile": None}
    forward(first)
    forward(OTHERWISE[change](first))
    assert len(compiled) == 2 and not compiled[0][1].runs
    forward(first)
    assert len(compiled) == 2 and len(compiled[0][1].runs) == 1 and not compiled[1][1].runs


def test_a_profiler_hears_of_every_launch(compiled, monkeypatch):
    import triton

    forward(base())
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    forward(base())
    assert len(compiled) == 2 and not compiled[0][1].runs
