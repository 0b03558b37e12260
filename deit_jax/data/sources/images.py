"""Images without labels, wherever below a folder: for what needs none."""

import os

import numpy as np

from deit_jax.data.sources.base import Dataset, SourceReading
from deit_jax.data.sources.files import FolderSource
from deit_jax.data.sources.scan import Scan
from deit_jax.errors import UserError
from deit_jax.storage import local


def open_source(rest: str, data) -> Dataset:
    """Return all images below a folder, to train on; none are held out, and there are no classes.

    Raise UserError if there are none.
    """
    root = local(rest)
    if not root.is_dir():
        raise UserError(f"config.data.source={data.source}: no such folder")
    for key, usual in (("train_split", ("train", ".")), ("eval_split", ("validation",))):
        if data[key] not in usual:
            raise UserError(
                f"config.data.{key}={data[key]}: config.data.source={data.source} has no parts; "
                "leave it out"
            )
    scan = Scan(root, data.channels)
    met = [os.path.join(root, place.path, name) for place in scan.walk() for name in place.files]
    superfluous = scan.superfluous_links()
    paths = [path for path in met if path not in superfluous]
    if not paths:
        raise UserError(f"config.data.source={data.source}: no images below {root}")
    train = FolderSource(root, paths, np.zeros(len(paths), np.int32))
    nothing = FolderSource(root, [], np.zeros(0, np.int32))
    reading = SourceReading(train="all of it, without labels", left_out=dict(scan.left_out))
    return Dataset(train, nothing, [], reading)
