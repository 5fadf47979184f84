"""The files that folders stand for, output files that are complete or absent, and names that do not collide."""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorun_fast._files import complete_file
from lorun_fast.apps.errors import UserError
from lorun_fast.apps.progress import note

_LONGEST = 255  # of a file name, in bytes
# In an output folder: SHA-256 and name of every file that was written into it, as sha256sum prints them.
_WRITTEN = ".lorun-fast"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def find(arguments: Sequence[Path], suffixes: Collection[str], what: str, one: str, hint: str = "") -> list[Path]:
    """The files that these files and folders name, each once; folders in alphabetical order, not below.

    suffixes: of the files that a folder stands for, lower case; others in it are left out with a note, hidden ones
        without. what, one: what the files are, for messages ("images", "an image"). hint: said where a folder has none.
    Raises UserError for a name that does not exist, a folder that cannot be read and one without such files.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        try:
            paths = sorted(p for p in argument.iterdir() if _names_a_file(p)) if argument.is_dir() else [argument]
        except OSError as error:
            raise UserError(f"expected a readable folder, got {argument}: {_reason(error)}") from error
        if argument.is_dir():
            paths = [p for p in paths if not p.name.startswith(".")]
            others = [p.name for p in paths if p.suffix.lower() not in suffixes]
            paths = [p for p in paths if p.suffix.lower() in suffixes]
            if not paths:
                got = f"{len(others)} other files" if others else "no files"
                raise UserError(f"expected {what} in {argument}, got {got}{hint}")
            if others:
                shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
                note(f"{argument}: skipped {len(others)} files that are not {what}: {shown}")
        elif not argument.exists():
            raise UserError(f"expected {one} or a folder of {what}, got {argument}: no such file")
        for path in paths:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files with these suffixes in a folder and all below it, in a fixed order.

    Hidden files and folders are left out, and the picture that a training run draws in its own folder. Raises UserError
    for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"expected a readable folder, got {error.filename}: {_reason(error)}") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        drawn = "curve.png" if {"config.json", "log.csv"} <= set(names) else None
        paths = [Path(place, name) for name in names if not name.startswith(".") and name != drawn]
        found += [path for path in paths if path.suffix.lower() in suffixes and _names_a_file(path)]
    return sorted(found)


def _names_a_file(path: Path) -> bool:
    """Whether it is one, or a link to one that is gone: that has to be told, not left out."""
    return path.is_file() or (path.is_symlink() and not path.exists())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a UserError that names ``path`` of an OSError of the block, which writes it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"expected to write {path}, got: {_reason(error)}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name ``path`` when the block ends, and vanishes if it raises.

    What was there before stays until then. A link is followed; what is no file (/dev/stdout) is written to as it
    is. A folder of :func:`make_outputs` notes the file. Raises UserError when the file cannot be written.
    """
    with writing(path):
        if written_in_place(path):
            with path.open("wb") as f:
                yield f
            return
        with complete_file(path) as temporary, temporary.open("wb") as f:
            yield f
        written = path.parent / _WRITTEN
        if written.exists():
            with written.open("a", encoding="utf-8", errors="surrogateescape") as f:
                f.write(f"{_mark(path)}\n")


def written_in_place(path: Path) -> bool:
    """Whether it is there and no file to be replaced, but a terminal, a pipe or another device."""
    return path.exists() and (path.is_relative_to("/dev") or not path.is_file())


def _mark(path: Path) -> str:
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"


def check_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises UserError unless a file of this name could be written, before anything costly starts.

    inputs: what is read, and is not to be replaced.
    """
    if path.is_dir():
        raise UserError(f"expected a file to write, got the folder {path}")
    if written_in_place(path):
        return
    if path.resolve() in {p.resolve() for p in inputs}:
        raise UserError(f"expected another file to write than those that are read, got {path}")
    if not path.parent.is_dir():
        raise UserError(f"expected an existing folder for {path.name}, got {path.parent}")
    _try_writing(path.parent)


def make_folder(path: Path) -> None:
    """Creates the folder where needed. Raises UserError unless files can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected a folder to write into, got {path}: {_reason(error)}") from error
    _try_writing(path)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """--overwrite."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files in DIR also where lorun-fast did not write them"
    )


def make_outputs(folder: Path, names: Sequence[str], overwrite: bool, others: Iterable[Path] = ()) -> None:
    """Creates the folder, where needed, for files of these names, which :func:`replacing` then notes in it.

    others: what the command reads, or writes by another option. Raises UserError where a name is one of them or,
    unless ``overwrite``, a file that is not as a command left it there, and unless files can be written there.
    """
    check_lengths(names)
    make_folder(folder)
    written = folder / _WRITTEN
    try:
        known = set(written.read_text("utf-8", "surrogateescape").splitlines()) if written.exists() else set()
        taken = {p.resolve() for p in others}
        for path in (folder / name for name in names):
            if path.resolve() in taken:
                raise UserError(f"expected another folder to write into, got {folder}: {path.name} is in use")
            if path.exists() and not overwrite and (not path.is_file() or _mark(path) not in known):
                want = "a folder without files of others (--overwrite replaces them)"
                raise UserError(f"expected {want}, got {folder} with {path.name}")
        written.touch()
    except OSError as error:
        raise UserError(f"expected a folder to write into, got {folder}: {_reason(error)}") from error


def _try_writing(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"expected a folder to write into, got {folder}: {_reason(error)}") from error


def check_lengths(names: Sequence[str]) -> None:
    """Raises UserError for a file name that is longer than file systems take, before anything is written."""
    for name in names:
        length = len(os.fsencode(name))
        if length > _LONGEST:
            raise UserError(f"expected names of at most {_LONGEST} bytes, got {length}: {name[:40]!r}...")


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name without suffix for each path, all different also where upper and lower case are the same.

    The stem where it is the only one; else stem_suffix (a.png and a.jpg become a_png and a_jpg); else numbered.
    """
    stems = [path.stem for path in paths]
    count: dict[str, int] = {}
    for stem in stems:
        count[stem.lower()] = count.get(stem.lower(), 0) + 1
    taken = {stem.lower() for stem in stems if count[stem.lower()] == 1}
    names = []
    for path, stem in zip(paths, stems, strict=True):
        if count[stem.lower()] == 1:
            names.append(stem)
            continue
        first = candidate = f"{stem}_{path.suffix[1:]}" if path.suffix else stem
        number = 2
        while candidate.lower() in taken:
            candidate = f"{first}_{number}"
            number += 1
        taken.add(candidate.lower())
        names.append(candidate)
    return names
