"""Images named on a command line: files, folders, patterns, lists and what is piped in."""

import glob
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from deit_jax.data.sources.base import PackedStrings
from deit_jax.data.sources.files import FolderSource
from deit_jax.data.sources.scan import Scan
from deit_jax.errors import UserError
from deit_jax.storage import is_remote, local

log = logging.getLogger("deit_jax")

PIPED = "-"  # stands for the paths on stdin, one a line


class NamedImages(FolderSource):
    """Image files by their paths, as they were given; they have no labels.

    `copies` says of what lies in a bucket where its copy is: {copy: gs://…}.
    """

    def __init__(self, paths: Iterable[str], copies: Mapping[str, str] = MappingProxyType({})):
        packed = PackedStrings(paths)
        super().__init__(Path(), packed, np.zeros(len(packed), np.int32))
        self._copies = copies

    def describe(self, index: int) -> str:
        path = super().describe(index)
        for copy, there in self._copies.items():
            if path.startswith(copy):
                return f"{there}{path[len(copy) :]}"
        return path


def named_images(words: Iterable[str], channels: int = 3, listed: str = "") -> NamedImages:
    """Return the images that words name, in that order; of a folder all below it, by name.

    A word is a file, a folder, a pattern such as `photos/**/*.jpg`, or `-`: paths on stdin.
    `listed` is a file of paths, one a line. A file is opened when its turn comes: whether it is
    there shows then. Raise UserError for a folder or a pattern without images.
    """
    copies: dict[str, str] = {}
    return NamedImages(_paths(words, channels, listed, copies), copies)


def _paths(
    words: Iterable[str], channels: int, listed: str, copies: dict[str, str]
) -> Iterator[str]:
    for word in words:
        if word == PIPED:
            yield from _at_hand(_lines(sys.stdin, "stdin"), copies)
            continue
        if is_remote(word) and glob.has_magic(word):
            raise UserError(f"{word}: patterns are of a disk; give the folder in the bucket")
        (here,) = _at_hand([word], copies)
        if os.path.isdir(here):
            yield from _below(here, channels)
        elif glob.has_magic(here) and not os.path.lexists(here):
            yield from _matches(here)
        else:
            yield here
    if listed == PIPED:
        yield from _at_hand(_lines(sys.stdin, "stdin"), copies)
    elif listed:
        try:
            with open(local(listed), encoding="utf-8-sig", errors="surrogateescape") as file:
                yield from _at_hand(_lines(file, listed), copies)
        except OSError as error:
            raise UserError(f"--list={listed}: cannot be read ({error.strerror})") from error


def _at_hand(paths: Iterable[str], copies: dict[str, str]) -> Iterator[str]:
    """Iterate over paths, for what is in a bucket over its copy, which is noted in `copies`."""
    for path in paths:
        if is_remote(path):
            there = path.rstrip("/")
            path = str(local(path))
            copies[path] = there
        yield path


def _lines(file: Iterable[str], where: str) -> Iterator[str]:
    count = 0
    for line in file:
        if path := line.rstrip("\r\n"):
            count += 1
            yield path
    if not count:
        raise UserError(f"{where}: names no image; give one path a line")


def _below(folder: str, channels: int) -> Iterator[str]:
    scan, count = Scan(Path(folder), channels), 0
    for place in scan.walk():
        for name in place.files:
            count += 1
            yield os.path.join(folder, place.path, name)
    others = ", ".join(f"{n} {reason}" for reason, n in scan.left_out.most_common(3))
    if not count:
        raise UserError(f"{folder}: no images in this folder" + (f" ({others})" if others else ""))
    if others:
        log.info("%s: left aside, as no images: %s", folder, others)


def _matches(pattern: str) -> Iterator[str]:
    count = 0
    for path in sorted(glob.iglob(pattern, recursive=True)):
        if not os.path.isdir(path):
            count += 1
            yield path
    if not count:
        raise UserError(f"{pattern}: matches no file")
