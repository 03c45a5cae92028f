"""Work done ahead in threads and processes: order, memory that is used again, processes that are killed."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.decoding import AHEAD, Slots, from_processes, prefetch


@settings(max_examples=25)
@given(st.lists(st.integers(0, 99), max_size=60), st.integers(0, 9), st.integers(1, 4), st.integers(0, 60))
def test_prefetch_keeps_the_order_and_runs_a_bounded_way_ahead(numbers, ahead, threads, taken):
    started = []

    def load(number: int) -> int:
        started.append(number)
        return -number

    found = prefetch(load, numbers, ahead, threads)
    assert [next(found) for _ in range(min(taken, len(numbers)))] == [-n for n in numbers[:taken]]
    assert len(started) <= taken + ahead
    assert list(found) == [-n for n in numbers[taken:]]
    assert sorted(started) == sorted(numbers)


def counted(number, memory):
    """As many values as fit are written, more are handed over."""
    found = np.full((number, 2), number, np.uint8)
    if found.size > len(memory):
        return found
    memory[: found.size] = found.reshape(-1)
    return found.shape


def killed(killings, number, memory):
    """As `counted`, but the first to find a file of its number in the folder ends its process, and the file."""
    file = killings / str(number)
    if file.exists():
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return counted(number, memory)


@pytest.mark.parametrize("at", [[0], [39], [7, 20, 33]])
def test_killed_processes_are_replaced(tmp_path, at):
    for number in at:
        (tmp_path / str(number)).touch()
    for number, found in enumerate(from_processes(partial(killed, tmp_path), range(40), 50)):
        assert found.tolist() == [[number, number]] * number
    assert number == 39
    assert not list(tmp_path.iterdir())


def always_killed(number, memory):
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_image_that_kills_every_process_is_given_up():
    with pytest.raises(BrokenProcessPool):
        list(from_processes(always_killed, range(3), 50))
    assert len(list(from_processes(counted, range(3), 50))) == 3  # others are not harmed


def test_memory_of_processes_is_used_again_and_again():
    """More items than slots, arrays that fit and that do not; two users at once do not meet."""
    numbers = [n % 40 for n in range(3 * AHEAD)]
    first, second = (from_processes(counted, numbers, size) for size in (50, 70))
    for number, ours, theirs in zip(numbers, first, second, strict=True):
        assert ours.tolist() == theirs.tolist() == [[number, number]] * number
    stopped = from_processes(counted, numbers, 50)
    assert next(stopped).shape == (0, 2)
    stopped.close()
    slots = Slots(2, 0)
    assert slots.array(1, (0, 3)).shape == (0, 3)
    slots.close()
