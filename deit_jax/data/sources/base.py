"""The interface of a source of images: random access to examples and their labels."""

import dataclasses
import functools
import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from deit_jax.errors import UserError


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
class Dataset:
    """Examples to train on, examples held out for evaluation, and the classes' names by label."""

    train: Source
    eval: Source
    classes: list[str]


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
    """Some examples of another source; it knows their labels if that does."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices

    @functools.cached_property
    def labels(self) -> np.ndarray:
        if not isinstance(self._source, Labelled):
            raise AttributeError("labels")  # as that source would
        return self._source.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))


def hold_out(source: Labelled, fraction: float) -> tuple[Subset, Subset]:
    """Split off `fraction` of each class (at least one example) for evaluation, always the same.

    Raise UserError if a class has a single example or the fraction leaves nothing on a side.
    """
    if not 0 < fraction < 1:
        raise UserError(f"config.data.eval_fraction={fraction}: must be between 0 and 1, exclusive")
    order = np.random.default_rng(0).permutation(len(source))
    by_class = order[np.argsort(source.labels[order], kind="stable")]
    held = []
    for members in np.split(by_class, np.flatnonzero(np.diff(source.labels[by_class])) + 1):
        if len(members) < 2:
            raise UserError(
                f"{source.describe(int(members[0]))}: the only image of its class; add a second, "
                "since one of each class is held out for evaluation"
            )
        held.append(members[: min(len(members) - 1, max(1, round(fraction * len(members))))])
    mask = np.zeros(len(source), bool)
    mask[np.concatenate(held)] = True
    return Subset(source, np.flatnonzero(~mask)), Subset(source, np.flatnonzero(mask))
