"""From a source to batches of uint8 images: a pure function of (seed, step).

Position p of a run's endless stream of examples decides everything about the example there: which
image, which copy of it, and the random numbers of its augmentation. Batch s is the positions
[s B, (s + 1) B); a process reads one contiguous part of it. So a run can start at any step, with
any number of threads and processes, and meet the same bytes.
"""

import dataclasses
import os
from collections.abc import Iterator

import cv2
import grain
import numpy as np

from deit_jax.data import decode
from deit_jax.data.augment import make_augment
from deit_jax.data.sources import Source


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

    def shuffled(self) -> grain.MapDataset:
        """Return the endless sequence of image indices, one random permutation after another."""
        return grain.MapDataset.range(self.num_images).seed(self.seed).shuffle().repeat()

    def slot(self, position: int) -> int:
        """Return where in `shuffled()` the image at a position stands."""
        per_epoch = self.steps_per_epoch * self.batch_size
        epoch, within = divmod(position, per_epoch)
        passes = -(-per_epoch // (self.repeats * self.num_images))  # of a set smaller than a batch
        return epoch * passes * self.num_images + within // self.repeats


def example_rng(seed: int, position: int) -> np.random.Generator:
    """Return the random numbers of one position; no other position shares them."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))


class TrainBatches:
    """Load step -> {"image": uint8 [b H W 3], "label": int32 [b]}, this process's rows."""

    def __init__(self, source: Source, order: EpochOrder, augment, image_size: int, rows: range):
        self._source, self._order, self._rows = source, order, rows
        self._config, self._image_size = augment, image_size
        self._indices = order.shuffled()
        self._augment = make_augment(augment.auto, augment.color_jitter)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Decode, crop, flip and augment; copies of one image decode it once."""
        size = self._image_size
        images = np.empty((len(self._rows), size, size, 3), np.uint8)
        labels = np.empty(len(self._rows), np.int32)
        slot, decoded, label = None, None, None
        for row, offset in enumerate(self._rows):
            position = step * self._order.batch_size + offset
            if (new := self._order.slot(position)) != slot:
                slot, index = new, int(self._indices[new])
                example = self._source[index]
                decoded = decode.decode(example["image"], self._source.describe(index))
                label = example["label"]
            images[row] = self._view(decoded, example_rng(self._order.seed, position))
            labels[row] = label
        return {"image": images, "label": labels}

    def _view(self, image, rng: np.random.Generator) -> np.ndarray:
        c = self._config
        if c.crop == "simple":
            crop = decode.simple_random_crop(image, self._image_size, rng)
        else:
            crop = decode.random_resized_crop(
                image, self._image_size, rng, c.crop_scale, c.crop_ratio
            )
        pixels = np.asarray(crop)
        if rng.random() < c.flip_prob:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        return self._augment(pixels, rng)


class EvalBatches:
    """Load batch i -> {"image", "label", "valid": bool [b]}; all examples valid once."""

    def __init__(
        self, source: Source, batch_size: int, image_size: int, crop_ratio: float, rows: range
    ):
        self._source, self._batch_size, self._rows = source, batch_size, rows
        self._image_size, self._crop_ratio = image_size, crop_ratio

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        """Decode, resize and crop; rows past the last example are black and not valid."""
        size = self._image_size
        images = np.zeros((len(self._rows), size, size, 3), np.uint8)
        labels = np.zeros(len(self._rows), np.int32)
        valid = np.zeros(len(self._rows), bool)
        for row, offset in enumerate(self._rows):
            index = batch * self._batch_size + offset
            if index < len(self._source):
                example = self._source[index]
                image = decode.decode(example["image"], self._source.describe(index))
                images[row] = np.asarray(decode.centre_crop(image, size, self._crop_ratio))
                labels[row], valid[row] = example["label"], True
        return {"image": images, "label": labels, "valid": valid}


def local_rows(batch_size: int, process: int, processes: int) -> range:
    """Return the rows of a global batch that one process loads."""
    share = batch_size // processes
    return range(process * share, (process + 1) * share)


def usable_cores() -> int:
    """Return the cores this process may run on, which a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load(batches, start: int, stop: int, threads: int, prefetch: int) -> Iterator[dict]:
    """Iterate over batches start … stop - 1 in order, loaded ahead by threads."""
    cv2.setNumThreads(0)  # these threads are the parallelism; OpenCV's own would fight them
    threads = min(threads or usable_cores(), prefetch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    loader = iter(grain.MapDataset.range(start, stop).map(batches).to_iter_dataset(options))
    try:
        yield from loader
    finally:
        loader.close()  # or the interpreter would first load what is queued, and exit late
