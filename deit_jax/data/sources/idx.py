"""MNIST and its successors, read from a local copy of their four idx files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from deit_jax.data.sources.base import ArraySource, Dataset, SourceReading
from deit_jax.data.sources.splits import choose_split
from deit_jax.errors import UserError
from deit_jax.storage import local

CLASSES = {
    "mnist": [str(i) for i in range(10)],
    "fashion_mnist": [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
}
PARTS = {"train": "train", "test": "t10k"}
# Where Debian's packages of the same names put them.
DEFAULT_DIRS = {
    "mnist": "/usr/share/datasets/mnist",
    "fashion_mnist": "/usr/share/datasets/fashion-mnist",
}


def open_source(rest: str, data) -> Dataset:
    """Open the data set that config.data.source names, in config.data.dir."""
    return open_idx(data.source, data)


def open_idx(name: str, data) -> Dataset:
    """Open {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz] in a folder; raise UserError."""
    root = local(data.dir or DEFAULT_DIRS[name])
    parts, chosen = [], [_split(name, data, field) for field in ("train_split", "eval_split")]
    for part in chosen:
        images = read_idx(_find(name, root, f"{part}-images-idx3-ubyte"), dimensions=3)
        path = _find(name, root, f"{part}-labels-idx1-ubyte")
        labels = read_idx(path, dimensions=1)
        classes = CLASSES[name]
        if len(images) != len(labels) or not len(labels):
            raise UserError(f"{path}: {len(labels)} labels for {len(images)} images")
        if labels.max() >= len(classes):
            raise UserError(f"{path}: label {labels.max()}; {name} has {len(classes)} classes")
        parts.append(ArraySource(f"{name} {part}", images, labels.astype(np.int32)))
    train, held = parts
    return Dataset(train, held, list(classes), SourceReading(train=chosen[0], eval=chosen[1]))


def _split(name: str, data, field: str) -> str:
    """Return the prefix of the files of a split."""
    found = choose_split(data[field], list(PARTS))
    if found is None:
        raise UserError(
            f"config.data.{field}={data[field]}: {name} has no such split; there are "
            f"{', '.join(PARTS)}"
        )
    return PARTS[found]


def _find(name: str, root: Path, file: str) -> Path:
    for path in (root / file, root / f"{file}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"config.data.source={name}: no {file}[.gz] in {root}; set --config.data.dir to the folder "
        "with its four idx files"
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an idx file, gzipped or not; raise UserError if damaged."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    # Magic number: two zeros, 8 = unsigned byte, the number of dimensions; then their sizes.
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise UserError(f"{path}: not an idx file of bytes in {dimensions} dimension(s)")
    shape = np.frombuffer(data, ">u4", dimensions, offset=4).tolist()
    if len(data) != start + math.prod(shape):
        raise UserError(f"{path}: {len(data)} bytes where {shape} need {start + math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
