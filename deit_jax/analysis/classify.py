"""Images and what a model takes them for."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deit_jax.analysis.inference import stream
from deit_jax.analysis.predictions import sigmoid, softmax
from deit_jax.data.sources.base import Source
from deit_jax.data.sources.named import NamedImages
from deit_jax.errors import UserError
from deit_jax.step.eval_step import jit_logits
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.load import open_model
from deit_jax.workdir.which import LATEST


def classify(
    source: str,
    paths: Sequence[str],
    topk: int = 5,
    model: str | None = None,
    multi_label: bool = False,
) -> list[dict[str, Any]]:
    """Return for each file {"image", "predictions": [{"class", "index", "probability"}, …]}.

    The probability is the softmax of the fused logits, or for weights trained with several labels
    an image the sigmoid of each; `multi_label` says so of weights that do not. `model` is the name
    of the weights' model if they do not say it. Raise UserError naming a file that cannot be read.
    """
    images = NamedImages(paths)
    opened = open_classifier(source, model, multi_label)
    results = dict(predictions(opened, images, topk, multi_label))
    if missing := [path for i, path in enumerate(paths) if i not in results]:
        raise UserError(unreadable_line(missing, len(paths)))
    return list(results.values())


def open_classifier(
    source: str,
    model: str | None = None,
    multi_label: bool = False,
    checkpoint: str | int = LATEST,
    ema: bool = False,
) -> LoadedWeights:
    """Return weights to classify with, as load_variables does; raise UserError for others."""
    opened = open_model(source, model, checkpoint=checkpoint, ema=ema)
    opened.check_convention()
    if not opened.classes:
        raise UserError(f"{source}: has no head, so it knows no classes; `deit embed` takes it")
    opened.tell()
    if multi_label and opened.multi_label is False:
        raise UserError(f"--multi_label: {source} answers one class an image; leave it out")
    return opened


def predictions(
    opened: LoadedWeights, source: Source, topk: int, multi_label: bool = False, title: str = ""
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterate over the numbers of images that can be read and what `classify` returns of them.

    In the order of the source; with a `title` there is a progress bar.
    """
    probabilities = sigmoid if multi_label or opened.multi_label else softmax
    mean, std = (tuple(map(float, numbers)) for numbers in (opened.mean, opened.std))

    def answer(variables, images):
        ask = functools.partial(jit_logits, model=opened.model, teacher=None, mean=mean, std=std)
        return ask(variables, None, images)["fused"]

    for batch in stream(opened, source, answer, title):
        for number, row in zip(batch.numbers.tolist(), probabilities(batch.values), strict=True):
            if not np.isfinite(row).all():
                name = source.describe(number)
                raise UserError(
                    f"{opened.source}: the answer to {name} is not finite; the weights are damaged"
                )
            best = np.argsort(-row, kind="stable")[:topk]
            said = [
                {"class": opened.classes[i], "index": int(i), "probability": float(row[i])}
                for i in best
            ]
            yield number, {"image": source.describe(number), "predictions": said}


def unreadable_line(paths: Sequence[str], count: int) -> str:
    """Return one line on images that could not be read, `paths` of so many."""
    of = "the only image" if count == 1 else f"{len(paths)} of {count} images"
    first = paths[0] if len(paths) == 1 else f"the first is {paths[0]}"
    return f"{of} could not be read: {first}; repair or remove what the lines above name"
