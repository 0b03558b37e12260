"""Soft distillation: the teacher's probabilities at a temperature (DeiT eq. 2)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deit_jax.step.distill.base import Distillation, Layout, Outputs, TapeForm

LOWEST = -6e4  # of a logarithm that float16 holds


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


def _target(outputs: Outputs) -> Float[Array, "B K"]:
    return outputs.heads.fused()


def _loss(outputs: Outputs, target, settings, extras) -> Float[Array, ""]:
    return soft_distillation(outputs.heads.taught, target, settings.tau, settings.reduction)


def _arrays(layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    label = np.dtype(np.int16 if layout.num_classes <= 2**15 else np.int32)
    rows, half = (layout.batch_size,), np.dtype(np.float16)
    top = (*rows, layout.top_k)
    return {"indices": (label, top), "logits": (half, top), "rest": (half, rows)}


def _pack(target: Float[Array, "B K"], layout: Layout) -> dict[str, Array]:
    """Keep the largest log-probabilities, and of all others' probability the logarithm."""
    logs = jax.nn.log_softmax(target.astype(jnp.float32))
    top, indices = jax.lax.top_k(logs, layout.top_k)
    kept = jnp.zeros(logs.shape, bool).at[jnp.arange(len(logs))[:, None], indices].set(True)
    rest = jax.nn.logsumexp(jnp.where(kept, -jnp.inf, logs), axis=-1)
    parts = {"indices": indices, "logits": jnp.maximum(top, LOWEST)}
    parts["rest"] = jnp.maximum(rest, LOWEST)
    return {name: part.astype(_arrays(layout)[name][0]) for name, part in parts.items()}


def _unpack(parts, layout: Layout) -> Float[np.ndarray, "b K"]:
    """Return logits whose softmax is what the tape knows.

    The classes that were not kept share the rest of the probability evenly.
    """
    others = max(1, layout.num_classes - layout.top_k)
    even = parts["rest"].astype(np.float32) - np.float32(np.log(others))
    logits = np.repeat(even[:, None], layout.num_classes, axis=1)
    indices = parts["indices"].astype(np.int64)
    np.put_along_axis(logits, indices, parts["logits"].astype(np.float32), axis=1)
    return logits


def soft_distillation_of_each(
    logits: Float[Array, "B K"], teacher_logits: Float[Array, "B K"], tau: float
) -> Float[Array, ""]:
    """Return tau^2 KL(teacher || student) of each class's sigmoid at temperature `tau`.

    The mean over examples and classes, as the binary loss of labels is.
    """
    logs = [
        (jax.nn.log_sigmoid(x / tau), jax.nn.log_sigmoid(-x / tau))
        for x in (teacher_logits, logits)
    ]
    (yes, no), (said_yes, said_no) = logs
    divergence = jnp.exp(yes) * (yes - said_yes) + jnp.exp(no) * (no - said_no)
    return jnp.mean(divergence) * tau**2


def _loss_of_each(outputs: Outputs, target, settings, extras) -> Float[Array, ""]:
    return soft_distillation_of_each(outputs.heads.taught, target, settings.tau)


SOFT = Distillation(
    target=_target,
    loss=_loss,
    tape=TapeForm(exact=False, arrays=_arrays, pack=_pack, unpack=_unpack, keeps=min),
    several=Distillation(target=_target, loss=_loss_of_each),
)
