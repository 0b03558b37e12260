"""The files of runs: any place with a few operations can hold a run, a disk or a bucket."""

# Another place is a class with the methods of LocalDisk and a line in BACKENDS. Checkpoints and the
# arrays of tapes go through Orbax and TensorStore, which have drivers of their own. All functions
# raise OSError, but for what says otherwise.

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from deit_jax.errors import UserError
from deit_jax.storage import gcs
from deit_jax.storage.bucket import Bucket
from deit_jax.storage.local import LocalDisk, LockedError
from deit_jax.storage.s3 import S3Objects

__all__ = ["LockedError"]

NO_RUNS = (
    "runs and label tapes cannot be kept in s3://, as Orbax has no driver for it; take gs://, a "
    "disk, or a bucket that is mounted (mount-s3)"
)
BACKENDS: dict[str, Any] = {  # by the scheme of a path
    "": LocalDisk(),
    "gs": Bucket(),
    "s3": Bucket(S3Objects(), NO_RUNS),
}


def to_path(text: str | PurePath) -> PurePath:
    """Return the path that a text is: one of etils.epath for a bucket, else one of a disk."""
    if not is_remote(text):
        return Path(text).expanduser() if str(text).startswith("~") else Path(text)
    if not isinstance(text, str):
        return text
    from etils import epath

    gcs.prepare_libraries()
    return epath.Path(text)


def is_remote(path: str | PurePath) -> bool:
    """Return whether a path or its text is of a bucket."""
    return str(path).startswith(("gs://", "s3://"))


def absolute(path: PurePath) -> PurePath:
    """Return a path that does not depend on the folder that the process is in."""
    return path.absolute() if isinstance(path, Path) else path


def local(text: str | PurePath) -> Path:
    """Return where a file or folder lies on this machine; what is in a bucket is copied first.

    For what is read at random: data and weights. Raise UserError where it cannot be copied.
    """
    path = to_path(text)
    return backend(path).local(path)


def on_disk(name: str, text: str) -> Path:
    """Return the path of a disk that a flag names; raise UserError for a bucket.

    For what is written bit by bit, or changed where it is.
    """
    if is_remote(text):
        raise UserError(f"{name}={text}: is not written to a bucket; name a disk, and copy it then")
    return Path(text).expanduser()


def backend(path: PurePath) -> Any:
    """Return what keeps the files of a path; raise UserError for a scheme that nothing keeps."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))  # a Path makes one of two slashes
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
        if (reason := BACKENDS[scheme].why_no_runs) and name.lstrip("-") in OF_RUNS:
            raise UserError(f"{name}={text}: {reason}")


OF_RUNS = ("workdir", "reproduce", "config.teacher.tape_path")  # flags and fields


def _remedy(scheme: str) -> str:
    return _REMEDIES.get(scheme.lower(), f"{scheme}:// is not understood; give the path of a disk")


_REMEDIES = {
    "file": "leave file:// out and give the path itself",
    "http": "http:// cannot be read; download it, and give its path",
    "https": "https:// cannot be read; download it, and give its path",
}


def read_text(path: PurePath) -> str:
    """Return the text in a file; what is no UTF-8 is replaced."""
    return backend(path).read(path).decode("utf-8", "replace")


def write_text(path: PurePath, text: str) -> None:
    """Write a text whole or not at all; what UTF-8 cannot hold, as in odd file names, is `?`."""
    backend(path).write(path, text.encode("utf-8", "replace"))


def write_json(path: PurePath, value: Any, indent: int = 2) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: PurePath, kind: type = dict) -> Any:
    """Return a JSON file's content, a dict or a list; raise UserError if it is damaged."""
    try:
        value = json.loads(backend(path).read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds no {kind.__name__}; restore it from a copy")
    return value


def write_lines(path: PurePath, records: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_line(path: PurePath, record: dict[str, Any]) -> None:
    """Add a record to a JSON-lines file, which need not be there."""
    with contextlib.closing(backend(path).append(path)) as end:
        end.append(json.dumps(record).encode() + b"\n")


def read_lines(path: PurePath) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; a last line cut short by a crash is left out."""
    records = []
    for line in read_text(path).splitlines() if exists(path) else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def replace_folder(new: PurePath, path: PurePath, old: PurePath) -> None:
    """Give a folder the name of another, which is gone then; on an error the other keeps its name.

    `old` is a name that is free, for the moment between.
    """
    disk = backend(path)
    there = disk.exists(path)
    if there:
        disk.rename(path, old)
    try:
        disk.rename(new, path)
    except OSError:
        if there:
            disk.rename(old, path)
        raise
    disk.remove(old)


def exists(path: PurePath) -> bool:
    """Return whether there is a file or a folder."""
    return backend(path).exists(path)


def steps_in(folder: PurePath) -> list[int]:
    """Return, ascending, the numbers that are names of checkpoints in a folder: of whole ones."""
    place = backend(folder)
    names = [name for name in place.names(folder) if name.isdecimal()]
    return sorted(int(name) for name in names if place.is_complete(folder / name))
