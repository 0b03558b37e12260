"""How many floating-point operations a model and its training take."""

import jax
import numpy as np

from deit_jax import config as config_lib


def flops_per_image(config, num_classes: int) -> float:
    """Return the floating-point operations that one training example takes.

    6 per multiply-accumulate of the student (2 forward, 4 backward), 2 of the frozen teacher;
    recomputation is not counted. A label tape takes the teacher's place for nothing.
    """
    size = config_lib.image_size(config.model)
    flops = 3 * forward_flops(config.model, num_classes, size)
    if config.distill.kind != "none" and config.teacher.tape != "replay":
        size = config.teacher.image_size or size
        flops += forward_flops(config.teacher.model, num_classes, size)
    return flops


def forward_flops(model_config, num_classes: int, size: int) -> float:
    """Return the floating-point operations of a model's answer to one image of `size` pixels."""
    model = config_lib.build_model(model_config, num_classes)
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, images)
    return lowered.cost_analysis()["flops"]
