"""What the page answers with: all models on one image, as HTML and as JSON. It knows no Gradio."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from deit_jax.analysis.classify import open_classifier
from deit_jax.analysis.report.html import Element, element, inline
from deit_jax.data.sources.named import NamedImages
from deit_jax.demo import answers, sections
from deit_jax.demo.examples import Example
from deit_jax.demo.models import Look, Model
from deit_jax.demo.teachers import Found, find_teacher
from deit_jax.errors import UserError
from deit_jax.shapes import sides
from deit_jax.step.teacher import Foreign
from deit_jax.storage import to_path
from deit_jax.weights.fit import LoadedWeights
from deit_jax.workdir import records
from deit_jax.workdir.which import LATEST

log = logging.getLogger("deit_jax")

KEPT = 16  # images whose looks are kept, so that another block is shown at once


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the page shows of an image, and the same answers as JSON; `error` is one line or ""."""

    html: str
    json: dict[str, Any]
    error: str = ""


class Session:
    """Models that look at images together, with examples in a folder."""

    def __init__(
        self,
        models: Sequence[Model],
        topk: int,
        folder: Path,
        examples: Sequence[Example] = (),
    ):
        self.models, self.topk = list(models), topk
        self.folder, self.examples = folder, list(examples)
        self.depth = max(model.depth for model in models)
        self._truths = {str(folder / e.file): e.truth for e in examples}
        self._looks = functools.lru_cache(maxsize=KEPT)(self._look)

    def warm_up(self) -> None:
        """Look at an image that is black, so that the first real one is answered as quickly."""
        for model in self.models:
            shape = (*sides(model.opened.image_size), model.opened.reading.channels)
            look = model.look(np.zeros(shape, np.uint8), "a black image")
            _html(sections.section(model, look, "", max(model.depth, 1), self.topk, ""))

    def answer(self, path: str, block: int) -> Answer:
        """Return what all models say of an image file, and what they read in a block (from 1).

        One that cannot be read is told of in one line.
        """
        name, truth = PurePath(path).name, self._truths.get(path, "")
        try:
            looks = self._looks(path)
        except UserError as error:
            line = " ".join(str(error).replace(path, name).split())
            return Answer(_html(element("p", line, class_="error", role="alert")), {}, line)
        shown = f"example {PurePath(path).stem}" if truth else name
        parts = [
            sections.section(model, look, shown, block, self.topk, truth)
            for model, look in zip(self.models, looks, strict=True)
        ]
        said = {
            model.title: answers.as_json(look, model.opened.classes, self.topk)
            for model, look in zip(self.models, looks, strict=True)
        }
        box = element("div", parts, class_=f"models n{min(len(parts), 2)}")
        return Answer(_html(self._together(looks), box), {"image": name, "models": said})

    def _look(self, path: str) -> tuple[Look, ...]:
        image, name = NamedImages([path])[0]["image"], PurePath(path).name
        views = {view: view(image, name) for view in {m.opened.view for m in self.models}}
        return tuple(model.look(views[model.opened.view], name) for model in self.models)

    def _together(self, looks: Sequence[Look]) -> Element | None:
        """Return what several models say together, None of one."""
        if len(looks) == 1:
            return None
        said = [
            answers.said_by(model, look.probabilities["fused"])
            for model, look in zip(self.models, looks, strict=True)
        ]
        if len(set(said)) == 1:
            words = ["All models say ", element("b", said[0]), "."]
            return element("p", words, class_="verdict all")
        each = [
            element("li", f"{model.title}: ", element("b", what))
            for model, what in zip(self.models, said, strict=True)
        ]
        words = ["The models differ.", element("ul", each)]
        return element("div", words, class_="verdict all differ")


def _html(*parts: Element | None) -> str:
    return inline(element("div", parts, class_="deit"))


def open_models(
    sources: Sequence[str],
    teacher: str = "",
    model: str | None = None,
    checkpoint: str | int = LATEST,
    ema: bool = False,
    multi_label: bool = False,
) -> tuple[list[Model], list[Found | None]]:
    """Return the models in weights, opened as `deit predict` opens them, and their teachers.

    Raise UserError for weights or a teacher that cannot be had.
    """
    names = titles(sources)
    opened = [open_classifier(s, model, multi_label, checkpoint, ema) for s in sources]
    models, teachers = [], []
    for weights, title in zip(opened, names, strict=True):
        found, note = find_teacher(weights, teacher)
        models.append(made(weights, title, found, multi_label))
        if note:
            log.info("%s: no teacher: %s", weights.source, note)
            models[-1].note = f"No teacher: {note}."
        teachers.append(found)
    return models, teachers


def made(weights: LoadedWeights, title: str, found: Found | None, several: bool) -> Model:
    """Return a model with the teacher that was found."""
    loaded = found.loaded if found else None
    return Model(weights, title, loaded, teacher_name(found), several)


def teacher_name(found: Found | None) -> str:
    """Return what people call a teacher: its architecture, or what it was given as."""
    if found is None:
        return ""
    model = getattr(found.loaded[0], "model", None)
    if isinstance(model, Foreign):
        return model.name
    given = found.spec.weights
    return PurePath(given).name if given else str(found.spec.model_config.name)


def titles(sources: Sequence[str]) -> list[str]:
    """Return a short name for each of some weights; raise UserError for the same ones twice."""
    for i, source in enumerate(sources):
        if source in sources[:i]:
            raise UserError(f"--weights: {source} is given twice; leave one of them out")
    return records.names([to_path(source) for source in sources], "--weights")
