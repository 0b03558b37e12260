"""The sources that `config.data.source` can name."""

import importlib
from typing import NamedTuple

from deit_jax.data.sources.base import Dataset
from deit_jax.errors import UserError


class Entry(NamedTuple):
    """One source: its module, how it is written, and the packages that decide its numbers.

    The module has open_source(rest, data) -> Dataset; `data` is config.data, and `rest` what
    follows the colon in config.data.source, "" where `usage` has none.
    """

    module: str
    usage: str
    packages: tuple[str, ...] = ()


SOURCES = {
    "digits": Entry("deit_jax.data.sources.digits", "digits", ("scikit-learn",)),
    "folder": Entry("deit_jax.data.sources.folder", "folder:PATH"),
    "tfds": Entry(
        "deit_jax.data.sources.tfds", "tfds:NAME", ("array_record", "tensorflow-datasets")
    ),
    "wds": Entry("deit_jax.data.sources.webdataset", "wds:PATH"),
    "hf": Entry("deit_jax.data.sources.huggingface", "hf:PATH|ORG/NAME", ("datasets",)),
    "fashion_mnist": Entry("deit_jax.data.sources.idx", "fashion_mnist"),
    "mnist": Entry("deit_jax.data.sources.idx", "mnist"),
}


def open_dataset(data) -> Dataset:
    """Open what a `config.data` names; raise UserError if it is not there."""
    kind, colon, rest = data.source.partition(":")
    entry = SOURCES.get(kind)
    _check_columns(kind, data)
    if entry and bool(rest) == bool(colon) == (":" in entry.usage):
        return importlib.import_module(entry.module).open_source(rest, data)
    if kind == "parquet" and rest:
        raise UserError(
            f"config.data.source={data.source}: parquet has no cheap random access (one image "
            f"costs its whole row group); convert once with `deit prepare {rest} DST`, or open it "
            f"as hf:{rest}, which keeps a copy of it that has"
        )
    *usages, last = (entry.usage for entry in SOURCES.values())
    raise UserError(f"config.data.source={data.source!r}: give {', '.join(usages)} or {last}")


def _check_columns(kind: str, data) -> None:
    """Raise UserError if columns are named for a source that has none."""
    for field in ("image_column", "label_column"):
        if kind != "hf" and field in data and data[field]:  # the config of an older run lacks them
            raise UserError(
                f"config.data.{field}={data[field]}: only hf: has columns, not "
                f"config.data.source={data.source}; leave it empty"
            )
