"""The interface of a source of images: random access to examples and their labels."""

import dataclasses
import functools
import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int) -> dict:
        """Return {"image": encoded bytes or a uint8 array [H W] or [H W C], "label": int}."""
        ...

    def describe(self, index: int) -> str:
        """Return how a person finds this example: a path, or the data set's name and index."""
        ...


@runtime_checkable
class Labelled(Source, Protocol):
    """A source that knows its labels without reading its images."""

    labels: np.ndarray


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
        return {"image": self._images[index], "label": int(self.labels[index])}

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

    `relabel` gives the new label of each old one.
    """

    def __init__(self, source: Source, indices: np.ndarray, relabel: np.ndarray | None = None):
        self._source, self._indices, self._relabel = source, indices, relabel

    @functools.cached_property
    def labels(self) -> np.ndarray:
        if not isinstance(self._source, Labelled):
            raise AttributeError("labels")  # as that source would
        labels = self._source.labels[self._indices]
        return labels if self._relabel is None else self._relabel[labels]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        example = self._source[int(self._indices[index])]
        if self._relabel is None:
            return example
        return {**example, "label": int(self._relabel[example["label"]])}

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def key(self, index: int) -> str:
        return key_of(self._source, int(self._indices[index]))


def key_of(source: Source, index: int) -> str:
    """Return the name of an example that stays the same wherever the data set is put."""
    key = getattr(source, "key", source.describe)
    return key(index)
