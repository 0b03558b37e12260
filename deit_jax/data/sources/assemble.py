"""The last step of opening a source: classes that are too small, and a part held out."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from deit_jax.data.sources.base import (
    Dataset,
    Labelled,
    Source,
    SourceReading,
    Subset,
    key_of,
    label_counts,
)
from deit_jax.data.sources.splits import kind_of, listed
from deit_jax.errors import UserError

# How folders are read and parts held out, `data.rules`: 1 as until 2026, in whose runs and label
# tapes it stays so; 2 what the modules of this room say.
NEWEST_RULES = 2


def rules_of(data) -> int:
    """Return the rules that a `config.data` asks for; None in it are the newest."""
    return data.rules or NEWEST_RULES


def assemble(
    train: Labelled | Subset,
    held: Source | None,
    classes: list[str],
    data: Any,
    reading: SourceReading | None = None,
    may_lack: bool = False,
) -> Dataset:
    """Return a data set of what a source found, a part held out where `held` is None.

    `may_lack` is for classes whose list was given: some may have no image. Raise UserError for
    other classes without, and where `data.eval_fraction` leaves nothing on a side.
    """
    reading = reading or SourceReading(train="all of it")
    least = max(data.min_images, 0 if may_lack else 1)
    counts = label_counts(train.labels, len(classes))
    small = np.flatnonzero(counts < least)
    left_out = dict(reading.left_out)
    if len(small) and not data.min_images:
        raise UserError(
            f"config.data.source={data.source}: no training images of class "
            f"{listed([repr(classes[i]) for i in small], 3)}; add some, or leave such classes out "
            "with --config.data.min_images=1"
        )
    if len(small):
        train, held, classes = _without(small, train, held, classes)
        left_out[f"classes of fewer than {least} training images"] = len(small)
        if len(classes) < (needed := 1 if train.labels.ndim == 2 else 2):
            raise UserError(
                f"config.data.min_images={data.min_images}: {len(classes)} of {len(counts)} "
                f"classes have so many training images, and {needed} are needed; the largest has "
                f"{counts.max()}"
            )
    reading = dataclasses.replace(reading, left_out=left_out)
    if held is not None:
        return Dataset(train, held, classes, reading)
    if rules_of(data) > 1 and kind_of(data.eval_split) != "validation":
        raise UserError(
            f"config.data.eval_split={data.eval_split}: config.data.source={data.source} has no "
            "parts; leave it out, and a part of each class is held out"
        )
    parts = hold_out(train, classes, data)
    if not reading.eval:
        of = "" if train.labels.ndim == 2 else " of each class"
        text = f"{data.eval_fraction:.0%} of the images{of}, held out"
        reading = dataclasses.replace(reading, eval=text, held_out=True)
    return Dataset(*parts, classes, reading)


def _without(small: np.ndarray, train: Labelled | Subset, held, classes: list[str]):
    """Return sources and names without some classes, the others numbered anew."""
    kept = np.setdiff1d(np.arange(len(classes)), small)
    relabel = np.full(len(classes), -1)
    relabel[kept] = np.arange(len(kept))

    def part(source):
        if source.labels.ndim == 2:  # the image stays, with its other labels
            return Subset(source, np.arange(len(source)), relabel)
        return Subset(source, np.flatnonzero(np.isin(source.labels, kept)), relabel)

    return part(train), None if held is None else part(held), [classes[i] for i in kept]


def hold_out(source: Labelled | Subset, classes: list[str], data: Any) -> tuple[Subset, Subset]:
    """Split off `data.eval_fraction` of each class for evaluation, at least one example of each.

    An example is held out for its own name and class: of each class those whose hashes are the
    lowest. One more or one less of a class moves at most one other of it to the other side. Raise
    UserError if a class has a single example or the fraction leaves nothing on a side.

    Where images have several labels, only their names decide, and classes are not looked at.
    """
    fraction = data.eval_fraction
    if not 0 < fraction < 1:
        raise UserError(f"config.data.eval_fraction={fraction}: must be between 0 and 1, exclusive")
    if source.labels.ndim == 2:
        return _hold_out_by_name(source, fraction)
    if rules_of(data) == 1:
        order = np.random.default_rng(0).permutation(len(source))
    else:
        order = np.argsort(_hashes(source, classes), kind="stable")
    by_class = order[np.argsort(source.labels[order], kind="stable")]
    held = []
    for members in np.split(by_class, np.flatnonzero(np.diff(source.labels[by_class])) + 1):
        if len(members) < 2:
            raise UserError(
                f"{source.describe(int(members[0]))}: the only image of its class; add a second, "
                "since one of each class is held out for evaluation, or leave such classes out "
                "with --config.data.min_images=2"
            )
        held.append(members[: min(len(members) - 1, max(1, round(fraction * len(members))))])
    mask = np.zeros(len(source), bool)
    mask[np.concatenate(held)] = True
    return Subset(source, np.flatnonzero(~mask)), Subset(source, np.flatnonzero(mask))


def _hold_out_by_name(source: Labelled | Subset, fraction: float) -> tuple[Subset, Subset]:
    count = len(source)
    if count < 2:
        raise UserError(
            f"{source.describe(0)}: the only image; add a second, since one is held out for "
            "evaluation"
        )
    texts = (key_of(source, i).encode(errors="surrogateescape") for i in range(count))
    hashes = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    order = np.argsort(np.frombuffer(b"".join(hashes), "<u8"), kind="stable")
    held = order[: min(count - 1, max(1, round(fraction * count)))]
    return Subset(source, np.setdiff1d(order, held)), Subset(source, np.sort(held))


def _hashes(source: Labelled | Subset, classes: list[str]) -> np.ndarray:
    """Return a number for every example that only its name and its class's decide."""

    def digest(index: int, label: int) -> bytes:
        text = f"{classes[label]}\0{key_of(source, index)}".encode(errors="surrogateescape")
        return hashlib.blake2b(text, digest_size=8).digest()

    labels = source.labels.tolist()
    return np.frombuffer(b"".join(map(digest, range(len(labels)), labels)), "<u8")
