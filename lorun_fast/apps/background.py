"""Reading and writing beside the network: a thread prepares what comes next, others save what is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], make: Callable[[T], U], threads: int = 1) -> Iterator[tuple[T, U]]:
    """(item, make(item)) in order; so many of the next items are made in threads while the caller works on this one.

    What make raises is raised where its item's turn comes.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[T, Future[U]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(make, item)))
            if len(waiting) > threads:
                item, made = waiting.popleft()
                yield item, made.result()
        for item, made in waiting:
            yield item, made.result()


class Workers:
    """Threads that run calls whose results nobody needs, at most ``most`` calls waiting; a context manager.

    The first error of a call is raised by a later submit() or at the end of the block.
    """

    def __init__(self, threads: int, most: int):
        self.pool = ThreadPoolExecutor(threads)
        self.most = most
        self.waiting: deque[Future] = deque()

    def submit(self, call: Callable, *args) -> None:
        while len(self.waiting) >= self.most or (self.waiting and self.waiting[0].done()):
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(call, *args))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind, *_) -> None:
        self.pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self.waiting:
                future.result()
