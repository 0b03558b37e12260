"""The teacher that answers beside a model: the run's own, or one that somebody names."""

import dataclasses

from deit_jax.analysis.figures import run_teacher
from deit_jax.configs import base
from deit_jax.errors import UserError
from deit_jax.shapes import Size
from deit_jax.storage import to_path
from deit_jax.teachers.folder import is_folder
from deit_jax.teachers.open import KINDS
from deit_jax.train.load_teacher import Loaded, load_teacher
from deit_jax.train.teacher_spec import TeacherSpec, sources_of, teacher_spec
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.load import open_model


@dataclasses.dataclass(frozen=True)
class Found:
    """A teacher with its parameters, and what is said of it. `spec` is how it was asked for."""

    loaded: Loaded
    spec: TeacherSpec
    weights: str


def find_teacher(
    opened: LoadedWeights, asked: str, size: Size | None = None
) -> tuple[Found | None, str]:
    """Return the teacher that is `asked` for, else the run's own, and a note where that is missing.

    `size` is that of the images that it is shown, None for its own. Raise UserError where the one
    that is asked for does not know the model's classes or does not take its images.
    """
    if asked:
        spec = asked_spec(opened, asked, size)
        try:
            return Found(load_teacher(spec, asked, opened.classes), spec, asked), ""
        except UserError as error:
            message = str(error).replace("config.teacher.weights=", "--teacher=")
            raise UserError(message) from error
    if opened.run is None:
        alone = getattr(opened.model, "distilled", False)
        return None, "these weights bring none; --teacher=… names one" if alone else ""
    workdir, notes = to_path(opened.source), dict[str, str]()
    loaded, own = run_teacher(opened, workdir, notes), teacher_spec(opened.run.config)
    if loaded is None or own is None:
        note = notes.get("teacher", "")
        return None, note and f"{note}; --teacher=… names another"
    return Found(loaded, own, own.weights_path(workdir)), ""


def asked_spec(opened: LoadedWeights, asked: str, size: Size | None) -> TeacherSpec:
    """Return what a config would say of a teacher that is given beside the weights."""
    if size is None and len(sources_of(asked)) == 1 and not is_foreign(asked):
        size = getattr(open_model(asked).model, "image_size", None)
    return TeacherSpec(
        model_config=base.get_config().teacher.model,
        weights=asked,
        image_size=opened.image_size if size is None else size,
        channels=opened.reading.channels,
        student_mean=tuple(map(float, opened.mean)),
        student_std=tuple(map(float, opened.std)),
        dtype="float32",
        tape="off",
        source=opened.source,
        several=bool(opened.multi_label),
        shares=(1 / len(sources_of(asked)),) * len(sources_of(asked)),
    )


def is_foreign(weights: str) -> bool:
    """Return whether a teacher is not in our own weights."""
    return weights.startswith(KINDS) or is_folder(weights)
