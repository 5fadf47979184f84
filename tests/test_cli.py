"""The lorun-fast command: finding subcommands, exit status, interrupts, missing packages, a real process."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from apps_help import accepted, contents, picture, refused, tiny_network

from lorun_fast import _native
from lorun_fast.apps import restoring
from lorun_fast.apps.cli import main
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.files import check_file, replacing
from lorun_fast.ops import _backends


@pytest.mark.parametrize("command", ["demo", "measure", "restore", "evaluate", "train", "export", "info"])
def test_every_command_has_help(command, capsys):
    text = accepted(capsys, command, "--help")
    assert text.startswith(f"usage: lorun-fast {command}")
    assert command in accepted(capsys, "--help")


def test_version(capsys):
    from lorun_fast._version import __version__

    assert accepted(capsys, "--version") == f"lorun-fast {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["--vers"],
        ["measure"],
        ["measure", "a.png", "-o", "y.npz"],
        ["measure", "a.png", "-o", "y.npz", "--ratio", "0"],
        ["measure", "a.png", "-o", "y.npz", "--ratio", "quarter"],
        ["measure", "a.png", "-o", "y.npz", "--ratio", "25", "--phi", "p.npy"],
        ["measure", "a.png", "-o", "y.npz", "--ratio", "25", "--noise", "-1"],
        ["measure", "a.png", "-o", "y.npz", "--ratio", "25", "--noise", "nan"],
        ["measure", "a.png", "-o", "y.npz", "--ratio", "25", "--seed", "-1"],
        ["restore", "y.npz", "-o", "out", "--dtype", "fp8"],
        ["restore", "y.npz", "-o", "out", "--batch", "0"],
        ["restore", "y.npz", "-o", "out", "--threads", "two"],
        ["demo", "sr3"],
        ["info", "cs-25", "more"],
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *arguments)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["info", "--ratio", "25"], "lorun-fast info"),
        (["measure", "a.png", "--ratio", "25", "-o", "y.npz", "--batch", "3"], "lorun-fast measure"),
        (
            ["measure", "sr", "a.png", "--gaussian", "1", "--scale", "2", "-o", "y.npz", "--json"],
            "lorun-fast measure sr",
        ),
        (["train", "cs", "--data", "a", "-o", "b", "--kernels", "k.npy"], "lorun-fast train cs"),
    ],
)
def test_an_unknown_option_names_the_commands_help(arguments, program, capsys):
    assert f"expected the arguments of {program} --help, got: unrecognized arguments: --" in refused(capsys, *arguments)


@pytest.mark.parametrize("bug", [ValueError("a bug"), ModuleNotFoundError("a bug", name="nobodys")])
def test_a_bug_keeps_its_traceback(bug, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise bug

    monkeypatch.setattr(restoring, "measure", broken)
    picture(tmp_path / "a.png")
    with pytest.raises(type(bug), match="a bug"):
        main(["measure", str(tmp_path / "a.png"), "--ratio", "25", "--gaussian", "-o", str(tmp_path / "y.npz")])


def test_a_missing_package_names_the_extra(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "lorun_fast.apps.tasks.cs.demo", raising=False)
    monkeypatch.setitem(sys.modules, "skimage", None)
    line = refused(capsys, "demo")
    assert "scikit-image" in line and "lorun-fast[apps]" in line


def test_an_interrupt_leaves_complete_files_only(tmp_path, capsys, monkeypatch):
    model = tiny_network(tmp_path / "net.safetensors")
    for name in "abc":
        picture(tmp_path / "photos" / f"{name}.png", seed=ord(name))
    y, out = tmp_path / "y.npz", tmp_path / "out"
    accepted(capsys, "measure", tmp_path / "photos", "--model", model, "-o", y)
    out.mkdir()
    (out / "b.png").write_bytes(b"before")
    command = ["restore", str(y), "-o", str(out), "--model", str(model)]
    calls = []
    real = restoring.restore

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(restoring, "restore", interrupted)
    assert main([*command, "--overwrite"]) == 130
    captured = capsys.readouterr()
    assert captured.err.strip() == "lorun-fast: interrupted"
    after = contents(out)
    assert sorted(after) == ["a.png", "b.png"]
    assert after["b.png"] == b"before"
    assert after["a.png"].endswith(b"IEND\xaeB`\x82")
    assert "b.png" in refused(capsys, *command)  # which was not written, unlike a.png
    (out / "b.png").unlink()
    accepted(capsys, *command)


def test_an_interrupt_while_writing_leaves_no_file(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "out").mkdir()

    def interrupted(f, **_arrays):
        f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    command = [
        "measure",
        str(tmp_path / "photos"),
        "--ratio",
        "25",
        "--gaussian",
        "-o",
        str(tmp_path / "out" / "y.npz"),
    ]
    assert main(command) == 130
    assert contents(tmp_path / "out") == {}


def test_a_variable_of_the_shell_that_is_not_set(tmp_path, capsys, monkeypatch):
    """As a path an empty argument is the current folder, into which `restore y.npz -o "$OUT"` would write."""
    monkeypatch.chdir(tmp_path)
    for command in (("restore", "y.npz", "-o", ""), ("measure", "", "--ratio", "25", "-o", "y.npz"), ("",)):
        assert "expected arguments that are not empty, got ''" in refused(capsys, *command)


def test_a_process_that_is_terminated_while_writing_leaves_no_file(tmp_path):
    """By default SIGTERM ends Python at once, and the temporary file stays."""
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "out").mkdir()
    script = """
import os, signal, sys
import numpy as np
from lorun_fast.apps.cli import main

def terminated(f, **_arrays):
    f.write(b"half")
    os.kill(os.getpid(), signal.SIGTERM)

np.savez = terminated
sys.exit(main())
"""
    command = ["measure", tmp_path / "photos", "--ratio", "25", "--gaussian", "-o", tmp_path / "out" / "y.npz"]
    process = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert process.returncode == 143 and process.stderr.strip() == "lorun-fast: terminated"
    assert contents(tmp_path / "out") == {}


def test_info_describes_a_network(tmp_path, capsys):
    model = tiny_network(tmp_path / "net.safetensors")
    text = accepted(capsys, "info", model)
    assert "block_cs_step" in text
    assert "25 % (16 of 64), 8x8 blocks, fixed Phi" in text
    assert "1, 0.7" in text
    assert "ResUNet" in text


def test_info_describes_measurements(tmp_path, capsys):
    y = np.arange(12, dtype=np.float32).reshape(3, 4)
    y[0, 0] = np.nan
    np.savez(tmp_path / "y.npz", y=y, name=np.array(["a"]), noise=0.25)
    text = accepted(capsys, "info", tmp_path / "y.npz")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("  ")}
    assert rows["y"] == "3 x 4 float32 1 to 11, mean 6 (1 NaN or infinite)"
    assert (rows["name"], rows["noise"]) == ("1 <U1 a", "1 float64 0.25")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "y.npz").read_bytes()[:100])
    assert "expected a measurement file (.npz)" in refused(capsys, "info", tmp_path / "bad.npz")


def test_info_of_a_file_of_many_arrays(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **{f"value{i}": i for i in range(30)})
    text = accepted(capsys, "info", tmp_path / "other.npz")
    assert "value23 " in text and "value24 " not in text and "and 6 more" in text


def test_a_task_stands_for_its_shipped_network_and_before_its_options(tmp_path, capsys):
    picture(tmp_path / "photos" / "a.png", 20, 28)
    by_task = accepted(capsys, "evaluate", "cs", tmp_path / "photos")
    by_name = accepted(capsys, "evaluate", "cs-25", tmp_path / "photos")
    assert by_task.split("seconds")[0] == by_name.split("seconds")[0]
    accepted(capsys, "measure", "cs", tmp_path / "photos", "--ratio", "25", "-o", tmp_path / "a.npz")
    accepted(capsys, "measure", tmp_path / "photos", "--ratio", "25", "-o", tmp_path / "b.npz")
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a.files == b.files and all(np.array_equal(a[key], b[key]) for key in a.files)
    assert accepted(capsys, "restore", tmp_path / "a.npz", "-o", tmp_path / "out").count("cs-25") == 1


def test_names_that_are_no_utf8(tmp_path):
    """A strict stdout and JSON show them, and a measurement file, whose names restore could not use, is not made."""
    model = tiny_network(tmp_path / "net.safetensors")
    picture(tmp_path / "a.png", 20, 28)
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "a.png").rename(tmp_path / name)
    program = [sys.executable, "-m", "lorun_fast.apps"]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    command = [*program, "evaluate", model, name, "--json", "s.json", "--save", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9.png" in done.stdout
    assert json.loads((tmp_path / "s.json").read_text("utf-8"))["images"][0]["name"] == name
    command = [*program, "measure", name, "--ratio", "25", "--gaussian", "-o", "y.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "name: expected a plain file name, got 'caf\\udce9'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status"), [("--version >&-", 0), ("restore 2>&-", 2), ("--version >&- 2>&-", 0)]
)
def test_streams_that_are_closed(arguments, status):
    command = f"{shlex.quote(sys.executable)} -m lorun_fast.apps {arguments}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_as_a_process(tmp_path):
    """The allocator setting, the true streams and the true exit status."""
    model = tiny_network(tmp_path / "net.safetensors")
    picture(tmp_path / "photos" / "a.png", 20, 28)
    command = [sys.executable, "-m", "lorun_fast.apps", "evaluate", str(model), str(tmp_path / "photos")]
    done = subprocess.run([*command, "--json", "s.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a.png" in done.stdout
    assert len(json.loads((tmp_path / "s.json").read_text())["images"]) == 1
    wrong = subprocess.run([*command, "--json", "no/s.json"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.splitlines()[-1] == "lorun-fast: error: expected an existing folder for s.json, got no"
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("variable", ["LORUN_BACKEND", "LORUN_CPU"])
def test_a_wrong_environment_is_one_line(variable, tmp_path):
    """The package refuses it at import, before the command's own code can run."""
    environment = {**os.environ, "LORUN_BACKEND": "", variable: "fastest"}  # an empty one is none
    script = Path(sys.executable).with_name("lorun-fast")
    for command in ([sys.executable, "-m", "lorun_fast.apps"], [str(script)]):
        done = subprocess.run([*command, "info"], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(
            rf"lorun-fast: error: {variable}: expected one of [a-z0-9, ]+, got 'fastest'\n", done.stderr
        )
    program = "try:\n import lorun_fast\nexcept ValueError as e:\n print(e)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(f"{variable}: expected one of ") and done.returncode == 0, done.stderr
    # Somebody's own module, of any name, may catch it.
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text(program)
    environment["PYTHONPATH"] = str(Path(_native.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "lorun_fast.apps"], cwd=tmp_path, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{variable}: expected one of ") and done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", ["benchmarks", "benchmarks.training_memory", "lorun_fast.kernels.tune", "lorun_fast.kernels.check"]
)
def test_a_wrong_environment_is_one_line_in_the_tools_too(module):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "LORUN_BACKEND": "fastest"}
    done = subprocess.run([sys.executable, "-m", module], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"lorun-fast: error: LORUN_BACKEND: expected one of [a-z, ]+, got 'fastest'\n", done.stderr)


def test_a_backend_that_cannot_run_here_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    model = tiny_network(tmp_path / "net.safetensors")
    picture(tmp_path / "photos" / "a.png")
    accepted(capsys, "measure", tmp_path / "photos", "--model", model, "-o", tmp_path / "y.npz")
    missing = dataclasses.replace(_backends.BACKENDS["lora_conv2d"]["packed"], missing=lambda: "no such instructions")
    monkeypatch.setitem(_backends.BACKENDS["lora_conv2d"], "packed", missing)
    monkeypatch.setattr(_native, "WISH", "packed")
    for command in (
        ["restore", tmp_path / "y.npz", "-o", tmp_path / "out", "--model", model, "--device", "cpu"],
        ["train", "cs", "--data", tmp_path / "photos", "-o", tmp_path / "out"],
    ):
        line = refused(capsys, *command)
        assert line.endswith("LORUN_BACKEND=packed: expected a backend that runs here, got none: no such instructions")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("task", "model"), [("cs", "sr"), ("cs", "cassi"), ("sr", "cs-25"), ("cassi", "cs-25")])
def test_a_demo_shows_its_own_task(task, model, tmp_path, capsys):
    line = refused(capsys, "demo", task, "--model", model, "-o", tmp_path / "out")
    assert f"--model: expected a network for task {task!r}, got {model} for" in line
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_no_files(tmp_path):
    """A link is followed, and what is no file is written to and stays what it is."""
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with replacing(link) as f:
        f.write(b"one")
    assert link.is_symlink() and target.read_bytes() == b"one"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    with replacing(pipe) as f:
        f.write(b"two")
    reader.join()
    assert got == [b"two"] and pipe.is_fifo()


def test_a_device_is_written_whatever_its_folder(tmp_path, monkeypatch):
    """/dev takes no new files of users, but /dev/null is there already."""

    def refuses(dir):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    check_file(Path("/dev/null"))
    with pytest.raises(UserError, match="expected a folder to write into"):
        check_file(tmp_path / "s.json")


def test_a_reader_that_leaves_early(monkeypatch):
    """As head does: no message, status 0, and nothing left to fail when the stream is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["--version"]) == 0
    stream.close()
