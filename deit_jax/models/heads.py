"""Heads: the logits that every model returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Heads(NamedTuple):
    """Logits of the class head and, with a distillation token, of the distillation head.

    Of a model without classes the features [B D] that each head would be given.
    """

    cls: Float[Array, "B K"]
    dist: Float[Array, "B K"] | None = None

    def fused(self) -> Float[Array, "B K"]:
        """Return the average of the heads' logits, which the reference evaluates.

        The paper adds the two softmax outputs (section 4); its code averages logits, as here.
        """
        return self.cls if self.dist is None else (self.cls + self.dist) / 2

    @property
    def taught(self) -> Float[Array, "B K"]:
        """The logits that a teacher's term acts on: the distillation head's if there is one."""
        return self.cls if self.dist is None else self.dist
