"""Figures of finished runs: the cosines of their tokens, where their classifiers disagree."""

import numpy as np

from deit_jax.analysis import attention, transformer
from deit_jax.analysis import predictions as predictions_lib
from deit_jax.data.sources.registry import open_dataset
from deit_jax.weights.load import open_model

TOKEN_IMAGES = 1000


def token_cosines(study, arm, seed: int) -> dict:
    """Return the cosine of the learned tokens and of their features at every layer.

    {} for a model with one token. The features are of the first test images.
    """
    opened, source = _opened(study.workdir(arm.name, seed))
    images = predictions_lib.pixels(source, range(min(TOKEN_IMAGES, len(source))), opened)
    found = transformer.tokens(opened, images)
    return {key: found[key] for key in ("learned_cosine", "cosines")} if found else {}


def disagreement(study, arm, seed: int) -> dict:
    """Return on what share of the test images each two classifiers of this run's seed differ.

    They are the labels, the convnet that teaches, the student without it and each head of the
    distilled student, with whose run they are kept; {} for other runs.
    """
    if arm.name != "token":
        return {}
    teacher = predictions(study.workdir("teacher-convnet", 0))
    found = {"truth": teacher["truth"], "convnet": teacher["cls"]}
    found["none"] = predictions(study.workdir("none", seed))["cls"]
    own = predictions(study.workdir("token", seed))
    found |= {name: own[name] for name in ("cls", "dist", "fused")}
    return {"classifiers": list(found), "disagreement": attention.disagreement(found).tolist()}


def predictions(workdir) -> dict[str, np.ndarray]:
    """Return the labels that each head of a run gives to the test images, and the true ones."""
    opened, source = _opened(workdir)
    said = predictions_lib.predict(opened, None, source, np.arange(len(source)), workdir.name)
    return {"truth": said.truth, **said.labels}


def _opened(workdir):
    opened = open_model(workdir)
    return opened, open_dataset(opened.run.config.data).eval
