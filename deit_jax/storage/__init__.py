"""The files of runs, by a small set of operations: any place that has them can hold a run.

There are the local disk and buckets of Google Cloud Storage; another place is a class with the
methods of LocalDisk and a line in BACKENDS. Checkpoints and the arrays of tapes go through Orbax
and TensorStore, which have drivers of their own. All raise OSError, but for what says otherwise.
"""

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit_jax.errors import UserError
from deit_jax.storage import gcs
from deit_jax.storage.bucket import Bucket
from deit_jax.storage.local import LocalDisk, LockedError

__all__ = ["LockedError"]

BACKENDS: dict[str, Any] = {"": LocalDisk(), "gs": Bucket()}  # by the scheme of a path


def to_path(text: str | Path) -> Path:
    """Return the path that a text is: one of etils.epath for gs://bucket/a, else one of a disk."""
    if not is_remote(text):
        return Path(text).expanduser() if str(text).startswith("~") else Path(text)
    if not isinstance(text, str):
        return text
    from etils import epath

    gcs.prepare_libraries()
    return epath.Path(text)


def is_remote(path: str | Path) -> bool:
    """Return whether a path or its text is of a bucket."""
    return str(path).startswith("gs://")


def absolute(path: Path) -> Path:
    """Return a path that does not depend on the folder that the process is in."""
    return path if is_remote(path) else path.absolute()


def local(text: str | Path) -> Path:
    """Return where a file or folder lies on this machine; what is in a bucket is copied first.

    For what is read at random: data and weights. Raise UserError where it cannot be copied.
    """
    path = to_path(text)
    return backend(path).local(path)


def backend(path: Path) -> Any:
    """Return what keeps the files of a path; raise UserError for a scheme that nothing keeps."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))  # a Path makes one slash of two
    if scheme and scheme[1] not in BACKENDS:
        raise UserError(f"{scheme[1]}://{str(path)[scheme.end() :]}: {_remedy(scheme[1])}")
    return BACKENDS[scheme[1] if scheme else ""]


def check_schemes(values: Iterable[tuple[str, Any]]) -> None:
    """Apply check_scheme to (name, value) of flags or fields; what is no text names no place."""
    for name, value in values:
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str):
                check_scheme(name, text)


def check_scheme(name: str, text: str) -> None:
    """Raise UserError if a text names a place by a scheme that nothing here keeps.

    `name` is the flag or field that it was given as. Without this, `gs://bucket/run` would be a
    folder named `gs:` on the local disk. The place may stand behind others, as in `folder:gs://…`.
    """
    for scheme in re.findall(r"([A-Za-z][A-Za-z0-9+.-]+)://", text):
        if scheme not in BACKENDS:
            raise UserError(f"{name}={text}: {_remedy(scheme)}")


def _remedy(scheme: str) -> str:
    return _REMEDIES.get(scheme.lower(), f"{scheme}:// is not understood; give the path of a disk")


_REMEDIES = {
    "file": "leave file:// out and give the path itself",
    "s3": "s3:// cannot be used; mount the bucket (mount-s3) or copy it, and give its path",
    "http": "http:// cannot be read; download it, and give its path",
    "https": "https:// cannot be read; download it, and give its path",
}


def read_text(path: Path) -> str:
    """Return the text in a file; what is no UTF-8 is replaced."""
    return backend(path).read(path).decode("utf-8", "replace")


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all; what UTF-8 cannot hold, as in odd file names, is `?`."""
    backend(path).write(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """Return a JSON file's content, a dict or a list; raise UserError if it is damaged."""
    try:
        value = json.loads(backend(path).read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds no {kind.__name__}; restore it from a copy")
    return value


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a JSON-lines file, which need not be there."""
    with contextlib.closing(backend(path).append(path)) as end:
        end.append(json.dumps(record).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; a last line cut short by a crash is left out."""
    records = []
    for line in read_text(path).splitlines() if exists(path) else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def exists(path: Path) -> bool:
    """Return whether there is a file or a folder."""
    return backend(path).exists(path)


def steps_in(folder: Path) -> list[int]:
    """Return, ascending, the numbers that are names of checkpoints in a folder: of whole ones."""
    place = backend(folder)
    names = [name for name in place.names(folder) if name.isdecimal()]
    return sorted(int(name) for name in names if place.is_complete(folder / name))
