"""Tables for `deit prepare`: parquet files, and what Hugging Face's `save_to_disk` writes."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from deit_jax.data.classes import natural_key
from deit_jax.data.sources.columns import (
    Columns,
    choose_columns,
    class_names,
    count_missing,
    number_labels,
)
from deit_jax.data.sources.splits import choose_split
from deit_jax.data.sources.webdataset import split_by_name
from deit_jax.errors import UserError

log = logging.getLogger("deit_jax")

FLAGS = ("--image-column", "--label-column")


class Example(NamedTuple):
    """An image's name and label, and its file's bytes."""

    name: str
    label: int
    image: bytes


@dataclasses.dataclass(frozen=True)
class TableShard:
    """Consecutive groups of a file's rows; `classes` by label, None where labels are integers."""

    path: str
    groups: tuple[int, ...]
    rows: int
    bytes: int
    image: str
    label: str
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return self.rows

    def facts(self) -> list:
        """Return what tells these images from others."""
        own = [os.path.basename(self.path), self.groups, self.rows, self.bytes]
        # Written since columns can be chosen; data sets of before have the usual ones.
        usual = (self.image, self.label) == ("image", "label") and self.classes is None
        return [own if usual else (*own, self.image, self.label, self.classes)]

    def read(self) -> Iterator[Example]:
        """Iterate over the examples, one group in memory at a time."""
        with _errors(self.path), _open(self.path) as file:
            for group in self.groups:
                table = file.read(group, [self.image, self.label])
                classes = list(self.classes) if self.classes else None
                numbers = number_labels(table[self.label], classes, self.path, FLAGS[1])
                for row, image in enumerate(table[self.image].to_pylist()):
                    place = f"{os.path.basename(self.path)}:{group}:{row}"
                    encoded, path = image, None
                    if isinstance(image, dict):
                        encoded, path = image["bytes"], image.get("path")
                    encoded = encoded or _file(self.path, path, place)
                    yield Example(path or place, int(numbers[row]), encoded)


def _file(table: str, path: str | None, place: str) -> bytes:
    """Return an image that a table gives by its path."""
    if not path:
        raise UserError(f"{place}: no image there, neither bytes nor a path")
    try:
        return Path(os.path.dirname(table), path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: {path}: cannot be read ({error})") from error


class _Parquet:
    """The row groups of a parquet file."""

    def __init__(self, path: str):
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path)
        self.schema = self._file.schema_arrow
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        self.sizes = [(group.num_rows, group.total_byte_size) for group in groups]

    def read(self, group: int, columns: list[str]) -> Any:
        """Return a group as a table."""
        return self._file.read_row_group(group, columns=columns)

    def column(self, name: str) -> Any:
        """Return a whole column."""
        return self._file.read(columns=[name])[name]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Arrow:
    """The record batches of an Arrow stream, mapped from its file."""

    def __init__(self, path: str):
        import pyarrow

        self._map = pyarrow.memory_map(path)
        with pyarrow.ipc.open_stream(self._map) as stream:
            table = stream.read_all()
        self._table, self.schema, self._batches = table, table.schema, table.to_batches()
        self.sizes = [(batch.num_rows, batch.nbytes) for batch in self._batches]

    def read(self, group: int, columns: list[str]) -> Any:
        """Return a batch as a table."""
        import pyarrow

        return pyarrow.Table.from_batches([self._batches[group]]).select(columns)

    def column(self, name: str) -> Any:
        """Return a whole column."""
        return self._table[name]

    def close(self) -> None:
        """Leave the file to those who still look at it."""


def _open(path: str) -> contextlib.closing:
    kind = _Parquet if path.endswith(".parquet") else _Arrow
    return contextlib.closing(kind(path))


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        line = " ".join(str(error).split())
        kind = "a parquet" if path.endswith(".parquet") else "an Arrow"
        raise UserError(
            f"{path}: not {kind} file that can be read ({line}); get it anew"
        ) from error


def is_saved(root: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))


def plan(
    root: Path, shard_bytes: int, image: str, label: str
) -> tuple[list[str], dict[str, list[TableShard]]]:
    """Return the classes and, for each split, the shards; raise UserError."""
    if is_saved(root):
        files = _saved_files(root)
    else:
        train, held = split_by_name(sorted(root.rglob("*.parquet")), root)
        files = {"train": train, "validation": held}
    found = {
        split: [_look(str(path), image, label) for path in _bar(paths)]
        for split, paths in files.items()
        if paths
    }
    if "train" not in found:
        raise UserError(f"{root}: no files of images to train on")
    tests = found.get("validation", [])
    if tests and all(count_missing(one.labels) == len(one.labels) for one in tests):
        log.warning("%s: has no labels and is left aside", ", ".join(one.path for one in tests))
        del found["validation"]
    seen = [one for ones in found.values() for one in ones]
    classes = next((one.columns.names for one in seen if one.columns.names), None)
    first = found["train"][0]
    for one in seen:
        if one.columns.names not in (None, classes):
            raise UserError(f"{one.path}: names other classes in column {one.columns.label!r}")
        mixed = classes is None and (one.strings is None) != (first.strings is None)
        if mixed or one.columns[:2] != first.columns[:2]:
            raise UserError(f"{one.path}: its columns or kind of labels differ from {first.path}'s")
    if classes is None and any(one.strings for one in seen):
        classes = sorted({s for one in found["train"] for s in one.strings or ()}, key=natural_key)
    shards = {}
    for split, ones in found.items():
        shards[split] = [shard for one in ones for shard in one.shards(shard_bytes, classes)]
    most = max(one.check(classes) for one in seen)
    return classes or [str(i) for i in range(most + 1)], shards


def _bar(paths: list[Path]) -> Any:
    return tqdm(paths, desc="indexing", unit="file", leave=False, disable=None)


def _saved_files(root: Path) -> dict[str, list[Path]]:
    """Return the Arrow files of the splits for training and evaluation."""
    try:
        if (root / "dataset_dict.json").is_file():
            there = json.loads((root / "dataset_dict.json").read_text())["splits"]
            folders = {split: root / split for split in there}
        else:
            folders = {"train": root}
        names = {
            split: [f["filename"] for f in json.loads(text)["_data_files"]]
            for split, text in ((s, (f / "state.json").read_text()) for s, f in folders.items())
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}: not as save_to_disk writes it ({error})") from error
    train = choose_split("train", list(folders))
    if train is None:
        raise UserError(f"{root}: no split to train on (it has {', '.join(folders)})")
    held = choose_split("validation", [split for split in folders if split != train])
    splits = {"train": train, **({"validation": held} if held else {})}
    return {ours: [folders[own] / n for n in names[own]] for ours, own in splits.items()}


@dataclasses.dataclass
class _File:
    """What planning needs to know of a file."""

    path: str
    columns: Columns
    labels: Any
    strings: list[str] | None
    sizes: list[tuple[int, int]]

    def check(self, classes: list[str] | None) -> int:
        """Return the largest label; raise UserError if one is missing or none of the classes."""
        numbers = number_labels(self.labels, classes, self.path, FLAGS[1])
        return int(np.max(numbers, initial=-1))

    def shards(self, shard_bytes: int, classes: list[str] | None) -> Iterator[TableShard]:
        """Iterate over parts of about `shard_bytes`."""
        own = tuple(classes) if classes and self.strings is not None else None
        groups: list[int] = []
        for i in range(len(self.sizes)):
            groups.append(i)
            total = sum(self.sizes[g][1] for g in groups)
            if total >= shard_bytes or i == len(self.sizes) - 1:
                rows = sum(self.sizes[g][0] for g in groups)
                image, label, _ = self.columns
                yield TableShard(self.path, tuple(groups), rows, total, image, label, own)
                groups = []


def _look(path: str, image: str, label: str) -> _File:
    with _errors(path), _open(path) as file:
        columns = choose_columns(file.schema, path, image, label, FLAGS)
        labels = file.column(columns.label)
        names = class_names(labels, columns.names)
        strings = names if columns.names is None else None
        return _File(path, columns, labels, strings, file.sizes)
