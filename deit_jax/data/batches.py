"""From a source to batches of uint8 images: a pure function of (seed, step).

Position p of a run's endless stream of examples decides everything about the example there: which
image, which copy of it, and the random numbers of its augmentation. Batch s is the positions
[s B, (s + 1) B); a process reads the rows that its devices hold, its threads blocks of that. So a
run can start at any step, with any number of threads and processes, and meet the same bytes.
The pixels are those of a decoder (decoders.py); another one's differ by rounding, hence a run keeps
the one that it began with.
"""

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from PIL import Image

from deit_jax.data import decode
from deit_jax.data.augment import make_augment
from deit_jax.data.decode import PLAIN, Reading
from deit_jax.data.decoders import choose
from deit_jax.data.order import EpochOrder, example_rngs
from deit_jax.data.sources.base import Source, label_room
from deit_jax.data.view import EvalView, random_view
from deit_jax.errors import UserError
from deit_jax.shapes import Size, sides

log = logging.getLogger("deit_jax")

BLOCK = 48  # rows that a thread loads at a time; much fewer would cost Grain's overhead
SCRATCH = 3 << 20  # bytes for one decoded image, a million pixels; larger ones are allocated
READ_US, SHOWN_US = 0.006, 0.018  # of a core for a pixel that is decoded, and for one that is shown
MAX_SKIPS = 1000  # unreadable images in a row: the data set is damaged, not some files

Batch = dict[str, np.ndarray]


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

    def work_us(self) -> float:
        """Return about how many µs an image takes a core outside of Python."""
        ...


class TrainBatches:
    """Load step -> {"image": uint8 [b H W C], "label": int32 [b]}, this process's rows.

    Where images have several labels, "label" is uint8 [b K], 1 where an image has a class.

    With `skip_unreadable` the next image in the epoch's order stands in for one that cannot be
    read; `unreadable` holds the names of those met so far.
    """

    def __init__(
        self,
        source: Source,
        order: EpochOrder,
        augment,
        image_size: Size,
        rows: Sequence[int],
        decoder: str = "auto",
        skip_unreadable: bool = False,
        reading: Reading = PLAIN,
    ):
        self._source, self._order, self._rows = source, order, rows
        self._labels = label_room(source, len(rows))
        self._reading = reading
        self._config, self._image_size = augment, image_size
        self._indices = order.images(source)
        self._augment = make_augment(augment.auto, augment.color_jitter, reading.channels)
        self._decoder, self._skip = choose(decoder), skip_unreadable
        self.unreadable: set[str] = set()
        self.blocks = -(-len(rows) // BLOCK)

    def __call__(self, step: int) -> Batch:
        """Return a whole batch."""
        return _whole(self, step)

    def empty(self) -> Batch:
        """Return arrays for a batch, with any content."""
        shape = (len(self._rows), *sides(self._image_size), self._reading.channels)
        return {
            "image": np.empty(shape, np.uint8),
            "label": np.empty_like(self._labels),
        }

    def work_us(self) -> float:
        """Return about how many µs an image takes a core outside of Python."""
        return _work_us(self._source, self._image_size)

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
                    pixels = decode.read(
                        example["image"], name, self._decoder, scratch, self._reading
                    )
                resize = decode.resize_of(example["image"], self._decoder, self._reading)
                return name, pixels, example["label"], resize
            except UserError as error:
                if not self._skip:
                    raise
                if name not in self.unreadable:
                    self.unreadable.add(name)
                    log.warning("another image stands in: %s", error)
        raise UserError(f"{name}: not readable, nor are the {MAX_SKIPS - 1} images before it")

    def _view(self, image: np.ndarray, rng: np.random.Generator, resize) -> np.ndarray:
        pixels = random_view(image, self._image_size, self._config, rng, resize, self._reading)
        if rng.random() < self._config.flip_prob:
            # OpenCV would drop a single channel's axis.
            pixels = cv2.flip(pixels, 1) if pixels.shape[2] == 3 else pixels[:, ::-1]
        return self._augment(pixels, rng)


class EvalBatches:
    """Load batch i -> {"image", "label", "valid": bool [b]}; all examples valid once.

    With Pillow, whatever decodes for training, so that accuracies compare. With `skip_unreadable`
    an image that cannot be read is not valid; `unreadable` holds the names of those met so far.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        view: EvalView,
        rows: Sequence[int],
        skip_unreadable: bool = False,
        left_out_of: str = "the evaluation",
    ):
        self._left_out_of = left_out_of
        self._source, self._batch_size, self._rows = source, batch_size, rows
        self._labels = label_room(source, len(rows))
        self._view, self._skip = view, skip_unreadable
        self.unreadable: set[str] = set()
        self.blocks = -(-len(rows) // BLOCK)

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __call__(self, step: int) -> Batch:
        """Return a whole batch."""
        return _whole(self, step)

    def empty(self) -> Batch:
        """Return arrays for a batch, with any content."""
        shape = (len(self._rows), *sides(self._view.size), self._view.reading.channels)
        return {
            "image": np.empty(shape, np.uint8),
            "label": np.empty_like(self._labels),
            "valid": np.empty(len(self._rows), bool),
        }

    def work_us(self) -> float:
        """Return about how many µs an image takes a core outside of Python."""
        return _work_us(self._source, self._view.size)

    def fill(self, step: int, block: int, batch: Batch) -> None:
        """Decode, resize and crop; rows without an image are black and not valid."""
        for row in range(block * BLOCK, min((block + 1) * BLOCK, len(self._rows))):
            index = step * self._batch_size + self._rows[row]
            found = self.read(index) if index < len(self._source) else None
            batch["valid"][row] = found is not None
            batch["image"][row], batch["label"][row] = found or (0, 0)

    def read(self, index: int) -> tuple[np.ndarray, int | np.ndarray] | None:
        """Return an example's view and label, None where it is left out."""
        name = _name(self._source, index)
        try:
            with _naming(name):
                example = self._source[index]
                return self._view(example["image"], name), example["label"]
        except UserError as error:
            if not self._skip:
                remedy = "--config.data.skip_unreadable=True leaves such images out"
                raise UserError(f"{error}; {remedy}") from error
            if name not in self.unreadable:
                self.unreadable.add(name)
                log.warning("left out of %s: %s", self._left_out_of, error)
            return None


def _work_us(source: Source, size: Size) -> float:
    """Judge by the first image; one that cannot be opened here is as good as a large one."""
    try:
        image = source[0]["image"]
        shape = Image.open(io.BytesIO(image)).size if isinstance(image, bytes) else image.shape[:2]
    except Exception:  # whoever reads it says what is wrong with it
        return math.inf
    return READ_US * math.prod(shape) + SHOWN_US * math.prod(sides(size))


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
