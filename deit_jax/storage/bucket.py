"""Files in a bucket, gs://BUCKET/a/b, with what LocalDisk gives; over the objects of gcs or s3.

A bucket knows no folders, no renaming at once, no adding to an end, and no locks. Here a folder is
a beginning of names; an object is there whole or not at all, as the disk's files are by renaming;
what is added to an end is put again with all before it, in the background; a lock is a lease.
Orbax marks a checkpoint that is whole by a file in it.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deit_jax.storage.fetch import fetched
from deit_jax.storage.gcs import PATIENCE, Objects
from deit_jax.storage.lease import TRY, Lease, is_held
from deit_jax.storage.objects import name_of

COMMITTED = "commit_success.txt"  # Orbax's
SUMS = "sha256.json"  # ours, of what is whole by then (workdir/checksums.py)
EVERY = 1.0  # seconds between two puts of one object: a bucket takes no more
RATE = 4e6  # bytes a second that the puts of a file that grows may take, in the long run

log = logging.getLogger("deit_jax")


class Bucket:
    """The files of all buckets; see LocalDisk for the methods that say no more here.

    `why_no_runs` is for where Orbax and TensorStore have no driver: "", or a line on it.
    """

    def __init__(self, objects: Any = None, why_no_runs: str = ""):
        self._objects, self.why_no_runs = objects or Objects(), why_no_runs
        self._leases: dict[str, Lease] = {}  # by the folder that they are for

    def read(self, path) -> bytes:
        """Return a file's content."""
        return self._objects.read(name_of(path))[0]

    def read_start(self, path, size: int) -> bytes:
        """Return the first bytes of a file, fewer where it has not so many."""
        return self._objects.read(name_of(path), size)[0]

    def write(self, path, data: bytes) -> None:
        """Write a file whole or not at all, in the place of one that is there."""
        deadline = time.monotonic() + PATIENCE
        while self._held(path):
            # Each try is short, and asks anew: a put that came through late would be written over
            # what a process that has taken the folder meanwhile has written.
            try:
                self._objects.put(name_of(path), data, patience=TRY)
                return
            except OSError as error:
                if error.errno != errno.EIO or time.monotonic() > deadline:
                    raise
        self._objects.put(name_of(path), data)

    def append(self, path) -> "Appender":
        """Open a file, which need not be there, to add to its end."""
        try:
            before = self.read(path)
        except FileNotFoundError:
            before = b""
        return Appender(self, path, before)

    def create(self, path) -> "Appender":
        """Open a file, emptied if it is there, to add to its end."""
        self.write(path, b"")
        return Appender(self, path, b"")

    def sha256(self, path) -> str:
        """Return the checksum of a file's content."""
        return self._objects.sha256(name_of(path))

    def names(self, folder) -> list[str]:
        """Return the sorted names of what is in a folder, none if there is no such folder."""
        try:
            objects, folders = self._objects.names(name_of(folder))
        except FileNotFoundError:
            return []
        return sorted({*objects, *folders})

    def files(self, folder) -> list[tuple[str, int]]:
        """Return path and size in bytes of every file below a folder; the paths begin in it."""
        start = name_of(folder) + "/"
        found = [(f.name[len(start) :], f.size) for f in self._objects.found(start)]
        return sorted((name, size) for name, size in found if name and not name.endswith("/"))

    def exists(self, path) -> bool:
        """Return whether there is a file or a folder."""
        try:
            return self._is_file(path) or self.is_folder(path)
        except FileNotFoundError:  # not even the bucket
            return False

    def _is_file(self, path) -> bool:
        name = name_of(path)
        return "/" in name and self._objects.state(name) is not None

    def is_folder(self, path) -> bool:
        """Return whether there is a folder, which is there by what is in it."""
        try:
            return any(True for _ in self._objects.found(name_of(path) + "/", limit=1))
        except FileNotFoundError:
            return False

    def is_complete(self, folder) -> bool:
        """Return whether a checkpoint's folder is whole, by Orbax's mark or our checksums."""
        return bool({COMMITTED, SUMS} & set(self.names(folder)))

    def is_marked(self, folder) -> bool:
        """Return whether a checkpoint's folder has the mark without which Orbax passes it over."""
        return self._is_file(folder / COMMITTED)

    def mark(self, folder) -> None:
        """Mark a checkpoint's folder and its parts as whole, as Orbax does."""
        _, parts = self._objects.names(name_of(folder))
        for place in (*(folder / part for part in parts), folder):
            self.write(place / COMMITTED, f"Checkpoint commit was successful to {place}".encode())

    def make_folder(self, path) -> None:
        """Raise OSError if there is no such bucket: a folder in it need not be made."""
        for _ in self._objects.found(name_of(path) + "/", limit=1):
            break

    def rename(self, old, new) -> None:
        """Copy a file or all below a folder, then delete the old ones: not at once."""
        self._held(old)
        source, target = name_of(old), name_of(new)
        names = [source] if self._is_file(old) else []
        names += [f.name for f in self._objects.found(source + "/")]
        if not names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(old))
        for name in names:
            self._objects.copy(name, target + name[len(source) :])
        # What marks a checkpoint as whole goes first: never is there a part that looks whole.
        for name in sorted(names, key=lambda name: not name.endswith((COMMITTED, SUMS))):
            self._objects.delete(name)

    def remove(self, path) -> None:
        """Remove a file or a folder with all in it, as far as that can be."""
        with contextlib.suppress(FileNotFoundError):
            names = [f.name for f in self._objects.found(name_of(path) + "/")]
            for name in sorted(names, key=lambda name: not name.endswith((COMMITTED, SUMS))):
                self._objects.delete(name)
            self._objects.delete(name_of(path))

    def local(self, path) -> Path:
        """Return a copy of a file or folder on this machine's disk; see fetch.py."""
        return fetched(str(path), self._objects)

    def must_be_writable(self, path) -> None:
        """Raise OSError if another process has taken the folder; asks nothing of the bucket."""
        self._held(path)

    def must_take_files(self, path) -> None:
        """Raise OSError unless files can be written in a folder: one is, and deleted."""
        self._held(path)
        self._objects.look(name_of(path).partition("/")[0])
        probe = f"{name_of(path)}.writable"
        self._objects.put(probe, b"")
        self._objects.delete(probe)

    @contextlib.contextmanager
    def lock(self, path, holder: str) -> Iterator[None]:
        """Hold a lease on the folder of `path`; raise LockedError if another process has it.

        It is renewed in the background, and ends soon after the process does. Once another process
        has taken it over, all that would be written in the folder raises OSError.
        """
        if self.why_no_runs:
            raise OSError(errno.ENOTSUP, self.why_no_runs, str(path))
        self._objects.look(name_of(path).partition("/")[0])  # as Orbax will, too late for a line
        lease = Lease(self._objects, name_of(path), holder)
        lease.take()
        folder = name_of(path).rpartition("/")[0] + "/"
        self._leases[folder] = lease
        try:
            yield
        finally:
            del self._leases[folder]
            lease.release()

    def is_locked(self, path) -> bool:
        """Return whether a process has the lease that `path` is, as far as can be told at once."""
        try:
            return is_held(self.read(path))
        except FileNotFoundError:
            return False

    def _held(self, path) -> bool:
        """Return whether a path is in a folder that is locked; raise OSError if that was lost."""
        name = name_of(path) + "/"
        leases = [lease for folder, lease in list(self._leases.items()) if name.startswith(folder)]
        for lease in leases:
            lease.must_be_held()
        return bool(leases)


class Appender:
    """The end of a file in a bucket: what is added is put, with all before it, in the background.

    An object can only be written whole. So that a line costs no more than a moment, what was added
    is put at most once a second, and more rarely the larger the file is; `flush` waits for it.
    """

    def __init__(self, bucket: Bucket, path, before: bytes):
        self._bucket, self._path, self._data = bucket, path, bytearray(before)
        self._put = len(before)  # so many bytes of it are in the bucket
        self._asked = self._tried = 0  # how often a put was asked for, and up to which it was tried
        self._failures, self._told = 0, 0
        self._error = OSError()  # of the last failure
        self._changed, self._closed, self._hurried = threading.Condition(), False, 0
        self._thread: threading.Thread | None = None
        self._due = 0.0

    def append(self, data: bytes) -> None:
        """Add to the file; raise OSError if what was added before could not be put."""
        with self._changed:
            if self._failures > self._told:
                self._told = self._failures
                raise self._error
            self._data += data
            self._ask()

    def flush(self) -> None:
        """Return once all that was added is in the bucket; raise OSError if it cannot be."""
        with self._changed:
            wanted, failures = len(self._data), self._failures
            if self._put < wanted and not self._closed:
                self._hurried += 1
                self._ask()
                while self._put < wanted and self._failures == failures:
                    self._changed.wait()
                self._hurried -= 1
            if self._put < wanted:
                self._told = self._failures
                raise self._error

    def close(self) -> None:
        """Put what is left, and end."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()

    def _ask(self) -> None:
        self._asked += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="deit-append")
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        while (data := self._next()) is not None:
            began = time.monotonic()
            error: Exception | None = None
            try:
                self._bucket.write(self._path, data)
                put = len(data)
            except Exception as failed:  # whatever it is, who waits must hear of it
                put, error = self._put, failed
            with self._changed:
                self._due = began + max(EVERY, len(data) / RATE)
                self._put = put
                if error is not None:
                    text = f"{type(error).__name__}: {error}"
                    other = OSError(errno.EIO, text, str(self._path))
                    self._error = error if isinstance(error, OSError) else other
                    self._failures += 1
                self._changed.notify_all()

    def _next(self) -> bytes | None:
        """Wait for what is to be put, all of the file; None once it is closed."""
        with self._changed:
            while self._put == len(self._data) or self._asked == self._tried:
                if self._closed:
                    return None
                self._changed.wait()
            while (wait := self._due - time.monotonic()) > 0 and not (
                self._hurried or self._closed
            ):
                self._changed.wait(wait)
            self._tried = self._asked
            return bytes(self._data)
