"""Batches made ahead come in order, fail in their place, never hang the loop, and leave no thread behind."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from gbla_rec.training.prefetch import Prefetcher

pytestmark = pytest.mark.timeout(30)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_at_most_depth_and_one_ahead() -> None:
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    with Prefetcher(count, depth=3) as items:
        taken = []
        for number in items:
            taken.append(number)
            assert len(made) <= len(taken) + 3 + 1
            if number == 50:
                break
        assert taken == list(range(51))
        # it goes on while nobody asks, and stops there
        deadline = time.monotonic() + 10
        while len(made) < 51 + 3 + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(made) == 51 + 3 + 1
    assert not prefetch_threads()


def test_an_error_comes_in_its_place_and_every_call_after_it_ends() -> None:
    def fail_at_three() -> Iterator[int]:
        yield from range(3)
        raise ValueError("the fourth batch")

    with Prefetcher(fail_at_three, depth=8) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="the fourth batch"):
            next(items)
        assert list(items) == []
    assert not prefetch_threads()


def test_an_error_at_the_start_reaches_the_loop() -> None:
    def refuse() -> None:
        raise RuntimeError("no such device")

    with Prefetcher(lambda: iter([1]), depth=1, start=refuse) as items, pytest.raises(RuntimeError, match="no such device"):
        next(items)


def test_the_end_frees_a_thread_that_waits_for_room() -> None:
    with pytest.raises(KeyError), Prefetcher(itertools.count, depth=1) as items:
        next(items)
        raise KeyError
    assert not prefetch_threads()


def test_time_waited_is_that_of_slow_items_alone() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.2)
        yield from range(2)

    with Prefetcher(slow, depth=4) as items:
        next(items)
        assert 0.1 < items.seconds_waited < 5
        time.sleep(0.2)
        before = items.seconds_waited
        next(items)
        assert items.seconds_waited - before < 0.1
