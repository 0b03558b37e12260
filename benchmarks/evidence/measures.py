"""Figures of finished runs: the cosines of their tokens, where their classifiers disagree."""

import contextlib
import functools

import jax
import numpy as np

from deit_jax import analysis, weights
from deit_jax.data import pipeline
from deit_jax.data.sources import open_dataset
from deit_jax.step import normalise

TOKEN_IMAGES = 1000


def token_cosines(study, arm, seed: int) -> dict:
    """Return the cosine of the learned tokens and of their features at every layer.

    {} for a model with one token. The features are of the first test images.
    """
    opened = weights.open_model(study.workdir(arm.name, seed))
    params = opened.variables["params"]
    if "dist_token" not in params:
        return {}
    images = next(_batches(opened))[0]
    features = analysis.token_features(opened.model, params, images)
    return {
        "learned_cosine": analysis.learned_cosine(params),
        "cosines": np.asarray(analysis.token_cosines(features)).tolist(),
    }


def disagreement(study, arm, seed: int) -> dict:
    """Return on what share of the test images each two classifiers of this run's seed differ.

    They are the labels, the convnet that teaches, the student without it and, once it is trained,
    each head of the distilled student. {} for the first of the two.
    """
    if arm.name != "token":
        return {}
    said = predictions(study.workdir("teacher-convnet", 0))
    found = {"truth": said.pop("truth"), "convnet": said["cls"]}
    found["none"] = predictions(study.workdir("none", seed))["cls"]
    own = predictions(study.workdir("token", seed))
    found |= {name: own[name] for name in ("cls", "dist", "fused")}
    return {"classifiers": list(found), "disagreement": analysis.disagreement(found).tolist()}


def predictions(workdir) -> dict[str, np.ndarray]:
    """Return the labels that each head of a run gives to the test images, and the true ones."""
    opened = weights.open_model(workdir)

    @jax.jit
    def classify(variables, images):
        heads = opened.model.apply(variables, images, train=False)
        logits = {"cls": heads.cls, "dist": heads.dist, "fused": heads.fused()}
        return {name: x.argmax(-1) for name, x in logits.items() if x is not None}

    parts = []
    for images, labels, valid in _batches(opened):
        said = {"truth": labels, **jax.device_get(classify(opened.variables, images))}
        parts.append({name: x[valid] for name, x in said.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batches(opened):
    data = opened.run.config.data
    source, rows = open_dataset(data).eval, range(TOKEN_IMAGES)
    batches = pipeline.EvalBatches(source, len(rows), opened.image_size, data.eval_crop_ratio, rows)
    prepare = jax.jit(functools.partial(normalise, mean=opened.mean, std=opened.std))
    with contextlib.closing(pipeline.load(batches, 0, len(batches), data.threads, 2)) as loader:
        for batch in loader:
            yield prepare(batch["image"]), batch["label"], batch["valid"]
