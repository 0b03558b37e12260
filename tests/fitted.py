"""A run on the digits that was not trained: networks of random weights, with fitted heads."""

import json

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

from deit_jax.data.decode import PLAIN
from deit_jax.data.sources.registry import open_dataset
from deit_jax.data.view import EvalView
from deit_jax.models import registry
from deit_jax.models.build import build_model
from deit_jax.models.preprocess import normalise
from deit_jax.weights.convert import convert
from deit_jax.weights.fit import LoadedWeights, init_variables
from tests.tiny import make_tiny_config

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def write_run(folder):
    """Write the run of a distilled student that reads digits, with its teacher; return its path.

    The distillation head is fitted to what the teacher says, the class head to the labels.
    """
    config = make_tiny_config()
    config.model.width = 48
    dataset = open_dataset(config.data)
    view = EvalView(16, 1.0, PLAIN)
    images = np.stack([view(e["image"], "") for e in map(dataset.eval.__getitem__, range(900))])
    truth = np.array([dataset.eval[i]["label"] for i in range(900)])
    student, teacher = build_model(config.model, 10), build_model(config.teacher.model, 10)
    teaches, (said,) = _fitted(teacher, images, [truth])
    learns, _ = _fitted(student, images, [truth, said])
    known = {"source": "", "format": "", "classes": dataset.classes, "image_size": 16}
    known |= {"mean": MEAN, "std": STD, "crop_ratio": 1.0}
    for name, model, variables, path in (
        (config.model.name, student, learns, folder),
        (config.teacher.model.name, teacher, teaches, folder / "teacher"),
    ):
        convert(
            LoadedWeights(name=name, model=model, variables=variables, **known), path, "deit_jax"
        )
        written = json.loads((path / "config.json").read_text())
        written["data"] |= {"source": "digits", "eval_fraction": 0.9}
        written["distill"]["kind"] = "none" if model is teacher else "hard"
        (path / "config.json").write_text(json.dumps(written))
    return folder


def _fitted(model, images, labels):
    """Return variables with heads fitted to one list of labels each, and what each head says."""
    variables, rng = init_variables(model, 0), np.random.default_rng(0)
    variables = {"batch_stats": {}, **variables}
    if len(labels) > 1:  # a transformer takes larger ones, or all images look alike to it
        params = variables["params"]
        params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.16, x.shape) + (x == 1)), params)
        variables["params"] = params
    paths = [path.split("/") for path in registry.family_of(model).heads]
    tops = [path[0] for path in paths]
    without = {k: v for k, v in variables["params"].items() if k not in tops}

    def seen(variables, images):
        return model.clone(num_classes=0).apply(
            variables, normalise(images, MEAN, STD), train=False
        )

    features, said = jax.jit(seen)({**variables, "params": without}, images), []
    for path, rows, wanted in zip(paths, features, labels, strict=False):
        rows = np.asarray(rows, np.float64)
        middle, spread = rows.mean(0), rows.std(0) + 1e-9
        fit = LogisticRegression(C=10, max_iter=2000).fit((rows - middle) / spread, wanted)
        kernel, bias = np.zeros((rows.shape[1], 10)), np.full(10, -100.0)
        kernel[:, fit.classes_] = fit.coef_.T / spread[:, None]
        bias[fit.classes_] = fit.intercept_ - middle @ kernel[:, fit.classes_]
        layer = variables["params"]
        for name in path:
            layer = layer[name]
        layer |= {"kernel": np.float32(kernel), "bias": np.float32(bias)}
        said.append(fit.predict((rows - middle) / spread))
    return variables, said
