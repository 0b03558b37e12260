"""Feature distillation: the student's features, projected, shall be the teacher's.

It compares no classes: the teacher may know others, or none (FitNets, arXiv 1412.6550; with a
standardised target, arXiv 2205.14141).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deit_jax.step.distill.base import Distillation, Layout, Outputs, TapeForm

EPS = 1e-6


def standardised(features: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Return every example's features with mean 0 and variance 1: a layer norm, nothing learned."""
    centred = features - features.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPS)


def cosine(student: Float[Array, "B D"], teacher: Float[Array, "B D"]) -> Float[Array, ""]:
    """Return 1 - the cosine of the angle between the two, averaged over examples."""

    def unit(x):
        return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + EPS**2)

    return 1.0 - jnp.mean(jnp.sum(unit(student) * unit(teacher), -1))


def smooth_l1(student: Float[Array, "B D"], teacher: Float[Array, "B D"]) -> Float[Array, ""]:
    """Return the smooth L1 distance (beta = 1) to the teacher's standardised features."""
    distance = jnp.abs(student - standardised(teacher))
    return jnp.mean(jnp.where(distance < 1.0, 0.5 * distance**2, distance - 0.5))


def mse(student: Float[Array, "B D"], teacher: Float[Array, "B D"]) -> Float[Array, ""]:
    """Return the mean squared distance, as timm's FeatureDistillationTask has it."""
    return jnp.mean((student - teacher) ** 2)


FEATURE_LOSSES = {"cosine": cosine, "smooth_l1": smooth_l1, "mse": mse}


def project(extras: dict[str, Any], features: Float[Array, "B d"]) -> Float[Array, "B D"]:
    """Return a student's features in the teacher's space, by the linear layer that is trained."""
    layer = extras["projection"]
    return features @ layer["kernel"] + layer["bias"]


def _target(outputs: Outputs) -> Float[Array, "B D"]:
    assert outputs.features is not None  # who loads the teacher has refused one without
    return outputs.features


def _loss(outputs: Outputs, target, settings, extras) -> Float[Array, ""]:
    assert outputs.features is not None  # `features` below asks for them
    return FEATURE_LOSSES[settings.feature_loss](project(extras, outputs.features), target)


def _init(key, student: Outputs, target) -> dict[str, Any]:
    """Return the projection as PyTorch draws a linear layer."""
    assert student.features is not None
    width, wide = student.features.shape[-1], target.shape[-1]
    of_kernel, of_bias = jax.random.split(key)
    bound = width**-0.5
    kernel = jax.random.uniform(of_kernel, (width, wide), jnp.float32, -bound, bound)
    bias = jax.random.uniform(of_bias, (wide,), jnp.float32, -bound, bound)
    return {"projection": {"kernel": kernel, "bias": bias}}


def _arrays(layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    rows = (layout.batch_size,)
    return {
        "features": (np.dtype(np.float16), (*rows, layout.width)),
        "scales": (np.dtype(np.float32), rows),
    }


def _pack(target: Float[Array, "B D"], layout: Layout) -> dict[str, Array]:
    """Keep features in float16 as parts of the largest of their example, which is beside them."""
    scales = jnp.abs(target).max(-1)
    parts = target / jnp.where(scales > 0, scales, 1.0)[:, None]
    return {"features": parts.astype(jnp.float16), "scales": scales.astype(jnp.float32)}


def _unpack(parts, layout: Layout) -> Float[np.ndarray, "b D"]:
    return parts["features"].astype(np.float32) * parts["scales"][:, None]


def _keeps(top_k: int, num_classes: int) -> int:
    return 1


_ONE = Distillation(
    target=_target,
    loss=_loss,
    tape=TapeForm(exact=False, arrays=_arrays, pack=_pack, unpack=_unpack, keeps=_keeps),
    features=True,
    init=_init,
    classes=False,
)
# Nothing in it depends on how many labels an image has.
FEATURE = dataclasses.replace(_ONE, several=_ONE)
