"""Average precision, the figure of images with several labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


def average_precision(
    scores: Float[np.ndarray, "n K"], labels: UInt8[np.ndarray, "n K"]
) -> Float[np.ndarray, "K"]:
    """Return scikit-learn's average_precision_score of each class.

    A score that is not finite ranks last. nan for a class without positives.
    """
    from sklearn.metrics import average_precision_score  # takes a second to import

    scores = np.where(np.isfinite(scores), scores, np.finfo(scores.dtype).min)
    each = [
        average_precision_score(there, score) if there.any() else np.nan
        for there, score in zip(labels.T, scores.T, strict=True)
    ]
    return np.array(each, np.float64)


def figures(
    scores: Float[np.ndarray, "n K"], labels: UInt8[np.ndarray, "n K"], classes: Sequence[str]
) -> dict[str, Any]:
    """Return {"mAP", "AP": {class: …}} in percent; None for a class without positives.

    mAP is the mean over the classes that have some.
    """
    each = 100 * average_precision(scores, labels)
    known = {name: None if np.isnan(x) else float(x) for name, x in zip(classes, each, strict=True)}
    return {"mAP": float(np.nanmean(each)), "AP": known}
