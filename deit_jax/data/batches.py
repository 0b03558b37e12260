"""From a source to batches of uint8 images: a pure function of (seed, step).

Position p of a run's endless stream of examples decides everything about the example there: which
image, which copy of it, and the random numbers of its augmentation. Batch s is the positions
[s B, (s + 1) B); a process reads the rows that its devices hold, its threads blocks of that. So a
run can start at any step, with any number of threads and processes, and meet the same bytes.
The pixels are those of a decoder (resize.py); another one's differ by rounding, hence a run keeps
the one that it began with.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import cv2
import numpy as np

from deit_jax.data import decode
from deit_jax.data.augment import make_augment
from deit_jax.data.resize import choose, resize_pillow
from deit_jax.data.sources import Source
from deit_jax.errors import UserError

log = logging.getLogger("deit_jax")

BLOCK = 48  # rows that a thread loads at a time; much fewer would cost Grain's overhead
SCRATCH = 3 << 20  # bytes for one decoded image, a million pixels; larger ones are allocated
MAX_SKIPS = 1000  # unreadable images in a row: the data set is damaged, not some files

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """Which image stands at each position: shuffled anew every epoch, copies side by side.

    An epoch has as many positions as whole batches fit in the data set; with `repeats` copies it
    meets 1 / repeats of the images (deit's RASampler, whose "300 epochs" are 100 passes).
    """

    num_images: int
    batch_size: int
    repeats: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; one at least, which then repeats images."""
        return max(1, self.num_images // self.batch_size)

    def shuffled(self):
        """Return the endless sequence of image indices, one random permutation after another.

        It is a grain.MapDataset.
        """
        import grain  # takes a second, and only who loads images needs it

        return grain.MapDataset.range(self.num_images).seed(self.seed).shuffle().repeat()

    def slot(self, position: int) -> int:
        """Return where in `shuffled()` the image at a position stands."""
        per_epoch = self.steps_per_epoch * self.batch_size
        epoch, within = divmod(position, per_epoch)
        passes = -(-per_epoch // (self.repeats * self.num_images))  # of a set smaller than a batch
        return epoch * passes * self.num_images + within // self.repeats


def offset_seed(seed: int, offset: int) -> int:
    """Return the seed of the data after `offset` rollbacks; far from those of neighbouring runs."""
    return (seed + offset * 0x9E3779B1) % 2**32 if offset else seed


def example_rng(seed: int, position: int) -> np.random.Generator:
    """Return the random numbers of one position; no other position shares them."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))


def example_rngs(seed: int) -> Callable[[int], np.random.Generator]:
    """Return `example_rng` of one seed, but ten times faster: each call ends the one before."""
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64))
    generator, state = np.random.Generator(bits), bits.state

    def at(position: int) -> np.random.Generator:
        state["state"]["key"][1] = position
        bits.state = state
        return generator

    return at


@runtime_checkable
class Batches(Protocol):
    """Batches by their number, each loaded in blocks that threads share out among themselves."""

    blocks: int

    def empty(self) -> Batch:
        """Return arrays for a batch, with any content."""
        ...

    def fill(self, step: int, block: int, batch: Batch) -> None:
        """Load one block of a batch, 0 … blocks - 1, into its rows."""
        ...


class TrainBatches:
    """Load step -> {"image": uint8 [b H W 3], "label": int32 [b]}, this process's rows.

    With `skip_unreadable` the next image in the epoch's order stands in for one that cannot be
    read; `unreadable` holds the names of those met so far.
    """

    def __init__(
        self,
        source: Source,
        order: EpochOrder,
        augment,
        image_size: int,
        rows: Sequence[int],
        decoder: str = "auto",
        skip_unreadable: bool = False,
    ):
        self._source, self._order, self._rows = source, order, rows
        self._config, self._image_size = augment, image_size
        self._indices = order.shuffled()
        self._augment = make_augment(augment.auto, augment.color_jitter)
        self._decoder, self._skip = choose(decoder), skip_unreadable
        self.unreadable: set[str] = set()
        self.blocks = -(-len(rows) // BLOCK)

    def __call__(self, step: int) -> Batch:
        """Return a whole batch."""
        return _whole(self, step)

    def empty(self) -> Batch:
        """Return arrays for a batch, with any content."""
        size = self._image_size
        return {
            "image": np.empty((len(self._rows), size, size, 3), np.uint8),
            "label": np.empty(len(self._rows), np.int32),
        }

    def fill(self, step: int, block: int, batch: Batch) -> None:
        """Decode, crop, flip and augment a block; copies of one image decode it once."""
        first = step * self._order.batch_size
        slot, rng_at = None, example_rngs(self._order.seed)
        scratch = np.empty(SCRATCH, np.uint8)
        for row in range(self._cut(first, block), self._cut(first, block + 1)):
            position = first + self._rows[row]
            if (new := self._order.slot(position)) != slot:
                slot = new
                name, decoded, label, resize = self._read(slot, scratch)
            with _naming(name):
                batch["image"][row] = self._view(decoded, rng_at(position), resize)
            batch["label"][row] = label

    def _cut(self, first: int, block: int) -> int:
        """Return the row where a block begins: about BLOCK a block, copies of an image together."""
        row = block * BLOCK
        rows, slot = self._rows, self._order.slot
        while 0 < row < len(rows) and slot(first + rows[row]) == slot(first + rows[row - 1]):
            row += 1
        return min(row, len(self._rows))

    def _read(self, slot: int, scratch: np.ndarray):
        for skipped in range(MAX_SKIPS):
            index = int(self._indices[slot + skipped])
            name = _name(self._source, index)
            try:
                with _naming(name):
                    example = self._source[index]
                    pixels = decode.read(example["image"], name, self._decoder, scratch)
                # Arrays are small and few: with Pillow, they look the same on every machine.
                array = isinstance(example["image"], np.ndarray)
                resize = resize_pillow if array else self._decoder.resize
                return name, pixels, example["label"], resize
            except UserError as error:
                if not self._skip:
                    raise
                if name not in self.unreadable:
                    self.unreadable.add(name)
                    log.warning("another image stands in: %s", error)
        raise UserError(f"{name}: not readable, nor are the {MAX_SKIPS - 1} images before it")

    def _view(self, image: np.ndarray, rng: np.random.Generator, resize) -> np.ndarray:
        c = self._config
        if c.crop == "simple":
            pixels = decode.simple_random_crop(image, self._image_size, rng, resize)
        else:
            height, width, _ = image.shape
            box = decode.random_box(width, height, rng, c.crop_scale, c.crop_ratio)
            pixels = decode.resized_crop(image, box, self._image_size, resize)
        if rng.random() < c.flip_prob:
            pixels = cv2.flip(pixels, 1)
        return self._augment(pixels, rng)


class EvalBatches:
    """Load batch i -> {"image", "label", "valid": bool [b]}; all examples valid once.

    With Pillow, whatever decodes for training, so that accuracies compare. No example is skipped.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        image_size: int,
        crop_ratio: float,
        rows: Sequence[int],
    ):
        self._source, self._batch_size, self._rows = source, batch_size, rows
        self._image_size, self._crop_ratio = image_size, crop_ratio
        self.blocks = -(-len(rows) // BLOCK)

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __call__(self, step: int) -> Batch:
        """Return a whole batch."""
        return _whole(self, step)

    def empty(self) -> Batch:
        """Return arrays for a batch, with any content."""
        size = self._image_size
        return {
            "image": np.empty((len(self._rows), size, size, 3), np.uint8),
            "label": np.empty(len(self._rows), np.int32),
            "valid": np.empty(len(self._rows), bool),
        }

    def fill(self, step: int, block: int, batch: Batch) -> None:
        """Decode, resize and crop; rows past the last example are black and not valid."""
        for row in range(block * BLOCK, min((block + 1) * BLOCK, len(self._rows))):
            index = step * self._batch_size + self._rows[row]
            batch["valid"][row] = valid = index < len(self._source)
            if not valid:
                batch["image"][row], batch["label"][row] = 0, 0
                continue
            name = _name(self._source, index)
            with _naming(name):
                example = self._source[index]
                image = decode.decode(example["image"], name)
                crop = decode.centre_crop(image, self._image_size, self._crop_ratio)
            batch["image"][row], batch["label"][row] = np.asarray(crop), example["label"]


def _name(source: Source, index: int) -> str:
    return f"{source.describe(index)} (example {index})"


@contextlib.contextmanager
def _naming(name: str):
    """Let an error that does not say which example it met say so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error


def _whole(batches: Batches, step: int) -> Batch:
    batch = batches.empty()
    for block in range(batches.blocks):
        batches.fill(step, block, batch)
    return batch


def usable_cores() -> int:
    """Return the cores this process may run on, which a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def load(batches: Batches, start: int, stop: int, threads: int, prefetch: int) -> Iterator[Batch]:
    """Iterate over batches start … stop - 1 in order, loaded ahead by threads.

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
    options = grain.ReadOptions(
        num_threads=min(threads or usable_cores(), ahead), prefetch_buffer_size=ahead
    )
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
