"""Floating-point operations of a model and of its training, counted from the traced program."""

import jax
import numpy as np

from deit_jax.models.build import for_counting
from deit_jax.models.operations import multiply_accumulates
from deit_jax.shapes import Size, input_shape, sides
from deit_jax.step.committee import Committee
from deit_jax.step.teacher import Foreign
from deit_jax.train.experiment import Experiment


def flops_per_image(experiment: Experiment) -> float:
    """Return the floating-point operations that one training example takes.

    6 per multiply-accumulate of the student (2 forward, 4 backward), 2 of the frozen teacher;
    recomputation is not counted. A label tape takes the teacher's place for nothing.
    """
    student = 3 * forward_flops(experiment.model, experiment.image_size)
    return student + teacher_flops_per_image(experiment)


def teacher_flops_per_image(experiment: Experiment) -> float:
    """Return the teacher's operations for one training example, 0 without one that is asked."""
    known = experiment.abstract_teacher()
    if known is None:
        return 0.0
    teacher, params = known
    if not isinstance(teacher, Committee):
        teacher, params = Committee((teacher,), (1.0,)), (params,)
    each = zip(teacher.members, params, strict=True)
    return sum(_of_frozen(member, own, experiment.image_size) for member, own in each)


def _of_frozen(teacher, params, size: Size) -> float:
    model, size = teacher.model, teacher.image_size or size
    if not isinstance(model, Foreign):
        return forward_flops(model, size)
    if model.macs is not None:
        return 2.0 * model.macs
    images = jax.ShapeDtypeStruct((1, *sides(size), len(teacher.mean)), np.float32)
    return 2.0 * multiply_accumulates(jax.make_jaxpr(model.outputs)(params, images).jaxpr)


def forward_flops(model, size: Size) -> float:
    """Return the floating-point operations of a model's answer to one image of `size` pixels.

    Those of its products and convolutions, 2 per multiply-accumulate, as timm counts them.
    """
    # Not by Lowered.cost_analysis(), which is None behind a plugin: on every GPU and TPU.
    model = for_counting(model)
    images = jax.ShapeDtypeStruct(input_shape(model, size), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    traced = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    return 2.0 * multiply_accumulates(traced.jaxpr)
