"""Work beside the network: in order, bounded, and no error lost."""

from __future__ import annotations

import itertools
import threading
import time

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


def test_several_items_are_made_at_once():
    together = threading.Barrier(3)

    def make(item):
        together.wait(10)
        return -item

    assert list(background.ahead(range(6), make, threads=3)) == [(n, -n) for n in range(6)]


def test_an_error_comes_at_its_items_turn():
    items = background.ahead([1, 0], lambda n: 1 / n)
    assert next(items) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_nothing_more_is_made_when_the_loop_ends():
    """The one that is being made is waited for, so that no thread outlives the loop."""
    made = []
    with pytest.raises(KeyboardInterrupt):
        for _item, _ in background.ahead(itertools.count(), made.append):
            raise KeyboardInterrupt
    assert made == [0, 1]


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_of_the_block_lets_the_running_call_end_and_cancels_those_that_wait(error):
    done, running, submitted = [], threading.Event(), threading.Event()
    workers = background.Workers(1, most=4)

    def until_the_next_is_cancelled():
        running.set()
        submitted.wait()
        for _ in range(1000):
            if workers.waiting[1].cancelled():
                break
            time.sleep(0.01)
        done.append("the running one")

    with pytest.raises(error), workers:
        workers.submit(until_the_next_is_cancelled)
        for n in range(3):
            workers.submit(done.append, n)
        running.wait()
        submitted.set()
        raise error
    assert done == ["the running one"]
    assert [future.cancelled() for future in workers.waiting] == [False, True, True, True]


def test_an_error_of_a_call_ends_the_block():
    done = []
    with pytest.raises(ZeroDivisionError), background.Workers(1, most=4) as workers:
        workers.submit(lambda: 1 / 0)
        workers.waiting[0].exception()  # returns when the call has failed
        workers.submit(done.append, 1)
    assert done == []
