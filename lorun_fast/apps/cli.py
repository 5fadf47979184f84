"""The ``lorun-fast`` command: finds the subcommand, and turns what goes wrong into one line and an exit status.

Exit status: 0 done; 1 a bug (with traceback); 2 wrong input; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from lorun_fast._version import __version__
from lorun_fast.apps import models, progress, tasks
from lorun_fast.apps.errors import UserError, first_line
from lorun_fast.apps.runtime import keep_freed_memory

# Each is a module with add_arguments(parser) and run(args), imported only when it is asked for: of this package, or,
# for those in _OF_A_TASK, of the task's.
_COMMANDS = {
    "demo": "restore bundled pictures with a shipped network; pictures, scores, time",
    "measure": "images to simulated measurements (.npz)",
    "restore": "measurements (.npz) to images",
    "evaluate": "measure, restore and score images; PSNR and more, seconds, JSON",
    "train": "train a network",
    "export": "a network as an ONNX file or a program that runs without lorun_fast",
    "info": "this installation, and what a network's file holds",
}
_OF_A_TASK = ("demo", "measure", "evaluate")
# Import name of what the extra "apps" installs, by the name that people know it by.
_EXTRA = {
    "PIL": "Pillow",
    "h5py": "h5py",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "tqdm": "tqdm",
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and containers send it: what is half written is to vanish, as after an interrupt."""


def _terminate(*_) -> None:
    raise _Terminated


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other wrong input: one line, status 2."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """Refuses what it does not know, so that the message names the command's help, not the whole program's."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str):
        if "expected" not in message:
            message = f"expected the arguments of {self.prog} --help, got: {message}"
        raise UserError(message)


def build_parser(command: str | None = None, task: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of ``command`` (for this task) only: the others' modules are not imported."""
    parser = _Parser(
        prog="lorun-fast",
        description="Deep unfolding image restoration with one shared denoiser and low-rank stages.",
        epilog="lorun-fast COMMAND --help describes a command. Start with: lorun-fast demo",
    )
    parser.add_argument("--version", action="version", version=f"lorun-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in _COMMANDS.items():
        if name == command:
            module = _module(command, task)
            epilog = getattr(module, "EPILOG", None)
            description, prog = line, f"lorun-fast {name}"
            if name in _OF_A_TASK:
                description = f"{tasks.TITLES[task]}: {line}\n{_how_to_choose_a_task(name)}"
                prog += "" if name == "evaluate" or task == tasks.NAMES[0] else f" {task}"
            module.add_arguments(
                commands.add_parser(name, help=line, description=description, epilog=epilog, prog=prog)
            )
        else:
            commands.add_parser(name, help=line)
    return parser


def _how_to_choose_a_task(command: str) -> str:
    if command == "evaluate":
        return "The task is MODEL's: lorun-fast evaluate MODEL --help lists its options."
    others = ", ".join(f"lorun-fast {command} {name}" for name in tasks.NAMES[1:])
    return f"Other tasks: {others}; --help behind each lists its options."


def _module(command: str, task: str | None) -> ModuleType:
    if command in _OF_A_TASK:
        return tasks.command(task, command)
    return importlib.import_module(f"lorun_fast.apps.{command}")


def _task_of(command: str, words: list[str]) -> tuple[str, list[str]]:
    """The task that a command line is about, and what is left of it for the parser."""
    if command == "evaluate":
        return models.task_of(words), words
    if words and words[0] in tasks.NAMES:
        return words[0], words[1:]
    if command == "demo" and words and not words[0].startswith("-"):
        raise UserError(f"demo: expected one of the tasks {', '.join(tasks.NAMES)}, got {words[0]!r}")
    return tasks.NAMES[0], words


def _complete_streams() -> None:
    """stdout and stderr that were closed (>&-) swallow what is printed; names that stdout cannot show are escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process
    sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. argv: the arguments; None stands for the process's own."""
    if argv is None:
        argv = sys.argv[1:]
        # These concern the whole process, so only when it is ours.
        _complete_streams()
        keep_freed_memory()
        signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _run(list(argv))
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status
    except _Terminated:
        print("\nlorun-fast: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("\nlorun-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone (| head): nothing is wrong, but nothing can be flushed at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        package = _EXTRA.get((error.name or "").split(".")[0])
        if package is None:
            raise
        message = f"expected {package}, got no such package: pip install 'lorun-fast[apps]' (or '.[apps]' in a clone)"
    except OSError as error:
        message = first_line(error)
    print(f"lorun-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
    progress.note.cache_clear()  # once means once a command
    if "" in argv:  # as a path it would be the current folder
        raise UserError("expected arguments that are not empty, got '': is a variable of the shell not set?")
    command = argv[0] if argv and argv[0] in _COMMANDS else None
    task, words = None, argv[1:]
    if command in _OF_A_TASK:
        # Importing torch for a file's header and the task's module is the price of its own options and help.
        task, words = _task_of(command, words)
    try:
        args = build_parser(command, task).parse_args([*argv[:1], *words])
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    return _module(args.command, task).run(args) or 0
