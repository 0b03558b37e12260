"""The objective: the loss of the labels and, with a teacher, the distillation term."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from deit_jax.models.heads import Heads
from deit_jax.step.distill.base import Distillation, Outputs
from deit_jax.step.distill.hard import HARD
from deit_jax.step.distill.soft import SOFT
from deit_jax.step.losses import LABEL_LOSSES

# config.distill.kind, which is one of these or none.
DISTILLATIONS: dict[str, Distillation] = {"soft": SOFT, "hard": HARD}


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
    """Return (1 - alpha) label loss of the class head + alpha * teacher's term, and both terms.

    The teacher's term acts on the distillation head or, in a model without one, on the class head
    (rows "usual" and "hard" of DeiT's Table 3). `distill` is the config of that name;
    `teacher_target` what its kind makes of the teacher's outputs, None without distillation;
    `label_loss` a name in LABEL_LOSSES. With `label_heads` "both" and no teacher, the distillation
    head learns the labels too, with equal weight: two class tokens (section 5.2). `features` and
    `extras` are for a kind that asks for them; `class_weights` weigh the labels' loss alone;
    `several` says that images have several labels.
    """
    label_loss_of = LABEL_LOSSES[label_loss]
    if class_weights is not None:
        weights = jnp.array(class_weights, jnp.float32)
        label_loss_of = functools.partial(label_loss_of, weights=weights)
    label_term = label_loss_of(heads.cls, targets)
    if distill.kind == "none":
        if label_heads == "both" and heads.dist is not None:
            label_term = (label_term + label_loss_of(heads.dist, targets)) / 2
        return label_term, {"loss_label": label_term}
    kind = chosen(distill.kind, several)
    teacher_term = kind.loss(Outputs(heads, features), teacher_target, distill, extras or {})
    loss = (1.0 - distill.alpha) * label_term + distill.alpha * teacher_term
    return loss, {"loss_label": label_term, "loss_teacher": teacher_term}
