"""The search for a better tile of one problem: compile, compare, time, one part of the tile after another."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lorun_fast.kernels.tables import Row
from lorun_fast.kernels.tuning import candidates
from lorun_fast.kernels.tuning.problems import Problem, fingerprint, launches
from lorun_fast.kernels.tuning.trial import Trial

# A chosen tile is at least 2 % faster than the shipped one.
MARGIN = 0.98

# (problem, tiles, indices of launches) -> for each tile, the compiler's check.Report of each of these launches.
Compile = Callable[[Problem, list, list[int]], list[list]]
# (tile, run) -> a function that takes one sample: seconds of one run.
Clock = Callable[[object, Callable[[], object]], Callable[[], float]]


@dataclass
class Search:
    """One search. What compiles and what times are arguments: tests on a CPU stand in for both.

    passes: steps away from the shipped tile, per part. rounds: samples of each candidate. until: the time.monotonic()
    after which no further pass begins. say: receives a line for each candidate.
    """

    trial: Trial
    arch: int
    compile: Compile
    clock: Clock
    passes: int = 2
    rounds: int = 5
    until: float = float("inf")
    say: Callable[[str], None] = print
    _seen: set = field(default_factory=set, init=False)

    def row(self) -> Row | None:
        """The best right tile with its time beside the shipped one's, or None where no tile is right."""
        key, shipped = self.trial.key, self.trial.shipped(self.arch)
        every_launch = range(len(launches(self.trial.problem, self.arch)))
        best, right = shipped, self._right([shipped], list(every_launch))
        shipped_is_right = usable = bool(right)
        for part, index in candidates.PARTS[key.direction].items():
            for _ in range(self.passes):
                if time.monotonic() > self.until:
                    break
                around = candidates.variations(best, part, key.geometry, self.trial.dtype, self.arch, key.rank)
                times = self._times([best] * usable + self._right(around, [index]))
                winner = min(times, key=times.get, default=best)
                if winner == best:
                    break
                best, usable = winner, True
        if not usable:
            return None
        times = self._times([shipped] * shipped_is_right + [best], 2 * self.rounds)
        if shipped_is_right and times[best] > MARGIN * times[shipped]:
            best = shipped
        return Row(key, best, times[best], times.get(shipped))

    def _right(self, tiles: list, indices: list[int]) -> list:
        """Those not seen before that compile well and give the right result; why the others do not is said."""
        fresh = [tile for tile in tiles if self._is_new(tile)]
        fine = []
        for tile, reports in zip(fresh, self.compile(self.trial.problem, fresh, indices), strict=True):
            why = next((f"{r.kernel}: {r.wrong}" for r in reports if r.wrong), "") or self.trial.fault(tile)
            if why:
                self.say(f"  {tile}: {why}")
            else:
                fine.append(tile)
        return fine

    def _is_new(self, tile) -> bool:
        mark = fingerprint(self.trial.problem, self.arch, tile)
        known = mark in self._seen
        self._seen.add(mark)
        return not known

    def _times(self, tiles: list, rounds: int = 0) -> dict:
        """Median seconds of each tile, sampled in turns: a device that slows down slows down for all."""
        samples = {tile: self.clock(tile, functools.partial(self.trial.run, tile)) for tile in tiles}
        taken: dict = {tile: [] for tile in samples}
        for _ in range(rounds or self.rounds):
            for tile, sample in samples.items():
                taken[tile].append(sample())
        times = {tile: statistics.median(seconds) for tile, seconds in taken.items()}
        for tile, seconds in times.items():
            self.say(f"  {tile}: {1e6 * seconds:.1f} us")
        return times


@functools.cache
def _graph_memory():
    """Memory that all recorded candidates share: they run one after another, and nobody reads their results."""
    return torch.cuda.graph_pool_handle()


def graph_clock(tile, run: Callable[[], object]) -> Callable[[], float]:
    """Records about 5 ms of runs as a CUDA graph, so that no Python lies between them; a sample is one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(work: Callable[[], object]) -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    run()
    repeats = max(1, min(200, int(5e-3 / max(seconds(run), 1e-6))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_graph_memory()):
        for _ in range(repeats):
            run()
    seconds(graph.replay)
    return lambda: seconds(graph.replay) / repeats
