"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` to be written to, which takes its name when the block ends, and vanishes if it
    raises. A link is followed; permissions are those of the file that was there, else the process's usual ones.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe would be gone
        raise FileExistsError(f"{path}: expected a file to write, found what is none")
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes
    try:
        mode = (path if path.exists() else temporary).stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)  # some writers put a private file of their own in its place
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
