"""TFDS data sets in ArrayRecord files: random access, without TensorFlow."""

import contextlib

from absl import logging

from deit_jax.data.sources.base import Dataset
from deit_jax.errors import UserError


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
    """Open a prepared data set, `NAME` or `NAME:VERSION`; raise UserError if it is none."""
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:  # in an image of somebody else's, a bench needs no data
        raise UserError(
            f"config.data.source=tfds:{name}: {error}; pip install tensorflow-datasets"
        ) from error

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
            "--config.data.dir, or prepare it with `deit prepare` or "
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
    for field in ("train_split", "eval_split"):
        split = data[field]
        try:
            data_source = builder.as_data_source(
                split, decoders={keys[0]: tfds.decode.SkipDecoding()}
            )
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits)
            raise UserError(
                f"config.data.{field}={split}: tfds:{name} has no split {split!r} (it has {known})"
            ) from error
        splits.append(TfdsSource(f"tfds:{name}", split, data_source, keys))
    allow_open_files(sum(info.num_shards for info in builder.info.splits.values()))
    train, held = splits
    return Dataset(train, held, list(features[keys[1]].names))


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
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
