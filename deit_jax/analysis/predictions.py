"""Answers of a run's heads and its teacher on held-out images, and their mistakes."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from deit_jax.data.batches import EvalBatches
from deit_jax.data.loader import load
from deit_jax.data.sources.base import Source, Subset
from deit_jax.errors import UserError
from deit_jax.step.eval_step import jit_logits
from deit_jax.train.average_precision import figures

BATCH = 128
MATRIX = 30  # classes: a confusion matrix of more is no picture; then the most confused pairs
PAIRS = 30
MISTAKES = 12


def spaced(total: int, count: int) -> Int[np.ndarray, "n"]:
    """Return the numbers of at most `count` of `total` examples, evenly spaced."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))


def pixels(
    source: Source, numbers: Sequence[int] | np.ndarray, opened
) -> UInt8[np.ndarray, "n H W C"]:
    """Return images as a model is given them in evaluation, before normalisation."""
    some = Subset(source, np.asarray(numbers, np.int64))
    batches = EvalBatches(some, len(some), opened.view, range(len(some)))
    return batches(0)["image"]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Labels that heads and teacher give to examples, and their probability of them.

    `numbers` are the examples' in the evaluation data; a label is -1 where logits are not finite.
    """

    numbers: Int[np.ndarray, "n"]
    truth: Int[np.ndarray, "n"]
    labels: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray]


def infer(
    model,
    variables,
    images: UInt8[np.ndarray, "B H W C"],
    convention: tuple[tuple[float, ...], tuple[float, ...]],
    teacher=None,
    teacher_params=None,
) -> dict[str, np.ndarray]:
    """Return the logits of every head, and of a teacher if there is one, for some images.

    `convention` are mean and standard deviation, by which the model's input is normalised.
    """
    mean, std = (tuple(map(float, numbers)) for numbers in convention)
    logits = jit_logits(
        variables, teacher_params, images, model=model, teacher=teacher, mean=mean, std=std
    )
    return jax.device_get(logits)


def softmax(logits: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B K"]:
    """Return probabilities; of logits that are not finite, nan."""
    with np.errstate(invalid="ignore", over="ignore"):
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B K"]:
    """Return the probability of each class by itself."""
    return 0.5 + 0.5 * np.tanh(logits / 2)


def predict(
    opened, teacher, source: Source, numbers: Int[np.ndarray, "n"], title: str
) -> Predictions:
    """Evaluate a run's model, and its (teacher, params) if that is not None, with a progress bar.

    The classifiers are `cls`, `dist` where there is one, `fused` and `teacher`. Images that cannot
    be read are not among the answers' `numbers` if the run skips them. Raise UserError if none can.
    """
    parts, readable = [], []

    def take(valid, labels, logits) -> None:
        readable.append(valid)
        parts.append((labels, {name: _answer(x) for name, x in logits.items()}))

    _each(opened, teacher, source, numbers, title, take)
    truth, answers = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    numbers = numbers[np.concatenate(readable)[: len(numbers)]]
    labels = {name: label for name, (label, _) in answers.items()}
    return Predictions(numbers, truth, labels, {name: p for name, (_, p) in answers.items()})


def rank(
    opened, teacher, source: Source, numbers: Int[np.ndarray, "n"], title: str
) -> tuple[Int[np.ndarray, "m"], dict[str, dict[str, Any]]]:
    """Return the images that can be read, and each classifier's average precisions on them.

    For images with several labels; see predict for the rest.
    """
    parts, readable = [], []

    def take(valid, labels, logits) -> None:
        readable.append(valid)
        parts.append({**logits, "label": labels})

    _each(opened, teacher, source, numbers, title, take)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    labels = whole.pop("label")
    if not labels.any():
        raise UserError(f"none of the {len(labels)} images for evaluation has a label")
    numbers = numbers[np.concatenate(readable)[: len(numbers)]]
    return numbers, {name: figures(x, labels, opened.classes) for name, x in whole.items()}


def _each(opened, teacher, source: Source, numbers, title: str, take: Callable) -> None:
    """Take (valid, labels, logits of every classifier) of each batch, those of valid images.

    Raise UserError if not one image can be read.
    """
    network, teacher_params = teacher or (None, None)
    variables, teacher_params = jax.device_put((opened.variables, teacher_params))
    some, convention, count = Subset(source, numbers), (opened.mean, opened.std), 0
    size = min(BATCH, len(some))
    data = opened.run.config.data
    batches = EvalBatches(some, size, opened.view, range(size), data.skip_unreadable)
    loader = load(batches, 0, len(batches), data.threads, prefetch=2)
    bar = tqdm(total=len(some), unit="image", desc=title, leave=False, disable=None)
    with contextlib.closing(loader), bar:
        for batch in loader:
            valid = batch["valid"].copy()  # the batch's memory is lent
            logits = infer(
                opened.model, variables, batch["image"], convention, network, teacher_params
            )
            take(valid, batch["label"][valid], {name: x[valid] for name, x in logits.items()})
            count += int(valid.sum())
            bar.update(int(valid.sum()))
    if not count:
        raise UserError(f"{data.source}: none of its images for evaluation can be read")


def _answer(logits: Float[np.ndarray, "n K"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the best labels, -1 where logits are not finite, and their probabilities."""
    finite = np.isfinite(logits).all(axis=-1)
    return np.where(finite, logits.argmax(-1), -1), softmax(logits).max(-1)


def top1(answers: Predictions) -> dict[str, float]:
    """Return the accuracy of every classifier in percent."""
    return {k: 100 * float(np.mean(v == answers.truth)) for k, v in answers.labels.items()}


def confusion(truth: np.ndarray, labels: np.ndarray, classes: int) -> Int[np.ndarray, "K K"]:
    """Return how many examples of each class [row] were given each label [column]."""
    answered = labels >= 0
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth[answered], labels[answered]), 1)
    return counts


def confused(truth: np.ndarray, labels: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (class, label given, examples) of the pairs that are confused most.

    Of pairs that occur alone: K x K numbers of 33 000 classes are gigabytes.
    """
    wrong = (labels >= 0) & (labels != truth)
    pairs, counts = np.unique(np.stack([truth[wrong], labels[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:PAIRS]
    return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]


def errors(answers: Predictions, source: Source, classes: Sequence[str]) -> dict[str, Any]:
    """Return the confusion of the fused prediction and its most confident mistakes."""
    count, said = len(classes), answers.labels["fused"]
    examples = np.bincount(answers.truth, minlength=count)
    right = np.bincount(answers.truth[said == answers.truth], minlength=count)
    matrix = confusion(answers.truth, said, count).tolist() if count <= MATRIX else None
    return {
        "classes": [
            {"class": name, "examples": int(n), "right": int(good)}
            for name, n, good in zip(classes, examples, right, strict=True)
        ],
        "confusion": matrix,
        "confused": [
            {"class": classes[i], "predicted": classes[j], "examples": n}
            for i, j, n in confused(answers.truth, said)
        ],
        "unanswered": int(np.sum(answers.labels["fused"] < 0)),
        "mistakes": _mistakes(answers, source, classes),
    }


def _mistakes(answers: Predictions, source: Source, classes: Sequence[str]) -> list[dict[str, Any]]:
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


def _opinion(answers: Predictions, who: str, index: int, classes: Sequence[str]) -> dict[str, Any]:
    label = int(answers.labels[who][index])
    return {
        "class": classes[label] if label >= 0 else None,
        "probability": float(answers.probabilities[who][index]),
        "right": label == int(answers.truth[index]),
    }
