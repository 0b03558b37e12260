"""What a run was trained and evaluated on, noted in its workdir: WORKDIR/data.json.

Other runs, resumes and evaluations of the same data can tell from it that images came or went.
Where a part of the data was held out, its names are in WORKDIR/held_out.txt.
"""

import hashlib
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from deit_jax.data.sources.base import Dataset, Labelled, Source, key_of
from deit_jax.data.sources.splits import listed
from deit_jax.storage import backend, exists, read_json, read_text, to_path, write_json

DATA, NAMES = "data.json", "held_out.txt"


def identity(source: Source) -> dict[str, Any]:
    """Return {"images", "sha256"} of a part of the data: of names and labels, not of pixels.

    The checksum is None for a source that does not know its labels without reading all.
    """
    if not isinstance(source, Labelled):
        return {"images": len(source), "sha256": None}
    digest = hashlib.sha256(label_bytes(source.labels))
    digest.update("\n".join(_names(source)).encode(errors="surrogateescape"))
    return {"images": len(source), "sha256": digest.hexdigest()}


def label_bytes(labels: np.ndarray) -> bytes:
    """Return labels as checksums take them."""
    return np.asarray(labels, np.int64 if labels.ndim == 1 else np.uint8).tobytes()


def _names(source: Source) -> list[str]:
    return [key_of(source, i) for i in range(len(source))]


def note(workdir: PurePath, dataset: Dataset, weights: Sequence[float] | None = None) -> list[str]:
    """Note a new run's data; return what has changed since then in that of one that goes on.

    `weights` are those of the classes in the loss, None without any.
    """
    if exists(workdir / DATA):
        return changes(workdir, dataset) + _other_weights(workdir, dataset.classes, weights)
    if jax.process_index() == 0:
        reading = dataset.reading
        facts: dict[str, Any] = {"train": identity(dataset.train), "eval": identity(dataset.eval)}
        facts |= {"held_out": reading.held_out}
        facts |= {"class_weights": list(weights)} if weights else {}
        write_json(workdir / DATA, facts)
        if reading.held_out:
            text = "".join(f"{name}\n" for name in _names(dataset.eval))
            backend(workdir).write(workdir / NAMES, text.encode(errors="surrogateescape"))
    return []


def changes(workdir: str | PurePath, dataset: Dataset) -> list[str]:
    """Return a line for each part of the data that is not what the run of a workdir had."""
    workdir = to_path(workdir)
    if not exists(workdir / DATA):  # a run of before
        return []
    then, lines = read_json(workdir / DATA), []
    for part, source in (("training", dataset.train), ("evaluation", dataset.eval)):
        was, now = then["train" if part == "training" else "eval"], identity(source)
        if was != now:
            lines.append(
                f"other {part} images than this run began with: {was['images']} then, "
                f"{now['images']} now{_moved(workdir, source) if part == 'evaluation' else ''}"
            )
    return lines


def _other_weights(workdir: PurePath, classes: list[str], weights: Sequence[float] | None):
    """Return a line where the weights of classes, of a file or of the data, have changed."""
    then = read_json(workdir / DATA).get("class_weights")
    if not then or not weights or len(then) != len(weights):  # which is another config
        return []
    changed = [
        f"{name}: {was:g} then, {now:g} now"
        for name, was, now in zip(classes, then, weights, strict=True)
        if was != now
    ]
    if not changed:
        return []
    return [f"other weights of classes than this run began with: {listed(changed, 3)}"]


def _moved(workdir: PurePath, source: Source) -> str:
    """Return how many images of an evaluation the run did not hold out."""
    if not exists(workdir / NAMES):
        return ""
    then = set(read_text(workdir / NAMES).splitlines())
    others = sum(name not in then for name in _names(source))
    return f"; {others} of these were not held out: they are new, or trained on" if others else ""
