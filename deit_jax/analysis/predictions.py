"""What a run's heads and its teacher answer on held-out images, and where they are wrong."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from deit_jax import step
from deit_jax.data import pipeline
from deit_jax.data.sources import Source, Subset

BATCH = 128
MATRIX = 30  # classes: a confusion matrix of more is no picture; then the most confused pairs
PAIRS = 30
MISTAKES = 12


def spaced(total: int, count: int) -> Int[np.ndarray, "n"]:
    """Return the numbers of at most `count` of `total` examples, evenly spaced."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))


def pixels(
    source: Source, numbers: Sequence[int] | np.ndarray, opened
) -> UInt8[np.ndarray, "n H W 3"]:
    """Return images as a model is given them in evaluation, before normalisation."""
    some = Subset(source, np.asarray(numbers, np.int64))
    batches = pipeline.EvalBatches(
        some, len(some), opened.image_size, opened.crop_ratio, range(len(some))
    )
    return batches(0)["image"]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Labels that heads and teacher give to examples, and their probability of them.

    `numbers` are the examples' in the evaluation data; a label is -1 where logits are not finite.
    """

    numbers: Int[np.ndarray, "n"]
    truth: Int[np.ndarray, "n"]
    labels: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray]


def ask(opened, teacher, source: Source, numbers: Int[np.ndarray, "n"], title: str) -> Answers:
    """Evaluate a run's model, and its (teacher, params) if that is not None, with a progress bar.

    The classifiers are `cls`, `dist` where there is one, `fused` and `teacher`.
    """
    answer, params = _compiled(opened, teacher)
    some, found = Subset(source, numbers), []
    size = min(BATCH, len(some))
    batches = pipeline.EvalBatches(some, size, opened.image_size, opened.crop_ratio, range(size))
    threads = opened.run.config.data.threads
    loader = pipeline.load(batches, 0, len(batches), threads, prefetch=2)
    bar = tqdm(total=len(some), unit="image", desc=title, leave=False, disable=None)
    with contextlib.closing(loader), bar:
        for batch in loader:
            valid = batch["valid"]
            said = jax.device_get(answer(*params, batch["image"]))
            said["truth"] = batch["label"].copy()  # whose memory a later batch takes
            found.append(jax.tree.map(lambda x, valid=valid: x[valid], said))
            bar.update(int(valid.sum()))
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    return Answers(numbers, whole["truth"], whole["labels"], whole["probabilities"])


def _compiled(opened, teacher):
    """Return the function (variables, teacher's params, images) -> answers, and its weights."""
    network, teacher_params = teacher or (None, None)

    @jax.jit
    def answer(variables, teacher_params, images):
        images = step.normalise(images, opened.mean, opened.std)
        heads = opened.model.apply(variables, images, train=False)
        logits = {"cls": heads.cls, "dist": heads.dist, "fused": heads.fused()}
        logits = {k: x for k, x in logits.items() if x is not None}
        if network is not None:
            logits["teacher"] = network.logits(teacher_params, images).astype(jnp.float32)
        finite = {k: jnp.isfinite(x).all(axis=-1) for k, x in logits.items()}
        labels = {k: jnp.where(finite[k], x.argmax(-1), -1) for k, x in logits.items()}
        best = {k: jax.nn.softmax(x).max(-1) for k, x in logits.items()}
        return {"labels": labels, "probabilities": best}

    return answer, jax.device_put((opened.variables, teacher_params))


def top1(answers: Answers) -> dict[str, float]:
    """Return the accuracy of every classifier in percent."""
    return {k: 100 * float(np.mean(v == answers.truth)) for k, v in answers.labels.items()}


def confusion(truth: np.ndarray, labels: np.ndarray, classes: int) -> Int[np.ndarray, "K K"]:
    """Return how many examples of each class [row] were given each label [column]."""
    answered = labels >= 0
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth[answered], labels[answered]), 1)
    return counts


def errors(answers: Answers, source: Source, classes: Sequence[str]) -> dict[str, Any]:
    """Return the confusion of the fused prediction and its most confident mistakes."""
    counts = confusion(answers.truth, answers.labels["fused"], len(classes))
    wrong = counts * (1 - np.eye(len(classes), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(*divmod(int(i), len(classes)), int(wrong.flat[i])) for i in order if wrong.flat[i]]
    examples = np.bincount(answers.truth, minlength=len(classes))
    return {
        "classes": [
            {"class": name, "examples": int(n), "right": int(right)}
            for name, n, right in zip(classes, examples, np.diag(counts), strict=True)
        ],
        "confusion": counts.tolist() if len(classes) <= MATRIX else None,
        "confused": [
            {"class": classes[i], "predicted": classes[j], "examples": n} for i, j, n in pairs
        ],
        "unanswered": int(np.sum(answers.labels["fused"] < 0)),
        "mistakes": _mistakes(answers, source, classes),
    }


def _mistakes(answers: Answers, source: Source, classes: Sequence[str]) -> list[dict[str, Any]]:
    fused = answers.labels["fused"]
    wrong = np.flatnonzero((fused != answers.truth) & (fused >= 0))
    sure = answers.probabilities["fused"][wrong]
    found = []
    for i in wrong[np.argsort(-sure, kind="stable")[:MISTAKES]]:
        number = int(answers.numbers[i])
        opinions = {k: _opinion(answers, k, int(i), classes) for k in answers.labels}
        found.append(
            {
                "example": number,
                "name": source.describe(number),
                "class": classes[answers.truth[i]],
                "predicted": opinions["fused"]["class"],
                "probability": opinions["fused"]["probability"],
                "teacher": opinions.get("teacher"),
            }
        )
    return found


def _opinion(answers: Answers, who: str, index: int, classes: Sequence[str]) -> dict[str, Any]:
    label = int(answers.labels[who][index])
    return {
        "class": classes[label] if label >= 0 else None,
        "probability": float(answers.probabilities[who][index]),
        "right": label == int(answers.truth[index]),
    }
