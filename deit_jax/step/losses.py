"""Cross-entropies of labels. All are float32 means over the batch.

`weights`, one a class, are those of torch's CrossEntropyLoss (with probabilities as targets, whose
mean is over examples) and BCEWithLogitsLoss; None weighs all alike.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def smooth_one_hot(
    labels: Int[Array, "*b"], num_classes: int, smoothing: float
) -> Float[Array, "*b K"]:
    """Return one-hot targets that give `smoothing` of the mass evenly to all classes."""
    off = smoothing / max(1, num_classes)  # images without labels have none
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + off


def cross_entropy(
    logits: Float[Array, "B K"],
    targets: Float[Array, "B K"],
    weights: Float[Array, "K"] | None = None,
) -> Float[Array, ""]:
    """Return the mean cross-entropy with target distributions (SoftTargetCrossEntropy in timm)."""
    if weights is not None:
        targets = weights * targets
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


def binary_cross_entropy(
    logits: Float[Array, "B K"],
    targets: Float[Array, "B K"],
    weights: Float[Array, "K"] | None = None,
) -> Float[Array, ""]:
    """Return the mean over examples and classes of a sigmoid's loss, as DeiT III trains.

    Every class with a share in the (mixed) target is fully one: the reference's `targets.gt(0.0)`.
    """
    present = (targets > 0.0).astype(logits.dtype)
    losses = optax.losses.sigmoid_binary_cross_entropy(logits, present)
    return jnp.mean(losses if weights is None else weights * losses)


LABEL_LOSSES = {"softmax": cross_entropy, "binary": binary_cross_entropy}
