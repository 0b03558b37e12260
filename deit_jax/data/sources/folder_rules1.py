"""Folders as they were read until 2026, data.rules=1: for runs and label tapes that began so."""

import os
from pathlib import Path

import numpy as np

from deit_jax.data.sources.assemble import assemble
from deit_jax.data.sources.base import Dataset
from deit_jax.data.sources.files import FolderSource
from deit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
EVAL_FOLDERS = ("val", "validation", "test")


def open_folder(root: Path, data) -> Dataset:
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
    return assemble(_scan(root, classes), None, classes, data, may_lack=True)


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
    return FolderSource(root, paths, np.array(labels, np.int32))
