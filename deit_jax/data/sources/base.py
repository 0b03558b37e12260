"""Where images come from: random access behind one small interface, without TensorFlow."""

import dataclasses
import functools
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from deit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
EVAL_FOLDERS = ("val", "validation", "test")
KINDS = "digits, folder:PATH, tfds:NAME, wds:PATH, fashion_mnist or mnist"


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


def open_dataset(data) -> Dataset:
    """Open what a `config.data` names; raise UserError if it is not there."""
    kind, _, rest = data.source.partition(":")
    if data.source == "digits":
        return _open_digits(data.eval_fraction)
    if data.source in ("fashion_mnist", "mnist"):
        from deit_jax.data import idx_source

        return idx_source.open_idx(data.source, data.dir)
    if kind == "folder" and rest:
        return open_folder(Path(rest).expanduser(), data.eval_fraction)
    if kind == "tfds" and rest:
        from deit_jax.data import tfds_source

        return tfds_source.open_tfds(rest, data)
    if kind == "wds" and rest:
        from deit_jax.data import wds_source

        return wds_source.open_wds(Path(rest).expanduser(), data.eval_fraction)
    if kind == "parquet" and rest:
        raise UserError(
            f"config.data.source={data.source}: parquet has no cheap random access (one image "
            f"costs its whole row group); convert once with `deit prepare {rest} DST`"
        )
    raise UserError(f"config.data.source={data.source!r}: give {KINDS}")


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


class PackedStrings(Sequence):
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

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.block[start : int(self.ends[index])])


class FolderSource:
    """Image files."""

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        self.labels = labels
        self._paths = PackedStrings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict:
        path = self._paths[index]
        try:
            with open(path, "rb", buffering=0) as file:
                image = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        return {"image": image, "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        return self._paths[index]


class Subset:
    """Some examples of another source; it knows their labels if that does."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices

    @functools.cached_property
    def labels(self) -> np.ndarray:
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


def _open_digits(eval_fraction: float) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 1797 of 8 x 8, values 0..16
    train, held = hold_out(ArraySource("digits", images, digits.target), eval_fraction)
    return Dataset(train, held, [str(name) for name in digits.target_names])


def open_folder(root: Path, eval_fraction: float) -> Dataset:
    """Open ROOT/{train,val}/CLASS/…, or hold out a part of ROOT/CLASS/…; raise UserError."""
    if not root.is_dir():
        raise UserError(f"config.data.source=folder:{root}: no such folder")
    train_root = root / "train"
    eval_root = next((root / n for n in EVAL_FOLDERS if (root / n).is_dir()), None)
    if train_root.is_dir() and eval_root:
        classes = _class_names(train_root)
        unknown = sorted(set(_class_names(eval_root)) - set(classes))
        if unknown:
            raise UserError(f"{eval_root / unknown[0]}: no class of this name in {train_root}")
        return Dataset(_scan(train_root, classes), _scan(eval_root, classes), classes)
    classes = _class_names(root)
    if classes == ["train"]:
        root, classes = train_root, _class_names(train_root)
    return Dataset(*hold_out(_scan(root, classes), eval_fraction), classes)


def _class_names(root: Path) -> list[str]:
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"{root}: no class folders; expected {root}/CLASS/IMAGE.jpg")
    return names


def _scan(root: Path, classes: list[str]) -> FolderSource:
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue
        found = len(paths)
        for directory, subdirectories, files in os.walk(root / name, followlinks=True):
            subdirectories[:] = sorted(s for s in subdirectories if not s.startswith("."))
            for file in sorted(files):
                if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                    paths.append(os.path.join(directory, file))
                    labels.append(label)
        if len(paths) == found:
            raise UserError(f"{root / name}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return FolderSource(paths, np.array(labels, np.int32))
