"""The interface of a source of images: random access to examples and their labels."""

import dataclasses
import functools
import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from deit_jax.errors import UserError

MOST_CELLS = 2**33  # bytes of the labels of images that have several


@runtime_checkable
class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int) -> dict:
        """Return {"image": encoded bytes or a uint8 array [H W] or [H W C], "label": int}.

        Where an image has several labels, "label" is a uint8 array [K] of zeros and ones.
        """
        ...

    def describe(self, index: int) -> str:
        """Return how a person finds this example: a path, or the data set's name and index."""
        ...


@runtime_checkable
class Labelled(Source, Protocol):
    """A source that knows its labels without reading its images.

    They are numbers of classes, [n] integers, or with several labels an image uint8 [n K], 1 where
    an image has a class.
    """

    labels: np.ndarray


def label_at(labels: np.ndarray, index: int) -> int | np.ndarray:
    """Return the label of one example, its own row of [n K] where images have several."""
    return int(labels[index]) if labels.ndim == 1 else labels[index].copy()


def no_labels(images: int, classes: int, where: str) -> np.ndarray:
    """Return uint8 [n K] of zeros; raise UserError where that is more than memory is likely to."""
    if images * classes > MOST_CELLS:
        raise UserError(
            f"{where}: {images} images with {classes} classes each, a byte for each of them, are "
            f"{images * classes / 2**30:.0f} GB; take fewer classes or fewer images"
        )
    return np.zeros((images, classes), np.uint8)


def label_room(source: Source, count: int) -> np.ndarray:
    """Return room for the labels of so many of a source's examples."""
    labels = getattr(source, "labels", None)  # without, each has one: TFDS
    if labels is None or labels.ndim == 1:
        return np.empty(count, np.int32)
    return np.empty((count, labels.shape[1]), np.uint8)


def label_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return how many examples have each class, [K]."""
    if labels.ndim == 1:
        return np.bincount(labels, minlength=classes)
    return labels.sum(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class SourceReading:
    """What was understood of a data set on opening it, for people to read.

    `left_out` counts what was met and not taken, by reason; `notes` say what else to know.
    """

    train: str = ""  # what is trained on: "train/"
    eval: str = ""  # what is evaluated: "valid/", "20 % of each class, held out"
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    held_out: bool = False  # by us: the source itself has no part for evaluation


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples to train on, examples held out for evaluation, and the classes' names by label."""

    train: Source
    eval: Source
    classes: list[str]
    reading: SourceReading = SourceReading()


class ArraySource:
    """Images in memory."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray):
        self.labels = labels
        self._name, self._images = name, images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._images[index], "label": label_at(self.labels, index)}

    def describe(self, index: int) -> str:
        return f"{self._name} example {index}"


class PackedStrings(Sequence[str]):
    """Many strings in one block of bytes, each up to one of `ends`: little memory, no copies."""

    def __init__(self, strings: Iterable[str] = ()):
        block, ends = bytearray(), array("q")
        for string in strings:
            block += os.fsencode(string)
            ends.append(len(block))
        self.block, self.ends = bytes(block), np.array(ends, np.int64)

    @classmethod
    def unpack(cls, block: bytes, ends: np.ndarray) -> "PackedStrings":
        """Return the strings that once had this block and these ends."""
        strings = cls()
        strings.block, strings.ends = block, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # nobody takes a slice
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.block[start : int(self.ends[index])])


class Subset:
    """Some examples of another source; it knows their labels if that does.

    `relabel` gives the new label of each old one, -1 for one that is none any more; an image of
    several labels loses those.
    """

    def __init__(self, source: Source, indices: np.ndarray, relabel: np.ndarray | None = None):
        self._source, self._indices, self._relabel = source, indices, relabel

    @functools.cached_property
    def labels(self) -> np.ndarray:
        if not isinstance(self._source, Labelled):
            raise AttributeError("labels")  # as that source would
        labels = self._source.labels[self._indices]
        return labels if self._relabel is None else self._renamed(labels)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        example = self._source[int(self._indices[index])]
        if self._relabel is None:
            return example
        return {**example, "label": label_at(self._renamed(np.asarray([example["label"]])), 0)}

    def _renamed(self, labels: np.ndarray) -> np.ndarray:
        assert self._relabel is not None  # or nobody would ask
        if labels.ndim == 2:
            return labels[:, self._relabel >= 0]  # the rest keep their order
        return self._relabel[labels]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def key(self, index: int) -> str:
        return key_of(self._source, int(self._indices[index]))


def key_of(source: Source, index: int) -> str:
    """Return the name of an example that stays the same wherever the data set is put."""
    key = getattr(source, "key", source.describe)
    return key(index)
