"""Clocks and interleaved sampling.

Contenders take turns: in every round each gives one sample, in a new order, so that drifts of clock speed,
temperature and neighbours fall on all of them. A slow contender takes part in fewer rounds, spread evenly.

Regimes. cold: the caches are overwritten before each sample, which is one call. warm: one untimed call, then
as many timed ones as fill a sample. overhead: host time per call at a tiny size; on a GPU the host does not
wait for the device, so this is what the call itself costs.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from benchmarks.harness.machine import cache_bytes
from benchmarks.harness.registry import COLD, OVERHEAD


class Timer(Protocol):
    """Times calls in seconds."""

    def flush(self) -> None:
        """Overwrites the caches."""

    def once(self, fn: Callable, calls: int, *, warm: bool, host: bool) -> float:
        """Seconds per call over ``calls`` calls; after one untimed call if warm; host time alone if host."""


class CpuTimer:
    """Wall clock."""

    def __init__(self):
        self._junk = torch.zeros(min(max(4 * cache_bytes(torch.device("cpu")), 64 << 20), 512 << 20) // 4)

    def flush(self) -> None:
        self._junk.add_(1)

    def once(self, fn: Callable, calls: int, *, warm: bool, host: bool) -> float:
        if warm:
            fn()
        start = time.perf_counter_ns()
        for _ in range(calls):
            fn()
        return (time.perf_counter_ns() - start) * 1e-9 / calls


class CudaTimer:
    """Device events on the current stream; the host's clock for overhead."""

    def __init__(self, device: torch.device):
        self._device = device
        self._junk = torch.zeros(max(4 * cache_bytes(device), 256 << 20) // 4, device=device)

    def flush(self) -> None:
        self._junk.add_(1)

    def once(self, fn: Callable, calls: int, *, warm: bool, host: bool) -> float:
        if warm:
            fn()
        if host:
            torch.cuda.synchronize(self._device)
            start = time.perf_counter_ns()
            for _ in range(calls):
                fn()
            seconds = (time.perf_counter_ns() - start) * 1e-9
            torch.cuda.synchronize(self._device)
            return seconds / calls
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(calls):
            fn()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3 / calls


def timer_for(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


@dataclass(frozen=True)
class Stats:
    """Median and quartiles of the samples, in seconds; ``values``: the samples, in the order they were taken."""

    median: float
    q25: float
    q75: float
    samples: int
    values: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def iqr(self) -> float:
        return self.q75 - self.q25

    @classmethod
    def of(cls, samples: list[float]) -> Stats:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1, tuple(samples))
        q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q25, q75, len(samples), tuple(samples))


RESAMPLES = 2000


def ratio_interval(one: Stats, other: Stats, *, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Where the ratio of the medians, one over other, lies: a bootstrap interval; None below five samples of either.

    Contenders that took part in every round were timed side by side, so rounds are drawn and not samples.
    """
    a, b = np.asarray(one.values), np.asarray(other.values)
    if min(len(a), len(b)) < 5:
        return None
    draw = np.random.default_rng(seed)
    rounds = draw.integers(len(a), size=(RESAMPLES, len(a)))
    others = rounds if len(a) == len(b) else draw.integers(len(b), size=(RESAMPLES, len(b)))
    ratios = np.median(a[rounds], axis=1) / np.median(b[others], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Budget:
    """How long to sample.

    seconds: per contender and regime. fewest, most: samples. sample: seconds that a warm sample fills. slow:
    seconds from which a call takes part with ``few`` samples only, and without an untimed call before each.
    """

    seconds: float = 0.5
    fewest: int = 5
    most: int = 40
    sample: float = 2e-3
    slow: float = 0.5
    few: int = 3

    @classmethod
    def exactly(cls, samples: int) -> Budget:
        """So many samples of every contender, however long they take."""
        return cls(fewest=samples, most=samples, few=samples)


QUICK = Budget(seconds=0.02, fewest=3, most=5, sample=2e-4)
# Enough calls to average the clock's resolution, few enough never to fill a GPU's launch queue.
OVERHEAD_CALLS = 20


def _rounds(count: int, rounds: int) -> set[int]:
    """``count`` of the rounds 0 ... rounds-1, spread evenly."""
    return {i * rounds // count for i in range(count)}


@dataclass(frozen=True)
class Plan:
    """How one contender is sampled: calls per sample, number of samples, an untimed call before each or not."""

    calls: int
    samples: int
    warm: bool


def _plan(fn: Callable, timer: Timer, budget: Budget, cold: bool, host: bool, flush_seconds: float) -> Plan:
    guess = max(timer.once(fn, 1, warm=False, host=host), 1e-9)
    if guess >= budget.slow:
        return Plan(1, min(budget.fewest, budget.few), False)
    guess = max(timer.once(fn, 1, warm=False, host=host), 1e-9)
    fitting = min(max(1, math.ceil(budget.sample / guess)), 10_000)
    calls = 1 if cold else min(OVERHEAD_CALLS, fitting) if host else fitting
    per_sample = guess * (calls + (not cold)) + flush_seconds
    return Plan(calls, min(budget.most, max(budget.fewest, int(budget.seconds / per_sample))), not cold)


def interleave(
    runs: dict[str, Callable], timer: Timer, regime: str, budget: Budget, *, seed: int = 0
) -> dict[str, Stats]:
    """Samples every callable in turn, in a new order each round. Each has been called before, by the check."""
    cold, host = regime == COLD, regime == OVERHEAD
    flush_seconds = timer.once(timer.flush, 1, warm=True, host=False) if cold else 0.0
    plans = {name: _plan(fn, timer, budget, cold, host, flush_seconds) for name, fn in runs.items()}
    rounds = max((plan.samples for plan in plans.values()), default=0)
    turns = {name: _rounds(plan.samples, rounds) for name, plan in plans.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(seed).shuffle
    order = list(runs)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shuffle(order)
            for name in order:
                if turn in turns[name]:
                    if cold:
                        timer.flush()
                    plan = plans[name]
                    samples[name].append(timer.once(runs[name], plan.calls, warm=plan.warm, host=host))
    finally:
        if enabled:
            gc.enable()
    return {name: Stats.of(values) for name, values in samples.items()}
