"""Files on a disk of this machine, or one that is mounted."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("deit_jax")


class LockedError(Exception):
    """A lock that another process holds; the message is what that one says of itself."""


class LocalDisk:
    """Files on a disk of this machine, or one that is mounted."""

    why_no_runs = ""

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

    def is_complete(self, folder: Path) -> bool:
        """Return whether a checkpoint's folder is whole: on a disk it has no name before."""
        return True

    def is_marked(self, folder: Path) -> bool:
        """Return whether Orbax takes a checkpoint's folder for whole: on a disk by its name."""
        return True

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

    def local(self, path: Path) -> Path:
        """Return where a file or folder lies on this machine's disk: where it is."""
        return path

    def must_be_writable(self, path: Path) -> None:
        """Raise OSError unless a file or folder is there and can be written."""
        code = errno.EROFS if path.exists() else errno.ENOENT
        if not os.access(path, os.W_OK):
            raise OSError(code, os.strerror(code), str(path))

    def must_take_files(self, path: Path) -> None:
        """Raise OSError unless files can be written in a folder, by whatever that takes to know."""
        self.must_be_writable(path)

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

    def flush(self) -> None:
        """Return once all that was added is in the file, which it is."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()
