"""Image files, read when they are asked for."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deit_jax.data.sources.base import PackedStrings, label_at
from deit_jax.errors import UserError


class FolderSource:
    """Image files below a folder, by their paths."""

    def __init__(self, root: Path, paths: Sequence[str], labels: np.ndarray):
        self.labels = labels
        self._paths, self._root = PackedStrings(paths), f"{root}{os.sep}"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict:
        path = self._paths[index]
        try:
            with open(path, "rb", buffering=0) as file:
                image = file.read()
        except OSError as error:
            where = self.describe(index)
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        return {"image": image, "label": label_at(self.labels, index)}

    def describe(self, index: int) -> str:
        return self._paths[index]

    def key(self, index: int) -> str:
        return self._paths[index].removeprefix(self._root)
