"""Rows of answers, to a file or to stdout, as they come: text, JSON, JSON lines or csv."""

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deit_jax.errors import UserError
from deit_jax.storage import backend, to_path

FORMATS = {
    "text": "lines to read",
    "json": "one JSON object, its `results` a list",
    "jsonl": "a JSON object a line",
    "csv": "a row an image",
}
_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".json": "json", ".txt": "text"}


def format_of(out: str, asked: str | None) -> str:
    """Return the format that was asked for, or that a file's name says; raise UserError."""
    ending = Path(out).suffix
    if not asked and ending and ending not in _SUFFIXES:
        endings = ", ".join(_SUFFIXES)
        raise UserError(f"--out={out}: give it one of {endings}, or say --format=…")
    return asked or _SUFFIXES.get(ending, "text")


class Out:
    """The file that --out names, or stdout without a name; what is written is there at once."""

    def __init__(self, out: str):
        self._name, self._end = out, None
        if out:
            with self._explained():
                self._end = backend(to_path(out)).create(to_path(out))

    def write(self, text: str) -> None:
        """Write a text; raise UserError where that cannot be."""
        if self._end is None:
            sys.stdout.write(text)
            return
        with self._explained():  # names of files that are no UTF-8 keep their bytes
            self._end.append(text.encode("utf-8", "surrogateescape"))

    def close(self) -> None:
        """Close the file."""
        if self._end is not None:
            self._end.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--out={self._name}: cannot be written ({reason})") from error


class Predictions:
    """Predictions of one image after the other, written as they come."""

    def __init__(self, file: Out, form: str, topk: int):
        self._file, self._form, self._topk, self._count = file, form, topk, 0
        self._csv = csv.writer(file, lineterminator="\n")
        if form == "csv":
            ranks = [f"{what}_{i}" for i in range(1, topk + 1) for what in ("class", "probability")]
            self._csv.writerow(["path", *ranks])
        elif form == "json":
            file.write('{"results": [')

    def write(self, result: dict[str, Any]) -> None:
        """Write what is said of one image."""
        said = result["predictions"]
        if self._form == "csv":
            cells = [x for p in said for x in (p["class"], f"{p['probability']:.6f}")]
            self._csv.writerow([result["image"], *cells])
        elif self._form == "text":
            lines = [f"  {p['probability']:6.1%}  {p['class']}\n" for p in said]
            self._file.write("".join([f"{result['image']}\n", *lines]))
        else:
            before = "" if self._form == "jsonl" or not self._count else ", "
            after = "\n" if self._form == "jsonl" else ""
            self._file.write(f"{before}{json.dumps(result)}{after}")
        self._count += 1

    def end(self, unreadable: list[str]) -> None:
        """Write what stands at the end: in JSON the images that could not be read."""
        if self._form == "json":
            left_out = f', "unreadable": {json.dumps(unreadable)}' if unreadable else ""
            self._file.write(f"]{left_out}}}\n")
