"""That a call gives the same bits however many threads it has, and in two threads at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def _same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(_same(x, y) for x, y in zip(a, b, strict=True))


def check_threads(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    whole = call()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _same(call(), whole)
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: call(), range(8)):
            assert _same(found, whole)
