"""Several labels an image, from the rows of label files: cells taken apart, images joined."""

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deit_jax.data.classes import natural_key, read_classes
from deit_jax.data.sources.base import no_labels
from deit_jax.data.sources.splits import listed
from deit_jax.errors import UserError

# What the column of public data sets of several labels is called besides the usual.
LABELS = ("tags", "finding labels", "finding_labels")  # Kaggle's planet, ChestX-ray14
SEPARATORS = ("|", ";", ",")  # in a cell; a space must be asked for, as names hold some too


class Row(NamedTuple):
    """One image as a file of labels has it; `names` are several labels that stand apart there.

    `columns` are the classes of a table with a column for each. `absent` is a row that only says
    which label its image has not.
    """

    path: str
    label: str
    split: str
    where: str  # file and line, for messages
    names: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    absent: bool = False


def one_hot_rows(
    head: list[str], body: Sequence[list[str]], file: str, path: int, split: int | None, of: str
) -> Iterator[Row]:
    """Iterate over the rows of a table with a column of zeros and ones for each class.

    `path` and `split` are the columns that are no classes. Raise UserError for other values.
    """
    classes = [(i, name.strip()) for i, name in enumerate(head) if i not in (path, split)]
    columns = tuple(name for _, name in classes)
    if twice := [name for name in columns if columns.count(name) > 1 or not name]:
        raise UserError(f"{file}: column {twice[0]!r} has no name of its own; give it one")
    for number, row in enumerate(body, 2):
        where = f"{file}:{number}"
        cells = [cell.strip() for cell in row]
        if len(cells) != len(head):
            raise UserError(f"{where}: {len(cells)} cells, the head has {len(head)}")
        for i, name in classes:
            if cells[i] not in ("0", "1", "0.0", "1.0"):
                raise UserError(
                    f"{where}: column {name!r} holds {cells[i]!r}; without a column of labels each "
                    "column is a class of 0 and 1: leave it out of the file, or name the labels' "
                    "with --config.data.label_column=NAME"
                )
        names = tuple(name for i, name in classes if cells[i][0] == "1")
        part = cells[split] if split is not None else of
        yield Row(cells[path], "", part, where, names, columns)


def joined(rows: Sequence[Row], paths: Sequence[str], data):
    """Return each image once, with the classes and its labels: rows, paths, classes, [n K] uint8.

    The same image in several rows has the labels of all. Raise UserError in one line for labels
    that cannot be told apart, of unknown classes or out of range.
    """
    separator = _separator(rows, data.label_separator)
    place, kept = dict[str, int](), list[int]()
    sets: list[dict[str, Row]] = []  # of each image, its labels and the row of each
    for i, (row, path) in enumerate(zip(rows, paths, strict=True)):
        if path not in place:
            place[path] = len(kept)
            kept.append(i)
            sets.append({})
        elif (first := rows[kept[place[path]]]).split != row.split:
            raise UserError(
                f"{row.where}: {path} is of split {row.split!r} here and {first.split!r} before"
            )
        sets[place[path]].update(dict.fromkeys(_names(row, separator), row))
    classes = _classes(sets, _columns(rows), data)
    number = {name: i for i, name in enumerate(classes)}
    labels = no_labels(len(kept), len(classes), f"config.data.labels={data.labels}")
    for i, names in enumerate(sets):
        labels[i, [number[name] for name in names]] = 1
    return [rows[i] for i in kept], [paths[i] for i in kept], classes, labels


def _separator(rows: Sequence[Row], given: str) -> str | None:
    """Return what stands between the labels of a cell, None where a cell holds one at most."""
    if given and given not in (*SEPARATORS, "space"):
        raise UserError(
            f"config.data.label_separator={given}: choose one of {' '.join(SEPARATORS)} or space"
        )
    if given:
        return " " if given == "space" else given
    field = "--config.data.label_separator"
    cells = [row for row in rows if row.names is None and not _is_list(row.label)]
    met = {s: row for s in SEPARATORS for row in reversed(cells) if s in row.label}
    if len(met) > 1:
        first, second = list(met)[:2]
        raise UserError(
            f"{met[second].where}: {met[second].label!r}: labels stand between {first} elsewhere; "
            f"choose with {field}='{first}' or '{second}'"
        )
    if met:
        return next(iter(met))
    if row := next((row for row in cells if len(row.label.split()) > 1), None):
        raise UserError(
            f"{row.where}: {row.label!r}: several labels, or one of several words? choose with "
            f"{field}=space or '|'"
        )
    return None


def check_apart(rows: dict[str, Row], remedy: str) -> None:
    """Raise UserError for names that are several labels in a cell; `rows` has a row of each.

    They are lists, or names with one of SEPARATORS between that stand alone or elsewhere too.
    """
    parts = {n: [p.strip() for p in n.split(s)] for s in SEPARATORS for n in rows if s in n}
    met = Counter(part for some in parts.values() for part in {*some})
    known = {*rows, *(part for part, count in met.items() if count > 1)}
    sets = [n for n in rows if _is_list(n) or (n in parts and known.issuperset(parts[n]))]
    if sets:
        raise UserError(
            f"{rows[sets[0]].where}: {sets[0]!r} looks like several labels ({len(sets)} such); "
            f"{remedy}; if it is the name of one, list the classes with --config.data.classes=FILE"
        )


def _is_list(cell: str) -> bool:
    return cell[:1] == "[" and cell[-1:] == "]"


def _names(row: Row, separator: str | None) -> Sequence[str]:
    """Return the labels of a row."""
    if row.names is not None:
        return row.names
    if _is_list(row.label):  # as pandas writes a column of lists
        try:
            values = ast.literal_eval(row.label)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{row.where}: {row.label!r} is no list of labels") from error
        return names_of(values, row.where)
    parts = [row.label] if separator is None else row.label.split(separator)
    return [part.strip() for part in parts if part.strip()]


def names_of(values: Sequence, where: str) -> tuple[str, ...]:
    """Return a list of labels, names or numbers, as strings; raise UserError for anything else."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise UserError(f"{where}: the label {value!r} is neither a name nor a number")
    return tuple(str(value) for value in values)


def _columns(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the classes that have a column of their own, be it all 0, and a row with them."""
    first = rows[0]
    for row in rows:
        if row.columns != first.columns and {*row.columns} != {*first.columns}:
            other = listed(sorted({*row.columns} ^ {*first.columns}), 3)
            raise UserError(
                f"{row.where}: other columns of classes than {first.where} has ({other}); give all "
                "tables the same"
            )
    return dict.fromkeys(first.columns, first)


def _classes(sets: Sequence[dict[str, Row]], columns: dict[str, Row], data) -> list[str]:
    """Return the classes: those given, numbers from 0, or all names in their natural order."""
    given = read_classes(data.classes) if data.classes else None
    rows = dict[str, Row]()  # the first of each name
    for name, row in (pair for names in sets for pair in names.items()):
        rows.setdefault(name, row)
    rows |= {name: row for name, row in columns.items() if name not in rows}
    if given and rows.keys() <= set(given):
        return given
    if not rows:
        raise UserError(f"config.data.labels={data.labels}: not one image has a label")
    if given is None and not columns and all(name.isdecimal() for name in rows):
        most = sum(map(len, sets))  # a class of each label, or some are no numbers of classes
        for name, row in rows.items():
            if int(name) > most:
                raise UserError(
                    f"{row.where}: label {name} of {row.path} is out of range for {most} labels in "
                    "all; give the classes with --config.data.classes=FILE"
                )
            if str(int(name)) != name:
                raise UserError(f"{row.where}: label {name} of {row.path}: write it {int(name)}")
        return [str(i) for i in range(max(map(int, rows)) + 1)]
    if given and all(name.isdecimal() for name in rows):
        raise UserError(
            f"config.data.labels={data.labels}: labels are numbers, config.data.classes="
            f"{data.classes} has names; write the names, or leave classes out"
        )
    if given:
        unknown = [name for name in rows if name not in set(given)]
        row = rows[unknown[0]]
        raise UserError(
            f"{row.where}: {listed(unknown, 3)}, a label of {row.path}, is no class of "
            f"config.data.classes={data.classes}"
        )
    if not columns:
        check_apart(rows, "say what stands between labels with --config.data.label_separator")
    return sorted(rows, key=natural_key)
