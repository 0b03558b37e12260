"""Images and labels in a table's columns, found by their types."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deit_jax.data.classes import natural_key
from deit_jax.data.sources.base import no_labels
from deit_jax.errors import UserError

CONFIG_FIELDS = ("config.data.image_column", "config.data.label_column")
LABEL_NAMES = ("label", "labels")  # which decide where several columns could be the label
MOST_CLASSES = 10**6  # beyond, such integers are no class numbers
# Hugging Face's types of features that are of use here; None is a plain struct, or says nothing.
KNOWN = (None, "Value", "Image", "ClassLabel", "Sequence", "List", "LargeList")


class Columns(NamedTuple):
    """The columns of images and of labels, and the classes' names where the table has them."""

    image: str
    label: str
    names: list[str] | None


def choose_columns(
    schema: Any,
    where: str,
    image: str = "",
    label: str = "",
    fields: tuple[str, str] = CONFIG_FIELDS,
    several: bool | None = None,
) -> Columns:
    """Return the columns that are named, or else those of a fitting type in an Arrow schema.

    `where` is what errors name, `fields` are the two in which a user names columns. The labels'
    holds lists where images have `several`, None where they cannot. Raise UserError where none
    fits, or several do.
    """
    described = _features(schema)
    kinds = {field.name: _kind(field.type, described.get(field.name)) for field in schema}
    known = ", ".join(f"{field.name} ({_type(field.type)})" for field in schema) or "none"
    for name, field in ((image, fields[0]), (label, fields[1])):
        if name and name not in kinds:
            raise UserError(f"{field}={name}: {where} has no such column (it has {known})")
    if image and kinds[image] not in ("image", "bytes"):
        raise UserError(
            f"{fields[0]}={image}: {where} has {_type(schema.field(image).type)} there, no encoded "
            f"images (it has {known})"
        )
    if not image:
        image = _only(kinds, (("image",), ("bytes",)), "images", where, fields[0], known)
    if not label:
        single = (("class",), ("integer", "string"))
        wanted = (("list",), *single) if several else (*single, ("list",))
        label = _only(kinds, wanted, "labels", where, fields[1], known)
    if several and kinds[label] != "list":
        raise UserError(
            f"{where}: column {label!r} has one label an image; leave config.data.multi_label out, "
            f"or name a column of lists with {fields[1]}"
        )
    if kinds[label] == "list" and not several:
        remedy = (
            "train from it with config.data.source=hf: and config.data.multi_label=True"
            if several is None
            else "set --config.data.multi_label=True"
        )
        raise UserError(
            f"{where}: column {label!r} has several labels an image; {remedy}, or name a column of "
            f"one label an image with {fields[1]}"
        )
    if several:
        names = (_inner(described.get(label)) or {}).get("names")
        return Columns(image, label, list(names) if names else None)
    if kinds[label] not in ("class", "integer", "string", "null"):
        raise UserError(
            f"{fields[1]}={label}: {where} has {_type(schema.field(label).type)} there; a label is "
            f"a ClassLabel, an integer or a string (it has {known})"
        )
    names = described[label].get("names") if kinds[label] == "class" else None
    return Columns(image, label, list(names) if names else None)


def _only(kinds: dict[str, str], wanted: Sequence, what: str, where: str, field: str, known: str):
    """Return the one column of the first of the kinds that there is."""
    for group in wanted:
        found = [name for name, kind in kinds.items() if kind in group]
        if len(found) > 1 and group == ("integer", "string"):
            found = [name for name in found if name in LABEL_NAMES] or found
        if len(found) > 1:
            names = ", ".join(found)
            raise UserError(f"{where}: {names} could each be the {what}; choose with {field}=NAME")
        if found:
            return found[0]
    raise UserError(f"{where}: no column of {what} (it has {known}); name one with {field}")


def _features(schema: Any) -> dict[str, Any]:
    """Return what Hugging Face's libraries note of a table's columns, by name."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(type_: Any, feature: Any) -> str:
    from pyarrow import types

    noted = feature.get("_type") if isinstance(feature, dict) else None
    if isinstance(noted, str) and noted not in KNOWN:
        return "other"  # such as sounds, which are structs of bytes and path too
    if types.is_null(type_):
        return "null"
    if types.is_dictionary(type_):
        type_ = type_.value_type
    if noted == "ClassLabel" and types.is_integer(type_):
        return "class"
    if types.is_struct(type_):
        index = type_.get_field_index("bytes")
        # Without any bytes, as where all images are files, that column has no type.
        encoded = index >= 0 and (_is_binary(t := type_.field(index).type) or types.is_null(t))
        return ("image" if noted == "Image" else "bytes") if encoded else "other"
    checks = {
        "bytes": _is_binary,
        "integer": types.is_integer,
        "string": lambda t: types.is_string(t) or types.is_large_string(t),
    }
    found = next((name for name, holds in checks.items() if holds(type_)), None)
    if is_list(type_):
        # Of numbers of classes or names; others, such as boxes, could be no labels.
        inner = _kind(type_.value_type, _inner(feature))
        return "list" if inner in ("class", "integer", "string") else "other"
    return found or "other"


def is_list(type_: Any) -> bool:
    """Return whether an Arrow type is of lists."""
    from pyarrow import types

    return types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)


def flat_labels(labels: Any) -> tuple[Any, np.ndarray]:
    """Return the labels in a column of lists one after the other, and how many each list has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = pc.fill_null(pc.list_value_length(labels), 0).to_numpy().astype(np.int64)
    flat = pc.list_flatten(labels)
    return pa.chunked_array([flat]) if isinstance(flat, pa.Array) else flat, counts


def multi_hot(numbers: np.ndarray, counts: np.ndarray, classes: int, where: str) -> np.ndarray:
    """Return uint8 [n K] of the labels of n examples, so many each, one after the other."""
    labels = no_labels(len(counts), classes, where)
    labels[np.repeat(np.arange(len(counts)), counts), numbers] = 1
    return labels


def refuse_zeros_and_ones(numbers: np.ndarray, counts: np.ndarray, where: str, field: str) -> None:
    """Raise UserError where lists hold not numbers of classes, but a 0 or 1 for each class."""
    length = int(counts.max(initial=0))
    if length > 2 and (counts == length).all() and numbers.max(initial=0) <= 1:
        raise UserError(
            f"{where}: every list has {length} values of 0 and 1, as if one for each class; make "
            f"them lists of the classes' numbers or names, or choose another column with {field}"
        )


def _inner(feature: Any) -> Any:
    if isinstance(feature, list):  # as old versions note it
        return feature[0] if feature else None
    return feature.get("feature") if isinstance(feature, dict) else None


def _is_binary(type_: Any) -> bool:
    from pyarrow import types

    return types.is_binary(type_) or types.is_large_binary(type_)


def _type(type_: Any) -> str:
    text = str(type_)
    return text if len(text) < 40 else f"{text[:36]} …"


def count_missing(labels: Any) -> int:
    """Return how many labels of a column are null, below 0 (-1 means none) or empty."""
    import pyarrow.compute as pc
    from pyarrow import types

    present = _plain(labels).drop_null()
    if is_list(present.type):  # an empty list says that an image has none
        return labels.null_count
    if types.is_null(present.type):
        return labels.null_count
    bad = pc.less(present, 0) if types.is_integer(present.type) else pc.equal(present, "")
    return labels.null_count + (pc.sum(bad).as_py() or 0)


def class_names(labels: Any, names: list[str] | None) -> list[str] | None:
    """Return the classes' names: those noted, or a column's strings, sorted; None for integers."""
    from pyarrow import types

    plain = _plain(labels)
    if names is not None or types.is_integer(plain.type):
        return names
    return sorted(plain.drop_null().unique().to_pylist(), key=natural_key)


def number_labels(labels: Any, classes: list[str] | None, where: str, field: str) -> np.ndarray:
    """Return a column's labels as numbers of `classes`, int32; None takes integers as they are.

    Raise UserError that counts those missing, or names one that is none of the classes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import types

    missing, plain = count_missing(labels), _plain(labels)
    if missing:
        raise UserError(
            f"{where}: {missing} of {len(labels)} examples have no label (null, -1 or empty); "
            f"choose another split, or another column with {field}"
        )
    if types.is_integer(plain.type):
        numbers = plain.to_numpy().astype(np.int64)
        most = MOST_CLASSES if classes is None else len(classes)
        if len(numbers) and numbers.max() >= most:
            told = "there are" if classes is not None else "classes are at most"
            raise UserError(
                f"{where}: label {numbers.max()}, but {told} {most}; choose a column of labels "
                f"with {field}"
            )
        return numbers.astype(np.int32)
    found = pc.index_in(plain, value_set=pa.array(classes, plain.type))
    if found.null_count:
        stranger = plain.filter(pc.is_null(found))[0].as_py()
        raise UserError(f"{where}: label {stranger!r} is no class of the training images")
    return found.to_numpy().astype(np.int32)


def _plain(labels: Any) -> Any:
    """Return a column without dictionary encoding."""
    from pyarrow import types

    if types.is_dictionary(labels.type):
        return labels.cast(labels.type.value_type)
    return labels
