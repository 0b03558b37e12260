"""Readers for `deit prepare`: image folders, the official ILSVRC tars, tables, TFRecords.

Each becomes a Plan: for every split a list of shards, each of which can be read by itself.
"""

import contextlib
import dataclasses
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from deit_jax.configs import base
from deit_jax.data.classes import imagenet_list
from deit_jax.data.prepare import records, tables
from deit_jax.data.prepare.records import RecordShard
from deit_jax.data.prepare.tables import Example, TableShard
from deit_jax.data.sources import folder, tar_index
from deit_jax.errors import UserError

SHARD_BYTES = 128 << 20  # as TFDS: about 1024 shards for ImageNet
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
IMAGENET = "imagenet2012"  # TFDS's name for it


class Entry(NamedTuple):
    """Where the bytes of an image are; its name and label."""

    path: str
    offset: int
    size: int
    name: str
    label: int


@dataclasses.dataclass(frozen=True)
class FileShard:
    """Images in files or inside of tars."""

    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bytes(self) -> int:
        """Bytes of all images."""
        return sum(e.size for e in self.entries)

    def facts(self) -> list:
        """Return what tells these images from others."""
        return [(e.name, e.label, e.size) for e in self.entries]

    def read(self) -> Iterator[Example]:
        """Iterate over the examples."""
        for e in self.entries:
            yield Example(e.name, e.label, tar_index.read(e.path, e.offset, e.size))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A data set to write: its name in TFDS, its classes' names by label, its splits."""

    name: str
    version: str
    classes: list[str]
    splits: Mapping[str, Sequence[FileShard | TableShard | RecordShard]]


def make_plan(root: Path, eval_fraction: float, columns: tuple[str, str] = ("", "")) -> Plan:
    """Find out what a folder holds and where; raise UserError if it is nothing known.

    `columns` are the names of those of images and labels in tables, "" = by their types.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if (root / TRAIN_TAR).exists() or (root / VAL_TAR).exists():
        return _plan_ilsvrc(root)
    if records.is_tfds(root):
        return _plan_records(root)
    if tables.is_saved(root) or any(root.rglob("*.parquet")):
        classes, splits = tables.plan(root, SHARD_BYTES, *columns)
        return Plan(_name(root), "1.0.0", classes, splits)
    return _plan_folder(root, eval_fraction)


def _name(root: Path) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", root.resolve().name.lower()).strip("_")
    return name if name[:1].isalpha() else f"images_{name}".rstrip("_")


def _plan(name: str, classes: list[str], splits: dict[str, list[Entry]]) -> Plan:
    """Shuffle each split once and for all, so that slices such as train[:10%] are fair samples."""
    shards = {}
    for split, entries in splits.items():
        order = np.random.default_rng(0).permutation(len(entries))
        count = max(1, -(-sum(e.size for e in entries) // SHARD_BYTES))
        parts = np.array_split(order, min(count, len(entries)))
        shards[split] = [FileShard(tuple(entries[i] for i in part)) for part in parts]
    version = "5.1.0" if name == IMAGENET else "1.0.0"
    return Plan(name, version, classes, shards)


def _plan_folder(root: Path, eval_fraction: float) -> Plan:
    data = base.get_config().data
    data.source, data.eval_fraction = f"folder:{root}", eval_fraction
    dataset = folder.open_folder(root, data)

    def entries(source) -> list[Entry]:
        found = []
        for i in range(len(source)):
            path = source.describe(i)
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error
            found.append(Entry(path, 0, size, os.path.relpath(path, root), int(source.labels[i])))
        return found

    name = IMAGENET if dataset.classes == imagenet_list("labels") else _name(root)
    splits = {"train": entries(dataset.train), "validation": entries(dataset.eval)}
    return _plan(name, dataset.classes, splits)


def _plan_ilsvrc(root: Path) -> Plan:
    for name in (TRAIN_TAR, VAL_TAR):
        if not (root / name).exists():
            raise UserError(f"{root / name}: missing; put both ILSVRC2012 image tars into {root}")
    classes = imagenet_list("labels")
    number = {wnid: i for i, wnid in enumerate(classes)}
    train = []
    outer = list(tar_index.members(root / TRAIN_TAR))
    for tar in tqdm(outer, desc="indexing", unit="class", leave=False, disable=None):
        wnid = Path(tar.name).stem
        if wnid not in number:
            raise UserError(f"{root / TRAIN_TAR}:{tar.name}: no class of ImageNet-1k")
        path = str(root / TRAIN_TAR)
        for m in tar_index.members(path, tar.offset, tar.offset + tar.size):
            train.append(Entry(path, m.offset, m.size, m.name, number[wnid]))
    path = str(root / VAL_TAR)
    truth = _validation_wnids(root)
    held = []
    for m in tar_index.members(path):
        match = re.search(r"_val_(\d+)\.", m.name)
        position = int(match[1]) if match else 0
        if not 0 < position <= len(truth):
            raise UserError(f"{path}:{m.name}: no label; there are {len(truth)}, for _val_00000001")
        wnid = truth[position - 1]
        held.append(Entry(path, m.offset, m.size, os.path.basename(m.name), number[wnid]))
    for name, entries in ((TRAIN_TAR, train), (VAL_TAR, held)):
        if not entries:
            raise UserError(f"{root / name}: no images in it")
    return _plan(IMAGENET, classes, {"train": train, "validation": held})


def _plan_records(root: Path) -> Plan:
    import tensorflow_datasets as tfds

    name, classes, splits = records.plan(root)
    with contextlib.suppress(tfds.core.DatasetNotFoundError):
        if name != IMAGENET and tfds.builder_cls(name):
            name += "_array_record"  # TFDS would open its own name with its own features
    return Plan(name, "1.0.0", classes, splits)


def _validation_wnids(root: Path) -> list[str]:
    """Return the classes of ILSVRC2012_val_00000001, …: the devkit's, or else TFDS's copy."""
    files = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
    numbers, meta = (_devkit_file(root, name) for name in files)
    if not (numbers and meta):
        return imagenet_list("validation_labels")
    import io

    import scipy.io

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Leaves are the classes; ILSVRC2012_ID is the number that the ground truth uses.
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not s["num_children"]}
        truth = [wnids[int(line)] for line in numbers.split()]
    except (KeyError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{root / DEVKIT}: not as published ({_line(error)})") from error
    unknown = set(truth) - set(imagenet_list("labels"))
    if unknown:
        raise UserError(f"{root / DEVKIT}: {min(unknown)} is no class of ImageNet-1k")
    return truth


def _devkit_file(root: Path, name: str) -> bytes | None:
    extracted = root / DEVKIT / "data" / name
    archive = root / f"{DEVKIT}.tar.gz"
    try:
        if extracted.exists():
            return extracted.read_bytes()
        if archive.exists():
            with tarfile.open(archive) as tar:
                file = tar.extractfile(f"{DEVKIT}/data/{name}")
                if file is None:
                    raise KeyError(f"{name} is no file")
                return file.read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{archive}: cannot be read ({_line(error)})") from error
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
