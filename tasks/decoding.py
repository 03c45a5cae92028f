"""Work done ahead of a model: in threads beside a CPU, in other processes beside a GPU.

In: a function and the items it takes, one after the other. Out: its results in order, computed before they are asked
for.
"""

import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import prod
from multiprocessing import get_context
from threading import Thread
from typing import Any

import numpy as np

DECODERS = 16
"""Processes that decode for one GPU, at most: a photo takes a CPU some 4 ms, and a GPU a third of one."""
AHEAD = 2 * DECODERS
"""Results that they compute before they are asked for."""
RETRIES = 3
"""How often they are replaced while one part is made: the system may end the one that takes the most memory."""
Written = tuple[int, ...] | np.ndarray
"""Shape of the array that a process wrote into the memory it was given, or one that did not fit there."""


def prefetch(
    load: Callable[[Any], Any], items: Sequence, ahead: int, threads: int = 2, pool: Executor | None = None
) -> Generator[Any, None, None]:
    """load(item) for every item, in order, computed in threads, or by the pool, up to `ahead` results before they are
    asked for. Without threads each is computed when it is asked for."""
    if threads == 0:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(threads) if pool is None else nullcontext(pool) as pool:
        waiting: deque[Future] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # nobody asks for the others any longer; when this ends, none is being computed
            wait([future for future in waiting if not future.cancel()])


def from_processes(load: Callable[[Any, np.ndarray], Written], items: Sequence, size: int) -> Iterator[np.ndarray]:
    """The uint8 array that load(item, memory) makes of every item, in order, in other processes; each is there until
    the next one is asked for.

    `memory`, uint8 [size], is shared with them: to take a batch of 19 MB out of a pipe costs the process that feeds the
    GPU 21 ms, to copy it out of shared memory 2. Where a process is killed, all are replaced and go on with what was
    not read yet; raises BrokenProcessPool where that happens more than RETRIES times.
    """
    with closing(Slots(AHEAD + 1, size)) as slots:
        left, deaths = deque((number % slots.num, item) for number, item in enumerate(items)), 0
        while left:
            pool = processes()
            found = prefetch(partial(_load_there, load, slots.place), tuple(left), AHEAD, pool=pool)
            with closing(found):  # before the memory, whose path would soon be another file's
                try:
                    for written in found:
                        slot, _ = left.popleft()
                        yield written if isinstance(written, np.ndarray) else slots.array(slot, written)
                except BrokenProcessPool:
                    deaths += 1
                    pool.shutdown()  # none of them writes into the memory any longer
                    if pool is processes():
                        processes.cache_clear()
                    if deaths > RETRIES:
                        raise


@dataclass(frozen=True)
class Place:
    """Where another process finds the memory of this one."""

    path: str
    size: int
    """Bytes of a slot."""
    inode: int
    """Paths come again, for other files."""

    def array(self, memory: mmap.mmap, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(memory, np.uint8, prod(shape), slot * self.size).reshape(shape)


class Slots:
    """Memory in equal slots that other processes write into.

    It has no name in /dev/shm, of which a container has 64 MB unless told otherwise, and is gone with its last user.
    """

    def __init__(self, num: int, size: int) -> None:
        self.num, self.file = num, os.memfd_create("axonym")
        os.ftruncate(self.file, max(num * size, 1))
        self.memory = mmap.mmap(self.file, 0)
        self.place = Place(f"/proc/{os.getpid()}/fd/{self.file}", size, os.fstat(self.file).st_ino)

    def array(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.place.array(self.memory, slot, shape)

    def close(self) -> None:
        os.close(self.file)


@lru_cache(maxsize=1)
def _mapped(place: Place) -> mmap.mmap:
    with open(place.path, "r+b") as file:
        assert os.fstat(file.fileno()).st_ino == place.inode, "the memory is gone, and its path another file's"
        return mmap.mmap(file.fileno(), 0)


def _load_there(load: Callable[[Any, np.ndarray], Written], place: Place, numbered: tuple[int, Any]) -> Written:
    slot, item = numbered
    return load(item, place.array(_mapped(place), slot, (place.size,)))


@cache
def processes() -> ProcessPoolExecutor:
    """They work until this process ends."""
    return ProcessPoolExecutor(min(os.cpu_count() or 1, DECODERS), get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """However the parent ends: killed, it could not tell."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
