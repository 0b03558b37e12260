"""Cross-entropies of labels. All are float32 means over the batch."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def smooth_one_hot(
    labels: Int[Array, "*b"], num_classes: int, smoothing: float
) -> Float[Array, "*b K"]:
    """Return one-hot targets that give `smoothing` of the mass evenly to all classes."""
    off = smoothing / num_classes
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + off


def cross_entropy(logits: Float[Array, "B K"], targets: Float[Array, "B K"]) -> Float[Array, ""]:
    """Return the mean cross-entropy with target distributions (SoftTargetCrossEntropy in timm)."""
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


def binary_cross_entropy(
    logits: Float[Array, "B K"], targets: Float[Array, "B K"]
) -> Float[Array, ""]:
    """Return the mean over examples and classes of a sigmoid's loss, as DeiT III trains.

    Every class with a share in the (mixed) target is fully one: the reference's `targets.gt(0.0)`.
    """
    present = (targets > 0.0).astype(logits.dtype)
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits, present))


LABEL_LOSSES = {"softmax": cross_entropy, "binary": binary_cross_entropy}
