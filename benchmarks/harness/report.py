"""Rows of results: as CSV, and as tables that print their losses."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.harness.registry import LIMIT, OURS, RIVAL


@dataclass
class Row:
    """One contender in one table; the columns of the CSV, in order. Empty cells: not measured.

    kind: ours, rival, limit (a bound that computes something else), or ceiling (the machine itself).
    correct: yes, no, or "" where there was nothing to check (not available). error, tolerance: relative to the
    largest value. Times in milliseconds. ratio: of the median to the fastest rival's; it
    lies between ratio_low and ratio_high with 95 % confidence, by bootstrap. limit_ms: the time that
    the ceilings allow for ``bytes`` and ``flops``; percent_of_limit: limit_ms / median_ms.
    """

    date: str = ""
    commit: str = ""
    device: str = ""
    machine: str = ""
    threads: int | str = ""
    allocator: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    suite: str = ""
    case: str = ""
    shape: str = ""
    dtype: str = ""
    mode: str = ""
    regime: str = ""
    contender: str = ""
    kind: str = ""
    correct: str = ""
    error: float | str = ""
    tolerance: float | str = ""
    median_ms: float | str = ""
    q25_ms: float | str = ""
    q75_ms: float | str = ""
    iqr_ms: float | str = ""
    samples: int | str = ""
    ratio: float | str = ""
    ratio_low: float | str = ""
    ratio_high: float | str = ""
    limit_ms: float | str = ""
    limited_by: str = ""
    percent_of_limit: float | str = ""
    bytes: float | str = ""
    flops: float | str = ""
    per_second: float | str = ""
    peak_mib: float | str = ""
    peak_by: str = ""
    note: str = ""

    @property
    def timed(self) -> bool:
        return self.median_ms != ""

    @property
    def table(self) -> tuple[str, ...]:
        """What the rows of one table have in common."""
        return (self.suite, self.case, self.shape, self.dtype, self.mode, self.regime)


COLUMNS = tuple(f.name for f in fields(Row))


class CsvFile:
    """Appends rows as they come, so that an interrupted run keeps what it measured."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def write(self, rows: Iterable[Row]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for row in rows:
                writer.writerow(_cell(getattr(row, name)) for name in COLUMNS)


def _cell(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers."""
    numbers = {"error", "tolerance", "median_ms", "q25_ms", "q75_ms", "iqr_ms", "ratio", "limit_ms", "percent_of_limit"}
    numbers |= {"bytes", "flops", "per_second", "peak_mib", "ratio_low", "ratio_high"}
    rows = []
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            values = {k: float(v) if k in numbers and v != "" else v for k, v in record.items()}
            rows.append(Row(**values))
    return rows


def fastest_rival(rows: Sequence[Row]) -> Row | None:
    """The rival with the smallest median, among those that were timed."""
    return min((r for r in rows if r.kind == RIVAL and r.timed), key=lambda r: r.median_ms, default=None)


def set_ratios(rows: Sequence[Row]) -> None:
    """Fills ``ratio``: each median over the fastest rival's."""
    best = fastest_rival(rows)
    if best is not None:
        for row in rows:
            if row.timed:
                row.ratio = row.median_ms / best.median_ms


def verdict(row: Row) -> str:
    """The mark of one of our rows: how much faster than the fastest rival, or LOSS and by how much."""
    if row.kind != OURS or row.ratio == "":
        return ""
    return f"{1 / row.ratio:.2f}x faster" if row.ratio < 1 else f"LOSS {row.ratio:.2f}x"


def milliseconds(ms: float | str) -> str:
    """A time with three digits and its unit."""
    if ms == "":
        return ""
    if ms < 1:
        return f"{ms * 1e3:.3g} us"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1e3:.3g} s"


def _number(value: float | str, form: str) -> str:
    return "" if value == "" else format(value, form)


def _interval(row: Row) -> str:
    return "" if row.ratio_low == "" else f"{row.ratio_low:.3f}-{row.ratio_high:.3f}"


def table(rows: Sequence[Row]) -> str:
    """One table as text: the limit above, timed rows by median, then those without a time and why."""
    first = rows[0]
    limit = next((r for r in rows if r.limit_ms != ""), None)
    head = f"{first.case}  {first.shape}  {first.dtype}  {first.mode}  [{first.regime}]"
    if limit is not None:
        work = f"{limit.bytes / 1e6:.3g} MB, {limit.flops / 1e9:.3g} GFLOP"
        head += f"   limit {milliseconds(limit.limit_ms)} ({limit.limited_by}; {work})"
    titles = ["contender", "kind", "median", "IQR", "ratio", "95 %", "% of limit", "peak MiB", "error", ""]
    if any(r.per_second != "" for r in rows):
        titles.insert(7, "images/s")
    body = []
    for r in sorted(rows, key=lambda r: r.median_ms if r.timed else math.inf):
        cells = [
            r.contender,
            r.kind,
            milliseconds(r.median_ms) if r.timed else "wrong" if r.correct == "no" else "-",
            milliseconds(r.iqr_ms),
            _number(r.ratio, ".2f"),
            _interval(r),
            _number(r.percent_of_limit, ".0f"),
            _number(r.peak_mib, ".1f"),
            _number(r.error, ".1e"),
            "; ".join(text for text in (verdict(r), r.note) if text),
        ]
        if len(titles) > len(cells):
            cells.insert(7, _number(r.per_second, ".3g"))
        body.append(cells)
    widths = [max(len(row[i]) for row in [titles, *body]) for i in range(len(titles))]
    lines = [head]
    for i, cells in enumerate([titles, *body]):
        left = {0, 1, len(cells) - 1}
        texts = [c.ljust(w) if j in left else c.rjust(w) for j, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append(("  " + "  ".join(texts)).rstrip())
        if i == 0:
            lines.append("  " + "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Wins and losses against the fastest rival, the losses and the wrong results by name."""
    ours = [r for r in rows if r.kind == OURS and r.timed and r.ratio != ""]
    losses = sorted((r for r in ours if r.ratio >= 1), key=lambda r: -r.ratio)
    wrong = list({(r.contender, r.case, r.shape, r.dtype, r.mode): r for r in rows if r.correct == "no"}.values())
    lines = [f"{len(ours) - len(losses)} of {len(ours)} rows of ours are faster than every rival."]
    for r in losses:
        rival = fastest_rival([q for q in rows if q.table == r.table])
        lines.append(
            f"  LOSS {r.ratio:.2f}x  {r.case} {r.shape} {r.dtype} {r.mode} [{r.regime}]: {r.contender} "
            f"{milliseconds(r.median_ms)}, {rival.contender} {milliseconds(rival.median_ms)}"
        )
    for r in wrong:
        lines.append(f"  WRONG  {r.case} {r.shape} {r.dtype} {r.mode}: {r.contender}, {r.note}")
    return "\n".join(lines)


def ours_wrong(rows: Sequence[Row]) -> bool:
    """Whether a result of ours, or a limit row's, was wrong or failed."""
    return any(r.kind in (OURS, LIMIT) and r.correct == "no" for r in rows)
