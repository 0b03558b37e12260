"""Data sets of Hugging Face's `datasets`, local or of the hub: random access through Arrow."""

import contextlib
import logging
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deit_jax.data.sources.assemble import assemble
from deit_jax.data.sources.base import Dataset, SourceReading, label_at, label_counts
from deit_jax.data.sources.columns import (
    CONFIG_FIELDS,
    Columns,
    choose_columns,
    class_names,
    count_missing,
    flat_labels,
    is_list,
    multi_hot,
    number_labels,
    refuse_zeros_and_ones,
)
from deit_jax.data.sources.splits import choose_split
from deit_jax.errors import UserError
from deit_jax.storage import local

log = logging.getLogger("deit_jax")

HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
INSTALL = "pip install 'deit_jax[hub]'"


class HuggingFaceSource:
    """Images in an Arrow table, encoded as they are; safe to read from many threads."""

    def __init__(self, name: str, images: Any, labels: np.ndarray, root: Path | None):
        self.labels = labels
        self._name, self._root = name, root
        self._bytes, self._paths = _encoded(images)
        self._ends = np.cumsum([len(chunk) for chunk in images.chunks]).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        chunk = bisect_right(self._ends, index)
        row = index - (self._ends[chunk - 1] if chunk else 0)
        buffer = self._bytes[chunk][row].as_buffer()
        # Out of the mapped file by numpy, which lets other threads run while the disk is read.
        image = None if buffer is None else np.array(np.frombuffer(buffer, np.uint8)).tobytes()
        if not image:
            paths = self._paths[chunk]
            image = self._read(index, paths[row].as_py() if paths is not None else None)
        return {"image": image, "label": label_at(self.labels, index)}

    def describe(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def _read(self, index: int, path: str | None) -> bytes:
        if not path:
            raise UserError(f"{self.describe(index)}: no image there, neither bytes nor a path")
        place = Path(self._root or "", path)  # an absolute path stays what it is
        try:
            return place.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self.describe(index)}: {place}: cannot be read ({reason})"
            ) from error


def _encoded(images: Any) -> tuple[list, list]:
    """Return a column's chunks of bytes, and of paths or Nones; nothing is copied."""
    from pyarrow import types

    if not types.is_struct(images.type):
        return images.chunks, [None] * images.num_chunks
    at, path = (images.type.get_field_index(name) for name in ("bytes", "path"))
    fields = [chunk.flatten() for chunk in images.chunks]  # null where the whole struct is
    encoded = [f[at].cast("binary") if types.is_null(f[at].type) else f[at] for f in fields]
    return encoded, [f[path] if path >= 0 else None for f in fields]


def open_source(rest: str, data) -> Dataset:
    """Open a local folder, or `ORG/NAME` or `ORG/NAME:CONFIG` of the hub; raise UserError."""
    name = f"hf:{rest}"
    tables, root = _load(rest, name)
    for field in ("train_split", "eval_split"):
        _cut(name, tables, field, data[field])
    train = _train_split(name, tables, data.train_split)
    schema = tables[train].features.arrow_schema
    several, asked = data.multi_label, (data.image_column, data.label_column)
    columns = choose_columns(schema, f"{name} {train}", *asked, several=several)
    labels = tables[train].data.column(columns.label)
    classes = class_names(flat_labels(labels)[0] if several else labels, columns.names)
    held = _eval_split(name, tables, train, columns.label, data.eval_split)

    def source(split: str) -> HuggingFaceSource:
        table, where = tables[split].data, f"{name} {split}"
        schema = tables[split].features.arrow_schema
        own = choose_columns(schema, where, *columns[:2], several=several)
        values = table.column(own.label)
        _check_alike(where, labels, values, own)
        if several:
            sets = _sets(where, values, own.names, classes, most)
            return HuggingFaceSource(where, table.column(own.image), sets, root)
        numbers = _numbers(where, values, own.names, classes)
        return HuggingFaceSource(where, table.column(own.image), numbers, root)

    splits = [split for split in (train, held) if split is not None]
    most = _most(name, tables, splits, columns.label) if several and classes is None else 0
    sources = [source(split) for split in splits]
    if classes is None:
        most = most or 1 + max(int(s.labels.max(initial=-1)) for s in sources)
        classes = [str(i) for i in range(most)]
    log.info(
        "%s: images in column %r, labels in %r; training on %r, evaluating on %s",
        *(name, columns.image, columns.label, train, repr(held) if held else "a part held out"),
    )
    _tell_gaps(name, sources[0].labels, len(classes))
    reading = SourceReading(f"split {train}", f"split {held}" if held else "")
    eval_source = sources[1] if held is not None else None
    return assemble(sources[0], eval_source, classes, data, reading, may_lack=True)


def _load(rest: str, name: str) -> tuple[dict[str, Any], Path | None]:
    """Return the splits by name, and the folder that they lie in if they are local."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"config.data.source={name}: {error}; {INSTALL}") from error

    path, config = _folder(rest)
    if path is None and not HUB_NAME.fullmatch(rest.partition(":")[0]):
        raise UserError(f"config.data.source={name}: no such folder, nor a name of the hub")
    with _errors(name, path), _quiet(datasets):
        if path and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
        elif path:
            log.info("%s: through Arrow files in %s", name, datasets.config.HF_DATASETS_CACHE)
            loaded = datasets.load_dataset(str(path.resolve()), config)
        else:
            repository, _, config = rest.partition(":")
            log.info("%s: from the hub, or else the copy of it in the cache", name)
            loaded = datasets.load_dataset(repository, config or None)
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    # A selection or another order that was kept beside the table; without, nothing is copied.
    flat = {k: t if t._indices is None else t.flatten_indices() for k, t in loaded.items()}
    return flat, path


def _folder(rest: str) -> tuple[Path | None, str | None]:
    """Return the folder that is meant, and the config after a colon; None if there is none."""
    path = local(rest)
    if path.is_dir():
        return path, None
    head, colon, config = rest.rpartition(":")
    path = local(head)
    return (path, config) if colon and config and path.is_dir() else (None, None)


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Show progress bars on a terminal only, as ours are, and no line for each try to connect."""
    bars = datasets.is_progress_bar_enabled() and not sys.stderr.isatty()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _errors(name: str, path: Path | None) -> Iterator[None]:
    """Turn the library's errors into one line that says what to do."""
    from datasets import exceptions

    source = f"config.data.source={name}"
    try:
        yield
    except exceptions.DatasetGenerationError as error:
        cause, place = _line(error.__cause__ or error), _damaged(path)
        what = f"{place}: " if place else ""
        raise UserError(f"{source}: {what}cannot be read ({cause}); get it anew") from error
    except ConnectionError as error:  # which other ones of the hub are not
        offline = [v for v in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(v)]
        why = f"{offline[0]} is set" if offline else "is there a network?"
        raise UserError(
            f"{source}: not in the local cache, and the hub cannot be reached ({why}; "
            f"{_line(error)}); fetch it once where it can, or give a folder"
        ) from error
    except Exception as error:  # of many kinds, by the version of the library
        if path is None and isinstance(error, exceptions.DatasetNotFoundError):
            raise UserError(
                f"{source}: {_line(error)} (a private or gated one takes `hf auth login`)"
            ) from error
        place = _damaged(path)
        what = f"{place}: cannot be read ({_line(error)}); get it anew" if place else _line(error)
        raise UserError(f"{source}: {what}") from error


def _damaged(path: Path | None) -> Path | None:
    """Return the first parquet file of a folder that cannot be opened, which the library hides."""
    import pyarrow.parquet

    for file in sorted(path.rglob("*.parquet")) if path else ():
        try:
            pyarrow.parquet.ParquetFile(file).close()
        except (OSError, pyarrow.ArrowException):
            return file
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _cut(name: str, tables: dict[str, Any], field: str, wanted: str) -> None:
    """Add parts of splits, such as train[:80%] or train+validation, by the library's own rules."""
    import datasets

    if wanted in tables or not any(sign in wanted for sign in "[+"):
        return
    there = list(tables)
    try:
        spans = datasets.ReadInstruction.from_spec(wanted).to_absolute(
            {split: len(table) for split, table in tables.items()}
        )
        parts = [tables[s.splitname].select(range(s.from_, s.to)) for s in spans]
        tables[wanted] = datasets.concatenate_datasets([part for part in parts if len(part)])
    except (ValueError, AssertionError, KeyError, IndexError) as error:
        raise UserError(
            f"config.data.{field}={wanted}: {name} has no such part ({_line(error)}; it has "
            f"{', '.join(there)})"
        ) from error


def _whole(tables: dict[str, Any]) -> list[str]:
    """Return the splits that are no parts of others."""
    return [split for split in tables if not any(sign in split for sign in "[+")]


def _train_split(name: str, tables: dict[str, Any], wanted: str) -> str:
    split = wanted if wanted in tables else choose_split(wanted, _whole(tables))
    if split is None:
        raise UserError(
            f"config.data.train_split={wanted}: {name} has no split {wanted!r} (it has "
            f"{', '.join(tables)})"
        )
    return split


def _eval_split(
    name: str, tables: dict[str, Any], train: str, label: str, wanted: str
) -> str | None:
    """Return the split to evaluate on; None where a part of the training one is to be held out.

    A split without any label, as some are published for contests, is left aside, but for the one
    that is wanted by its very name.
    """
    if wanted in tables:
        return wanted
    there, trained = _whole(tables), {part.partition("[")[0] for part in train.split("+")}
    while (split := choose_split(wanted, there)) is not None:
        table = tables[split].data
        found = table.column(label) if label in table.column_names else None
        if split in trained or found is None or count_missing(found) == len(found):
            if split not in trained:
                log.warning("%s: split %r has no labels and is left aside", name, split)
            there.remove(split)
            continue
        break
    if split is None and choose_split(wanted, ["validation"]) is None:
        raise UserError(
            f"config.data.eval_split={wanted}: {name} has no split {wanted!r} with labels (it has "
            f"{', '.join(tables)})"
        )
    return split


def _check_alike(where: str, trained: Any, labels: Any, own: Columns) -> None:
    """Raise UserError if one split has integers without names where the other has strings."""
    from pyarrow import types

    inner = [t.value_type if is_list(t) else t for t in (trained.type, labels.type)]
    kinds = [types.is_integer(t) for t in inner]
    if own.names is None and kinds[0] != kinds[1]:
        raise UserError(
            f"{where}: column {own.label!r} has labels of {labels.type}, the training images of "
            f"{trained.type}; make them alike"
        )


def _numbers(
    where: str, labels: Any, names: list[str] | None, classes: list[str] | None
) -> np.ndarray:
    """Return labels as numbers of the classes, also where a split numbers them in its own way."""
    if names is None or classes is None or names == classes:
        return number_labels(labels, classes, where, CONFIG_FIELDS[1])
    numbers = number_labels(labels, names, where, CONFIG_FIELDS[1])
    strangers = sorted({names[i] for i in np.unique(numbers)} - set(classes))
    if strangers:
        raise UserError(f"{where}: label {strangers[0]!r} is no class of the training images")
    known = {name: number for number, name in enumerate(classes)}
    return np.array([known.get(name, -1) for name in names], np.int32)[numbers]


def _sets(
    where: str, labels: Any, names: list[str] | None, classes: list[str] | None, most: int
) -> np.ndarray:
    """Return lists of labels as uint8 [n K]; `most` is K where classes have no names."""
    if missing := count_missing(labels):
        raise UserError(
            f"{where}: {missing} of {len(labels)} examples have no list of labels (null); an empty "
            f"list says that there are none; or choose another column with {CONFIG_FIELDS[1]}"
        )
    flat, counts = flat_labels(labels)
    numbers = _numbers(where, flat, names, classes)
    if names is None and classes is None:
        refuse_zeros_and_ones(numbers, counts, where, CONFIG_FIELDS[1])
    return multi_hot(numbers, counts, most if classes is None else len(classes), where)


def _most(name: str, tables: dict[str, Any], splits: list[str], label: str) -> int:
    """Return how many classes there are where labels are numbers in lists."""
    largest = -1
    for split in splits:
        flat, _ = flat_labels(tables[split].data.column(label))
        numbers = _numbers(f"{name} {split}", flat, None, None)
        largest = max(largest, int(numbers.max(initial=-1)))
    return 1 + largest


def _tell_gaps(name: str, labels: np.ndarray, classes: int) -> None:
    missing = np.flatnonzero(label_counts(labels, classes) == 0)
    if len(missing):
        some = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        log.warning(
            "%s: %d of %d classes have no training image: %s", name, len(missing), classes, some
        )
