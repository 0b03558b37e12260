"""How many threads load small images fastest?

    python -m benchmarks.small_images [--threads=1,2,4,8] [--out=FILE.json]

DeiT's recipe on noise of several sizes that is in memory, shown at its own size: images a second,
and µs of all cores for an image. Of small images Python's own work, one thread at a time, is the
most; more threads wait for each other, and the waiting costs cores. deit_jax/data/loader.py has
what follows from it: its PYTHON_US, and data/batches.py's SHOWN_US, are the line that one thread's
µs make over the number of pixels, which is printed.
"""

import argparse
import contextlib
import datetime
import json
import time
from pathlib import Path

import numpy as np

from deit_jax.configs import base
from deit_jax.data.batches import TrainBatches
from deit_jax.data.loader import load, usable_cores, useful_threads
from deit_jax.data.order import EpochOrder
from deit_jax.data.sources.base import ArraySource

SIZES, IMAGES, TURNS = (32, 64, 96, 128, 160, 192, 224), 300, 3
BATCH = 48


def batches_of(size: int) -> TrainBatches:
    """Return batches of noise by DeiT's recipe."""
    images = np.random.default_rng(0).integers(256, size=(IMAGES, size, size, 3), dtype=np.uint8)
    source = ArraySource("noise", images, np.zeros(IMAGES, np.int32))
    augment = base.get_config().augment
    order = EpochOrder(IMAGES, BATCH, augment.repeats, 0)
    return TrainBatches(source, order, augment, size, range(BATCH))


def speed(batches: TrainBatches, threads: int, count: int) -> tuple[float, float]:
    """Return images a second, and µs of all cores for one."""
    with contextlib.closing(load(batches, 0, 2**31, threads, prefetch=8)) as loader:
        for _ in range(10):
            next(loader)
        began, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(loader)
        seconds, used = time.perf_counter() - began, time.process_time() - used
    return count * BATCH / seconds, 1e6 * used / (count * BATCH)


def main() -> None:
    """Measure, print and, if asked, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2,4,8")
    parser.add_argument("--out", help="write the figures to this file")
    options = parser.parse_args()
    choices = [int(text) for text in options.threads.split(",")]
    found = {"date": datetime.date.today().isoformat(), "cores": usable_cores(), "sizes": {}}
    for size in SIZES:
        batches, turns = batches_of(size), []
        count = max(8, 40 * 32 // size)
        turns = [[speed(batches, n, count) for n in choices] for _ in range(TURNS)]
        rates, costs = np.median(turns, axis=0).T.round().astype(int).tolist()
        chosen = useful_threads(batches.work_us(), usable_cores())
        found["sizes"][size] = {
            "images_per_second": dict(zip(choices, rates, strict=True)),
            "core_us": dict(zip(choices, costs, strict=True)),
            "chosen": chosen,
        }
        print(size, found["sizes"][size], flush=True)
    pixels = np.array(SIZES) ** 2
    one = [found["sizes"][size]["core_us"][choices[0]] for size in SIZES]
    slope, start = np.polyfit(pixels, one, 1)
    found["line"] = {"us": round(float(start), 1), "us_a_pixel": round(float(slope), 4)}
    print(found["line"])
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
