"""A config's teacher with its weights, or with their shapes alone."""

import logging
from typing import Any

import jax
import jax.numpy as jnp

from deit_jax.errors import UserError
from deit_jax.models.build import build_model, compute_dtype, for_counting
from deit_jax.shapes import Size, input_shape, text
from deit_jax.step.committee import Committee
from deit_jax.step.teacher import FrozenTeacher
from deit_jax.teachers.open import KINDS, TIMM, open_teacher
from deit_jax.teachers.teacher import Teacher
from deit_jax.train import foreign
from deit_jax.train.teacher_spec import TeacherSpec, sources_of
from deit_jax.weights.fit import LoadedWeights, in_order
from deit_jax.weights.load import folded, load_variables
from deit_jax.workdir.which import LATEST

log = logging.getLogger("deit_jax")

Loaded = tuple[FrozenTeacher | Committee, Any]  # and its parameters


def load_teacher(spec: TeacherSpec, weights: str, classes: list[str]) -> Loaded:
    """Return the teacher in any kind of weights and its parameters, batch norm folded into them.

    Of several teachers, with commas between them, a Committee and a tuple. Their classes are put in
    the order of `classes` by their names; they may know more. Raise UserError unless they know
    those and take the student's images.
    """
    sources = sources_of(weights)
    each = [_load(spec, source, classes, several=len(sources) > 1) for source in sources]
    return _together(spec, each)


def _together(spec: TeacherSpec, each: list[Loaded]) -> Loaded:
    if len(each) == 1:
        return each[0]
    members, params = zip(*each, strict=True)
    return Committee(members, spec.shares, spec.votes), params


def _load(spec: TeacherSpec, weights: str, classes: list[str], several: bool) -> Loaded:
    given = foreign_teacher(spec, weights)
    if given is None:
        return _load_ours(spec, weights, classes, several)
    teacher = foreign.fitted(spec, given, weights, classes)
    return teacher, jax.tree.map(jnp.asarray, given.params)


def foreign_teacher(spec: TeacherSpec, weights: str, abstract: bool = False) -> Teacher | None:
    """Return a teacher that is not in our own weights, None for one that is."""
    if not weights:  # it is trained first
        return None
    try:
        given = _open(spec, weights, abstract)
    except UserError as error:
        reason = str(error).removeprefix(f"{weights}: ")
        raise UserError(f"config.teacher.weights={weights}: {reason}") from error
    if given is None:
        return None
    averaged = spec.ema and not weights.startswith(TIMM)
    if spec.checkpoint != LATEST or averaged:
        field = f"ema={spec.ema}" if averaged else f"checkpoint={spec.checkpoint}"
        raise UserError(
            f"config.teacher.{field}: is of a run's weights, and config.teacher.weights={weights} "
            "is no run; leave it out"
        )
    return given


def _open(spec: TeacherSpec, weights: str, abstract: bool) -> Teacher | None:
    """Open a teacher; one that is made anew each time only once for its shapes and its numbers."""
    if weights in spec.made:
        return spec.made[weights] if abstract else spec.made.pop(weights)
    teacher = open_teacher(weights, compute_dtype(spec.dtype).name, abstract, spec.ema)
    if abstract and weights.startswith(KINDS):
        spec.made[weights] = teacher
    return teacher


def _load_ours(spec: TeacherSpec, weights: str, classes: list[str], several: bool) -> Loaded:
    """Return a teacher of our own architectures; `spec.model_config` where weights do not say."""
    opened = _opened(spec, weights)
    opened.tell()
    taken = getattr(opened.model, "in_channels", 3)
    if taken != spec.channels:
        raise UserError(
            f"config.teacher.weights={weights}: the teacher takes images of {taken} channels, and "
            f"config.data.channels={spec.channels}; take a teacher of the same images"
        )
    if spec.classes:
        whose = f"config.teacher.weights={weights}: the teacher"
        opened, note = in_order(opened, classes, whose, spec.source, may_know_more=True)
        if note:
            log.info(note)
        if opened.multi_label not in (None, spec.several):
            says = "any number of classes" if opened.multi_label else "one class"
            raise UserError(
                f"config.teacher.weights={weights}: the teacher answers {says} an image; take one "
                f"that was trained with data.multi_label={spec.several}, as the student is"
            )
    try:
        opened.check_convention()
    except ValueError as error:
        reason = str(error).removeprefix(f"{weights}: ")
        raise UserError(f"config.teacher.weights={weights}: {reason}") from error
    size = _size(spec, weights, opened, several)
    model, params = folded(opened.model, opened.variables)
    if hasattr(model, "attention") and spec.model_config.attention:
        model = model.clone(attention=spec.model_config.attention)
    inputs = (opened.mean, opened.std, spec.student_mean, spec.student_std, size)
    teacher = FrozenTeacher(model, *inputs, answers=spec.classes)
    return teacher, _cast(params, compute_dtype(spec.dtype))


def _opened(spec: TeacherSpec, weights: str) -> LoadedWeights:
    known: dict[str, Any]
    try:
        known = {"default": spec.model_config, "dtype": spec.dtype}
        known |= {"checkpoint": spec.checkpoint, "ema": spec.ema}
        # Who compares no classes needs no head: a backbone has none.
        return load_variables(weights, num_classes=None if spec.classes else 0, **known)
    except UserError as error:
        if weights not in sources_of(spec.weights):
            raise
        reason = str(error).removeprefix(f"{weights}: ")
        raise UserError(f"config.teacher.weights={weights}: {reason}") from error


def _size(spec: TeacherSpec, weights: str, opened, several: bool) -> Size:
    """Return the size of the images that a teacher of ours is shown; of several each its own."""
    own = getattr(opened.model, "image_size", spec.image_size)
    if own == spec.image_size or (several and spec.given_size is None):
        return own
    raise UserError(
        f"config.teacher.weights={weights}: the teacher takes {text(opened.image_size)} px "
        f"images, not {text(spec.image_size)}; resize them for it with "
        f"--config.teacher.image_size={_as_flag(opened.image_size)}"
    )


def _as_flag(size: Size) -> str:
    return str(size) if isinstance(size, int) else f"'({size[0]},{size[1]})'"


def random_teacher(spec: TeacherSpec | None, num_classes: int) -> Loaded | None:
    """Return what load_teacher would, with random weights; None without a teacher to ask.

    It is as fast as a trained one, and as large. A teacher that is not ours has its own weights.
    """
    if spec is None or not spec.answers:
        return None
    return _together(spec, [_random(spec, s, num_classes) for s in sources_of(spec.weights)])


def _random(spec: TeacherSpec, source: str, num_classes: int) -> Loaded:
    if (given := foreign_teacher(spec, source)) is not None:
        return foreign.unnamed(spec, given, source, num_classes), given.params
    model = build_model(spec.model_config, num_classes, spec.dtype, "teacher.", spec.channels)
    images = jnp.zeros(input_shape(model, spec.image_size))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    model, params = folded(model, variables)
    return spec.as_student_sees(model), _cast(params, compute_dtype(spec.dtype))


def abstract_teacher(spec: TeacherSpec | None, num_classes: int) -> Loaded | None:
    """Return a teacher and the shapes of its parameters, without any; None without one to ask."""
    if spec is None or not spec.answers:
        return None
    return _together(spec, [_abstract(spec, s, num_classes) for s in sources_of(spec.weights)])


def _abstract(spec: TeacherSpec, source: str, num_classes: int) -> Loaded:
    if (given := foreign_teacher(spec, source, abstract=True)) is not None:
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given.params)
        return foreign.unnamed(spec, given, source, num_classes), params
    model = spec.build(num_classes)
    if spec.features and source:  # the projection has the width of the teacher itself
        model = _opened(spec, source).model
        model = model.clone(folded=True) if hasattr(model, "folded") else model
    images = jax.ShapeDtypeStruct(input_shape(model, spec.image_size), jnp.float32)
    # Shapes are asked for without its own attention, which might try cuDNN.
    variables = jax.eval_shape(for_counting(model).init, jax.random.key(0), images)
    dtype = compute_dtype(spec.dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables["params"])
    return spec.as_student_sees(model), params


def _cast(params, dtype):
    """Return parameters of another dtype, made by one program instead of one for each shape."""
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))(params)
