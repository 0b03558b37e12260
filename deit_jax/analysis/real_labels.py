"""ReaL: ImageNet's validation images with all the labels that people saw in each.

Beyer et al. 2020, "Are we done with ImageNet?" (arXiv 2006.07159). An answer is right if it is one
of an image's labels; images without any are not counted. Their file is a list, in the order of
ILSVRC2012_val_00000001.JPEG, …, of lists of class numbers; a dict by file name does too.
"""

import json
import os
from collections import Counter
from typing import Any

import numpy as np

from deit_jax.data.classes import PLACEHOLDER, imagenet_list
from deit_jax.data.sources.base import Dataset, Source, key_of
from deit_jax.data.sources.ground_truth import NAME
from deit_jax.errors import UserError
from deit_jax.storage import read_text, to_path


class RealLabels:
    """The labels in a file for the examples of a data set, and how many answers are among them."""

    def __init__(self, path: str, dataset: Dataset):
        """Read the labels; raise UserError where they do not go together with the data."""
        self._path, self._source = path, dataset.eval
        self._labels, self._classes = _read(path), _numbers_of(dataset.classes, path)
        self._right, self._counted = Counter[str](), 0
        self._of(0, self._source)  # raises if the names are others

    def watch(self, numbers: np.ndarray, labels: np.ndarray, logits: dict[str, np.ndarray]) -> None:
        """Count the right answers to some examples."""
        answers = {head: self._classes[x.argmax(axis=1)] for head, x in logits.items()}
        for i, number in enumerate(numbers.tolist()):
            if allowed := self._of(number, self._source):
                self._counted += 1
                self._right.update(head for head, said in answers.items() if said[i] in allowed)

    def results(self) -> dict[str, Any]:
        """Return {"examples", "cls" | "dist" | "fused": {"top1"}}, in percent of those counted."""
        if not self._counted:
            raise UserError(f"--real_labels={self._path}: labels none of these images")
        share = {head: {"top1": 100 * n / self._counted} for head, n in self._right.items()}
        return {"examples": self._counted, **share}

    def _of(self, number: int, source: Source) -> list[int]:
        name = os.path.basename(key_of(source, number))
        if isinstance(self._labels, dict):
            if name not in self._labels:
                raise UserError(f"--real_labels={self._path}: does not know {name}")
            return self._labels[name]
        match = NAME.fullmatch(name)
        if match is None or not 0 < int(match[1]) <= len(self._labels):
            raise UserError(
                f"--real_labels={self._path}: {len(self._labels)} labels for images called "
                f"ILSVRC2012_val_00000001.JPEG and on, and the data has {name}"
            )
        return self._labels[int(match[1]) - 1]


def _read(path: str) -> list[list[int]] | dict[str, list[int]]:
    try:
        labels = json.loads(read_text(to_path(path)))
    except OSError as error:
        raise UserError(f"--real_labels={path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--real_labels={path}: not valid JSON ({error})") from error
    values = labels.values() if isinstance(labels, dict) else labels
    fine = isinstance(labels, list | dict) and all(
        isinstance(v, list) and all(isinstance(n, int) for n in v) for v in values
    )
    if not fine:
        raise UserError(
            f"--real_labels={path}: must be a list of lists of class numbers, or such by file name"
        )
    return labels


def _numbers_of(classes: list[str], path: str) -> np.ndarray:
    """Return ImageNet's number of each class, by its WordNet id or where classes only count."""
    ids = {name: i for i, name in enumerate(imagenet_list("labels"))}
    if all(name in ids for name in classes):
        return np.array([ids[name] for name in classes])
    matches = [PLACEHOLDER.fullmatch(name) for name in classes]
    numbers = [int(m[1]) for m in matches if m]
    if len(numbers) == len(classes) and len(set(numbers)) == len(classes):
        return np.array(numbers)
    raise UserError(
        f"--real_labels={path}: numbers of ImageNet's classes, and the data's are called "
        f"{', '.join(classes[:3])}, …; name them by their WordNet ids or numbers"
    )
