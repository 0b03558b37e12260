"""The files of runs, by a small set of operations: any place that has them can hold a run.

The local disk is the only such place so far; another one is a class with the methods of LocalDisk
and a line in BACKENDS. Checkpoints and the arrays of tapes go through Orbax and TensorStore, which
have drivers of their own. All raise OSError, but for what says otherwise.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deit_jax.errors import UserError

log = logging.getLogger("deit_jax")


class LockedError(Exception):
    """A lock that another process holds; the message is what that one says of itself."""


class LocalDisk:
    """Files on a disk of this machine, or one that is mounted."""

    def read(self, path: Path) -> bytes:
        """Return a file's content."""
        return path.read_bytes()

    def read_start(self, path: Path, size: int) -> bytes:
        """Return the first bytes of a file, fewer where it has not so many."""
        with path.open("rb") as file:
            return file.read(size)

    def write(self, path: Path, data: bytes) -> None:
        """Write a file whole or not at all, in the place of one that is there."""
        path = path.resolve() if path.is_symlink() else path  # a link is to stay one
        if path.exists() and not path.is_file():
            path.write_bytes(data)  # a pipe or a device, not to be replaced
            return
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):  # it takes the room that is lacking
                temporary.unlink()
            raise

    def append(self, path: Path) -> "LocalAppender":
        """Open a file, which need not be there, to add to its end."""
        return LocalAppender(path)

    def create(self, path: Path) -> "LocalAppender":
        """Open a file, emptied if it is there, to add to its end."""
        return LocalAppender(path, "wb")

    def sha256(self, path: Path) -> str:
        """Return the checksum of a file's content."""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def names(self, folder: Path) -> list[str]:
        """Return the sorted names of what is in a folder, none if there is no such folder."""
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files(self, folder: Path) -> list[tuple[str, int]]:
        """Return path and size in bytes of every file below a folder; the paths begin in it."""
        found = [p for p in folder.rglob("*") if p.is_file()]
        return sorted((p.relative_to(folder).as_posix(), p.stat().st_size) for p in found)

    def exists(self, path: Path) -> bool:
        """Return whether there is a file or a folder."""
        return path.exists()

    def is_folder(self, path: Path) -> bool:
        """Return whether there is a folder."""
        return path.is_dir()

    def make_folder(self, path: Path) -> None:
        """Make a folder, and those around it, unless it is there."""
        path.mkdir(parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, at once."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with all in it, as far as that can be."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def must_be_writable(self, path: Path) -> None:
        """Raise OSError unless a file or folder is there and can be written."""
        code = errno.EROFS if path.exists() else errno.ENOENT
        if not os.access(path, os.W_OK):
            raise OSError(code, os.strerror(code), str(path))

    @contextlib.contextmanager
    def lock(self, path: Path, holder: str) -> Iterator[None]:
        """Hold a lock that ends with the process, however it ends; raise LockedError if it is held.

        The file holds the text `holder` meanwhile. Where the file system has no locks, warn.
        """
        with path.open("a+") as file:
            _lock(file, path)
            with contextlib.suppress(OSError):  # on a full disk, who it is goes without saying
                file.truncate(0)
                file.write(f"{holder}\n")
                file.flush()
            try:
                yield
            finally:  # the file stays: another process may have opened it to wait for the lock
                with contextlib.suppress(OSError):
                    file.truncate(0)


def _lock(file, path: Path) -> None:
    import portalocker  # flock on Unix, byte ranges on Windows

    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:
        holder = ""
        with contextlib.suppress(OSError):  # Windows lets nobody read what is locked
            file.seek(0)
            holder = file.read().strip()
        raise LockedError(holder) from None
    except portalocker.LockException as error:
        reason = error.strerror or error
        log.warning("%s: no locks on this file system (%s)", path.parent, reason)


class LocalAppender:
    """The end of a file."""

    def __init__(self, path: Path, mode: str = "ab"):
        self._file = path.open(mode, buffering=0)

    def append(self, data: bytes) -> None:
        """Add to the file all of it or, raising OSError, nothing."""
        end = self._file.tell()
        if self._file.write(data) < len(data):
            self._file.truncate(end)  # of a line cut short, the rest would never join it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


BACKENDS = {"": LocalDisk()}  # by the scheme of a path


def backend(path: Path) -> LocalDisk:
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
    "gs": "gs:// cannot be used yet; mount the bucket (gcsfuse) or copy it, and give its path",
    "s3": "s3:// cannot be used yet; mount the bucket (mount-s3) or copy it, and give its path",
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
    """Return, ascending, the numbers that are names in a folder, as of checkpoints."""
    return sorted(int(name) for name in backend(folder).names(folder) if name.isdecimal())
