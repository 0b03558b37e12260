"""The objective: the loss of the labels and, with a teacher, the distillation term."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from deit_jax.models.heads import Heads
from deit_jax.step.distill.base import Distillation, Outputs
from deit_jax.step.distill.both import with_features
from deit_jax.step.distill.feature import FEATURE
from deit_jax.step.distill.hard import HARD
from deit_jax.step.distill.soft import SOFT
from deit_jax.step.losses import LABEL_LOSSES

# config.distill.kind, which is one of these or none.
DISTILLATIONS: dict[str, Distillation] = {
    "soft": SOFT,
    "hard": HARD,
    "feature": FEATURE,
    "soft+feature": with_features(SOFT),
    "hard+feature": with_features(HARD),
}


def distillation(kind: str, several: bool) -> Distillation | None:
    """Return a kind of distillation, for images of `several` labels or of one; None without it."""
    known = DISTILLATIONS.get(kind)
    return known.several if known and several else known


def chosen(kind: str, several: bool) -> Distillation:
    """Return `distillation` of a config that was validated."""
    known = distillation(kind, several)
    assert known is not None  # validate has refused the others
    return known


def objective(
    heads: Heads,
    targets: Float[Array, "B K"],
    teacher_target: Any,
    distill,
    label_loss: str = "softmax",
    label_heads: str = "cls",
    features: Array | None = None,
    extras: dict[str, Any] | None = None,
    class_weights: Sequence[float] | None = None,
    several: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return (1 - alpha) label loss of the class head + alpha * teacher's term, and all terms.

    The teacher's term acts on the distillation head or, in a model without one, on the class head
    (rows "usual" and "hard" of DeiT's Table 3). `distill` is the config of that name, or what it
    says at a step; `teacher_target` what its kind makes of the teacher's outputs, None without
    distillation; `label_loss` a name in LABEL_LOSSES. With `label_heads` "both" and no teacher, the
    distillation head learns the labels too, with equal weight: two class tokens (section 5.2).
    `features` and `extras` are for a kind that asks for them; `class_weights` weigh the labels'
    loss alone; `several` says that images have several labels. Targets of no classes (K = 0) are
    those of images without labels: then the teacher's terms are all there is.
    """
    terms = {}
    if targets.shape[-1]:
        terms["label"] = _label_term(
            heads, targets, distill, label_loss, label_heads, class_weights
        )
    if distill.kind == "none":
        return terms["label"], {"loss_label": terms["label"]}
    kind = chosen(distill.kind, several)
    outputs = Outputs(heads, features)
    terms |= kind.terms(outputs, teacher_target, distill, extras or {})
    weights = term_weights(distill, labelled="label" in terms)
    loss = functools.reduce(jnp.add, (weights[name] * term for name, term in terms.items()))
    return loss, {f"loss_{name}": term for name, term in terms.items()}


def _label_term(heads: Heads, targets, distill, label_loss: str, label_heads: str, class_weights):
    label_loss_of = LABEL_LOSSES[label_loss]
    if class_weights is not None:
        weights = jnp.array(class_weights, jnp.float32)
        label_loss_of = functools.partial(label_loss_of, weights=weights)
    label_term = label_loss_of(heads.cls, targets)
    if distill.kind == "none" and label_heads == "both" and heads.dist is not None:
        return (label_term + label_loss_of(heads.dist, targets)) / 2
    return label_term


def term_weights(distill, labelled: bool = True) -> dict[str, Any]:
    """Return the weight of each term of the loss: alpha shares it out, unless they are given.

    Without labels the teacher's term counts whole.
    """
    label, teacher = distill.label_weight, distill.teacher_weight
    of_teacher = distill.alpha if labelled else 1.0
    return {
        "label": 1.0 - distill.alpha if label is None else label,
        "teacher": of_teacher if teacher is None else teacher,
        "feature": distill.feature_weight,
    }
