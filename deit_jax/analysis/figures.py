"""The figures of one or several runs, finished or under way.

`deit analyze` prints the very figures that `deit report` draws. Nothing is written in a workdir.
"""

import dataclasses
import datetime
import logging
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from deit_jax import __version__
from deit_jax.analysis import attention, predictions, transformer
from deit_jax.analysis.choices import IMAGES
from deit_jax.config.serialize import from_json
from deit_jax.data.channels import as_colours
from deit_jax.data.sources.base import Dataset
from deit_jax.data.sources.registry import has_labels, open_dataset
from deit_jax.errors import UserError
from deit_jax.storage import exists, steps_in, to_path
from deit_jax.train.experiment import length_of
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.teacher_spec import teacher_spec
from deit_jax.weights.fit import LoadedWeights, in_order
from deit_jax.weights.load import open_model
from deit_jax.workdir import records
from deit_jax.workdir.which import LATEST

log = logging.getLogger("deit_jax")

TOKEN_IMAGES = 128  # that the tokens' cosine is averaged over
ATTENTION_IMAGES = 5
TRIES = 3
_COMPUTED = (
    *(
        "checkpoint_step",
        "checkpoint_ema",
        "total_steps",
        "steps_per_epoch",
        "evaluation",
        "tokens",
        "attention",
    ),
    *("patch_grid", "position_similarity", "patch_filters"),
)


@dataclasses.dataclass
class Analysis:
    """The figures, as `deit analyze` prints them, and for each run images by example number."""

    figures: dict[str, Any]
    pictures: list[dict[int, np.ndarray]]


@dataclasses.dataclass
class _Seen:
    """One run's figures and what they were made of."""

    figures: dict[str, Any]
    pictures: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    classes: list[str] | None = None
    said: predictions.Predictions | None = None


def analyze(
    workdirs: Sequence[str | PurePath],
    images: int = IMAGES,
    checkpoint: str | int = LATEST,
    ema: bool = False,
) -> Analysis:
    """Return the figures of runs, evaluated on at most `images` evenly spaced held-out images.

    `checkpoint` (latest, best or a step) and `ema` say which of their weights are looked at.
    What cannot be computed, as without a checkpoint, is None, and the run's `notes` say why. Raise
    UserError if there is no run in one of the directories.
    """
    paths = [to_path(w) for w in workdirs]
    names = records.names(paths)
    for path in paths:
        records.config_of(path)
    _leave_accelerator(paths)
    seen = [
        _run(path, name, images, (checkpoint, ema)) for path, name in zip(paths, names, strict=True)
    ]
    figures = {
        "deit_jax": __version__,
        "generated": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{jax.devices()[0].device_kind}",
        "runs": [s.figures for s in seen],
        "disagreement": disagreement(seen),
    }
    return Analysis(_finite(figures), [s.pictures for s in seen])


def _leave_accelerator(workdirs: Sequence[PurePath]) -> None:
    """Compute on the CPU while one of the runs trains here: it needs its accelerator for itself."""
    busy = [w for w in workdirs if records.under_way(w)]
    if busy:
        log.info("%s: a training is under way; the report is computed on the CPU", busy[0])
        jax.config.update("jax_platforms", "cpu")


def _run(workdir: PurePath, name: str, images: int, which: tuple[str | int, bool]) -> _Seen:
    figures = {"name": name, **records.read(workdir), **dict.fromkeys(_COMPUTED), "notes": {}}
    seen, notes = _Seen(figures), figures["notes"]
    figures["data_card"] = records.data_card(workdir)
    try:
        opened = _open(workdir, *which)
        if opened.run is None:
            raise UserError(f"{workdir}: has weight files besides a run's; move them elsewhere")
        figures["checkpoint_step"], figures["checkpoint_ema"] = opened.run.step, which[1]
        figures |= transformer.learned(opened)
    except UserError as error:
        if which != (LATEST, False):  # it was asked for
            raise
        opened, notes["checkpoint"] = None, str(error)
        if not has_labels(figures["source"]):
            notes["checkpoint"] = (
                "trained on images without labels: there is no head, and nothing to evaluate; "
                "`deit eval --probe=knn` asks its features"
            )
        if figures["step"] == 0 and exists(workdir / "teacher" / "config.json"):
            notes["checkpoint"] += f"; its teacher is a run of its own, {workdir / 'teacher'}"
    try:
        dataset = open_dataset(from_json(figures["config"]).data)
        _add_length(figures, dataset)
        if opened:
            _look(seen, opened, dataset, workdir, images)
    except (UserError, OSError) as error:
        notes["data"] = str(error)
    return seen


def _open(workdir: PurePath, checkpoint: str | int = LATEST, ema: bool = False) -> LoadedWeights:
    """Return a checkpoint's weights; a training may delete one while it is being read."""
    dtype = records.config_of(workdir)["dtype"]
    for _ in range(TRIES):
        before = _checkpoints(workdir)
        try:
            return open_model(workdir, dtype=dtype, checkpoint=checkpoint, ema=ema)
        except UserError as error:
            failure = error
            if _checkpoints(workdir) == before:
                break
    raise failure


def _checkpoints(workdir: PurePath) -> set[int]:
    return set(steps_in(workdir / "checkpoints"))


def _add_length(figures: dict[str, Any], dataset: Dataset) -> None:
    order, total_steps = length_of(from_json(figures["config"]), len(dataset.train))
    figures["steps_per_epoch"] = order.steps_per_epoch
    figures["total_steps"] = total_steps


def _look(seen: _Seen, opened, dataset: Dataset, workdir: PurePath, images: int) -> None:
    """Add to a run's figures what needs its weights and its images."""
    source, figures = dataset.eval, seen.figures
    where = opened.run.config.data.source
    opened, note = in_order(opened, dataset.classes, f"{workdir}: the run", where)
    if note:
        figures["notes"]["classes"] = note
    numbers = predictions.spaced(len(source), images)
    teacher = run_teacher(opened, workdir, figures["notes"])
    given = (opened, teacher, source, numbers, figures["name"])
    said: predictions.Predictions | None = None
    answers: dict[str, Any]
    if opened.multi_label:
        readable, ranked = predictions.rank(*given)
        answers = {
            "mAP": {head: of["mAP"] for head, of in ranked.items()},
            "AP": {head: of["AP"] for head, of in ranked.items()},
        }
    else:
        said = predictions.predict(*given)
        readable = said.numbers
        answers = {
            "top1": predictions.top1(said),
            **predictions.errors(said, source, opened.classes),
        }
    left_out, numbers = len(numbers) - len(readable), readable
    figures["evaluation"] = {
        "images": len(numbers),
        **({"unreadable": left_out} if left_out else {}),
        "of": len(source),
        **answers,
    }
    few = numbers[predictions.spaced(len(numbers), TOKEN_IMAGES)]
    figures["tokens"] = transformer.tokens(opened, predictions.pixels(source, few, opened))
    shown = numbers[predictions.spaced(len(numbers), ATTENTION_IMAGES)]
    photographs = predictions.pixels(source, shown, opened)
    figures["attention"] = transformer.attention(opened, source, shown, photographs)
    wrong = [m["example"] for m in answers.get("mistakes", [])]
    pictures = [*photographs, *(predictions.pixels(source, wrong, opened) if wrong else [])]
    colours = map(as_colours, pictures)
    seen.pictures = dict(zip([*map(int, shown), *wrong], colours, strict=True))
    seen.classes, seen.said = opened.classes, said


def run_teacher(opened, workdir: PurePath, notes: dict[str, str]):
    """Return the run's (teacher, params), None without one or where its weights are not found."""
    try:
        spec = teacher_spec(opened.run.config)
        weights = spec.weights_path(workdir) if spec else ""
        teacher = load_teacher(spec, weights, opened.classes) if spec and weights else None
        return teacher if teacher and teacher[0].answers else None
    except UserError as error:
        notes["teacher"] = str(error)
        return None


def disagreement(seen: Sequence[_Seen]) -> dict[str, Any] | None:
    """Return the share of images, in percent, on which each two classifiers of all runs differ.

    None unless all runs that were evaluated saw the same images of the same classes.
    """
    runs = [(s, s.said) for s in seen if s.said]
    if not runs or not all(_comparable(runs[0][0], other) for other, _ in runs[1:]):
        return None
    classifiers, labels = [], {}
    for run, said in runs:
        single = "dist" not in said.labels  # whose fused prediction is the class head's
        for head in ("teacher", "cls", "dist", *(() if single else ("fused",))):
            if head in said.labels:
                classifiers.append({"run": run.figures["name"], "head": head})
                labels[str(len(labels))] = said.labels[head]
    return {
        "images": len(runs[0][1].numbers),
        "classifiers": classifiers,
        "percent": (100 * attention.disagreement(labels)).tolist(),
    }


def _comparable(first: _Seen, second: _Seen) -> bool:
    """Return whether two runs answered about the same images, with labels of the same meaning."""
    fields = ("source", "eval_split", "eval_fraction")
    said, other = first.said, second.said
    assert said is not None  # `disagreement` asks of no others
    assert other is not None
    return (
        first.classes == second.classes
        and np.array_equal(said.numbers, other.numbers)
        and np.array_equal(said.truth, other.truth)
        and all(
            first.figures["config"]["data"][k] == second.figures["config"]["data"][k]
            for k in fields
        )
    )


def _finite(value: Any) -> Any:
    """Return figures with None for every number that is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
