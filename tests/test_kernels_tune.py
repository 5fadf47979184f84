"""Tuning on request: the search with a stand-in for compiler and clock, the file, and who reads it when."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from kernels_help import needs_triton

needs_triton()

import triton  # noqa: E402

from lorun_fast.kernels import (  # noqa: E402
    _launch,
    check,
    configs,
    lora_conv2d,
    lora_conv2d_backward,
    tables,
    tiles,
    tune,
)
from lorun_fast.kernels.tuning import candidates, problems, ranking  # noqa: E402
from lorun_fast.kernels.tuning.problems import Problem  # noqa: E402
from lorun_fast.kernels.tuning.search import Search  # noqa: E402
from lorun_fast.kernels.tuning.trial import Trial, poisoned  # noqa: E402

TINY = Problem.parse("forward 3-4 k1 12px b2 fp32 mixed relu residual")
BACK = Problem.parse("backward 3-4 k1 5px b2 fp16 mixed relu")


def compile_all(problem, asked, indices, wrong=()):
    """A compiler that finds nothing wrong, except with the tiles in ``wrong``."""
    reports = []
    for tile in asked:
        one = check.Report(problem.name, "kernel", 80, 4, 1, registers=64, shared=1000, per_sm=2)
        one.wrong = "SPILLS" if tile in wrong else ""
        reports.append([one for _ in indices])
    return reports


class Clock:
    """Times that a test makes up: tile -> seconds, 1 for all others. Runs nothing."""

    def __init__(self):
        self.seconds: dict = {}
        self.asked: list = []

    def __call__(self, tile, run):
        self.asked.append(tile)
        return lambda: self.seconds.get(tile, 1.0)


def searching(problem, clock, **changes):
    said: list[str] = []
    given = {"compile": compile_all, "clock": clock, "say": said.append, "rounds": 2} | changes
    search = Search(Trial(problem, "cpu"), 80, **given)
    return search, said


def around(search, part="tile"):
    trial = search.trial
    shipped = trial.shipped(80)
    return candidates.variations(shipped, part, trial.key.geometry, trial.dtype, 80, trial.key.rank)


def spoil(monkeypatch, tile, how):
    """Makes the kernels of one tile wrong: ``how`` is given its first launch before it runs."""
    run = Trial.run

    def spoiled(self, asked):
        if asked != tile:
            return run(self, asked)
        with monkeypatch.context() as patch:
            launch = _launch.Launch.run
            patch.setattr(_launch.Launch, "run", lambda one: (how(one), launch(one))[1])
            return run(self, asked)

    monkeypatch.setattr(Trial, "run", spoiled)


def test_the_fastest_right_candidate_is_chosen(monkeypatch):
    clock = Clock()
    search, said = searching(TINY, clock, passes=1)
    shipped = search.trial.shipped(80)
    spilling, unwritten, failing, imprecise, fast, *_ = around(search)
    clock.seconds = {shipped: 1.0, fast: 0.5} | dict.fromkeys((spilling, unwritten, failing, imprecise), 0.1)

    def lose_a_program(one):
        one.programs -= 1

    def fail(one):
        raise RuntimeError("out of resources")

    def lose_a_scale(one):
        one.args["scale"] *= 1.1

    spoil(monkeypatch, unwritten, lose_a_program)
    spoil(monkeypatch, failing, fail)
    spoil(monkeypatch, imprecise, lose_a_scale)
    search.compile = lambda *asked: compile_all(*asked, wrong=(spilling,))
    row = search.row()
    assert row == tables.Row(search.trial.key, fast, 0.5, 1.0)
    assert not {spilling, unwritten, failing, imprecise} & set(clock.asked)
    for tile, why in (
        (spilling, "SPILLS"),
        (unwritten, "WRONG: leaves elements unwritten"),
        (failing, "does not run: RuntimeError: out of resources"),
        (imprecise, "WRONG: error"),
    ):
        assert any(f"{tile}: " in line and why in line for line in said), (why, said)


def test_the_shipped_tile_stays_unless_another_is_clearly_faster(few):
    clock = Clock()
    search, _ = searching(TINY, clock, passes=1)
    other = around(search)[0]
    clock.seconds = {other: 0.99}
    assert search.row() == tables.Row(search.trial.key, search.trial.shipped(80), 1.0, 1.0)


def test_a_shipped_tile_that_is_wrong_gives_way(few, monkeypatch):
    search, said = searching(TINY, Clock(), passes=1)
    shipped = search.trial.shipped(80)
    spoil(monkeypatch, shipped, lambda one: one.args.update(scale=9.0))
    row = search.row()
    assert row.tile in around(search) and row.shipped_seconds is None and "WRONG" in said[0]
    search, said = searching(TINY, Clock(), passes=1)
    search.compile = lambda problem, asked, indices: compile_all(problem, asked, indices, wrong=asked)
    assert search.row() is None


def test_the_parts_of_a_backward_tile_are_tuned_one_after_another(few):
    clock = Clock()
    search, _ = searching(BACK, clock, passes=1)
    shipped = search.trial.shipped(80)
    output, factor = around(search, "output")[0], around(search, "factor")[0]
    both = dataclasses.replace(output, factor=factor.factor)
    clock.seconds = {output: 0.8, factor: 0.9, both: 0.7}
    row = search.row()
    assert row.tile == both and (both.output, both.image) == (output.output, shipped.image)


def test_two_passes_go_two_steps():
    clock = Clock()
    search, _ = searching(TINY, clock, passes=2)
    shipped = search.trial.shipped(80)
    once = dataclasses.replace(shipped, stages=3)
    twice = dataclasses.replace(shipped, stages=4)
    clock.seconds = {once: 0.8, twice: 0.6}
    assert search.row().tile == twice
    search, _ = searching(TINY, clock, until=0.0)
    assert search.row().tile == shipped


@pytest.mark.parametrize(
    ("channels", "batch", "px", "kind"),
    [
        (32, 16, 256, "strip 128 c32 o32 8 warps 3 stages"),
        (32, 1, 256, "8x16"),  # strips would store 4 rows a program and read 6
        (64, 16, 64, "8x16"),  # rows too short for strips
        (64, 1, 64, "8x8"),  # patches twice as large would leave multiprocessors idle
        (96, 16, 64, "16x16 c32"),
        (128, 16, 64, "8x16 c128"),
        (128, 1, 64, "8x8 c64 o64"),
    ],
)
def test_tiles_follow_the_size_of_the_call(channels, batch, px, kind):
    tile = problems.tile_of(Problem(channels, batch=batch, px=px, form="merged", activation="relu"), 90)
    assert str(tile).startswith(kind)


@pytest.mark.parametrize("name", [p.name for p in problems.problems() if p.form != "merge"])
def test_every_candidate_can_compute_its_problem(name):
    problem = Problem.parse(name)
    t = problems.tensors(problem, "meta")
    _, s = t.read(problem)
    g = s.arrange()[0]
    for arch in configs.ARCHITECTURES:
        shipped = problems.shipped_tile(problem, g, t.x.dtype, arch, s.rank)
        assert not tiles.fault(shipped, g)
        for part in candidates.PARTS["backward" if problem.backward else "forward"]:
            found = candidates.variations(shipped, part, g, t.x.dtype, arch, s.rank)
            if part == "strip" and shipped.strip is None:
                assert not found
                continue
            assert found and shipped not in found and len(set(found)) == len(found)
            for tile in found:
                assert not tiles.fault(tile, g)
                assert all(one.programs > 0 for one in problems.launches(problem, arch, tile))
                if part != "tile":
                    assert dataclasses.replace(tile, **{part: getattr(shipped, part)}) == shipped


@pytest.fixture
def few(monkeypatch):
    """One candidate per part: a test that needs no more need not wait for the interpreter."""
    every = candidates.variations
    monkeypatch.setattr(candidates, "variations", lambda *args: every(*args)[:1])


@pytest.mark.parametrize("problem", [TINY, BACK], ids=lambda p: p.name)
def test_every_tile_gives_the_same_bits_in_deterministic_mode(problem, few, monkeypatch):
    search, _ = searching(problem, Clock())
    run, modes = Trial.run, []
    monkeypatch.setattr(
        Trial, "run", lambda *args: (modes.append(torch.are_deterministic_algorithms_enabled()), run(*args))[1]
    )
    chosen = [search.trial.shipped(80)]
    for part in candidates.PARTS[search.trial.key.direction]:
        chosen += around(search, part)
    for tile in chosen:
        assert not search.trial.fault(tile)  # runs it twice, and compares the bits
    assert modes == [True] * 2 * len(chosen) and not torch.are_deterministic_algorithms_enabled()


def test_a_tile_whose_runs_differ_is_refused(monkeypatch):
    trial, shifts = Trial(TINY, "cpu"), iter((0.0, 1e-7))
    run = Trial.run
    monkeypatch.setattr(Trial, "run", lambda *args: [t + next(shifts) for t in run(*args)])
    assert trial.fault(trial.shipped(80)) == "WRONG: two runs differ"


def test_poisoned_tensors_start_as_nan():
    with poisoned():
        assert torch.zeros(1).new_empty(5).isnan().all()


def test_linear_and_merged_problems_have_a_definition():
    for name in ("forward linear 5-3 6px b2 fp32 mixed", "backward linear 5-3 3px b2 fp32 silu",
                 "backward 3-4 k1 5px b2 fp32 merged mixed relu", "forward 3 k3 5px b1 fp16 merged"):  # fmt: skip
        trial = Trial(Problem.parse(name), "cpu")
        assert not trial.fault(trial.shipped(80)), name


# The file.


def a_table(**changes) -> tables.Table:
    trial = Trial(TINY, "cpu")
    shipped = trial.shipped(80)
    other = dataclasses.replace(shipped, stages=5, warps=8)
    back = Trial(BACK, "cpu")
    back_tile = dataclasses.replace(back.shipped(80), programs=3)
    rows = [tables.Row(trial.key, other, 1e-6, 2e-6), tables.Row(back.key, back_tile, 3e-6, None)]
    return dataclasses.replace(tune.description("cpu"), **({"rows": rows} | changes))


def forget():
    """Makes this process one that has launched nothing."""
    for kept in (configs.table, lora_conv2d.plan, lora_conv2d_backward.plan):
        kept.cache_clear()


@pytest.fixture
def in_force(monkeypatch, tmp_path):
    """Puts a table's file into force, as a new process would find it."""

    def force(table):
        path = tmp_path / "tiles.json"
        tables.write(table, path)
        monkeypatch.setenv("LORUN_KERNELS_CONFIGS", str(path))
        forget()
        return path

    yield force
    forget()


def tiles_launched(monkeypatch, trial, count=1) -> list:
    """(warps, stages) of what a call without a tile launches."""
    seen = []
    run = _launch.Launch.run
    with monkeypatch.context() as patch:
        patch.setattr(_launch.Launch, "run", lambda one: (seen.append((one.warps, one.stages)), run(one))[1])
        results = [trial.run(None) for _ in range(count)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    return seen


def test_a_file_comes_back_as_it_was_written(tmp_path):
    table = a_table()
    tables.write(table, tmp_path / "t.json")
    assert tables.read(tmp_path / "t.json") == table
    value = json.loads((tmp_path / "t.json").read_text())
    assert {"device", "architecture", "triton", "torch", "date", "version"} <= set(value)
    assert value["rows"][0]["seconds"] == 1e-6 and value["rows"][0]["shipped_seconds"] == 2e-6


def test_the_kernels_use_the_file_only_when_told_to(in_force, monkeypatch):
    trial, other = Trial(TINY, "cpu"), Trial(dataclasses.replace(TINY, batch=1), "cpu")
    monkeypatch.delenv("LORUN_KERNELS_CONFIGS", raising=False)
    forget()
    before = tiles_launched(monkeypatch, trial)
    assert before == [(trial.shipped(80).warps, trial.shipped(80).stages)]
    path = in_force(a_table())
    assert tiles_launched(monkeypatch, trial, 2) == [(8, 5)] * 2
    assert tiles_launched(monkeypatch, other) == before  # not in the file
    backward = Trial(BACK, "cpu")
    g, key = backward.key.geometry, backward.key
    found = configs.backward(g, backward.dtype, 80, key.rank, key.mixed, key.activation)
    assert found == dataclasses.replace(backward.shipped(80), programs=3)
    path.unlink()  # read once: the launches of a process never change
    assert tiles_launched(monkeypatch, trial) == [(8, 5)]
    forget()
    with pytest.raises(tables.TableError, match=r"expected a file that kernels\.tune wrote"):
        trial.run(None)


def test_a_file_for_another_architecture_is_an_error(in_force):
    in_force(a_table(architecture=90, device="NVIDIA H200"))
    with pytest.raises(tables.TableError, match=r"expected tiles for sm_80, got a file for sm_90 \(NVIDIA H200\)"):
        Trial(TINY, "cpu").run(None)


def test_what_the_check_calls_shipped_is_not_the_files(in_force):
    want = [str(one.constants) for one in problems.launches(TINY, 80)]
    trial = Trial(TINY, "cpu")
    row = tables.Row(trial.key, dataclasses.replace(trial.shipped(80), bw=32), 1.0, 1.0)
    in_force(dataclasses.replace(a_table(), rows=[row]))
    assert [str(one.constants) for one in problems.launches(TINY, 80)] == want


def _edit(**changes):
    """Changes one field by its path, as rows__0__tile__bh=3."""

    def edit(text):
        value = json.loads(text)
        for path, new in changes.items():
            at, keys = value, [int(k) if k.isdigit() else k for k in path.split("__")]
            for key in keys[:-1]:
                at = at[key]
            at[keys[-1]] = new
        return json.dumps(value)

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text[: len(text) // 2], "expected JSON, whole"),
        (lambda text: "[]", "expected format 'lorun_fast kernel tiles', got 'list'"),
        (_edit(format="other"), "expected format 'lorun_fast kernel tiles', got 'other'"),
        (_edit(version=3), "expected version 2 of the format, got 3"),
        (_edit(triton="3.0.0"), f"expected tiles tuned with Triton {triton.__version__}, got Triton 3.0.0"),
        (_edit(architecture="90"), "architecture: expected int, got '90'"),
        (_edit(colour=1), "expected the fields"),
        (_edit(rows={}), "rows: expected a list"),
        (_edit(rows__0__tile__bh=3), r"rows\[0\].tile: bh: expected a power of two"),
        (_edit(rows__0__tile__warps=True), r"rows\[0\].tile.warps: expected int, got True"),
        (_edit(rows__0__tile__rows=0), r"rows\[0\].tile: rows: expected bh 1"),
        (_edit(rows__0__tile={"bh": 1}), r"rows\[0\].tile: expected the fields"),
        (_edit(rows__0__key__direction="backward"), r"rows\[0\].tile: expected the tile of a backward pass"),
        (_edit(rows__0__key__activation="tanh"), r"activation: expected one of None, relu"),
        (_edit(rows__0__key__geometry__stride=[1]), r"geometry.stride: expected a list of 2"),
        (_edit(rows__1__tile__factor__group=3), r"rows\[1\].tile: factor: group: expected a power of two"),
        (_edit(rows__1__tile__programs=0), r"programs: expected 1 or more, got 0"),
    ],
)  # fmt: skip
def test_a_bad_file_says_what_was_expected(edit, said, tmp_path):
    path = tmp_path / "tiles.json"
    tables.write(a_table(), path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(tables.TableError, match=said) as error:
        tables.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_strip_needs_room_for_all_channels():
    g = Trial(Problem.parse("forward 20 k3 5px b1 fp32"), "cpu").key.geometry
    strip = tiles.Tile(1, 16, 32, 32, 4, 2, rows=4)
    assert not tiles.fault(strip, g)
    assert "expected blocks that hold all 20 -> 20 channels" in tiles.fault(dataclasses.replace(strip, bo=16), g)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    tables.write(a_table(), path)
    old = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tables.write(a_table(device="other"), path)
    assert path.read_text() == old and list(tmp_path.iterdir()) == [path]


# The command.


def test_tune_adds_rows_and_replaces_those_of_the_same_problem(tmp_path):
    path = tmp_path / "tiles.json"
    first, second = a_table().rows
    found = {TINY: first, BACK: None}
    said = []
    assert tune.tune([TINY, BACK], path, a_table(rows=[]), found.get, said.append) == 1
    assert tables.read(path).rows == [first] and "  no tile gives the right result" in said
    again = dataclasses.replace(first, seconds=5e-7)
    table = tune.opened(path, tune.description("cpu"))
    assert tune.tune([TINY, BACK], path, table, {TINY: again, BACK: second}.get, said.append) == 0
    assert tables.read(path).rows == [again, second]
    assert tune.tune([TINY], path, table, {}.__getitem__, said.append, until=0.0) == 0
    assert said[-1] == f"{TINY.name}: not searched, no time left" and tables.read(path).rows == [again, second]
    with pytest.raises(tables.TableError, match="expected tiles for another"):
        tune.opened(path, dataclasses.replace(table, device="another"))


def test_candidates_are_ranked_by_the_model_without_a_gpu():
    def compile(problem, tiles_asked, indices):
        return compile_all(problem, tiles_asked, indices, wrong=tiles_asked[-1:] if len(tiles_asked) > 1 else ())

    for name in ("forward 64 k3 b1", "backward 64 k3 b1 relu", "backward 28 k3 b1 fp32"):
        for arch in configs.ARCHITECTURES:
            found = ranking.rank(Problem.parse(name), arch, compile)
            for part in dict.fromkeys(one.part for one in found):
                ranked = [one for one in found if one.part == part]
                seconds = [one.seconds for one in ranked if one.seconds is not None]
                assert seconds == sorted(seconds) and seconds[0] > 0 and sum(one.shipped for one in ranked) == 1
                assert ranked[-1].seconds is None and "SPILLS" in ranked[-1].line()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["forward 64 k3 green"], "got 'green'"),
        (["forward k3"], "expected channels"),
        (["forward 64 b0"], "expected batch of 1 or more"),
        (["forward linear 64 s2"], "expected no stride"),
        (["forward 64 merged rank3"], "expected no rank"),
        (["--passes", "0"], "--passes: expected 1 or more"),
        (["--out", "/nonexistent/tiles.json"], "--out: expected a folder that exists"),
        (["--offline", "90"], "TRITON_INTERPRET=1"),
    ],
)
def test_bad_input_ends_with_status_2(arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        status = tune.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2 and said in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "lorun_fast.kernels.tune"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and "expected a CUDA device, got none" in done.stderr


@pytest.mark.parametrize("problem", [p for p in problems.problems() if p.form != "merge"], ids=lambda p: p.name)
def test_problems_are_read_as_they_are_written(problem):
    assert Problem.parse(problem.name) == dataclasses.replace(problem, factors="")


def test_a_problem_can_say_everything():
    text = "backward linear 64-192 64px b3 fp16 mixed relu residual rank7"
    assert Problem.parse(text).name == text
