"""The image files below a folder: each once, and a count of all the rest by reason."""

import collections
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deit_jax.data.formats import image_suffixes

# What archives, notebooks and operating systems leave behind, besides names that begin with a dot.
LEFTOVERS = frozenset(
    (
        *("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"),
        *("lost+found", "Thumbs.db", "desktop.ini", "ehthumbs.db"),
    )
)


class Folder(NamedTuple):
    """A folder that was met: its path below the root ("" for itself), and its images' names."""

    path: str
    files: list[str]


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is nobody's data."""
    return name[0] == "." or name in LEFTOVERS


def subfolders(root: Path) -> list[str]:
    """Return the names of the folders in a folder, leftovers aside."""
    return sorted(e.name for e in os.scandir(root) if not is_leftover(e.name) and e.is_dir())


def has_images(root: Path, channels: int = 3) -> bool:
    """Return whether any image lies below a folder; the search ends at the first."""
    return any(folder.files for folder in Scan(root, channels).walk())


class Scan:
    """One walk through a tree of folders; `left_out` counts what it did not take, by reason.

    Links are followed, but no folder is entered twice, and no image counts twice for a link to it.
    """

    def __init__(self, root: Path, channels: int = 3):
        self.root, self.left_out = str(root), collections.Counter[str]()
        self._suffixes, self._seen = frozenset(image_suffixes(channels)), set[tuple[int, int]]()
        self._inodes, self._links = array("Q"), list[str]()

    def walk(self) -> Iterator[Folder]:
        """Iterate over the folders from the root on: sorted, each before those in it."""
        stack = [""]
        while stack:
            path = stack.pop()
            directory = os.path.join(self.root, path) if path else self.root
            status = os.stat(directory)
            if (key := (status.st_dev, status.st_ino)) in self._seen:
                self.left_out["folders met again through links"] += 1
                continue
            self._seen.add(key)
            files, folders = self._listed(directory)
            yield Folder(path, files)
            stack += [f"{path}/{name}" if path else name for name in reversed(folders)]

    def _listed(self, directory: str) -> tuple[list[str], list[str]]:
        """Return the names of the images and of the folders in a folder."""
        files, folders, suffixes = [], [], self._suffixes
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name in LEFTOVERS:
                    self.left_out["leftovers of other programs"] += 1
                elif name[name.rfind(".") :].lower() in suffixes and not entry.is_dir():
                    files.append(name)
                    if entry.is_symlink():
                        self._links.append(f"{directory}/{name}")
                    else:
                        self._inodes.append(entry.inode())
                elif entry.is_dir():
                    folders.append(name)
                else:
                    self.left_out[f"files {_suffix(name)}"] += 1
        return sorted(files), sorted(folders)

    def superfluous_links(self) -> set[str]:
        """Return the links to images that were met besides, and those to nothing; count them.

        To be called after the walk.
        """
        if not self._links:
            return set()
        known, here = set[tuple[int, int]](), frozenset(np.unique(np.array(self._inodes)).tolist())
        found = set()
        for path in sorted(self._links):
            try:
                status = os.stat(path)
            except OSError:
                self.left_out["links to nothing"] += 1
                found.add(path)
                continue
            key = (status.st_dev, status.st_ino)
            # An inode's number is that of one device: only the path is proof.
            if key in known or (status.st_ino in here and self._is_met(path)):
                self.left_out["links to images that are there"] += 1
                found.add(path)
            elif not stat.S_ISREG(status.st_mode):
                self.left_out["links to what is no file"] += 1
                found.add(path)
            known.add(key)
        return found

    def _is_met(self, link: str) -> bool:
        """Return whether the walk has been in the folder of the file that a link leads to."""
        status = os.stat(os.path.dirname(os.path.realpath(link)))
        return (status.st_dev, status.st_ino) in self._seen


def _suffix(name: str) -> str:
    end = os.path.splitext(name)[1].lower()
    return end if 1 < len(end) <= 8 else "of other kinds"
