"""Average precision, the figure of images with several labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8


def average_precision(
    scores: Float[np.ndarray, "n K"], labels: UInt8[np.ndarray, "n K"]
) -> Float[np.ndarray, "K"]:
    """Return for each class the sum of precision times gain in recall, from the highest score down.

    As scikit-learn's average_precision_score: equal scores are one threshold. A score that is not
    finite ranks last. nan for a class without positives.
    """
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    return np.array([_of_class(*pair) for pair in zip(scores.T, labels.T, strict=True)])


def _of_class(scores: Num[np.ndarray, "n"], labels: UInt8[np.ndarray, "n"]) -> float:
    positives = int(labels.sum(dtype=np.int64))
    if not positives:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # of the examples of a threshold
    right = np.cumsum(labels[order], dtype=np.int64)[last]
    precision = right / (1 + np.flatnonzero(last))
    return float(np.sum(precision * np.diff(right, prepend=0)) / positives)


def figures(
    scores: Float[np.ndarray, "n K"], labels: UInt8[np.ndarray, "n K"], classes: Sequence[str]
) -> dict[str, Any]:
    """Return {"mAP", "AP": {class: …}} in percent; None for a class without positives.

    mAP is the mean over the classes that have some.
    """
    each = 100 * average_precision(scores, labels)
    known = {name: None if np.isnan(x) else float(x) for name, x in zip(classes, each, strict=True)}
    return {"mAP": float(np.nanmean(each)), "AP": known}
