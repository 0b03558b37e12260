"""What a step learns of its teacher: the shape of it, and what is trained for it besides."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.models.heads import Heads
from deit_jax.shapes import Size, input_shape
from deit_jax.step.distill.base import Outputs
from deit_jax.step.teacher import apply_with_features
from deit_jax.step.train_step import StepConfig
from deit_jax.storage import to_path
from deit_jax.train import memory
from deit_jax.train.load_teacher import Loaded
from deit_jax.train.tape.tape import features_width
from deit_jax.train.teacher_spec import TeacherSpec


def shown_size(spec: TeacherSpec | None, teacher: Loaded | None) -> Size | None:
    """Return the size of the images that a teacher is shown, None without one."""
    if spec is None:
        return None
    return (teacher and teacher[0].image_size) or spec.image_size


def target_shape(
    teacher: Loaded | None, settings: StepConfig, width: int, model, size: Size, batch: int
):
    """Return the shape of what distillation makes of the teacher's answers to so many images.

    These are as the student's `model` takes them. Where a tape answers for the teacher, what it
    knows are logits, and features of `width`.
    """
    if settings.distill.kind == "none":
        return None
    kind = settings.kind

    def target(params, images):
        if teacher is None:
            logits = jnp.zeros((batch, settings.num_classes))
            return kind.target(Outputs(Heads(logits), jnp.zeros((batch, width))))
        return kind.target(teacher[0].outputs(params, images, kind.features))

    images = jax.ShapeDtypeStruct(input_shape(model, size, batch), np.float32)
    return jax.eval_shape(target, teacher and teacher[1], images)


def targets_of(
    teacher: Loaded | None, settings: StepConfig, spec: TeacherSpec | None, model, size: Size
) -> Callable[[int], Any]:
    """Return the function that gives target_shape for a number of images."""
    width = tape_width(spec)
    return functools.partial(target_shape, teacher, settings, width, model, size)


def init_extras(
    model, size: Size, settings: StepConfig, target: Callable[[int], Any], key
) -> dict[str, Any]:
    """Return the trainable parameters of the kind of distillation; {} for most.

    `target` gives the shape of what is learned of so many images.
    """
    if settings.distill.kind == "none" or not settings.kind.features:
        return {}
    images = jax.ShapeDtypeStruct(input_shape(model, size), np.float32)
    variables = memory.abstract_variables(model, size)

    def answer(variables, images):
        return apply_with_features(model, variables, images, settings.features)[0]

    return settings.kind.init(key, jax.eval_shape(answer, variables, images), target(1))


def extras_shapes(model, size: Size, settings: StepConfig, target: Callable[[int], Any]):
    """Return the shapes of what init_extras returns."""
    init = functools.partial(init_extras, model, size, settings, target)
    return jax.eval_shape(init, jax.random.key(0))


def tape_width(spec: TeacherSpec | None) -> int:
    """Return how wide the features on a tape are that answers for the teacher; 0 without any."""
    if spec is None or spec.answers or not spec.features:
        return 0
    return features_width(to_path(spec.tape_path))
