"""How well a simple classifier does on features of a frozen model: what representations are worth.

The features are those that the heads would be given (`pooled`), of the training images as they are
evaluated, without augmentation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deit_jax.analysis.evaluate import Evaluation
from deit_jax.analysis.features import embedder
from deit_jax.analysis.inference import normalising, stream
from deit_jax.data.sources.base import Source
from deit_jax.errors import UserError

NEIGHBOURS = 20  # and a temperature of 0.07: DINO's (arXiv 2104.14294)
TEMPERATURE = 0.07
QUERIES = 256  # at a time
STEPS = 1000  # of L-BFGS at most

Features = Float[np.ndarray, "n D"]
Queries = Float[np.ndarray, "q D"]
Labels = Int[np.ndarray, "n"]
Scores = Float[np.ndarray, "q K"]


def probe(evaluation: Evaluation, kind: str) -> dict[str, Any]:
    """Return {"examples", "probe": {"kind", "train_examples", "top1", "top5"}} in percent.

    `kind` is one of choices.PROBES. Raise UserError for several labels an image.
    """
    if evaluation.data.multi_label:
        raise UserError("--probe: is for images of one class each; leave out data.multi_label")
    dataset = evaluation.dataset
    bank, known = _features(evaluation, dataset.train, "features of training images")
    queries, truth = _features(evaluation, dataset.eval, "features of evaluation images")
    scores = _SCORES[kind](bank, known, queries, len(dataset.classes))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    right = order == truth[:, None]
    about = {"kind": kind, "train_examples": len(bank)}
    tops = {f"top{k}": 100 * float(right[:, :k].any(axis=1).mean()) for k in (1, 5)}
    return {"examples": len(queries), "probe": {**about, **tops}}


def _features(evaluation: Evaluation, source: Source, title: str) -> tuple[Features, Labels]:
    opened = evaluation.opened
    compiled = normalising(opened, embedder(opened.model, "pooled"))
    batches = list(stream(opened, source, compiled, title, of="the probe"))
    if not sum(len(batch.numbers) for batch in batches):
        raise UserError(f"config.data.source={evaluation.data.source}: no image can be read")
    values = np.concatenate([batch.values for batch in batches])
    return values, np.concatenate([batch.labels for batch in batches])


def knn(bank: Features, known: Labels, queries: Queries, classes: int) -> Scores:
    """Return how much the nearest neighbours vote for each class, each by exp(cosine / 0.07)."""
    neighbours = min(NEIGHBOURS, len(bank))
    unit = jax.device_put(_unit(bank))
    vote = jax.jit(functools.partial(_votes, neighbours=neighbours, classes=classes))
    padded = np.pad(_unit(queries), ((0, -len(queries) % QUERIES), (0, 0)))
    parts = [
        np.asarray(vote(unit, known, padded[i : i + QUERIES]))
        for i in range(0, len(padded), QUERIES)
    ]
    return np.concatenate(parts)[: len(queries)]


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _votes(
    bank: Float[Array, "n D"], known, queries, neighbours: int, classes: int
) -> Float[Array, "q K"]:
    cosines = jnp.matmul(queries, bank.T, precision="highest")
    nearest, indices = jax.lax.top_k(cosines, neighbours)
    votes = jnp.exp(nearest / TEMPERATURE)
    return jax.vmap(lambda c, v: jnp.zeros(classes).at[c].add(v))(known[indices], votes)


def linear(bank: Features, known: Labels, queries: Queries, classes: int) -> Scores:
    """Return the scores of scikit-learn's logistic regression (C = 1) on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(known)) < 2:
        raise UserError("--probe=linear: the training images that can be read are of one class")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS)).fit(bank, known)
    scores = np.full((len(queries), classes), -np.inf)  # of a class without a training image
    scores[:, model.classes_] = model.predict_proba(queries)
    return scores


_SCORES: dict[str, Callable[[Features, Labels, Queries, int], np.ndarray]] = {
    "knn": knn,
    "linear": linear,
}
