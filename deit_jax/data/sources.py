"""Where images come from: random access behind one small interface, without TensorFlow."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging

from deit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
EVAL_FOLDERS = ("val", "validation", "test")


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
    if kind == "folder" and rest:
        return _open_folder(Path(rest).expanduser(), data.eval_fraction)
    if kind == "tfds" and rest:
        return _open_tfds(rest, data)
    raise UserError(f"config.data.source={data.source!r}: give digits, folder:PATH or tfds:NAME")


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


class FolderSource:
    """Image files."""

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        self.labels = labels
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict:
        try:
            image = Path(self._paths[index]).read_bytes()
        except OSError as error:
            raise UserError(f"{self._paths[index]}: cannot be read ({error.strerror})") from error
        return {"image": image, "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        return self._paths[index]


class TfdsSource:
    """A TFDS split in ArrayRecord files, its images left encoded."""

    def __init__(self, name: str, split: str, data_source, keys: tuple[str, str]):
        self._name, self._split, self._data_source, self._keys = name, split, data_source, keys

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, index: int) -> dict:
        example = self._data_source[index]
        image, label = self._keys
        return {"image": example[image], "label": int(example[label])}

    def describe(self, index: int) -> str:
        return f"{self._name} {self._split}[{index}]"


class Subset:
    """Some examples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))


def hold_out(source: ArraySource | FolderSource, fraction: float) -> tuple[Subset, Subset]:
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


def _open_folder(root: Path, eval_fraction: float) -> Dataset:
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


def _open_tfds(name: str, data) -> Dataset:
    import tensorflow_datasets as tfds

    try:
        with _errors_only():
            builder = tfds.builder(name, data_dir=data.dir or None, try_gcs=False)
            prepared = builder.is_prepared()
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"config.data.source=tfds:{name}: {first_line} (config.data.dir={data.dir!r})"
        ) from error
    if not prepared:
        raise UserError(
            f"config.data.source=tfds:{name}: not prepared in {data.dir or builder.data_dir}; set "
            "--config.data.dir, or prepare it with "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()"
        )
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{builder.data_path}: TFDS files in {builder.info.file_format.value}, which has no "
            "random access; convert with `tfds convert_format --out_file_format=array_record`"
        )
    keys = (builder.info.supervised_keys or ("image", "label"))[:2]
    features = builder.info.features
    kinds = zip(keys, (tfds.features.Image, tfds.features.ClassLabel), strict=True)
    if not all(key in features and isinstance(features[key], kind) for key, kind in kinds):
        raise UserError(
            f"config.data.source=tfds:{name}: not image classification; it takes an Image and a "
            f"ClassLabel, its {keys[0]!r} and {keys[1]!r} are others"
        )
    splits = []
    for split in (data.train_split, data.eval_split):
        try:
            data_source = builder.as_data_source(
                split, decoders={keys[0]: tfds.decode.SkipDecoding()}
            )
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits)
            raise UserError(f"tfds:{name}: no split {split!r} (it has {known})") from error
        splits.append(TfdsSource(f"tfds:{name}", split, data_source, keys))
    return Dataset(*splits, list(features[keys[1]].names))


@contextlib.contextmanager
def _errors_only():
    """Keep TFDS, which logs through absl, from warning of what ends in one clear error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
