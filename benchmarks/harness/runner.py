"""Runs the tables of one size: build, check, time in turns, check again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.harness import memory
from benchmarks.harness.backend import note as backend_note
from benchmarks.harness.ceilings import Ceilings, percent_of_limit
from benchmarks.harness.check import Verdict, step
from benchmarks.harness.registry import Case, Contender, Problem, Run, Size, Unavailable, matches
from benchmarks.harness.report import Row, fastest_rival, set_ratios
from benchmarks.harness.timing import Budget, Stats, Timer, interleave, ratio_interval
from benchmarks.harness.variants import as_run


@dataclass
class Options:
    """facts: columns shared by all rows. allocator: "keep" or "system". without: contenders left out, a pattern."""

    device: torch.device
    timer: Timer
    budget: Budget
    facts: dict = field(default_factory=dict)
    allocator: str = "system"
    dtypes: tuple[str, ...] = ()
    compiled: bool = True
    measure_memory: bool = True
    without: str | None = None


@dataclass
class Entry:
    """A contender on its way through one table."""

    contender: Contender
    row: Row
    run: Run | None = None
    call: Callable | None = None


def progress(text: str) -> None:
    """One line that the next one replaces, where somebody is watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K  {text}", end="", file=sys.stderr, flush=True)


def dtypes_of(chosen: Size, options: Options) -> list[str]:
    return [d for d in chosen.dtypes if not options.dtypes or d in options.dtypes]


def _taking_part(case: Case, chosen: Size, mode: str, options: Options) -> list[Contender]:
    return [
        c
        for c in case.contenders
        if mode in c.modes
        and options.device.type in c.devices
        and not (c.compiled and not (options.compiled and chosen.compiled))
        and not (options.without and matches(options.without, c.name))
    ]


def _failure(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:160]}"


def admit(entry: Entry, p: Problem, verdict: Verdict) -> bool:
    """Builds a contender and checks its result; only a correct one is admitted to the clock."""
    row = entry.row
    try:
        entry.run = as_run(entry.contender.build(p))
        entry.call = step(entry.run, p)
        row.error = verdict.error(entry.run, entry.call)
    except Unavailable as reason:
        row.note = str(reason)
        return False
    except Exception as error:
        row.correct, row.note = "no", _failure(error)
        return False
    row.tolerance = verdict.tolerance
    row.correct = "yes" if row.error <= verdict.tolerance else "no"
    if row.correct == "no":
        row.note = f"error {row.error:.1e}, tolerance {verdict.tolerance:.0e}"
    return row.correct == "yes"


def _still_right(entry: Entry, verdict: Verdict) -> bool:
    try:
        error = verdict.error(entry.run, entry.call)
    except Exception as failure:
        entry.row.correct, entry.row.note = "no", f"after timing: {_failure(failure)}"
        return False
    if error <= verdict.tolerance:
        return True
    entry.row.correct, entry.row.error = "no", error
    entry.row.note = f"right at first, wrong after timing: error {error:.1e}"
    return False


def fill(row: Row, stats: Stats, p: Problem, ceilings: Ceilings | None) -> None:
    """Writes the times of one contender into its row."""
    row.median_ms, row.q25_ms, row.q75_ms = (1e3 * t for t in (stats.median, stats.q25, stats.q75))
    row.iqr_ms, row.samples = 1e3 * stats.iqr, stats.samples
    if p.items is not None:
        row.per_second = p.items / stats.median
    row.bytes, row.flops = float(p.work.bytes), float(p.work.flops)
    if ceilings is not None:
        limit, row.limited_by = ceilings.limit(p.work, p.dtype, row.regime)
        row.limit_ms = 1e3 * limit
        row.percent_of_limit = percent_of_limit(limit, stats.median)


def set_intervals(rows: list[Row], stats: dict[str, Stats]) -> None:
    """Fills how well the ratios are known."""
    best = fastest_rival(rows)
    for row in rows if best is not None else ():
        if row.timed and row is not best:
            found = ratio_interval(stats[row.contender], stats[best.contender])
            if found is not None:
                row.ratio_low, row.ratio_high = found


def run_size(
    case: Case, chosen: Size, dtype: str, mode: str, options: Options, ceilings: Ceilings | None
) -> list[list[Row]]:
    """The tables of one size, dtype and mode: one per regime, each a list of rows."""
    torch._dynamo.reset()
    started = time.monotonic()
    p = case.problem(chosen, dtype, mode, options.device)
    verdict = Verdict(p, dtype)
    common = options.facts | {
        "suite": case.suite,
        "case": case.name,
        "shape": chosen.label,
        "dtype": dtype,
        "mode": mode,
    }
    entries = [
        Entry(c, Row(**common, contender=c.name, kind=c.kind)) for c in _taking_part(case, chosen, mode, options)
    ]
    admitted = []
    for entry in entries:
        progress(f"checking {entry.contender.name}")
        if admit(entry, p, verdict):
            entry.row.note = backend_note(entry.contender.ops, options.device)
            admitted.append(entry)
    if options.measure_memory:
        progress("measuring memory")
        for entry in admitted:
            if entry.run.recorded:
                continue
            peak = memory.peak(entry.call, options.device, options.allocator)
            if peak is not None:
                entry.row.peak_mib, entry.row.peak_by = peak / 2**20, memory.HOW[options.device.type]
    tables, samples = [], []
    for regime in chosen.regimes:
        progress(f"timing {len(admitted)} contenders, {regime}")
        calls = {e.contender.name: e.call for e in admitted}
        stats = interleave(calls, options.timer, regime, options.budget)
        rows = []
        for entry in entries:
            row = Row(**vars(entry.row))
            row.regime = regime
            if entry.contender.name in stats:
                fill(row, stats[entry.contender.name], p, ceilings)
            rows.append(row)
        tables.append(rows)
        samples.append(stats)
    late = {e.contender.name: e.row for e in admitted if not _still_right(e, verdict)}
    for rows, stats in zip(tables, samples, strict=True):
        for i, row in enumerate(rows):
            if row.contender in late:
                rows[i] = Row(**(vars(late[row.contender]) | {"regime": row.regime}))
        set_ratios(rows)
        set_intervals(rows, stats)
    progress(f"{case.name} {chosen.label} {dtype} {mode}: {time.monotonic() - started:.0f} s")
    return tables


def ceiling_rows(ceilings: Ceilings, options: Options, suite: str) -> list[Row]:
    """The machine's ceilings as rows of the same CSV."""
    rows = []
    for c in ceilings.rows:
        row = Row(**options.facts, suite=suite, case="ceiling", contender=c.name, kind="ceiling")
        row.median_ms, row.q25_ms, row.q75_ms = (1e3 * t for t in (c.stats.median, c.stats.q25, c.stats.q75))
        row.iqr_ms, row.samples = 1e3 * c.stats.iqr, c.stats.samples
        row.bytes, row.flops = float(c.bytes), float(c.flops)
        rate = c.flops / c.stats.median / 1e12 if c.flops else c.bytes / c.stats.median / 1e9
        row.note = f"{rate:.4g} {'TFLOP/s' if c.flops else 'GB/s'}"
        rows.append(row)
    return rows
