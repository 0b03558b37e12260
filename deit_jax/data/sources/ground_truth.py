"""ImageNet's validation images as they are published: in one folder, their labels elsewhere."""

import re
from pathlib import Path

import numpy as np

from deit_jax.data.classes import imagenet_list
from deit_jax.data.sources.files import FolderSource
from deit_jax.data.sources.scan import Scan
from deit_jax.errors import UserError

NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


def has_imagenets_names(root: Path) -> bool:
    """Return whether a folder has images called ILSVRC2012_val_00000001.JPEG, …, and only these."""
    files = next(Scan(root).walk()).files
    return bool(files) and all(NAME.fullmatch(name) for name in files)


def is_flat_imagenet(root: Path, classes: list[str]) -> bool:
    """Return whether a folder holds ImageNet's validation images, unsorted, of known classes."""
    if not has_imagenets_names(root):
        return False
    if not set(classes) & set(imagenet_list("labels")):
        raise UserError(
            f"{root}: ImageNet's validation images, but {classes[0]} and the other classes are not "
            "its WordNet ids; name the folders of the training images so"
        )
    return True


def open_flat(root: Path, classes: list[str]) -> tuple[FolderSource, dict[str, int]]:
    """Return ImageNet's validation images with their labels, which TFDS carries.

    Images of classes that are not among `classes` are left out, and counted: {reason: count}.
    """
    truth, number = imagenet_list("validation_labels"), {name: i for i, name in enumerate(classes)}
    paths, labels, files = [], [], next(Scan(root).walk()).files
    for name in files:
        match = NAME.fullmatch(name)
        position = int(match[1]) if match else 0
        if not 0 < position <= len(truth):
            raise UserError(f"{root}/{name}: no label; there are {len(truth)}, from 00000001 on")
        if (label := number.get(truth[position - 1])) is not None:
            paths.append(f"{root}/{name}")
            labels.append(label)
    others = len(files) - len(paths)
    left_out = {"validation images of classes that are not trained": others} if others else {}
    return FolderSource(root, paths, np.array(labels, np.int32)), left_out
