"""Rows of what each head said of the examples of an evaluation: `deit eval --out`."""

import csv

import numpy as np

from deit_jax.analysis.predictions import softmax
from deit_jax.cli.rows import Out
from deit_jax.data.sources.base import Dataset


class Answers:
    """What each head said of each example of an evaluation: rows of a csv file."""

    def __init__(self, file: Out, dataset: Dataset):
        self._csv, self._dataset, self._begun = (
            csv.writer(file, lineterminator="\n"),
            dataset,
            False,
        )

    def watch(self, numbers: np.ndarray, labels: np.ndarray, logits: dict[str, np.ndarray]) -> None:
        """Write the rows of some examples."""
        if not self._begun:
            heads = [cell for head in logits for cell in (head, f"{head}_probability")]
            self._csv.writerow(["path", "label", *heads])
            self._begun = True
        classes, said = self._dataset.classes, []
        for x in logits.values():
            best = x.argmax(axis=1)
            said.append((best, softmax(x)[np.arange(len(x)), best]))
        for i, number in enumerate(numbers.tolist()):
            cells = [c for best, p in said for c in (classes[best[i]], f"{p[i]:.6f}")]
            path, label = self._dataset.eval.describe(number), classes[int(labels[i])]
            self._csv.writerow([path, label, *cells])
