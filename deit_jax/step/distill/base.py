"""Distillation: the parts of a kind, and what a teacher and a student hand to it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Shaped

from deit_jax.models.heads import Heads


class Outputs(NamedTuple):
    """What a network says of images: its logits and, if a kind asks for them, its features.

    A teacher's are what its head is given, a student's what `distill.student_features` says.
    """

    heads: Heads
    features: Float[Array, "B D"] | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The size of a label tape's steps; `top_k` is the number of classes kept where not all are.

    `several` says that it is of images with several labels; `width` is that of features.
    """

    kind: str
    batch_size: int
    num_classes: int
    top_k: int
    several: bool = False
    width: int = 0


@dataclasses.dataclass(frozen=True)
class TapeForm:
    """How targets lie on a label tape.

    `arrays` gives each array's dtype and shape in one step, `pack` makes them of a target on the
    device, `unpack` the target of them, for some rows, in numpy. With `exact` it is the very same.
    `keeps` is how many of so many classes a tape keeps if it is asked for top_k of them.
    """

    exact: bool
    arrays: Callable[[Layout], dict[str, tuple[np.dtype, tuple[int, ...]]]]
    pack: Callable[[Any, Layout], dict[str, Array]]
    unpack: Callable[[dict[str, Shaped[np.ndarray, "b ..."]], Layout], Any]
    keeps: Callable[[int, int], int]


def no_extras(key, student: Outputs, target) -> dict[str, Any]:
    """Return the trainable parameters of a kind that has none."""
    return {}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """One kind of distillation; step/objective.py lists them.

    `target` makes of the teacher's outputs what is learned, of one example from that example alone;
    `loss` compares the student's outputs with it, under `config.distill` and the parameters that
    `init` made of the shapes of both (a projection, say: trained with the student, in its state
    under "distill", and left out of what is exported). `features` asks for features besides logits.
    Without a `tape` form a kind cannot be recorded. `several` is the same kind where images have
    several labels, whose teacher answers each class by itself; None where there is none. `classes`
    says whether the teacher must know the data's classes. A kind that is made of several has no
    loss of its own but `parts`, and a dict of their targets by the same names.
    """

    target: Callable[[Outputs], Any]
    loss: Callable[[Outputs, Array, Any, dict[str, Any]], Array] | None = None
    tape: TapeForm | None = None
    features: bool = False
    init: Callable[[Any, Outputs, Any], dict[str, Any]] = no_extras
    several: "Distillation | None" = None
    classes: bool = True
    parts: Mapping[str, "Distillation"] = dataclasses.field(default_factory=dict)

    def terms(self, outputs: Outputs, target, settings, extras: dict[str, Any]) -> dict[str, Array]:
        """Return the terms of the loss: "teacher", or those of the parts."""
        if self.loss is not None:
            return {"teacher": self.loss(outputs, target, settings, extras)}
        return {
            name: part.terms(outputs, target[name], settings, extras)["teacher"]
            for name, part in self.parts.items()
        }
