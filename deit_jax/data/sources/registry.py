"""The sources that `config.data.source` can name."""

import importlib
from typing import NamedTuple

from deit_jax.data.sources.base import Dataset
from deit_jax.errors import UserError
from deit_jax.storage import check_scheme


class Entry(NamedTuple):
    """One source: its module, how it is written, and the packages that decide its numbers.

    The module has open_source(rest, data) -> Dataset; `data` is config.data, and `rest` what
    follows the colon in config.data.source, "" where `usage` has none.
    """

    module: str
    usage: str
    packages: tuple[str, ...] = ()
    options: tuple[str, ...] = ("min_images",)  # those that it understands; assemble does that one
    labelled: bool = True


# Fields of config.data that only some sources understand, and what they are where nobody asks.
OPTIONS = {
    "labels": "",
    "classes": "",
    "image_column": "",
    "label_column": "",
    "nested": "auto",
    "min_images": 0,
    "multi_label": False,
    "label_separator": "",
}

SOURCES = {
    "digits": Entry("deit_jax.data.sources.digits", "digits", ("scikit-learn",)),
    "folder": Entry("deit_jax.data.sources.folder", "folder:PATH", options=tuple(OPTIONS)),
    "tfds": Entry(
        "deit_jax.data.sources.tfds", "tfds:NAME", ("array_record", "tensorflow-datasets"), ()
    ),
    "wds": Entry("deit_jax.data.sources.webdataset", "wds:PATH", options=("classes", "min_images")),
    "hf": Entry(
        "deit_jax.data.sources.huggingface",
        "hf:PATH|ORG/NAME",
        ("datasets",),
        ("image_column", "label_column", "min_images", "multi_label"),
    ),
    "images": Entry("deit_jax.data.sources.images", "images:PATH", options=(), labelled=False),
    "fashion_mnist": Entry("deit_jax.data.sources.idx", "fashion_mnist", options=()),
    "mnist": Entry("deit_jax.data.sources.idx", "mnist", options=()),
}


def has_labels(source: str) -> bool:
    """Return whether the images of a `config.data.source` have labels; of an unknown one, True."""
    entry = SOURCES.get(source.partition(":")[0])
    return entry is None or entry.labelled


def open_dataset(data) -> Dataset:
    """Open what a `config.data` names; raise UserError if it is not there."""
    check_scheme("config.data.source", data.source)
    kind, colon, rest = data.source.partition(":")
    entry = SOURCES.get(kind)
    if entry:
        _check_fields(entry, data)
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


def _check_fields(entry: Entry, data) -> None:
    """Raise UserError for a field that is set and that the source would leave unheard."""
    for field, unset in OPTIONS.items():
        if data[field] != unset and field not in entry.options:
            if field == "multi_label":
                raise UserError(
                    f"config.data.multi_label=True: config.data.source={data.source} has one label "
                    "an image; leave it out, or take a folder: with data.labels, or an hf:"
                )
            raise UserError(
                f"config.data.{field}={data[field]}: config.data.source={data.source} has no use "
                "for it; leave it out"
            )
    if data.multi_label and "labels" in entry.options and not data.labels:
        raise UserError(
            f"config.data.multi_label=True: a folder a class, config.data.source={data.source} "
            "gives an image one label; name a table with --config.data.labels=FILE, or leave it out"
        )
    if data.label_separator and not data.multi_label:
        raise UserError(
            f"config.data.label_separator={data.label_separator}: an image has one label; set "
            "--config.data.multi_label=True, or leave it out"
        )
    columns = [f for f in ("image_column", "label_column") if data[f]]
    if columns and "labels" in entry.options and not data.labels:
        raise UserError(
            f"config.data.{columns[0]}={data[columns[0]]}: folders have no columns; give the table "
            "with --config.data.labels=FILE, or leave it out"
        )
