"""TFDS data sets in ArrayRecord files: random access, without TensorFlow."""

import contextlib
import importlib.util
import logging
import re
from pathlib import Path

from absl import logging as absl_logging

from deit_jax.data.sources.base import Dataset
from deit_jax.data.sources.splits import choose_split
from deit_jax.errors import UserError
from deit_jax.storage import is_remote, local

log = logging.getLogger("deit_jax")

FIELDS = ("train_split", "eval_split")


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


def open_source(rest: str, data) -> Dataset:
    """Open the data set that `rest` names, in config.data.dir."""
    return open_tfds(rest, data)


def open_tfds(name: str, data) -> Dataset:
    """Open a prepared data set, `NAME` or `NAME/CONFIG`, with or without `:VERSION`.

    Raise UserError if it is none.
    """
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:  # in an image of somebody else's, a bench needs no data
        raise UserError(
            f"config.data.source=tfds:{name}: {error}; pip install tensorflow-datasets"
        ) from error

    try:
        with _errors_only():
            folder = _at_hand(name, data.dir)
            builder = tfds.builder(name, data_dir=folder or None, try_gcs=False)
            prepared = builder.is_prepared()
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UserError(
            f"config.data.source=tfds:{name}: {_reason(error)} (config.data.dir={data.dir!r}"
            f"{_what_is_there(name, data.dir)})"
        ) from error
    if not prepared:
        raise UserError(
            f"config.data.source=tfds:{name}: not prepared in {data.dir or builder.data_dir}; set "
            "--config.data.dir, or prepare it with `deit prepare`, or where TensorFlow is with "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()"
        )
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{builder.data_path}: TFDS files in {builder.info.file_format.value}, which has no "
            f"random access; convert them with `deit prepare {builder.data_path} DST`"
        )
    keys = image_and_label(builder.info, f"config.data.source=tfds:{name}")
    require_array_record(f"config.data.source=tfds:{name}")
    splits = [_split(builder, f"tfds:{name}", field, data, keys) for field in FIELDS]
    allow_open_files(sum(info.num_shards for info in builder.info.splits.values()))
    train, held = splits
    return Dataset(train, held, list(builder.info.features[keys[1]].names))


def _at_hand(name: str, folder: str) -> str:
    """Return a data_dir of this machine; of one in a bucket, what the data set has is copied."""
    if not is_remote(folder):
        return folder
    return str(local(f"{folder.rstrip('/')}/{re.split('[/:]', name)[0]}").parent)


def image_and_label(info, where: str) -> tuple[str, str]:
    """Return the names of the features to train on; raise UserError if they are of other kinds."""
    import tensorflow_datasets as tfds

    keys = (info.supervised_keys or ("image", "label"))[:2]
    features = info.features
    kinds = zip(keys, (tfds.features.Image, tfds.features.ClassLabel), strict=True)
    if not all(key in features and isinstance(features[key], kind) for key, kind in kinds):
        raise UserError(
            f"{where}: not image classification; it takes an Image and a ClassLabel, its "
            f"{keys[0]!r} and {keys[1]!r} are others"
        )
    return keys


def _split(builder, name: str, field: str, data, keys: tuple[str, str]) -> TfdsSource:
    """Open a split by one of its usual names, or parts of splits as TFDS writes them."""
    import tensorflow_datasets as tfds

    wanted, there = data[field], list(builder.info.splits)
    split = _named(wanted, there)
    if split != wanted:
        trained = {part.partition("[")[0] for part in _named(data.train_split, there).split("+")}
        if field == "eval_split" and split in trained:
            split = wanted  # which there is none of
        else:
            log.info("%s: config.data.%s=%s is its split %r", name, field, wanted, split)
    decoders = {keys[0]: tfds.decode.SkipDecoding()}
    try:
        data_source = builder.as_data_source(split, decoders=decoders)
        len(data_source)  # which fails where a part ends before it begins
    except (ValueError, KeyError) as error:
        reason = f": {_reason(error)}" if "[" in split else ""
        raise UserError(
            f"config.data.{field}={wanted}: {name} has no split {wanted!r} (it has "
            f"{', '.join(there)}{reason}); a part of one is written train[90%:]"
        ) from error
    return TfdsSource(name, split, data_source, keys)


def _named(wanted: str, there: list[str]) -> str:
    """Return the split that a name means; parts of splits as they are, which TFDS reads."""
    part = any(sign in wanted for sign in "[+")
    return wanted if part else choose_split(wanted, there) or wanted


def _reason(error: Exception) -> str:
    """Return TFDS's words in one line, without its lists of all data sets there are."""
    import tensorflow_datasets as tfds

    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, tfds.core.DatasetNotFoundError):
        return lines[0]
    return " ".join(word for line in lines for word in line.split())[:400]


def _what_is_there(name: str, folder: str) -> str:
    """Return the configs and versions of a data set that are prepared, to be added to an error."""
    if is_remote(folder):
        return ""
    root = Path(folder).expanduser()
    own = root / re.split("[/:]", name)[0]
    found = [p.parent for p in own.glob("**/dataset_info.json")] if folder and own.name else []
    there = ", ".join(sorted(str(p.relative_to(root)) for p in found))
    return f", which has {there}" if there else ""


def require_array_record(for_what: str) -> None:
    """Raise UserError where the library that reads and writes such files is not installed."""
    if importlib.util.find_spec("array_record") is None:
        raise UserError(
            f"{for_what}: needs `pip install array_record`; Windows has no wheels of it: train on "
            "folder:PATH or wds:PATH there, or work in WSL2"
        )


def allow_open_files(count: int) -> None:
    """Raise this process's limit so that it can keep `count` files open besides a few others.

    ArrayRecord opens every shard once and for all: ImageNet's 1024 alone are more than the usual
    limit. Raise UserError where the system does not allow it.
    """
    import resource  # not on every system

    needed = count + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    if soft == infinite or soft >= needed:
        return
    if hard != infinite and hard < needed:
        raise UserError(
            f"the data set has {count} files, but a process may open only {hard} here; allow "
            f"{needed} with `ulimit -Hn` or in /etc/security/limits.conf"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _errors_only():
    """Keep TFDS, which logs through absl, from warning of what ends in one clear error."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
