"""Candidates ranked without a GPU: compiled, and timed by the model. Predictions, never measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorun_fast.kernels import model
from lorun_fast.kernels.tuning import candidates
from lorun_fast.kernels.tuning.problems import Problem, fingerprint, launches, shipped_tile, tensors


@dataclass
class Ranked:
    """One candidate. report: check.Report of the launch that ``part`` decides. seconds: the model's for all launches
    of the pass, None where the compiler's result cannot be used; limit: what binds that launch."""

    part: str
    tile: object
    shipped: bool
    report: object
    seconds: float | None
    limit: str

    def line(self) -> str:
        r = self.report
        shown = self.tile if self.part == "tile" else getattr(self.tile, self.part)
        predicted = r.wrong if self.seconds is None else f"{1e6 * self.seconds:.1f} us ({self.limit})"
        return (
            f"{'*' if self.shipped else ' '} {predicted:<28}{r.registers:>4} registers {r.spilled:>5} B spilled "
            f"{r.shared:>7} B shared {r.per_sm:>2} per SM  {self.part}: {shown}"
        )


def rank(problem: Problem, arch: int, compile: Callable) -> list[Ranked]:
    """Every candidate one step from the shipped tile, part by part, the model's fastest first.

    compile: as in search.py.
    """
    t = tensors(problem, "meta")
    _, s = t.read(problem)
    g, dtype = s.arrange()[0], t.x.dtype
    shipped = shipped_tile(problem, g, dtype, arch, s.rank)
    (beside,) = compile(problem, [shipped], list(range(len(launches(problem, arch)))))
    found, seen = [], {fingerprint(problem, arch, shipped)}
    for part, index in candidates.PARTS["backward" if problem.backward else "forward"].items():
        marks = {fingerprint(problem, arch, t): t for t in candidates.variations(shipped, part, g, dtype, arch, s.rank)}
        if not marks:  # a launch that this problem does not have
            continue
        tiles = [tile for mark, tile in marks.items() if mark not in seen]
        seen |= set(marks)
        compiled = [beside[index], *(report for (report,) in compile(problem, tiles, [index]))]
        ranked = []
        for tile, report in zip([shipped, *tiles], compiled, strict=True):
            reports = [report if i == index else other for i, other in enumerate(beside)]
            seconds, limit = None, ""
            if not any(r.wrong for r in reports):
                each = [
                    model.estimate(one, g.n, r.per_sm, arch)
                    for one, r in zip(launches(problem, arch, tile), reports, strict=True)
                ]
                seconds, limit = sum(e.seconds for e in each), each[index].limit
            ranked.append(Ranked(part, tile, tile == shipped, report, seconds, limit))
        found += sorted(ranked, key=lambda r: float("inf") if r.seconds is None else r.seconds)
    return found
