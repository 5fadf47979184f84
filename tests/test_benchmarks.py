"""The benchmark harness: it refuses to time what is wrong, and its arithmetic is right."""

from __future__ import annotations

import contextlib
import csv
import gc
import math
import os
import re
import subprocess
import sys
import tarfile
import types
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import cases  # noqa: F401 registers every case
from benchmarks.harness import allocator, backend, memory, plot, registry, report, timing, variants
from benchmarks.harness.ceilings import Ceilings, measure
from benchmarks.harness.check import Verdict, error, output_gradient
from benchmarks.harness.registry import (
    CASES,
    COLD,
    FORWARD,
    LIMIT,
    OURS,
    OVERHEAD,
    RIVAL,
    TRAIN,
    WARM,
    Case,
    Problem,
    Run,
    Unavailable,
    Work,
    select,
    size,
)
from benchmarks.harness.report import COLUMNS, CsvFile, Row
from benchmarks.harness.runner import Entry, Options, admit, run_size
from benchmarks.harness.timing import Budget, Stats, interleave

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class FakeTimer:
    """Runs what it is given once and reports the seconds that the contender announced. Counts flushes."""

    def __init__(self):
        self.seconds = 0.0
        self.flushes = 0
        self.order: list[float] = []

    def flush(self) -> None:
        self.flushes += 1

    def once(self, fn, calls, *, warm, host):
        self.seconds = 1.0
        fn()
        self.order.append(self.seconds)
        return self.seconds


def toy(timer: FakeTimer, mode=FORWARD, regimes=(WARM,), **seconds: float) -> tuple[Case, Options]:
    """A case y = 3x with correct contenders of the given announced times; "ours" is ours, "bound" a limit."""

    def make(dtype, device) -> Problem:
        x = torch.rand(4, 5, device=device).to(dtype)
        return Problem({"x": x}, lambda x: 3 * x, Work(1e6, 2e6), Work(2e6, 4e6), wrt=("x",), items=4)

    one = Case("toy", "ops", (size("4x5", modes=(mode,), regimes=regimes, compiled=True),), make)
    kinds = {"ours": OURS, "bound": LIMIT}
    for name, value in seconds.items():
        one.contender(name, kind=kinds.get(name, RIVAL))(announced(timer, value, lambda p: 3 * p.x))
    return one, Options(CPU, timer, Budget(seconds=1.0, fewest=4, most=6), measure_memory=False)


def announced(timer: FakeTimer, seconds: float, compute):
    def build(p: Problem):
        def run():
            timer.seconds = seconds
            return compute(p)

        return run

    return build


def rows_of(one: Case, options: Options, ceilings: Ceilings | None = None) -> dict[str, Row]:
    chosen = one.sizes[0]
    (rows,) = run_size(one, chosen, "fp32", chosen.modes[0], options, ceilings)
    return {row.contender: row for row in rows}


def assert_refused(row: Row) -> None:
    assert row.correct == "no" and not row.timed
    assert row.median_ms == row.ratio == row.percent_of_limit == row.per_second == ""


# What is wrong gets no time.


@pytest.mark.parametrize(
    "compute",
    [
        lambda p: 3 * p.x + 1e-3,
        lambda p: torch.full_like(p.x, math.nan),
        lambda p: (3 * p.x).sum(0),
        lambda p: (3 * p.x).index_fill(0, torch.tensor([2]), 0.0),
    ],
    ids=["offset", "nan", "shape", "one row missing"],
)
def test_a_wrong_rival_gets_no_time_and_does_not_count(compute):
    timer = FakeTimer()
    one, options = toy(timer, ours=2e-3, slow=4e-3)
    one.contender("liar")(announced(timer, 1e-6, compute))
    rows = rows_of(one, options)
    assert_refused(rows["liar"])
    assert rows["ours"].ratio == pytest.approx(0.5)
    assert 1e-6 not in timer.order
    text = report.table(list(rows.values()))
    assert re.search(r"liar\s+rival\s+wrong", text)
    assert "WRONG" in report.summary(list(rows.values()))


def test_tf32_rounding_is_wrong_in_fp32_and_bf16_storage_is_right_in_bf16():
    x = torch.rand(64, 64, dtype=torch.float64)
    p = Problem({"x": x.float()}, lambda x: 3 * x, Work(1, 1))
    assert error((3 * x * (1 + 2.0**-11),), (3 * x,)) > Verdict(p, "fp32").tolerance
    assert error(((3 * x.float()),), (3 * x,)) < Verdict(p, "fp32").tolerance
    assert error(((3 * x).bfloat16(),), (3 * x,)) < Verdict(p, "bf16").tolerance


def test_where_gradients_jump_one_value_may_and_none_may_be_forgotten():
    want = (torch.rand(4, 4).double(), torch.randn(300, 300).double(), 1e-3 * torch.randn(9).double())

    def off(which: int, by: torch.Tensor) -> float:
        return error(tuple(w + by if i == which else w for i, w in enumerate(want)), want, jumps=True)

    jump = torch.zeros(300, 300).double()
    jump[3, 5] = 1e-2
    tolerance = 1e-4
    assert off(1, jump) < tolerance
    assert error((want[0], want[1] + jump), want[:2]) > tolerance
    assert off(1, 0.01 * want[1]) > tolerance
    # Nine values beside 90,000 a thousand times as large, and all of them wrong by a tenth.
    assert off(2, 0.1 * want[2]) > tolerance
    assert off(0, torch.full((4, 4), 1e-3)) > tolerance


def test_a_wrong_gradient_gets_no_time():
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    timer = FakeTimer()
    one, options = toy(timer, mode=TRAIN, ours=2e-3, slow=4e-3)
    one.contender("forgetful")(announced(timer, 1e-6, lambda p: Forgetful.apply(p.x)))
    rows = rows_of(one, options)
    assert_refused(rows["forgetful"])
    assert rows["ours"].correct == "yes" and rows["ours"].timed


def test_a_contender_that_writes_to_its_input_is_refused_and_the_input_restored():
    timer = FakeTimer()
    one, options = toy(timer)
    one.contender("vandal")(announced(timer, 1e-6, lambda p: p.x.mul_(3)))
    one.contender("ours", kind=OURS)(announced(timer, 1e-3, lambda p: 3 * p.x))
    rows = rows_of(one, options)
    assert_refused(rows["vandal"])
    assert "wrote to its input x" in rows["vandal"].note
    assert rows["ours"].correct == "yes"


def test_a_result_that_goes_wrong_later_loses_its_time():
    timer = FakeTimer()
    one, options = toy(timer, ours=2e-3, slow=4e-3)
    calls = []

    def tiring(p):
        calls.append(1)
        return 3 * p.x if len(calls) < 5 else 4 * p.x

    one.contender("tiring")(announced(timer, 1e-6, tiring))
    rows = rows_of(one, options)
    assert_refused(rows["tiring"])
    assert "wrong after timing" in rows["tiring"].note
    assert rows["ours"].ratio == pytest.approx(0.5)


def test_failures_and_missing_packages_are_rows_without_a_time():
    timer = FakeTimer()
    one, options = toy(timer, ours=2e-3)

    @one.contender("broken")
    def _(p):
        raise ZeroDivisionError("half an op")

    @one.contender("missing")
    def _(p):
        raise Unavailable("not installed")

    rows = rows_of(one, options)
    assert_refused(rows["broken"])
    assert rows["broken"].note == "failed: ZeroDivisionError: half an op"
    assert rows["missing"].correct == "" and not rows["missing"].timed and rows["missing"].note == "not installed"
    assert rows["ours"].timed and rows["ours"].ratio == ""


def test_exit_status_follows_our_own_results_only():
    assert not report.ours_wrong([Row(kind=RIVAL, correct="no"), Row(kind=OURS, correct="yes")])
    assert report.ours_wrong([Row(kind=OURS, correct="no")])
    assert report.ours_wrong([Row(kind=LIMIT, correct="no")])


def test_a_limit_row_is_checked_against_its_own_definition():
    timer = FakeTimer()
    one, options = toy(timer, ours=2e-3, slow=4e-3)
    one.contender("copy", kind=LIMIT)(lambda p: Run(lambda: p.x.clone(), reference=lambda x: x))
    one.contender("bad copy", kind=LIMIT)(lambda p: Run(lambda: p.x + 1, reference=lambda x: x))
    rows = rows_of(one, options)
    assert rows["copy"].correct == "yes" and rows["copy"].timed
    assert_refused(rows["bad copy"])


# Arithmetic on announced times.


def ceilings(copies=None, memory=1e9, product=1e9) -> Ceilings:
    return Ceilings(copies or {1e7: 2e9}, memory, {"fp32": product, "bf16": product})


def test_ratio_percent_and_images_per_second():
    timer = FakeTimer()
    one, options = toy(timer, ours=4e-3, fast=8e-3, slow=16e-3, bound=2e-3)
    rows = rows_of(one, options, ceilings())
    assert {name: rows[name].ratio for name in rows} == pytest.approx(
        {"ours": 0.5, "fast": 1.0, "slow": 2.0, "bound": 0.25}
    )
    # 2e6 operations at 1e9 a second take 2 ms; 1e6 bytes at the warm 2e9 a second half a millisecond.
    assert rows["ours"].limit_ms == pytest.approx(2.0) and rows["ours"].limited_by == "arithmetic"
    assert rows["ours"].percent_of_limit == pytest.approx(50)
    assert rows["bound"].percent_of_limit == pytest.approx(100)
    assert rows["ours"].per_second == pytest.approx(1000)
    assert (rows["ours"].ratio_low, rows["ours"].ratio_high) == pytest.approx((0.5, 0.5))
    assert rows["fast"].ratio_low == ""
    assert "2.00x faster" in report.table(list(rows.values()))


def test_losses_are_marked():
    timer = FakeTimer()
    one, options = toy(timer, ours=6e-3, fast=4e-3)
    rows = list(rows_of(one, options).values())
    assert re.search(r"ours.*LOSS 1\.50x", report.table(rows))
    assert "LOSS 1.50x  toy 4x5 fp32 forward [warm]: ours 6 ms, fast 4 ms" in report.summary(rows)
    assert report.summary(rows).startswith("0 of 1 ")
    for ratio, mark in ((1.0, "LOSS 1.00x"), (1.01, "LOSS 1.01x"), (0.99, "1.01x faster")):
        assert report.verdict(Row(kind=OURS, ratio=ratio)) == mark
    assert report.verdict(Row(kind=RIVAL, ratio=2.0)) == ""


def test_training_is_held_to_its_own_work():
    timer = FakeTimer()
    one, options = toy(timer, mode=TRAIN, ours=8e-3, fast=8e-3)
    assert rows_of(one, options, ceilings())["ours"].percent_of_limit == pytest.approx(50)


def test_limit_takes_the_slower_of_memory_and_arithmetic():
    c = ceilings(copies={1e6: 8e9, 1e8: 2e9}, memory=1e9, product=1e12)
    assert c.limit(Work(1e6, 0), "fp32", COLD) == (pytest.approx(1e-3), "memory")
    assert c.limit(Work(1e6, 1e12), "fp32", COLD) == (pytest.approx(1.0), "arithmetic")
    # Warm: the best copy that moves at least as much; beyond the largest one, memory.
    assert c.bandwidth(5e5, WARM) == 8e9
    assert c.bandwidth(5e6, WARM) == 2e9
    assert c.bandwidth(1e9, WARM) == 1e9


def test_quartiles():
    stats = Stats.of([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (stats.median, stats.q25, stats.q75, stats.iqr, stats.samples) == (3.0, 2.0, 4.0, 2.0, 5)
    assert Stats.of([2.0]) == Stats(2.0, 2.0, 2.0, 1)


def test_ratio_interval_pairs_the_rounds():
    # Neighbours double both contenders' times in half of the rounds: side by side the ratio stays 2.
    drift = [1.0, 2.0] * 10
    slow, fast = Stats.of([2 * d for d in drift]), Stats.of(drift)
    assert timing.ratio_interval(slow, fast) == pytest.approx((2.0, 2.0))
    low, high = timing.ratio_interval(slow, Stats.of(drift[:-1]))
    assert low < 1.5 and high > 2.5
    assert timing.ratio_interval(slow, Stats.of([1.0] * 4)) is None


def test_the_gradient_of_a_result_has_its_layout():
    out = torch.rand(2, 3, 4, 5)
    last = out.to(memory_format=torch.channels_last).requires_grad_()
    assert output_gradient(last).stride() == last.stride() and not output_gradient(last).requires_grad
    assert torch.equal(output_gradient(last), output_gradient(out))


def test_exactly_so_many_samples_of_slow_contenders_too():
    timer = FakeTimer()
    stats = sampled(timer, WARM, Budget.exactly(7), quick=1e-3, slow=4.0)
    assert {name: s.samples for name, s in stats.items()} == {"quick": 7, "slow": 7}


def sampled(timer: FakeTimer, regime: str, budget: Budget, **seconds: float) -> dict[str, Stats]:
    def runs(value):
        def run():
            timer.seconds = value

        return run

    return interleave({name: runs(value) for name, value in seconds.items()}, timer, regime, budget)


def test_contenders_take_turns():
    timer = FakeTimer()
    assert gc.isenabled()
    stats = sampled(timer, WARM, Budget(seconds=10.0, fewest=3, most=6, sample=1e-3), a=1e-2, b=2e-2)
    assert {name: s.samples for name, s in stats.items()} == {"a": 6, "b": 6}
    assert gc.isenabled()
    samples = timer.order[-12:]
    # Each round holds both, and not always in the same order.
    assert all({samples[i], samples[i + 1]} == {1e-2, 2e-2} for i in range(0, 12, 2))
    assert len(set(samples[::2])) == 2


def test_slow_contenders_give_few_samples_spread_over_the_rounds():
    timer = FakeTimer()
    stats = sampled(timer, WARM, Budget(seconds=1.0, fewest=5, most=9, sample=1e-3), quick=1e-2, slow=4.0)
    assert {name: s.samples for name, s in stats.items()} == {"quick": 9, "slow": 3}
    where = [i for i, t in enumerate(timer.order[-12:]) if t == 4.0]
    assert max(where) - min(where) >= 5


def test_only_cold_rows_flush_before_every_sample():
    budget = Budget(seconds=10.0, fewest=3, most=5, sample=1e-3)
    for regime, flushes in ((COLD, 2 * 5 + 1), (WARM, 0), (OVERHEAD, 0)):
        timer = FakeTimer()
        sampled(timer, regime, budget, a=1e-3, b=1e-3)
        assert timer.flushes == flushes


def test_cpu_timer_divides_by_its_calls():
    timer = timing.CpuTimer()
    calls = []
    seconds = timer.once(lambda: calls.append(torch.linalg.qr(torch.ones(60, 60))), 8, warm=True, host=False)
    assert len(calls) == 9
    assert 0 < seconds < 1


def test_cuda_timer_uses_events_and_waits_for_the_host_clock_only_outside(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 12.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("sync"))
    timer = timing.CudaTimer.__new__(timing.CudaTimer)
    timer._device = CPU
    assert timer.once(lambda: log.append("call"), 4, warm=False, host=False) == pytest.approx(3e-3)
    assert log == ["record", "call", "call", "call", "call", "record", "wait"]
    log.clear()
    assert timer.once(lambda: log.append("call"), 2, warm=True, host=True) < 1e-3
    assert log == ["call", "sync", "call", "call", "sync"]


def test_ceilings_are_rates_of_this_machine():
    found = measure(CPU, ["fp32", "bf16"], timing.CpuTimer(), timing.QUICK, quick=True)
    assert set(found.products) == {"fp32", "bf16"} and all(rate > 1e6 for rate in found.products.values())
    assert found.memory > 1e6 and len(found.copies) == 2
    assert len(found.rows) == 2 * 2 + 2


# Memory and the allocator.


def test_peak_memory_counts_temporaries_and_the_result():
    x = torch.rand(8 << 20)  # 32 MiB

    def call():
        doubled = x * 2
        return (doubled + 1).sum()

    found = memory.peak(call, CPU, "system")
    if not sys.platform.startswith("linux"):
        assert found is None
        return
    assert found / 2**20 == pytest.approx(64, abs=3)
    kept = memory.peak(lambda: x + 1, CPU, "keep")
    allocator.apply("return")
    assert kept / 2**20 == pytest.approx(32, abs=3)


def test_a_recording_has_no_peak_of_its_own(monkeypatch):
    """A CUDA graph holds its memory before the call as after it."""
    monkeypatch.setattr(memory, "peak", lambda *_: 2**20)
    one, options = toy(FakeTimer(), ours=1e-3)
    one.contender("replayed")(lambda p: Run(lambda: 3 * p.x, recorded=True))
    rows = rows_of(one, replace(options, measure_memory=True))
    assert (rows["ours"].peak_mib, rows["replayed"].peak_mib) == (1.0, "")


def test_the_allocator_setting_is_named():
    assert "keeping freed memory" in allocator.describe("keep") or "not glibc" in allocator.describe("keep")
    assert allocator.describe("system").startswith("system default")


# Registration and selection.


def test_selection_by_suite_pattern_device_and_size():
    def labels(**wanted) -> list[str]:
        return [f"{c.name} {s.label}" for c, s in select(list(CASES.values()), **wanted)]

    everything = labels(device="cpu")
    assert labels(device="cpu", patterns=["block_cs.step"]) == [x for x in everything if "block_cs.step" in x]
    assert labels(device="cpu", patterns=["*.step 16x*"]) == [
        x for x in everything if x.startswith(("block_cs.step 16x", "cassi.step 16x", "blur_downsample.step 16x"))
    ]
    assert labels(device="cpu", patterns=["no such case"]) == []
    assert labels(device="cpu", patterns=["block_cs.step", "cassi.forward"]) == [
        x for x in everything if "block_cs.step" in x or "cassi.forward" in x
    ]
    layers = {x.split(".")[0] for x in labels(device="cpu", suites=("layers",))}
    assert layers == {
        "depthwise_conv2d",
        "fused_conv2d",
        "lora_conv2d",
        "packed_conv2d",
        "relayout",
        "spectral_attention",
        "thin_conv2d",
        "winograd_conv2d",
    }
    assert labels(device="cpu") != labels(device="cuda")
    quick = labels(device="cpu", quick=True)
    assert quick and set(quick) < set(everything)


def test_mistakes_in_registration_raise():
    one, _ = toy(FakeTimer(), ours=1e-3)
    with pytest.raises(ValueError, match="registered twice"):
        one.contender("ours")(lambda p: None)
    with pytest.raises(ValueError, match="kind: expected ours, rival or limit, got 'friend'"):
        one.contender("x", kind="friend")
    with pytest.raises(ValueError, match="suite: expected one of"):
        registry.case("x", suite="opera", sizes=())
    with pytest.raises(ValueError, match=r"dtypes: expected some of .*got int8"):
        size("x", dtypes=("int8",))
    with pytest.raises(ValueError, match="registered twice"):
        registry.case("block_cs.step", suite="ops", sizes=())(lambda: None)


def test_compiled_variants_take_part_where_the_size_and_the_options_ask_for_them(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: compiled.append(dynamic) or fn)
    timer = FakeTimer()
    one, options = toy(timer, ours=1e-3)
    one.contender("lazy", compiled=True)(lambda p: lambda: 3 * p.x)
    assert list(rows_of(one, options)) == ["ours", "lazy", "lazy, compiled"] and compiled == [False]
    assert list(rows_of(one, replace(options, compiled=False))) == ["ours", "lazy"]
    assert list(rows_of(one, replace(options, without="lazy"))) == ["ours"]
    one.sizes = (replace(one.sizes[0], compiled=False),)
    assert list(rows_of(one, options)) == ["ours", "lazy"]


@pytest.fixture
def recording(monkeypatch):
    """Stands for torch.cuda's graphs; ``fail`` says how a recording ends."""
    cuda = types.SimpleNamespace(replays=0, stream=mock.MagicMock(), here=mock.MagicMock(), now=None, fail=None)

    class Graph:
        def replay(self):
            cuda.replays += 1

    @contextlib.contextmanager
    def on(stream):
        before, cuda.now = cuda.now, stream
        yield
        cuda.now = before

    @contextlib.contextmanager
    def graph(_, stream):
        cuda.now = stream
        try:
            yield
        finally:
            if cuda.fail is not None:
                raise RuntimeError(cuda.fail)  # and stays on the stream, as torch does
            cuda.now = None

    stand_ins = {
        "Stream": lambda: cuda.stream, "current_stream": lambda: cuda.here, "CUDAGraph": Graph, "stream": on,
        "graph": graph, "set_stream": lambda stream: setattr(cuda, "now", stream),
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return cuda


def test_a_recording_keeps_what_it_reads(recording):
    """Weights merged beforehand belong to the contender alone; freed, they would be overwritten under the graph."""
    owned = []

    def build(_):
        weight = torch.ones(3)
        owned.append(weakref.ref(weight))
        return lambda: weight.sum()

    one, _ = toy(FakeTimer(), ours=1e-3)
    run = variants.graphed(build)(one.problem(one.sizes[0], "fp32", FORWARD, CPU))
    gc.collect()
    assert owned[0]() is not None
    assert run.recorded and run.step is None and run.fn() == 3 and recording.replays == 1


@pytest.mark.parametrize("factor", [3, 2], ids=["right", "wrong"])
def test_a_backward_pass_is_recorded_with_its_forward_pass(factor, recording, monkeypatch):
    """Called on one stream some times and recorded on the same, then replayed alone; checked as every contender."""
    monkeypatch.setattr(memory, "peak", lambda *_: 2**20)
    streams, found = [], []

    def build(p):
        def run():
            streams.append(recording.now)
            return factor * p.x

        return run

    def spied(p):
        found.append(variants.graphed(build)(p))
        return found[0]

    one, options = toy(FakeTimer(), TRAIN, ours=1e-3)
    one.contender("replayed")(spied)
    row = rows_of(one, replace(options, measure_memory=True))["replayed"]
    assert streams == [recording.stream] * 4 and recording.now is None
    y, grad = found[0].step()
    assert found[0].recorded and not y.requires_grad and y.shape == grad.shape == (4, 5) and len(streams) == 4
    if factor == 3:
        assert row.timed and row.correct == "yes" and row.peak_mib == "" and recording.replays > 5
    else:
        assert_refused(row)


@pytest.mark.parametrize("end", [None, "operation failed due to a previous error"])
def test_what_a_graph_cannot_hold_is_a_row_that_says_why(end, recording):
    recording.fail = end

    def build(p):
        def run():
            if recording.now is recording.stream and len(calls) == 3:
                raise RuntimeError("a wait for the device\nwhile recording")
            calls.append(1)
            return 3 * p.x

        return run

    calls = []
    one, options = toy(FakeTimer(), TRAIN, ours=1e-3)
    one.contender("waits")(variants.graphed(build))
    rows = rows_of(one, options)
    assert rows["waits"].note == "no CUDA graph: RuntimeError: a wait for the device"
    assert rows["waits"].correct == "" and not rows["waits"].timed and rows["ours"].timed
    assert recording.now is recording.here, "what follows is on the stream of before"


def test_graphs_are_of_the_forward_pass_unless_told_otherwise():
    one, _ = toy(FakeTimer(), ours=1e-3)
    for name, graphed in (("a", True), ("b", (TRAIN,)), ("c", False)):
        one.contender(name, graphed=graphed)(lambda p: lambda: 3 * p.x)
    assert {c.name: (c.modes, c.devices) for c in one.contenders if "graph" in c.name} == {
        "a, CUDA graph": ((FORWARD,), ("cuda",)), "b, CUDA graph": ((TRAIN,), ("cuda",)),
    }  # fmt: skip
    trained = {
        name: {
            c.name.removesuffix(", CUDA graph")
            for c in CASES[name].contenders
            if "graph" in c.name and TRAIN in c.modes
        }
        for name in ("lora_conv2d.peft", "lora_conv2d.loralib", "network.training")
    }
    every = {"lorun_fast", "fused kernel", "merged at every call", "bare convolution"}
    assert trained == {
        "lora_conv2d.peft": every | {"adapter branch", "PEFT"},
        "lora_conv2d.loralib": every | {"loralib"},
        "network.training": {"lorun_fast", "loralib-style layers", "untied"},
    }


@pytest.mark.parametrize("name", list(CASES))
def test_what_compiles_is_known_to_compile(name):
    """As --no-compile leaves it out; a search by Inductor takes longer than all else in a table."""
    named = [c for c in CASES[name].contenders if re.search("compiled|autotune", c.name)]
    assert [c.name for c in named if not c.compiled] == []


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_has_an_opponent_and_a_quick_size(name):
    one = CASES[name]
    kinds = [c.kind for c in one.contenders]
    assert OURS in kinds and RIVAL in kinds
    assert sum(s.quick for s in one.sizes) == 1
    for device in ("cpu", "cuda"):
        labels = [s.label for s in one.sizes if device in s.devices]
        assert len(set(labels)) == len(labels)
    for s in one.sizes:
        assert TRAIN not in s.modes or one.problem(next(q for q in one.sizes if q.quick), "fp32", TRAIN, CPU).train


@pytest.mark.parametrize("name", list(CASES))
def test_every_contender_is_right_at_the_quick_size(name):
    one = CASES[name]
    chosen = next(s for s in one.sizes if s.quick)
    for mode in chosen.modes:
        p = one.problem(chosen, "fp32", mode, CPU)
        verdict = Verdict(p, "fp32")
        for c in one.contenders:
            if mode in c.modes and "cpu" in c.devices and not c.compiled:
                entry = Entry(c, Row())
                assert admit(entry, p, verdict) or entry.row.correct == "", f"{c.name} {mode}: {entry.row.note}"


def test_reference_backend_is_named(monkeypatch):
    built = {"lorun_fast::block_cs": ("CPU",), "lorun_fast::block_cs_step": ()}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: key in built[op])
    assert backend.backend("block_cs", CPU) == "compiled"
    assert backend.backend("block_cs", torch.device("cuda")) == "reference"
    assert backend.note(("block_cs", "block_cs_step"), CPU) == "reference backend (block_cs_step)"
    assert backend.note(("block_cs",), CPU) == backend.note((), CPU) == ""


# Rows, plots, the command line.

REQUIRED = {
    "date", "commit", "device", "machine", "threads", "allocator", "torch", "triton", "suite", "case", "shape",
    "dtype", "mode", "regime", "contender", "kind", "correct", "error", "median_ms", "iqr_ms", "ratio",
    "percent_of_limit", "peak_mib",
}  # fmt: skip


def test_csv_round_trip(tmp_path):
    rows = [Row(case="a", contender="b, c", kind=OURS, median_ms=1.25, ratio=0.5, samples=7), Row(note='say "no"')]
    file = CsvFile(tmp_path / "deep" / "rows.csv")
    file.write(rows[:1])
    file.write(rows[1:])
    with file.path.open(newline="") as handle:
        assert tuple(next(csv.reader(handle))) == COLUMNS
    assert set(COLUMNS) >= REQUIRED
    back = report.read(file.path)
    assert (back[0].contender, back[0].median_ms, back[0].ratio, back[0].samples) == ("b, c", 1.25, 0.5, "7")
    assert back[1].median_ms == "" and back[1].note == 'say "no"'


def test_quick_run_end_to_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "ops", "--case", "block_cs.step", "--quick", "--device", "cpu"]
    command += ["--threads", "1", "--plot", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 threads" in done.stdout and "allocator:" in done.stdout
    (path,) = tmp_path.glob("ops-cpu-*.csv")
    rows = report.read(path)
    assert {r.mode for r in rows} == {"", FORWARD, TRAIN} and {r.regime for r in rows} == {"", WARM, OVERHEAD}
    timed = [r for r in rows if r.kind in (OURS, RIVAL)]
    assert len(timed) == 4 * 4
    assert all(r.timed and r.correct == "yes" and r.ratio > 0 and r.percent_of_limit > 0 for r in timed)
    assert all(r.commit and r.machine and r.torch == torch.__version__ and r.peak_by for r in timed)
    pictures = sorted(p.name for p in tmp_path.glob("*.png"))
    assert [re.sub(r".*-\d+-\d+-", "", name) for name in pictures] == ["bars.png", "roofline-fp32.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in tmp_path.glob("*.png"))


def test_old_rows_can_be_drawn(tmp_path):
    common = {"suite": "ops", "case": "c", "shape": "s", "dtype": "fp32", "mode": FORWARD, "regime": COLD}
    rows = [
        Row(case="ceiling", contender=f"copy 1 MiB, {COLD}", kind="ceiling", bytes=1e6, flops=0.0, median_ms=1.0),
        Row(case="ceiling", contender="matrix product 8, fp32", kind="ceiling", bytes=1.0, flops=1e9, median_ms=1.0),
        *(
            Row(**common, contender=f"{kind} {i}", kind=kind, median_ms=1.0 + i, q25_ms=0.9 + i, q75_ms=1.2 + i,
                bytes=1e6, flops=1e8, limit_ms=0.9, ratio=1.0 + i)
            for kind in (OURS, RIVAL, LIMIT) for i in range(2)
        ),
    ]  # fmt: skip
    file = CsvFile(tmp_path / "rows.csv")
    file.write(rows)
    paths = plot.draw(report.read(file.path), tmp_path / "picture")
    assert [p.name for p in paths] == ["picture-bars.png", "picture-roofline-fp32.png"]
    assert all(p.stat().st_size > 5000 for p in paths)


def batch_rows(batches: tuple[int, ...]) -> list[Row]:
    common = {"suite": "network", "case": "c", "dtype": "fp32", "mode": FORWARD, "regime": WARM}
    return [
        Row(**common, shape=f"{n}x1x8x8", contender=kind, kind=kind, median_ms=1.0, per_second=n, peak_mib=2.0 * n)
        for n in batches for kind in (OURS, RIVAL)
    ]  # fmt: skip


def test_rows_that_differ_in_their_batch_make_a_curve(tmp_path):
    rows = batch_rows((1, 4, 2))
    (path,) = plot.throughput(rows, tmp_path / "picture")
    assert path.name == "picture-batches-c-1x8x8-fp32.png" and path.stat().st_size > 5000
    ((key, contenders),) = plot._curves(rows).items()
    assert key[2] == "1x8x8" and {name: sorted(line) for name, line in contenders.items()} == {
        OURS: [1, 2, 4],
        RIVAL: [1, 2, 4],
    }
    assert plot.throughput(batch_rows((1, 2)), tmp_path / "none") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples: expected at least 1, got 0"),
        (["opera"], "suite: expected some of ops, layers, network, got opera"),
        (["--case", "no such case"], "matches 'no such case' on cpu"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch):
    from benchmarks.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_list(capsys):
    from benchmarks.__main__ import main

    assert main(["ops", "--device", "cpu", "--list"]) == 0
    text = capsys.readouterr().out
    assert "cassi.step 1x28x256x256" in text and "band loop" in text and "lora_conv2d" not in text


# The script for CUDA machines, with an interpreter that only pretends.


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs benchmarks/gpu.sh with a stand-in for Python that logs its arguments and fails on a chosen word."""
    log = tmp_path / "calls"
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/bash\n"
        f'echo "$*" >> {log}\n'
        'if [ "$1" = - ]; then cat > /dev/null; fi\n'
        'case "$*" in *"${HANG:-nothing hangs}"*) sleep 30;; esac\n'
        'case "$*" in *"${FAIL:-nothing fails}"* | *"${FAIL_TOO:-nothing fails}"*) echo "as asked"; exit 3;; esac\n'
    )
    fake.chmod(0o755)

    def run(*arguments: str, **variables: str):
        log.write_text("")
        environment = os.environ | {"PYTHON": str(fake)} | variables
        done = subprocess.run(
            ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments, str(tmp_path / "out")],
            capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
        parts = dict(re.findall(r"^(\w+) +(.+?) +\d+s ", done.stdout, re.MULTILINE))
        return types.SimpleNamespace(status=done.returncode, parts=parts, calls=log.read_text(), text=done.stdout)

    return run


PARTS = ["environment", "build", "backends", "tests", "layers", "network", "ops", "total"]


def test_gpu_script_runs_every_part_and_a_second_run_repeats_none(gpu_sh, tmp_path):
    first = gpu_sh("--device", "cpu")
    assert first.status == 0 and list(first.parts) == PARTS and set(first.parts.values()) == {"ok"}
    assert "-m pip install --no-build-isolation --no-deps -e ." in first.calls
    assert "-m pytest -v -m gpu" in first.calls
    for name in ("ops", "layers", "network"):
        assert re.search(rf"-m benchmarks {name} --device cpu --out \S+ --limit \d+ --quick", first.calls)
        assert (tmp_path / "out" / f"{name}.log").exists()
    again = gpu_sh("--device", "cpu")
    assert again.status == 0 and again.calls == ""
    assert set(again.parts.values()) == {"done before", "ok"}
    assert gpu_sh("--device", "cpu", "--fresh").calls != ""
    assert (tmp_path / "out" / "summary.txt").read_text().count("total") == 3


def test_gpu_script_goes_on_after_failures_and_repeats_only_those(gpu_sh, tmp_path):
    first = gpu_sh("--device", "cpu", FAIL="-m pytest")
    assert first.status == 1
    assert first.parts["tests"] == "failed, status 3" and first.parts["network"] == "ok"
    assert "tests.log: as asked" in first.text
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as bundle:
        held = {Path(name).name for name in bundle.getnames()}
        summary = bundle.extractfile("summary.txt").read().decode()
    assert held == {"summary.txt", *(f"{name}.log" for name in PARTS[:-1])}
    assert re.search("tests +failed, status 3", summary) and re.search("total +with failures", summary)
    second = gpu_sh("--device", "cpu")
    assert second.status == 0 and second.parts["tests"] == "ok" and second.parts["ops"] == "done before"
    assert second.calls.count("\n") == 1


def test_gpu_script_builds_elsewhere_where_pip_cannot_install(gpu_sh):
    done = gpu_sh("--device", "cpu", FAIL="pip install")
    assert done.parts["build"] == "ok"
    assert re.search(r"setup\.py build --build-base \S+ --build-lib \S+/site", done.calls)


def test_gpu_script_stops_a_part_that_hangs(gpu_sh):
    done = gpu_sh("--device", "cpu", HANG="benchmarks layers", TOTAL="7")
    assert re.fullmatch(r"stopped at \d+ s", done.parts["layers"])
    assert done.parts["network"] == done.parts["ops"] == "not run: no time left"


def test_gpu_script_goes_on_without_the_extension_where_it_does_not_build(gpu_sh):
    done = gpu_sh("--device", "cpu", FAIL="pip install", FAIL_TOO="setup.py build")
    assert done.parts["build"] == "failed, status 1" and done.calls.count("setup.py build") == 2
    assert done.parts["plain"] == "failed, status 3" and done.parts["tests"] == "ok" and done.status == 1


def test_gpu_script_measures_what_decides_first(gpu_sh):
    """On a GPU tables come in the order of the patterns, and nothing is compiled by torch before the last parts."""
    calls = [line for line in gpu_sh().calls.splitlines() if "-m benchmarks" in line]
    assert [line.split()[2] for line in calls] == ["layers", "network", "ops", "ops", "layers", "network"]
    assert ["--no-compile" in line for line in calls] == [True, True, True, False, False, False]
    assert "--case lora_conv2d.*16x64x256x256* --case lora_conv2d.mixed*" in calls[0]


def test_gpu_script_tunes_only_when_asked(gpu_sh, tmp_path):
    asked = gpu_sh("--tune")
    assert list(asked.parts)[-2:] == ["tune", "total"]
    assert re.search(r"-m lorun_fast\.kernels\.tune --out \S+/out/lorun-kernels\.json --limit \d+", asked.calls)
    assert "kernels.tune" not in gpu_sh("--fresh").calls
    assert gpu_sh("--device", "cpu", "--tune").status == 2


# Documentation.


def test_every_environment_variable_is_in_the_table():
    documented = set(re.findall(r"`(LORUN_\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    used = set()
    for folder in ("lorun_fast", "csrc", "kernels", "benchmarks", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and (path.suffix in (".py", ".sh", ".cpp", ".cu") or folder == ".ci"):
                used |= set(re.findall(r"(?:environ\S*?[\[(]|getenv\(|\$\{?)\"?(LORUN_\w+)", path.read_text()))
    for name in ("setup.py", "Makefile"):
        used |= set(re.findall(r"environ\S*?[\[(]\"(LORUN_\w+)", (ROOT / name).read_text()))
    assert used == documented
