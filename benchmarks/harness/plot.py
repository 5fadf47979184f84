"""Bars, rooflines and batch curves of a suite's rows, as PNG files.

``python -m benchmarks.harness.plot FILE.csv`` draws old rows.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.registry import COLD, LIMIT, OURS, RIVAL
from benchmarks.harness.report import Row, milliseconds, read

# One colour per role, told apart in grey and by readers who confuse red and green; hatching says "loss".
COLOURS = {OURS: "#0072b2", RIVAL: "#b8b8b8", LIMIT: "#e69f00"}
PER_PAGE = 12


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _tables(rows: Sequence[Row]) -> list[list[Row]]:
    tables: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.kind in COLOURS and row.timed:
            tables.setdefault(row.table, []).append(row)
    return list(tables.values())


def _panel(axes, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda r: -r.median_ms)
    first = rows[0]
    names = [r.contender for r in rows]
    times = [r.median_ms for r in rows]
    spread = [[r.median_ms - r.q25_ms for r in rows], [r.q75_ms - r.median_ms for r in rows]]
    bars = axes.barh(names, times, xerr=spread, color=[COLOURS[r.kind] for r in rows], ecolor="#444444", capsize=2)
    for bar, row in zip(bars, rows, strict=True):
        loses = row.kind == OURS and row.ratio != "" and row.ratio >= 1
        if loses:
            bar.set_hatch("///")
        label = milliseconds(row.median_ms) + (f"  {row.ratio:.2f}x" if row.ratio != "" else "")
        axes.annotate(label, (row.q75_ms, bar.get_y() + bar.get_height() / 2), (4, 0), textcoords="offset points",
                      va="center", fontsize=7)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 2, max(times) * 6)
    limit = next((r.limit_ms for r in rows if r.limit_ms != ""), None)
    if limit is not None and limit > axes.get_xlim()[0]:
        axes.axvline(limit, color="#444444", linestyle=":", linewidth=1)
    axes.set_title(f"{first.case}  {first.shape}\n{first.dtype} {first.mode} [{first.regime}]", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def bars(rows: Sequence[Row], stem: Path) -> list[Path]:
    """One panel a table, log time, quartiles as whiskers, the limit dotted; rows of ours that lose are hatched."""
    plt = _pyplot()
    tables = _tables(rows)
    paths = []
    for page in range(math.ceil(len(tables) / PER_PAGE)):
        part = tables[page * PER_PAGE : (page + 1) * PER_PAGE]
        columns = min(3, len(part))
        lines = math.ceil(len(part) / columns)
        tallest = max(len(t) for t in part)
        figure, grid = plt.subplots(
            lines, columns, figsize=(5.2 * columns, lines * (0.9 + 0.24 * tallest)), squeeze=False
        )
        for axes, table in zip(grid.flat, part, strict=False):
            _panel(axes, table)
        for axes in list(grid.flat)[len(part) :]:
            axes.set_visible(False)
        first = part[0][0]
        figure.suptitle(
            f"{first.machine}, {first.threads} threads, torch {first.torch}, {first.commit}: time in ms, and as a "
            "multiple of the fastest rival (blue: lorun_fast, grey: rivals, orange: bounds; hatched: a loss)",
            fontsize=9,
        )
        figure.tight_layout(rect=(0, 0, 1, 0.98))
        path = stem.with_name(f"{stem.name}-bars{page + 1 if len(tables) > PER_PAGE else ''}.png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths


def roofline(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Operations per second against operations per byte, one figure a dtype, under the run's own ceilings.

    Each point is a row's least work over its median, so it lies under the roof that its regime allows.
    """
    plt = _pyplot()
    memory = max(
        (r.bytes / r.median_ms * 1e3 for r in rows if r.kind == "ceiling" and r.contender.endswith(COLD)), default=None
    )
    paths = []
    for ceiling in (r for r in rows if r.kind == "ceiling" and r.flops):
        dtype = re.search(r"(\w+)$", ceiling.contender).group(1)
        points = [r for r in rows if r.kind in COLOURS and r.timed and r.dtype == dtype and r.flops and r.bytes]
        if not points or memory is None:
            continue
        peak = ceiling.flops / ceiling.median_ms * 1e3
        intensity = [r.flops / r.bytes for r in points]
        low, high = min(*intensity, peak / memory) / 3, max(*intensity, peak / memory) * 3
        figure, axes = plt.subplots(figsize=(7.5, 5))
        axes.plot([low, peak / memory, high], [low * memory, peak, peak], color="#444444", linewidth=1.2)
        for kind in (RIVAL, LIMIT, OURS):
            part = [r for r in points if r.kind == kind]
            axes.scatter(
                [r.flops / r.bytes for r in part], [r.flops / r.median_ms * 1e3 for r in part],
                s=[46 if kind == OURS else 18] * len(part), color=COLOURS[kind], label=kind, zorder=3,
                edgecolors="white", linewidths=0.5,
            )  # fmt: skip
        for r in {(r.case, r.shape, r.mode): r for r in points if r.kind == OURS}.values():
            axes.annotate(f"{r.case} {r.shape}", (r.flops / r.bytes, r.flops / r.median_ms * 1e3), (5, -3),
                          textcoords="offset points", fontsize=6)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte (least work)")
        axes.set_ylabel("operations per second")
        axes.set_title(
            f"{ceiling.machine}, {dtype}: memory {memory / 1e9:.3g} GB/s, products {peak / 1e12:.3g} TFLOP/s",
            fontsize=9,
        )
        axes.legend(fontsize=8)
        axes.grid(alpha=0.25)
        figure.tight_layout()
        path = stem.with_name(f"{stem.name}-roofline-{dtype}.png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths


def _curves(rows: Sequence[Row]) -> dict[tuple, dict[str, dict[int, Row]]]:
    """Rows that differ in their batch alone, from three batches on: {table without batch: {contender: {n: row}}}."""
    found: dict[tuple, dict[str, dict[int, Row]]] = {}
    for row in rows:
        shape = re.fullmatch(r"(\d+)x(.+)", row.shape)
        if row.kind in COLOURS and row.timed and row.per_second != "" and shape is not None:
            key = (row.suite, row.case, shape.group(2), row.dtype, row.mode, row.regime)
            found.setdefault(key, {}).setdefault(row.contender, {})[int(shape.group(1))] = row
    return {
        key: contenders
        for key, contenders in found.items()
        if len({n for line in contenders.values() for n in line}) >= 3
    }


LINES = ("-", "--", ":", "-.")


def throughput(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Images per second, and peak memory where it was measured, against the batch; a figure for each such series."""
    plt = _pyplot()
    paths = []
    for key, contenders in _curves(rows).items():
        columns = [("per_second", "images per second")]
        if any(row.peak_mib != "" for line in contenders.values() for row in line.values()):
            columns.append(("peak_mib", "peak memory, MiB"))
        figure, grid = plt.subplots(1, len(columns), figsize=(4.6 * len(columns), 3.4), squeeze=False)
        for axes, (column, title) in zip(grid.flat, columns, strict=True):
            for i, (name, line) in enumerate(contenders.items()):
                points = [(n, row) for n, row in sorted(line.items()) if getattr(row, column) != ""]
                kind = points[0][1].kind if points else RIVAL
                axes.plot(
                    [n for n, _ in points], [getattr(row, column) for _, row in points], color=COLOURS[kind],
                    linestyle=LINES[i % len(LINES)], marker="o", markersize=4, label=name,
                )  # fmt: skip
            batches = sorted({n for line in contenders.values() for n in line})
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(n) for n in batches])
            axes.set_ylim(bottom=0)
            axes.set_xlabel("images in a batch")
            axes.set_ylabel(title)
            axes.spines[["top", "right"]].set_visible(False)
        grid.flat[0].legend(fontsize=7)
        first = next(iter(next(iter(contenders.values())).values()))
        _, case, shape, dtype, mode, _ = key
        figure.suptitle(f"{case}  {shape}  {dtype} {mode}: {first.machine}, {first.threads} threads", fontsize=9)
        figure.tight_layout()
        name = re.sub(r"[^\w.]+", "-", f"{case}-{shape}-{dtype}")
        path = stem.with_name(f"{stem.name}-batches-{name}.png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """All figures of one suite, named after ``stem``."""
    return bars(rows, stem) + roofline(rows, stem) + throughput(rows, stem)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*draw(read(Path(name)), Path(name).with_suffix("")), sep="\n")
