"""WebDataset shards, tars of KEY.jpg and KEY.cls: random access through an index of offsets."""

import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from deit_jax.data.classes import read_classes
from deit_jax.data.formats import image_suffixes
from deit_jax.data.sources import tar_index
from deit_jax.data.sources.assemble import assemble, rules_of
from deit_jax.data.sources.base import Dataset, PackedStrings, SourceReading, Subset
from deit_jax.data.sources.splits import choose_split, kinds_in, listed
from deit_jax.errors import UserError
from deit_jax.storage import local
from deit_jax.storage.fetch import cache_folder

INDEX_NAME = ".deit_index.npz"
CLASSES = "classes.txt"
EVAL_WORDS = ("val", "validation", "test")

ROW = np.dtype([("tar", np.int32), ("offset", np.int64), ("size", np.int64), ("label", np.int32)])


class Index(NamedTuple):
    """All images of some tars: where they are (ROW records), and their names inside of them."""

    rows: np.ndarray
    names: PackedStrings


class WdsSource:
    """Images inside of tar files."""

    def __init__(self, paths: list[str], index: Index):
        self.labels = index.rows["label"]
        self._index, self._paths = index, paths

    def __len__(self) -> int:
        return len(self._index.rows)

    def __getitem__(self, index: int) -> dict:
        tar, offset, size, label = self._index.rows[index].item()
        return {"image": tar_index.read(self._paths[tar], offset, size), "label": label}

    def describe(self, index: int) -> str:
        return f"{self._paths[self._index.rows['tar'][index]]}:{self._index.names[index]}"

    def key(self, index: int) -> str:
        return self._index.names[index]  # whichever tar it is in


def open_source(rest: str, data) -> Dataset:
    """Open the tars in the folder that `rest` names."""
    return open_wds(local(rest), data)


def open_wds(root: Path, data) -> Dataset:
    """Open the *.tar files below a folder, train and evaluation told apart by their names.

    Without any for evaluation, hold out a part. The first opening reads every tar's headers and
    keeps what it found in an index. Raise UserError if it cannot be read.
    """
    paths = sorted(root.rglob("*.tar"))
    if not paths:
        raise UserError(f"config.data.source=wds:{root}: no *.tar files in it")
    if rules_of(data) == 1:
        train, held = split_by_name(paths, root)
    else:
        train, held = _chosen(paths, root, data)
    reading = SourceReading(
        f"{len(train)} tars",
        f"{len(held)} tars" if held else "",
        notes=_aside(len(paths) - len(train) - len(held)),
    )
    paths = [*train, *held]
    index = load_index(root, paths, data.channels)
    labels = index.rows["label"]
    if not len(labels):
        raise UserError(f"config.data.source=wds:{root}: no images in its tars")
    source = WdsSource([str(p) for p in paths], index)
    classes = _class_names(root, int(labels.max()) + 1, data.classes)
    may_lack = rules_of(data) == 1 or bool(data.classes) or (root / CLASSES).exists()
    if not held:
        return assemble(source, None, classes, data, reading, may_lack)
    is_train = index.rows["tar"] < len(train)
    kept, others = (Subset(source, np.flatnonzero(mask)) for mask in (is_train, ~is_train))
    return assemble(kept, others, classes, data, reading, may_lack)


def _aside(count: int) -> tuple[str, ...]:
    return (f"{count} tars of other splits are left aside",) if count else ()


def _chosen(paths: list[Path], root: Path, data) -> tuple[list[Path], list[Path]]:
    """Return the tars of the two splits that are asked for; raise UserError if one is not there.

    A tar is of the split that its name, or the folder's, says; without any such names all are to
    be trained on.
    """
    named: dict[str, list[Path]] = {}
    for path in paths:
        kinds = [kinds_in(part) for part in path.relative_to(root).with_suffix("").parts]
        found = next((k for k in reversed(kinds) if len(k) == 1), {""})
        named.setdefault(next(iter(found)), []).append(path)
    if set(named) == {""} and data.train_split == "train":
        return paths, []
    there = sorted(k for k in named if k)
    train, held = (choose_split(data[f], there) for f in ("train_split", "eval_split"))
    if train is None and data.train_split == "train" and held and "" in named:
        train = ""  # all that are not for evaluation
    wanted = {"train_split": train, "eval_split": held}
    for field, got in wanted.items():
        if got is None and not (field == "eval_split" and data.eval_split == "validation"):
            raise UserError(
                f"config.data.{field}={data[field]}: no tars of this name in {root}; there are "
                f"{listed(there) or 'none with a split in their names'}"
            )
    return named[train or ""], named[held] if held else []


def split_by_name(paths: list[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and those of the first kind for evaluation that there is."""

    def named(word: str) -> list[Path]:
        return [p for p in paths if word in str(p.relative_to(root)).lower()]

    train = named("train")
    held = next((found for word in EVAL_WORDS if (found := named(word))), [])
    if not train:
        return [p for p in paths if p not in held] or paths, held
    return train, [p for p in held if p not in train]


def _class_names(root: Path, count: int, file: str) -> list[str]:
    path = root / CLASSES
    if file:
        names = read_classes(file)
        if len(names) < count:
            raise UserError(
                f"config.data.classes={file}: {len(names)} names, but labels up to {count - 1}"
            )
        return names
    if not path.exists():
        return [str(i) for i in range(count)]
    names = path.read_text().splitlines()
    if len(names) < count:
        raise UserError(f"{path}: {len(names)} names, but labels up to {count - 1}")
    return names


def load_index(root: Path, paths: list[Path], channels: int = 3) -> Index:
    """Return the index of some tars, from the file beside them if it fits them."""
    facts = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    facts += [] if channels == 3 else [(".npy", 0, 0)]  # which are images then
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    places = [root / INDEX_NAME, cache_folder() / f"wds-{key[:16]}.npz"]
    for place in places:
        try:
            with place.open("rb") as file, np.load(file) as saved:
                if str(saved["key"]) == key:
                    block = saved["names"].tobytes()
                    return Index(saved["rows"], PackedStrings.unpack(block, saved["ends"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # not there, or damaged: it is made anew
    rows, names = [], []
    read = images_of if channels == 3 else functools.partial(images_of, channels=channels)
    bar = tqdm(paths, desc="indexing tars", unit="tar", leave=False, disable=None)
    for number, path in enumerate(bar):
        for image, label in read(path):
            rows.append((number, image.offset, image.size, label))
            names.append(image.name)
    index = Index(np.array(rows, ROW), PackedStrings(names))
    for place in places:  # the second where the tars' folder is read-only
        try:
            _save(place, key, index)
            break
        except OSError:
            continue
    return index


def _save(place: Path, key: str, index: Index) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    names = np.frombuffer(index.names.block, np.uint8)
    with temporary.open("wb") as file:
        np.savez(file, key=key, rows=index.rows, names=names, ends=index.names.ends)
    os.replace(temporary, place)


class _Sample(NamedTuple):
    image: tar_index.Member | None = None
    label: int | None = None


def images_of(path: Path, channels: int = 3) -> Iterator[tuple[tar_index.Member, int]]:
    """Iterate over a tar's images and their labels; raise UserError naming one without."""
    samples: dict[str, _Sample] = {}
    for member in tar_index.members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")  # WebDataset: a key ends at the first dot
        key, extension = f"{folder}/{stem}", extension.lower()
        sample = samples.get(key, _Sample())
        if f".{extension}" in image_suffixes(channels):
            sample = sample._replace(image=member)
        elif extension in ("cls", "json") and sample.label is None:
            sample = sample._replace(label=_label(path, member, extension))
        samples[key] = sample
    for key, (image, label) in samples.items():
        if image is None:
            continue
        if label is None or label < 0:
            raise UserError(f"{path}:{image.name}: no label; expected {key.lstrip('/')}.cls by it")
        yield image, label


def _label(path: Path, member: tar_index.Member, extension: str) -> int | None:
    text = tar_index.read(str(path), member.offset, member.size)
    try:
        if extension == "cls":
            return int(text)
        value = json.loads(text)
        label = value.get("label") if isinstance(value, dict) else None
        return None if label is None else int(label)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}:{member.name}: not a class number ({error})") from error
