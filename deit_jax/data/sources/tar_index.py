"""Offsets of the files inside of a tar, so that any of them is one read away."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from deit_jax.errors import UserError


class Member(NamedTuple):
    """A file inside of a tar: `size` bytes from `offset`, both counted in the tar itself."""

    name: str
    offset: int
    size: int


def members(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Iterate over the files of a tar, or of one that lies at [start, stop) inside of a file.

    Raise UserError if it is compressed, damaged or cut short.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            yield from _members(file, start, size if stop is None else stop)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{path}: not a readable, uncompressed tar file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _members(file: BinaryIO, start: int, stop: int) -> Iterator[Member]:
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            # It would keep every header in memory.
            tar.members.clear()  # type: ignore[attr-defined]  # which typeshed leaves out
            if info.offset_data >= stop:
                return
            if info.offset_data + info.size > stop:
                raise tarfile.ReadError(f"{info.name} is cut short")
            if info.isfile() and info.sparse is None:
                yield Member(info.name, info.offset_data, info.size)


def read(path: str, offset: int, size: int) -> bytes:
    """Return bytes of a file; raise UserError if it cannot be read or has become shorter."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) != size:
        raise UserError(f"{path}: shorter than it was; {size} bytes at {offset} are not all there")
    return data
