"""Image files and what a model takes them for."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from deit_jax.analysis.predictions import infer, sigmoid, softmax
from deit_jax.data.view import EvalView
from deit_jax.errors import UserError
from deit_jax.storage import backend
from deit_jax.weights.load import open_model

BATCH = 32


def classify(
    source: str,
    paths: list[str],
    topk: int = 5,
    model: str | None = None,
    multi_label: bool = False,
) -> list[dict[str, Any]]:
    """Return for each file {"image", "predictions": [{"class", "index", "probability"}, …]}.

    The probability is the softmax of the fused logits, or for weights trained with several labels
    an image the sigmoid of each; `multi_label` says so of weights that do not. `model` is the name
    of the weights' model if they do not say it. Raise UserError naming a file that cannot be read
    before any result is computed.
    """
    opened = open_model(source, model)
    try:
        opened.check_convention()
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if multi_label and opened.multi_label is False:
        raise UserError(f"--multi_label: {source} answers one class an image; leave it out")
    images = np.stack([_read(path, opened.view) for path in paths])

    variables, convention = jax.device_put(opened.variables), (opened.mean, opened.std)
    probabilities = sigmoid if multi_label or opened.multi_label else softmax
    scores = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        scores.append(probabilities(infer(opened.model, variables, part, convention)["fused"]))
    results = []
    for path, row in zip(paths, np.concatenate(scores), strict=True):
        best = np.argsort(-row, kind="stable")[:topk]
        predictions = [
            {"class": opened.classes[i], "index": int(i), "probability": float(row[i])}
            for i in best
        ]
        results.append({"image": path, "predictions": predictions})
    return results


def _read(path: str, view: EvalView) -> np.ndarray:
    try:
        data = backend(Path(path)).read(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return view(data, path)
