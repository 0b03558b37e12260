"""Batches loaded ahead by threads, in order."""

import os
import sys
import threading
from collections.abc import Callable, Generator

import cv2

from deit_jax.data.batches import Batch, Batches


def usable_cores() -> int:
    """Return the cores this process may run on, which a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# µs that Python itself has for an image, under its lock. benchmarks/small_images.py measures it.
PYTHON_US = 180.0


def useful_threads(work_us: float, cores: int) -> int:
    """Return how many threads load faster than fewer would, one a core at most.

    `work_us` is what an image takes outside of Python's lock. Of small images that is little: their
    threads would wait for each other, and take the cores from whoever trains.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return cores
    return max(1, round(min(work_us / PYTHON_US, cores)))


class _Memory:
    """Batches' arrays, given out again once nobody refers to them, as fresh ones must be cleared.

    A reference is any: a view, or a JAX array on the CPU, which shares the memory.
    """

    def __init__(self, allocate: Callable[[], Batch]):
        self._allocate, self._batches = allocate, [allocate()]
        self._idle = self._references(self._batches[0])

    @staticmethod
    def _references(batch: Batch) -> list[int]:
        return [sys.getrefcount(array) for array in batch.values()]

    def take(self) -> Batch:
        """Return arrays that nobody else has."""
        for batch in self._batches:
            if self._references(batch) == self._idle:
                return dict(batch)
        self._batches.append(self._allocate())
        return dict(self._batches[-1])


def load(
    batches: Batches, start: int, stop: int, threads: int, prefetch: int
) -> Generator[Batch, None, None]:
    """Iterate over batches start … stop - 1 in order, loaded ahead by threads; 0 = what helps.

    The arrays of a batch may be used for a later one once nothing refers to them.
    """
    import grain

    cv2.setNumThreads(0)  # these threads are the parallelism; OpenCV's own would fight them
    # A thread back from decoding waits so long for the interpreter; by default 5 ms, six images.
    sys.setswitchinterval(1e-4)
    memory, under_way, lock = _Memory(batches.empty), {}, threading.Lock()

    def fill(number: int) -> int:
        step, block = divmod(number, batches.blocks)
        with lock:
            if step not in under_way:
                under_way[step] = memory.take()
            batch = under_way[step]
        batches.fill(step, block, batch)
        return number

    blocks = batches.blocks
    ahead = prefetch * blocks
    threads = threads or useful_threads(batches.work_us(), usable_cores())
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    numbers = grain.MapDataset.range(start * blocks, stop * blocks)
    loader = iter(numbers.map(fill).to_iter_dataset(options))
    try:
        for number in loader:
            if (number + 1) % blocks == 0:
                with lock:
                    batch = under_way.pop(number // blocks)
                yield batch
                del batch  # or its memory would not be free while the next is waited for
    finally:
        loader.close()  # or the interpreter would first load what is queued, and exit late
