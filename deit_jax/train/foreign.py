"""A teacher of any origin, fitted to the images and classes of a student."""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp

from deit_jax.data.classes import align
from deit_jax.data.sources.splits import listed
from deit_jax.errors import UserError
from deit_jax.shapes import Size, sides, text
from deit_jax.step.distill.base import Outputs
from deit_jax.step.teacher import Foreign, FrozenTeacher
from deit_jax.teachers.programs import PLAIN_SIDE
from deit_jax.teachers.teacher import Teacher
from deit_jax.train.teacher_spec import TeacherSpec

log = logging.getLogger("deit_jax")

NO_CLASSES = "gives features alone, no classes; take distill.kind=feature, or another teacher"


def fitted(spec: TeacherSpec, given: Teacher, weights: str, classes: list[str]) -> FrozenTeacher:
    """Return a teacher that answers a student with the given classes.

    Raise UserError, naming `config.teacher.weights`, where it cannot.
    """
    where = f"config.teacher.weights={weights}"
    teacher = _frozen(spec, given, where)
    outputs = _outputs(teacher, given)
    if spec.features and outputs.features is None:
        raise UserError(
            f"{where}: the teacher gives no features; take distill.kind=hard or soft, or another"
        )
    if not spec.classes:
        return teacher
    wide = outputs.heads.cls.shape[-1]
    if not wide:
        raise UserError(f"{where}: the teacher {NO_CLASSES}")
    if given.multi_label not in (None, spec.several):
        says = "any number of classes" if given.multi_label else "one class"
        raise UserError(
            f"{where}: the teacher answers {says} an image; take one that was trained with "
            f"data.multi_label={spec.several}, as the student is"
        )
    order, note = _aligned(given, classes, f"{where}: the teacher", spec.source)
    if note:
        log.info(note)
    columns = None if order is None else tuple(int(i) for i in order)
    return dataclasses.replace(teacher, columns=columns)


def unnamed(spec: TeacherSpec, given: Teacher, weights: str, num_classes: int) -> FrozenTeacher:
    """Return the same for so many classes whose names do not matter: to plan and to measure."""
    where = f"config.teacher.weights={weights}"
    teacher = _frozen(spec, given, where)
    wide = _outputs(teacher, given).heads.cls.shape[-1]
    if not spec.classes or wide == num_classes:
        return teacher
    if not wide:
        raise UserError(f"{where}: the teacher {NO_CLASSES}")
    if wide < num_classes:
        raise UserError(
            f"{where}: the teacher knows {wide} classes ({listed(given.classes, 5)}), and the data "
            f"has {num_classes}; take one that knows them all, or distill.kind=feature"
        )
    return dataclasses.replace(teacher, columns=tuple(range(num_classes)))


def _aligned(given: Teacher, classes: list[str], whose: str, source: str):
    """Return the classes' numbers and a note; by the other names where the first do not fit."""
    try:
        return align(list(given.classes), classes, whose, source, may_know_more=True)
    except UserError:
        if not given.also_called:
            raise
        try:
            return align(list(given.also_called), classes, whose, source, may_know_more=True)
        except UserError:
            pass
        raise


def _frozen(spec: TeacherSpec, given: Teacher, where: str) -> FrozenTeacher:
    """Return the teacher as the step asks it; all its classes, as they are."""
    if given.channels != spec.channels:
        raise UserError(
            f"{where}: the teacher takes images of {given.channels} channels, and "
            f"config.data.channels={spec.channels}; take a teacher of the same images"
        )
    size = _size(spec, given, where)
    macs, image_bytes = (_of_size(n, given, size) for n in (given.macs, given.image_bytes))
    model = Foreign(given.apply, given.name, macs, image_bytes, given.program)
    conventions = (tuple(map(float, given.mean)), tuple(map(float, given.std)))
    of_student = (spec.student_mean, spec.student_std)
    return FrozenTeacher(model, *conventions, *of_student, size, answers=spec.classes)


def _size(spec: TeacherSpec, given: Teacher, where: str) -> Size:
    if given.image_size is None:
        return spec.image_size
    if spec.given_size not in (None, given.image_size):
        raise UserError(
            f"config.teacher.image_size={spec.given_size}: {where} takes {text(given.image_size)} "
            "px images and no others; leave it out"
        )
    return given.image_size


def _of_size(count: int | None, given: Teacher, size: Size) -> int | None:
    """Return what an image of a size takes; of one that takes any, in proportion to the pixels."""
    if count is None or given.image_size is not None:
        return count
    return round(count * math.prod(sides(size)) / PLAIN_SIDE**2)


def _outputs(teacher: FrozenTeacher, given: Teacher) -> Outputs:
    """Return the shapes of what a teacher says of two images."""
    assert teacher.image_size is not None  # _size chooses one
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given.params)
    shape = (2, *sides(teacher.image_size), given.channels)
    return jax.eval_shape(teacher.model.outputs, params, jax.ShapeDtypeStruct(shape, jnp.float32))
