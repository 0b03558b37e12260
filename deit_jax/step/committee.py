"""Several teachers that answer together."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deit_jax.models.heads import Heads
from deit_jax.parallel import sharding
from deit_jax.step.distill.base import Outputs
from deit_jax.step.teacher import FrozenTeacher

TIE = 1e-4  # of all votes: what the averaged probabilities add to them


@dataclasses.dataclass(frozen=True)
class Committee:
    """Teachers, each in its own normalisation and resolution, and how much each counts.

    `shares` sum to one. The answer is the weighted mean of their logits or, with `votes`, for each
    class the shares of those whose first choice it is; where these are equal to TIE, the averaged
    probabilities decide. Its parameters are a tuple of theirs.
    """

    members: tuple[FrozenTeacher, ...]
    shares: tuple[float, ...]
    votes: bool = False

    answers = True
    image_size = None  # each has its own

    def outputs(self, params, images: Float[Array, "B H W C"], features: bool = False) -> Outputs:
        """Return what the teachers say together of the student's images; no features."""
        each = [m.logits(p, images) for m, p in zip(self.members, params, strict=True)]
        mean = _weighted(self.shares, each)
        if not self.votes:
            return Outputs(Heads(mean))
        choices = [jax.nn.one_hot(x.argmax(-1), x.shape[-1]) for x in each]
        decided = _weighted(self.shares, choices) + TIE * jax.nn.softmax(mean)
        return Outputs(Heads(decided))

    def logits(self, params, images: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Return the answers of `outputs`."""
        return self.outputs(params, images).heads.fused()


def _weighted(shares, each) -> Float[Array, "B K"]:
    return sum(share * x.astype(jnp.float32) for share, x in zip(shares, each, strict=True))


def shardings(teacher: FrozenTeacher | Committee | None, mesh, params) -> Any:
    """Return where each of a teacher's parameters lives on a mesh; of no teacher, nothing."""
    if isinstance(teacher, Committee):
        each = zip(teacher.members, params, strict=True)
        return tuple(shardings(member, mesh, own) for member, own in each)
    return sharding.state_shardings(mesh, params, getattr(teacher, "model", None))
