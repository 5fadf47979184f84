"""Searches better tiles for given problems, on request; nothing tunes by itself.

    python -m lorun_fast.kernels.tune 'forward 64 k3 b16' 'backward 64 k3 b16 relu' --out tiles.json
    LORUN_KERNELS_CONFIGS=tiles.json python train.py
    python -m lorun_fast.kernels.tune --offline 90 'forward 64'       no GPU: compiled, and ranked by the model

A candidate is compiled first (one that spills or does not fit is skipped), compared with the definition in float64
over poisoned memory (a wrong one is never chosen), and then timed in turns with the others. The file holds tile and
times of each problem; a shipped tile stays unless another is at least 2 % faster. Exit status: 0; 1 where a problem
has no tile that is right; 2 for bad input, or no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lorun_fast import kernels
from lorun_fast.kernels.tuning.problems import Problem

DEFAULT = ("forward 28", "backward 28", "forward 64", "backward 64", "forward 64 mixed", "backward 64 relu")


def description(device: str):
    """An empty tables.Table for this device: what is tuned, where, with what, and when."""
    import torch
    import triton

    from lorun_fast.kernels import configs, tables

    name, capability = "Triton's interpreter", ""
    if device == "cuda":
        name, capability = torch.cuda.get_device_name(), "{}.{}".format(*torch.cuda.get_device_capability())
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    arch = configs.architecture(torch.device(device))
    return tables.Table(name, arch, capability, triton.__version__, torch.__version__, now)


def opened(path: Path, table):
    """``table`` with the rows that the file has already. Raises tables.TableError for those of another device."""
    from lorun_fast.kernels import tables

    if not path.exists():
        return table
    before = tables.read(path)
    if (before.device, before.architecture) != (table.device, table.architecture):
        raise tables.TableError(
            f"{path}: expected tiles for {table.device} (sm_{table.architecture}) to add to, got those for "
            f"{before.device} (sm_{before.architecture})"
        )
    return table.with_rows(before.rows)


def tune(
    problems: list[Problem],
    path: Path,
    table,
    search: Callable[[Problem], object],
    say: Callable[[str], None] = print,
    until: float = float("inf"),
) -> int:
    """Searches each problem and writes the file after each: its row takes the place of one of the same key.

    search: problem -> tables.Row or None. until: the time.monotonic() after which none begins. Returns the exit status.
    """
    from lorun_fast.kernels import tables

    status = 0
    for problem in problems:
        if time.monotonic() > until:
            say(f"{problem.name}: not searched, no time left")
            continue
        say(problem.name)
        row = search(problem)
        if row is None:
            say("  no tile gives the right result")
            status = 1
            continue
        table = table.with_rows([row])
        tables.write(table, path)
        beside = "" if row.shipped_seconds is None else f", the shipped one {1e6 * row.shipped_seconds:.1f} us"
        say(f"  chosen: {row.tile}: {1e6 * row.seconds:.1f} us{beside}")
    return status


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lorun_fast.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument("--out", type=Path, default=Path("lorun-kernels.json"), help="the file to write, or to add to")
    parser.add_argument("--offline", type=int, choices=(80, 90, 100), help="no GPU: compile, and rank by the model")
    parser.add_argument("--passes", type=int, default=2, help="steps away from the shipped tile, per part")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each candidate")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no search goes on")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    args = parser.parse_args(argv)
    for name in ("passes", "rounds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(args, name)}")
    if not args.offline and not args.out.parent.is_dir():
        parser.error(f"--out: expected a folder that exists, got {args.out.parent}")
    return args


def _cannot(offline: bool) -> str:
    import torch

    if kernels.unavailable():
        return kernels.unavailable()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: the interpreter does not compile"
    if not offline and not torch.cuda.is_available():
        return "expected a CUDA device, got none; --offline 90 compiles and ranks without one"
    return ""


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        problems = [Problem.parse(text) for text in args.problems or DEFAULT]
        why = _cannot(bool(args.offline))
        if why:
            raise ValueError(why)
        return _offline(problems, args.offline, args.jobs) if args.offline else _on_device(problems, args)
    except ValueError as error:
        print(f"kernels tune: {error}", file=sys.stderr)
        return 2


def _offline(problems: list[Problem], arch: int, jobs: int) -> int:
    from lorun_fast.kernels import check, model
    from lorun_fast.kernels.tuning import ranking

    gpu = model.CEILINGS[arch].name
    print(f"sm_{arch}: compiled, not run. Times are predictions for one {gpu}, lower bounds; * is the shipped tile.")
    with check.Compiler(arch, jobs) as compiler:
        for problem in problems:
            print(problem.name)
            for one in ranking.rank(problem, arch, compiler):
                print(one.line(), flush=True)
    return 0


def _on_device(problems: list[Problem], args: argparse.Namespace) -> int:
    import torch

    from lorun_fast.kernels import check
    from lorun_fast.kernels.tuning.search import Search, graph_clock
    from lorun_fast.kernels.tuning.trial import Trial

    major, minor = torch.cuda.get_device_capability()
    table = opened(args.out, description("cuda"))
    arch, until = table.architecture, time.monotonic() + args.limit
    with check.Compiler(arch, args.jobs, 10 * major + minor) as compiler:

        def search(problem: Problem):
            trial = Trial(problem, "cuda")
            return Search(trial, arch, compiler, graph_clock, args.passes, args.rounds, until).row()

        return tune(problems, args.out, table, search, until=until)


if __name__ == "__main__":
    sys.exit(main())
