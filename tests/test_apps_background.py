"""Work beside the network: in order, bounded, and no error lost."""

from __future__ import annotations

import threading

import pytest

from lorun_fast.apps import background


def test_the_next_item_is_made_while_this_one_is_used():
    made, started = [], threading.Event()

    def make(item):
        made.append(item)
        if item == 1:
            started.set()
        return 10 * item

    items = background.ahead(iter(range(3)), make)
    assert next(items) == (0, 0)
    assert started.wait(10)
    assert list(items) == [(1, 10), (2, 20)]
    assert made == [0, 1, 2]
    assert list(background.ahead([], make)) == []


def test_an_error_comes_at_its_items_turn():
    items = background.ahead([1, 0], lambda n: 1 / n)
    assert next(items) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_all_calls_are_made_and_few_wait():
    done, gate = [], threading.Event()
    with background.Workers(1, most=2) as workers:
        workers.submit(gate.wait)
        workers.submit(done.append, 1)
        threading.Timer(0.05, gate.set).start()
        workers.submit(done.append, 2)  # has to wait for the gate: two calls are waiting
        assert gate.is_set()
        for n in range(3, 8):
            workers.submit(done.append, n)
    assert done == [1, 2, 3, 4, 5, 6, 7]


def test_an_error_of_a_call_is_raised():
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), background.Workers(2, most=4) as workers:
        workers.submit(fail)


def test_an_error_of_the_block_wins():
    with pytest.raises(KeyError), background.Workers(1, most=4) as workers:
        workers.submit(int, "no number")
        raise KeyError("first")
