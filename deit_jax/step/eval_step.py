"""Answers of a model to images, and the number of those that are right."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from deit_jax.models.heads import Heads
from deit_jax.models.preprocess import normalise
from deit_jax.step.micro_batches import in_parts


def eval_step(variables, batch, *, model, mean, std, parts: int = 1) -> dict[str, Any]:
    """Return for each head how many of the valid examples it has right, in its top 1 and top 5.

    Beside them, under "examples", how many are valid. The images go through the model in so many
    `parts`.
    """

    def heads(images):
        return model.apply(variables, normalise(images, mean, std), train=False)

    counts = count_heads(in_parts(heads, batch["image"], parts), batch["label"], batch["valid"])
    return {**counts, "examples": jnp.sum(batch["valid"])}


def eval_logits(variables, batch, *, model, mean, std, parts: int = 1) -> dict[str, Array]:
    """Return each head's logits [B K] of a batch's images, and its "label" and "valid"."""

    def logits(images):
        return _by_name(model.apply(variables, normalise(images, mean, std), train=False))

    answers = in_parts(logits, batch["image"], parts)
    return {**answers, "label": batch["label"], "valid": batch["valid"]}


def count_answers(answers: dict[str, Array]) -> dict[str, Any]:
    """Return what eval_step does, from the logits that eval_logits returns."""
    labels, valid = answers["label"], answers["valid"]
    heads = {k: x for k, x in answers.items() if k not in ("label", "valid")}
    counts = {name: count_correct(x, labels, valid) for name, x in heads.items()}
    return {**counts, "examples": jnp.sum(valid)}


def all_logits(
    variables, teacher_params, images: UInt8[Array, "B H W C"], *, model, teacher, mean, std
) -> dict[str, Float[Array, "B K"]]:
    """Return the logits of `cls`, `dist` if there is one, `fused`, and a teacher that answers."""
    normalised = normalise(images, mean, std)
    logits = _by_name(model.apply(variables, normalised, train=False))
    if teacher is not None and teacher.answers:
        logits["teacher"] = teacher.logits(teacher_params, normalised).astype(jnp.float32)
    return logits


# What predicts outside of a training's evaluation: compiled once for a model, whoever asks.
jit_logits = jax.jit(all_logits, static_argnames=("model", "teacher", "mean", "std"))


def _by_name(heads: Heads) -> dict[str, Float[Array, "B K"]]:
    logits = {"cls": heads.cls, "dist": heads.dist, "fused": heads.fused()}
    return {name: x for name, x in logits.items() if x is not None}


def count_heads(
    heads: Heads, labels: Int[Array, "B"], valid: Bool[Array, "B"]
) -> dict[str, dict[str, Int[Array, ""]]]:
    """Return {"cls" | "dist" | "fused": {"top1", "top5"}} in numbers of examples."""
    return {name: count_correct(x, labels, valid) for name, x in _by_name(heads).items()}


def count_correct(
    logits: Float[Array, "B K"], labels: Int[Array, "B"], valid: Bool[Array, "B"]
) -> dict[str, Int[Array, ""]]:
    """Return how many valid examples have their label among the 1 and the 5 largest logits.

    Equal logits rank by class number, as argmax does; a logit that is not finite is never right.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
    rank = jnp.where(valid & jnp.isfinite(own[:, 0]), rank, logits.shape[1] + 5)
    return {f"top{k}": jnp.sum(rank < k) for k in (1, 5)}
