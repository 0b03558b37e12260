"""Cross-entropies and the two kinds of distillation. All are float32 means over the batch."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from deit_jax.models.heads import Heads


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


def hard_distillation(
    logits: Float[Array, "B K"], teacher_labels: Int[Array, "B"]
) -> Float[Array, ""]:
    """Return the cross-entropy with the teacher's argmax, not smoothed (DeiT eq. 3)."""
    return cross_entropy(logits, jax.nn.one_hot(teacher_labels, logits.shape[-1]))


def soft_distillation(
    logits: Float[Array, "B K"],
    teacher_logits: Float[Array, "B K"],
    tau: float,
    reduction: str = "batchmean",
) -> Float[Array, ""]:
    """Return tau^2 KL(teacher || student) at temperature `tau` (DeiT eq. 2).

    `reduction` is "batchmean", the divergence of the formula averaged over examples, or "numel",
    the reference code's sum / (B K), which is smaller by the number of classes.
    """
    student = jax.nn.log_softmax(logits / tau)
    teacher = jax.nn.log_softmax(teacher_logits / tau)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student)) * tau**2
    return divergence / (logits.shape[0] if reduction == "batchmean" else logits.size)


def distillation(
    heads: Heads,
    targets: Float[Array, "B K"],
    teacher_signal: Float[Array, "B K"] | Int[Array, "B"] | None,
    distill,
    label_loss: str = "softmax",
    label_heads: str = "cls",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return (1 - alpha) label loss of the class head + alpha * teacher's term, and both terms.

    The teacher's term acts on the distillation head or, in a model without one, on the class head
    (rows "usual" and "hard" of DeiT's Table 3). `distill` is the config of that name;
    `teacher_signal` the teacher's labels for hard, its logits for soft, None without distillation;
    `label_loss` is "softmax" or "binary". With `label_heads` "both" and no teacher, the
    distillation head learns the labels too, with equal weight: two class tokens (section 5.2).
    """
    label_term = LABEL_LOSSES[label_loss](heads.cls, targets)
    if distill.kind == "none":
        if label_heads == "both" and heads.dist is not None:
            label_term = (label_term + LABEL_LOSSES[label_loss](heads.dist, targets)) / 2
        return label_term, {"loss_label": label_term}
    logits = heads.cls if heads.dist is None else heads.dist
    if distill.kind == "hard":
        teacher_term = hard_distillation(logits, teacher_signal)
    else:
        teacher_term = soft_distillation(logits, teacher_signal, distill.tau, distill.reduction)
    loss = (1.0 - distill.alpha) * label_term + distill.alpha * teacher_term
    return loss, {"loss_label": label_term, "loss_teacher": teacher_term}
