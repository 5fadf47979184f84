"""python -m benchmarks [ops|layers|network ...]: checks, times and compares; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import allocator, ceilings, machine, report
from benchmarks.harness.registry import CASES, DTYPES, SUITES, select
from benchmarks.harness.runner import Options, ceiling_rows, dtypes_of, run_size
from benchmarks.harness.timing import QUICK, Budget, timer_for

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Checks every contender against the float64 reference, times the correct ones in turns, and "
        "writes tables and CSV rows. Exit status 1 when a result of lorun_fast is wrong.",
    )
    p.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--case", action="append", metavar="PATTERN", help='part of, or shell pattern for, "case size" (repeatable)'
    )
    p.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this dtype (repeatable)")
    p.add_argument("--mode", choices=("forward", "forward+backward"), help="only this mode")
    p.add_argument("--without", metavar="PATTERN", help="leave these contenders out")
    p.add_argument("--quick", action="store_true", help="tiny sizes, few samples, nothing compiled: a smoke test")
    p.add_argument("--no-compile", action="store_true", help="leave out the contenders under torch.compile")
    p.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    p.add_argument("--seconds", type=float, help="sampling time per contender and table (default 0.5)")
    p.add_argument("--samples", type=int, metavar="N", help="so many samples per contender and table, slow ones too")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="start no further table after this time")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    p.add_argument("--allocator", choices=("keep", "system"), default="keep", help="C allocator, docs/benchmarks.md")
    p.add_argument("--plot", action="store_true", help="draw bars and rooflines as PNG beside the CSV (matplotlib)")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    p.add_argument("--list", action="store_true", help="print the cases, sizes and contenders, and stop")
    return p


def listing(chosen) -> str:
    lines = []
    for case, size in chosen:
        lines.append(f"{case.suite:8} {case.name} {size.label}  {','.join(size.dtypes)}  {', '.join(size.modes)}")
    for case in dict.fromkeys(case for case, _ in chosen):
        names = ", ".join(f"{c.name} ({c.kind})" if c.kind != "rival" else c.name for c in case.contenders)
        lines.append(f"{case.name}: {names}")
    return "\n".join(lines)


def prepare(args: argparse.Namespace) -> Options:
    """One setting for every contender: threads, allocator, precision of products and convolutions."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.allocator == "keep":
        allocator.apply("keep")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    budget = QUICK if args.quick else Budget(seconds=args.seconds) if args.seconds else Budget()
    if args.samples:
        budget = Budget.exactly(args.samples)
    return Options(
        device,
        timer_for(device),
        budget,
        facts=machine.facts(device, allocator.describe(args.allocator)),
        allocator=args.allocator,
        dtypes=tuple(args.dtype or ()),
        compiled=not (args.quick or args.no_compile),
        measure_memory=not args.no_memory,
        without=args.without,
    )


def header(options: Options) -> str:
    f = options.facts
    lines = [
        f"{f['machine']}; {f['threads']} threads; torch {f['torch']}, Triton {f['triton']}, Python {f['python']}",
        f"commit {f['commit']}, {f['date']}; allocator: {f['allocator']}; fp32 strict (no tf32), cudnn.benchmark on",
    ]
    if not options.compiled:
        lines.append("contenders under torch.compile are left out")
    if options.without:
        lines.append(f"contenders matching {options.without!r} are left out")
    return "\n".join(lines)


def run_suite(
    suite: str, chosen: Sequence, args: argparse.Namespace, options: Options, until: float
) -> list[report.Row]:
    """All tables of a suite, printed and written as they come."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    file = report.CsvFile(args.out / f"{suite}-{args.device}-{stamp}.csv")
    used = list(dict.fromkeys(d for _, size in chosen for d in dtypes_of(size, options)))
    measured = ceilings.measure(options.device, used, options.timer, options.budget, quick=args.quick)
    rows = ceiling_rows(measured, options, suite)
    file.write(rows)
    print("\n".join(f"  {r.contender}: {r.note}" for r in rows))
    left_out = []
    for case, size in chosen:
        for dtype in dtypes_of(size, options):
            for mode in size.modes:
                if args.mode and mode != args.mode:
                    continue
                if time.monotonic() > until:
                    left_out.append(f"{case.name} {size.label} {dtype} {mode}")
                    continue
                for one in run_size(case, size, dtype, mode, options, measured):
                    file.write(one)
                    rows += one
                    print(f"\n{report.table(one)}", flush=True)
    if left_out:
        print(f"\nNot run, --limit {args.limit:g} s reached: {'; '.join(left_out)}")
    print(f"\n{suite}: {report.summary(rows)}\nrows: {file.path}")
    if args.plot:
        from benchmarks.harness import plot

        for path in plot.draw(rows, file.path.with_suffix("")):
            print(f"plot: {path}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(arguments)
    unknown = [s for s in args.suites if s not in SUITES]
    if unknown:
        p.error(f"suite: expected some of {', '.join(SUITES)}, got {', '.join(unknown)}")
    if args.samples is not None and args.samples < 1:
        p.error(f"--samples: expected at least 1, got {args.samples}")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device here")
    from benchmarks import cases  # noqa: F401 registers every case

    started = time.monotonic()
    until = started + args.limit if args.limit else float("inf")
    suites = [s for s in SUITES if s in args.suites or not args.suites]
    chosen = list(select(list(CASES.values()), suites=suites, patterns=args.case, device=args.device, quick=args.quick))
    if not chosen:
        wanted = " or ".join(map(repr, args.case or ["any"]))
        p.error(f"no size of {', '.join(suites)} matches {wanted} on {args.device}; --list shows them all")
    if args.list:
        print(listing(chosen))
        return 0
    options = prepare(args)
    print(header(options))
    rows = []
    for suite in suites:
        part = [(case, size) for case, size in chosen if case.suite == suite]
        if part:
            print(f"\n== {suite}")
            rows += run_suite(suite, part, args, options, until)
    return 1 if report.ours_wrong(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
