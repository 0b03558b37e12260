"""Labels of the images below a folder from files: csv, tsv, json, or lines of path and label."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deit_jax.data.classes import natural_key, read_classes
from deit_jax.data.formats import image_suffixes
from deit_jax.data.sources import label_sets
from deit_jax.data.sources.assemble import assemble
from deit_jax.data.sources.base import Dataset, SourceReading
from deit_jax.data.sources.files import FolderSource
from deit_jax.data.sources.label_sets import Row
from deit_jax.data.sources.scan import Scan
from deit_jax.data.sources.splits import choose_split, kind_of, kinds_in, listed
from deit_jax.errors import UserError
from deit_jax.storage import local

# What people call the columns of a table, without capitals.
PATHS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "images", "img"),
    *("image_path", "image_name", "image_id", "id", "image_file_path", "fname", "id_code"),
    *("image name", "image index", "image_index", "imageid", "image id", "file name"),
)
LABELS = (
    *("label", "labels", "class", "classes", "target", "category", "class_name", "label_name"),
    *("class_id", "label_id", "wnid", "species", "breed", "labelname", "category_id"),
    *("diagnosis", "dx"),
)
SEVERAL = "for several labels an image set --config.data.multi_label=True"
COLUMNS = "--config.data.image_column=NAME and --config.data.label_column=NAME"
CONFIDENCE = "confidence"  # of a row's label, as in Open Images: 0 says that it is absent
SPLITS = ("split", "set", "subset", "partition", "data_split")


def open_labelled(root: Path, data) -> Dataset:
    """Return the images that `data.labels` names, files with commas between them.

    Splits are those of a column, else of the files' names (train.csv, val.csv), else of the images'
    folders; without, a part is held out. Raise UserError with the first offender and the count.
    """
    rows = [row for file in data.labels.split(",") for row in _read(file.strip(), data)]
    if not rows:
        raise UserError(f"config.data.labels={data.labels}: no images in it")
    scan = Scan(root, data.channels)
    there = [f"{f.path}/{n}" if f.path else n for f in scan.walk() for n in f.files]
    paths = _resolve(root, rows, there, data.labels)
    repeated, every = 0, rows
    if data.multi_label:
        rows, paths, classes, numbers = label_sets.joined(rows, paths, data)
    else:
        rows, paths, repeated = _unique(rows, paths)
        classes, numbers = _numbers(rows, data)
    train, held, notes = _parts(rows, paths, data)
    notes += _note_on_sets(classes, data)
    if absent := sum(row.absent for row in every):
        notes += (f"{absent} rows whose confidence is 0: labels that an image has not",)
    left_out = dict(scan.left_out)
    named = set(paths)
    left_out |= _counted("images that data.labels does not name", len(set(there) - named))
    left_out |= _counted("rows that repeat another", repeated)
    reading = SourceReading(f"the images of {data.labels}", "", left_out, notes)

    def part(chosen: Sequence[int]):
        names = [os.path.join(root, paths[i]) for i in chosen]
        return FolderSource(root, names, numbers[np.asarray(chosen, np.int64)])

    if held:
        reading = dataclasses.replace(reading, eval=f"{len(held)} of them, by their split")
    return assemble(
        part(train), part(held) if held else None, classes, data, reading, bool(data.classes)
    )


def _note_on_sets(classes: list[str], data) -> tuple[str, ...]:
    """Return a note on classes whose names look like several."""
    sets = [name for name in classes if "|" in name or ";" in name]
    if not sets or data.multi_label:
        return ()
    return (f"{listed(sets, 2)}: one class each; --config.data.multi_label=True takes them apart",)


def _counted(what: str, count: int) -> dict[str, int]:
    return {what: count} if count else {}


def _read(file: str, data) -> Iterator[Row]:
    """Iterate over the rows of one file; its name may say which split it is of."""
    path = local(file)
    kinds = kinds_in(path.stem)
    split = next(iter(kinds)) if len(kinds) == 1 else ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            yield from _json_rows(json.loads(text), file, split, data.multi_label)
        elif path.suffix in (".csv", ".tsv"):
            yield from _table_rows(text, "\t" if path.suffix == ".tsv" else ",", file, split, data)
        else:
            yield from _line_rows(text, file, split, data.multi_label)
    except OSError as error:
        raise UserError(f"config.data.labels={file}: cannot be read ({error.strerror})") from error
    except (ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.data.labels={file}: not understood ({reason})") from error


def _line_rows(text: str, file: str, split: str, several: bool) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        between = "," if "," in line else None
        parts = line.rsplit(between, 1)
        if several:  # any number of labels after the path, also none
            parts = [*line.strip().split(between, 1), ""][:2]
        if len(parts) != 2:
            raise ValueError(f"line {number}, {line.strip()!r}, is no path with a label after it")
        yield Row(parts[0].strip(), parts[1].strip(), split, f"{file}:{number}")


def _json_rows(content: Any, file: str, split: str, several: bool) -> Iterator[Row]:
    if isinstance(content, dict) and isinstance(content.get("labels"), list):
        content = content["labels"]  # StyleGAN's dataset.json
    pairs = content.items() if isinstance(content, dict) else content
    if not isinstance(content, dict | list):
        raise ValueError("neither a list nor an object")
    for number, pair in enumerate(pairs, 1):
        where = f"{file}, entry {number}"
        if isinstance(pair, dict):
            fields = {k.lower(): v for k, v in pair.items()}
            paths, labels = _known(several)
            path, label = _one(fields, paths, "path", where), _one(fields, labels, "label", where)
            given = next((fields[k] for k in SPLITS if k in fields), split)
            pair, row_split = (fields[path], fields[label]), str(given)
        else:
            row_split = split
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"entry {number} is no path with a label")
        if isinstance(pair[1], list):
            if not several:
                raise ValueError(f"{pair[0]} has several labels; {SEVERAL}")
            yield Row(pair[0], "", row_split, where, label_sets.names_of(pair[1], where))
            continue
        if isinstance(pair[1], bool) or not isinstance(pair[1], str | int):
            raise ValueError(f"the label of {pair[0]}, {pair[1]!r}, is neither a name nor a number")
        yield Row(pair[0], str(pair[1]), row_split, where)


def _table_rows(text: str, separator: str, file: str, split: str, data) -> Iterator[Row]:
    first_line = text.partition("\n")[0]
    if separator == "," and "," not in first_line:  # as a spreadsheet of another country writes it
        separator = next((sign for sign in ";\t" if sign in first_line), separator)
    rows = [row for row in csv.reader(text.splitlines(), delimiter=separator) if any(row)]
    if not rows:
        return
    head = [cell.strip().lower() for cell in rows[0]]
    paths, labels = _known(data.multi_label)
    named = set(head) & {*paths, *labels} or data.image_column or data.label_column
    if named:
        columns = {name: i for i, name in enumerate(head)}
        where = f"{file}, columns {', '.join(rows[0])}"
        path = columns[_one(columns, paths, "path", where, data.image_column)]
        split_column = next((columns[k] for k in SPLITS if k in columns), None)
        body = rows[1:]
        if data.multi_label and not data.label_column and not set(columns) & set(labels):
            yield from label_sets.one_hot_rows(rows[0], body, file, path, split_column, split)
            return
        label = columns[_one(columns, labels, "label", where, data.label_column)]
    else:
        if len(head) != 2:
            raise ValueError(
                f"{len(head)} columns without known names, {listed(rows[0], 4)}; name two with "
                f"{COLUMNS}; {SEVERAL}"
            )
        first = _is_image(rows[0][0], data.channels) or not _is_image(rows[0][1], data.channels)
        path, label, split_column, body = int(not first), int(first), None, rows
        columns = {}
    for number, row in enumerate(body, 1 + bool(named)):
        needed = max(path, label, -1 if split_column is None else split_column)
        if len(row) <= needed:
            raise ValueError(f"line {number} has {len(row)} cells, column {needed + 1} is needed")
        of = row[split_column].strip() if split_column is not None else split
        where = f"{file}:{number}"
        if _is_absent(row, columns.get(CONFIDENCE), label, where, data.multi_label):
            yield Row(row[path].strip(), "", of, where, names=(), absent=True)
        else:
            yield Row(row[path].strip(), row[label].strip(), of, where)


def _is_absent(row: list[str], column: int | None, label: int, where: str, several: bool) -> bool:
    """Return whether a row tells that its image has not the label, as some of Open Images' do.

    Raise UserError where that is no answer: with one label an image, or by halves.
    """
    if column in (None, label) or not row[column:]:
        return False
    try:
        confidence = float(row[column])
    except ValueError:
        return False  # another kind of column of this name
    if (not several and confidence == 0) or (several and confidence not in (0, 1)):
        remedy = "leave out the rows that are not sure" if several else SEVERAL
        raise UserError(f"{where}: a label whose confidence is {confidence:g}; {remedy}")
    return confidence == 0


def _known(several: bool) -> tuple[Sequence[str], Sequence[str]]:
    """Return the usual names of the columns of paths and of labels."""
    return PATHS, (*LABELS, *(label_sets.LABELS * several))


def _is_image(name: str, channels: int) -> bool:
    return os.path.splitext(name.strip())[1].lower() in image_suffixes(channels)


def _one(columns, known: Sequence[str], what: str, where: str, wanted: str = "") -> str:
    """Return the one column that can be meant; raise UserError where there is none, or several."""
    field = "--config.data.image_column" if what == "path" else "--config.data.label_column"
    found = [wanted.lower()] if wanted.lower() in columns else []
    found = found if wanted else [name for name in known if name in columns]
    if len(found) != 1:
        several = f"{listed(found)} could each be the {what}" if found else f"no column of {what}s"
        given = f" called {wanted}" if wanted and not found else ""
        sets = f"; {SEVERAL}" if what == "label" and not found and not wanted else ""
        raise UserError(
            f"config.data.labels={where}: {several}{given}; choose with {field}=NAME{sets}"
        )
    return found[0]


def _resolve(root: Path, rows: list[Row], there: list[str], labels: str) -> list[str]:
    """Return the path below the root of each row's image; names without folder or ending do."""
    exact, by_name, by_stem = set(there), dict[str, list[str]](), dict[str, list[str]]()
    for path in there:
        name = os.path.basename(path)
        by_name.setdefault(name, []).append(path)
        by_stem.setdefault(os.path.splitext(name)[0], []).append(path)
    found, missing = [], []
    for row in rows:
        path = os.path.normpath(row.path)
        path = os.path.relpath(path, root) if os.path.isabs(path) else path
        name = os.path.basename(path)
        candidates = [path] if path in exact else by_name.get(name, by_stem.get(name, []))
        if len(candidates) > 1:  # images/cat/1.jpg may be written cat/1
            candidates = [p for p in candidates if _stem(f"/{p}").endswith(_stem(f"/{path}"))]
        if len(candidates) > 1:  # a table may lie beside its images
            beside = os.path.relpath(os.path.dirname(row.where) or ".", root)
            candidates = [p for p in candidates if p.startswith(f"{beside}/")] or candidates
        if len(candidates) > 1:
            raise UserError(
                f"{row.where}: {row.path} could be any of {listed(candidates, 3)}; write its "
                "folder too"
            )
        if candidates:
            found.append(candidates[0])
        else:
            missing.append(row)
    if missing:
        head = missing[0].where.endswith(":1")
        raise UserError(
            f"config.data.labels={labels}: {len(missing)} of {len(rows)} images are not in {root}, "
            f"the first is {missing[0].path} ({missing[0].where})"
            + (f"; if that is a head, name its columns with {COLUMNS}" if head else "")
        )
    return found


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _unique(rows: list[Row], paths: list[str]) -> tuple[list[Row], list[str], int]:
    """Return each image once; raise UserError for one of two labels."""
    label_of, kept = dict[str, str](), list[int]()
    for i, (row, path) in enumerate(zip(rows, paths, strict=True)):
        if path not in label_of:
            label_of[path] = row.label
            kept.append(i)
        elif label_of[path] != row.label:
            count = sum(
                label_of.get(p, r.label) != r.label for r, p in zip(rows, paths, strict=True)
            )
            raise UserError(
                f"{row.where}: {path} is {row.label} here and {label_of[path]} before "
                f"({count} such rows); an image has one label. {SEVERAL}"
            )
    return [rows[i] for i in kept], [paths[i] for i in kept], len(rows) - len(kept)


def _numbers(rows: list[Row], data) -> tuple[list[str], np.ndarray]:
    """Return the classes and the label of each row."""
    given = read_classes(data.classes) if data.classes else None
    if given and {row.label for row in rows} <= set(given):
        number = {name: i for i, name in enumerate(given)}
        return given, np.array([number[row.label] for row in rows], np.int32)
    if all(row.label.isdecimal() for row in rows):
        numbers = np.array([int(row.label) for row in rows], np.int64)
        classes = given or [str(i) for i in range(min(numbers.max() + 1, len(rows) + 1))]
        outside = np.flatnonzero(numbers >= len(classes))
        if len(outside):
            row = rows[outside[0]]
            raise UserError(
                f"{row.where}: label {row.label} of {row.path} is out of range, there are "
                f"{len(classes)} classes ({len(outside)} such rows)"
            )
        return classes, numbers.astype(np.int32)
    if given:
        unknown = [row for row in rows if row.label not in set(given)]
        raise UserError(
            f"{unknown[0].where}: class {unknown[0].label!r} of {unknown[0].path} is none of "
            f"config.data.classes={data.classes} ({len(unknown)} such rows)"
        )
    if empty := [row for row in rows if not row.label]:
        sets = f"; {SEVERAL}" if any("|" in r.label or ";" in r.label for r in rows) else ""
        raise UserError(f"{empty[0].where}: no label ({len(empty)} such rows){sets}")
    first = dict[str, Row]()
    for row in rows:
        first.setdefault(row.label, row)
    label_sets.check_apart(first, SEVERAL)
    classes = sorted(first, key=natural_key)
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[row.label] for row in rows], np.int32)


def _parts(rows: list[Row], paths: list[str], data) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Return the rows to train and to evaluate on, [] where a part is to be held out, and notes."""
    tops = [path.partition("/")[0] if "/" in path else "" for path in paths]
    by_folder = all(kind_of(top) for top in tops)
    splits = [row.split or (top if by_folder else "") for row, top in zip(rows, tops, strict=True)]
    there = sorted(set(splits))
    if there == [""]:
        return list(range(len(rows))), [], ()
    if "" in there:
        row = rows[splits.index("")]
        raise UserError(
            f"{row.where}: {row.path} is of no split, others are of {listed(there[1:])}"
        )
    train = choose_split(data.train_split, there)
    held = choose_split(data.eval_split, there)
    for field, wanted, got in (
        ("train_split", data.train_split, train),
        ("eval_split", data.eval_split, held or data.eval_split == "validation"),
    ):
        if not got:
            raise UserError(
                f"config.data.{field}={wanted}: data.labels has no such split; there are "
                f"{listed(there)}"
            )
    other = set(there) - {train, held}
    notes = tuple(f"split {name} is left aside (not asked for)" for name in sorted(other))
    return (
        [i for i, s in enumerate(splits) if s == train],
        [i for i, s in enumerate(splits) if s == held],
        notes,
    )
