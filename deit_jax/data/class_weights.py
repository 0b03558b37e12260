"""Weights of classes in the loss of the labels: `loss.class_weights`."""

import csv
import io
import json
import math
from typing import Any

import numpy as np

from deit_jax.data.sources.base import Dataset, Labelled, label_counts
from deit_jax.data.sources.splits import listed
from deit_jax.errors import UserError
from deit_jax.storage import local

BALANCED = "balanced"


def class_weights(text: str, dataset: Dataset) -> tuple[float, ...] | None:
    """Return the weight of each class, None without any; `text` is `loss.class_weights`.

    It is "balanced", numbers with commas between them, or a csv or json file of names and weights.
    Raise UserError in one line for what is no weight of each of the classes.
    """
    if not text:
        return None
    where, classes = f"config.loss.class_weights={text}", dataset.classes
    if text == BALANCED:
        weights = _balanced(where, dataset)
    elif numbers := _numbers(text):
        weights = numbers
    else:
        weights = _of_file(where, text, classes)
    if len(weights) != len(classes):
        raise UserError(
            f"{where}: {len(weights)} weights for {len(classes)} classes; give each one"
        )
    for name, weight in zip(classes, weights, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"{where}: class {name} has {weight}; a weight is 0 or a positive number"
            )
    if not any(weights):
        raise UserError(f"{where}: all weights are 0, so nothing would be learned; raise some")
    return tuple(weights)


def _balanced(where: str, dataset: Dataset) -> list[float]:
    """Return scikit-learn's "balanced" weights: labels / (classes * labels of the class)."""
    if not isinstance(dataset.train, Labelled):
        raise UserError(
            f"{where}: this source does not tell its labels without reading every image; give a "
            "file of class names and weights"
        )
    counts = label_counts(dataset.train.labels, len(dataset.classes))
    if missing := [dataset.classes[i] for i in np.flatnonzero(counts == 0)]:
        raise UserError(
            f"{where}: no training images of class {listed(missing, 3)}, whose weight would be "
            "infinite; leave such classes out with --config.data.min_images=1, or give numbers"
        )
    return (counts.sum() / (len(counts) * counts)).tolist()


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def _of_file(where: str, file: str, classes: list[str]) -> list[float]:
    path = local(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = _json_pairs(text) if path.suffix == ".json" else _csv_pairs(text)
    except OSError as error:
        raise UserError(
            f"{where}: neither {BALANCED}, nor numbers, nor a file ({error.strerror})"
        ) from error
    except (ValueError, TypeError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: no table of class names and weights ({reason})") from error
    weights = dict(pairs)
    if len(weights) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: class {twice} stands there twice; keep one")
    if unknown := [name for name in weights if name not in set(classes)]:
        raise UserError(
            f"{where}: no class of the data: {listed(unknown, 3)}; there are {listed(classes, 5)}"
        )
    if missing := [name for name in classes if name not in weights]:
        raise UserError(f"{where}: no weight of class {listed(missing, 3)}; give each class one")
    return [weights[name] for name in classes]


def _json_pairs(text: str) -> list[tuple[str, float]]:
    content: Any = json.loads(text, object_pairs_hook=list)
    if not isinstance(content, list) or not all(isinstance(pair, tuple) for pair in content):
        raise ValueError("it must be {name: weight}")
    return [(name, _weight(name, value)) for name, value in content]


def _csv_pairs(text: str) -> list[tuple[str, float]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if any(row)]
    if bad := next((row for row in rows if len(row) != 2), None):
        raise ValueError(f"{','.join(bad)[:60]!r} is no name and a weight")
    if rows and not _numbers(rows[0][1]):  # the names of the columns
        rows = rows[1:]
    return [(name, _weight(name, value)) for name, value in rows]


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"the weight of {name} is {value!r}")
    return float(value)
