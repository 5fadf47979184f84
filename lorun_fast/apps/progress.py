"""What a person sees on the terminal while a command works: bars and notes, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")


def bar(total: int, what: str, unit: str = "image") -> tqdm:
    """A progress bar; silent where stderr is not a terminal."""
    from tqdm import tqdm  # of the extra "apps", which `lorun-fast info` does without

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=None, leave=False, dynamic_ncols=True)


def over(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, under a bar."""
    with bar(len(items), what) as running:
        for item in items:
            yield item
            running.update()


@cache
def note(text: str) -> None:
    """One line that a user should see although nothing is wrong, once: files are read to check them and again for the
    work. Does not tear a running bar.
    """
    from tqdm import tqdm

    tqdm.write(f"lorun-fast: note: {text}", file=sys.stderr)
