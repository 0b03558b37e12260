"""Names of classes: their order, lists of them in files, and what follows where two lists meet."""

import csv
import io
import json
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from deit_jax.data.sources.splits import listed
from deit_jax.errors import UserError
from deit_jax.storage import local

# What programs call classes whose names they do not know.
PLACEHOLDER = re.compile(r"(?:class |LABEL_|class_)?(\d+)")


def natural_key(name: str) -> tuple:
    """Return what sorts names as timm does: numbers in them by their value, capitals alike."""
    parts = re.split(r"(\d+)", name.lower())  # every second one is a number
    return tuple(int(p) if i % 2 else p for i, p in enumerate(parts)), name


class Alignment(NamedTuple):
    """How two lists of classes go together.

    `order` has for each class of the one that is wanted its number in the one at hand, None where
    they are the same; `note` is a line for people, "" where there is nothing to say.
    """

    order: np.ndarray | None
    note: str


def align(
    have: list[str], want: list[str], whose: str, where: str, may_know_more: bool = False
) -> Alignment:
    """Return how the classes at hand, of `whose`, become those wanted, of `where`.

    The same names in another order are put in order. Names of which one list knows none, or which
    have nothing in common, cannot be compared: they are taken as they come. Raise UserError where
    some are the same and others not, or the numbers differ; but with `may_know_more` those at hand
    may be more, if all that are wanted are among them.
    """
    if have == want:
        return Alignment(None, "")
    ours, theirs = _comparable(have), _comparable(want)
    same_count, unnamed = len(have) == len(want), _unnamed(have) or _unnamed(want)
    if sorted(ours) == sorted(theirs):
        if ours == theirs:
            return Alignment(None, "")
        if twice := [name for name, n in Counter(ours).items() if n > 1]:
            raise UserError(
                f"{whose} has the classes of {where} in another order ({_first(have, want)}), and "
                f"names that stand twice cannot be mapped: {listed(twice, 3)}"
            )
        number = {name: i for i, name in enumerate(ours)}
        note = f"{whose} has another order of classes, mapped by their names: {_first(have, want)}"
        return Alignment(np.array([number[name] for name in theirs]), note)
    unknown = sorted(set(theirs) - set(ours), key=theirs.index)
    if may_know_more and len(have) > len(want) and not (unknown or unnamed):
        return Alignment(*_among(ours, theirs, whose, where))
    if not same_count or (len(unknown) < len(set(theirs)) and not unnamed):
        names = [want[theirs.index(name)] for name in unknown]
        text = "" if unnamed or not names else f"; not known there: {listed(names, 5)}"
        if unnamed and may_know_more and len(have) > len(want):
            text = "; names that only count cannot be mapped, give others with config.data.classes"
        raise UserError(
            f"{whose} knows {len(have)} classes, {where} has {len(want)}{text} "
            f"({_first(have, want)})"
        )
    if unnamed:
        return Alignment(None, "")
    note = f"{whose} has other names of classes, taken in their order: {_first(have, want)}"
    return Alignment(None, note)


def _among(ours: list[str], theirs: list[str], whose: str, where: str) -> tuple[np.ndarray, str]:
    """Return the numbers that some of the classes at hand have, and a note that they are some."""
    counts = Counter(ours)
    if twice := [name for name in theirs if counts[name] > 1]:
        raise UserError(
            f"{whose} knows {len(ours)} classes, of which names that {where} asks for stand twice: "
            f"{listed(twice, 3)}"
        )
    if len(set(theirs)) < len(theirs):
        raise UserError(f"{where}: names of classes that stand twice cannot be mapped")
    number = {name: i for i, name in enumerate(ours)}
    note = f"{whose} knows {len(ours)} classes; it is asked for the {len(theirs)} of {where} alone"
    return np.array([number[name] for name in theirs]), note


def _first(have: list[str], want: list[str]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), 0)
    there, here = (", ".join(names[at : at + 3]) for names in (have, want))
    return f"from {at} on {there}, … there and {here}, … here"


def _comparable(names: list[str]) -> list[str]:
    return [re.sub(r"[\s_-]+", " ", name).strip().casefold() for name in names]


def _unnamed(names: list[str]) -> bool:
    """Return whether a list only counts: class 0, class 1, …"""
    matches = [PLACEHOLDER.fullmatch(name) for name in names]
    return all(m and int(m[1]) == i for i, m in enumerate(matches))


def read_classes(file: str) -> list[str]:
    """Return the names of classes by label from a file, or ImageNet-1k's ids for "imagenet".

    A text with a name a line (of `n01440764 tench, …` the id), a JSON list, {"0": name},
    {"0": [id, name]} or {name: 0}, or a csv of names and numbers. Raise UserError.
    """
    if file == "imagenet":
        return imagenet_list("labels")
    path = local(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            names = _from_json(json.loads(text))
        elif path.suffix == ".csv":
            names = _from_rows(list(csv.reader(io.StringIO(text))))
        else:
            names = _from_lines(text.splitlines())
    except OSError as error:
        raise UserError(f"config.data.classes={file}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, IndexError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.data.classes={file}: no list of classes ({reason})") from error
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"config.data.classes={file}: stands there twice: {listed(twice, 3)}")
    if len(names) < 2:
        raise UserError(f"config.data.classes={file}: {len(names)} class(es); two are needed")
    return names


def _from_lines(lines: list[str]) -> list[str]:
    names = [line.strip() for line in lines if line.strip()]
    ids = [re.match(r"(n\d{8})(?=[\s,]|$)", name) for name in names]
    return [m[1] for m in ids if m] if all(ids) else names


def _from_rows(rows: list[list[str]]) -> list[str]:
    rows = [[cell.strip() for cell in row] for row in rows if any(row)]
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    column = next((c for c in (0, 1) if all(_is_int(row[c]) for row in rows[1:])), None)
    if column is None:
        raise ValueError("neither of the first two columns is a number")
    body = rows if _is_int(rows[0][column]) else rows[1:]
    return _by_number({int(row[column]): row[1 - column] for row in body}, len(body))


def _from_json(content: Any) -> list[str]:
    if isinstance(content, list):
        return [_name(value) for value in content]
    if not isinstance(content, dict):
        raise ValueError("neither a list nor an object")
    if all(isinstance(value, int) for value in content.values()):
        return _by_number({value: name for name, value in content.items()}, len(content))
    return _by_number({int(k): _name(v) for k, v in content.items()}, len(content))


def _name(value: Any) -> str:
    value = value[0] if isinstance(value, list) else value  # imagenet_class_index.json
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value


def _by_number(names: dict[int, str], count: int) -> list[str]:
    if sorted(names) != list(range(count)):
        raise ValueError(f"the numbers are not 0 to {count - 1}, each once")
    return [names[i] for i in range(count)]


def _is_int(text: str) -> bool:
    return bool(re.fullmatch(r"\d+", text))


def imagenet_list(name: str) -> list[str]:
    """Return one of the two lists of WordNet ids that TFDS carries: labels, validation_labels."""
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path(f"datasets/imagenet2012/{name}.txt")
    return path.read_text().split()
