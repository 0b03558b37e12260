"""Image files in folders, one a class."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deit_jax.data.sources.base import Dataset, PackedStrings, hold_out
from deit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
EVAL_FOLDERS = ("val", "validation", "test")


class FolderSource:
    """Image files."""

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        self.labels = labels
        self._paths = PackedStrings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict:
        path = self._paths[index]
        try:
            with open(path, "rb", buffering=0) as file:
                image = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        return {"image": image, "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        return self._paths[index]


def open_source(rest: str, data) -> Dataset:
    """Open the folder that `rest` names."""
    return open_folder(Path(rest).expanduser(), data.eval_fraction)


def open_folder(root: Path, eval_fraction: float) -> Dataset:
    """Open ROOT/{train,val}/CLASS/…, or hold out a part of ROOT/CLASS/…; raise UserError."""
    if not root.is_dir():
        raise UserError(f"config.data.source=folder:{root}: no such folder")
    train_root = root / "train"
    eval_root = next((root / n for n in EVAL_FOLDERS if (root / n).is_dir()), None)
    if train_root.is_dir() and eval_root:
        classes = _class_names(train_root)
        unknown = sorted(set(_class_names(eval_root)) - set(classes))
        if unknown:
            raise UserError(f"{eval_root / unknown[0]}: no class of this name in {train_root}")
        return Dataset(_scan(train_root, classes), _scan(eval_root, classes), classes)
    classes = _class_names(root)
    if classes == ["train"]:
        root, classes = train_root, _class_names(train_root)
    return Dataset(*hold_out(_scan(root, classes), eval_fraction), classes)


def _class_names(root: Path) -> list[str]:
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"{root}: no class folders; expected {root}/CLASS/IMAGE.jpg")
    return names


def _scan(root: Path, classes: list[str]) -> FolderSource:
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue
        found = len(paths)
        for directory, subdirectories, files in os.walk(root / name, followlinks=True):
            subdirectories[:] = sorted(s for s in subdirectories if not s.startswith("."))
            for file in sorted(files):
                if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                    paths.append(os.path.join(directory, file))
                    labels.append(label)
        if len(paths) == found:
            raise UserError(f"{root / name}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return FolderSource(paths, np.array(labels, np.int32))
