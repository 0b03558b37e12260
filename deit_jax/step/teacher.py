"""The frozen teacher, whose answer is computed inside the student's step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deit_jax.step.distill.base import Outputs


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network, and how the student's normalised images become its own.

    `mean` and `std` are the teacher's normalisation, `student_mean` and `student_std` that of the
    images it is handed; `image_size` its resolution, a side or (height, width), None for theirs.
    Its parameters travel apart, as an argument of the compiled step.
    """

    model: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    student_mean: tuple[float, ...]
    student_std: tuple[float, ...]
    image_size: int | tuple[int, int] | None = None

    def outputs(self, params, images: Float[Array, "B H W C"], features: bool = False) -> Outputs:
        """Return what the teacher says of the student's images."""
        if (self.mean, self.std) != (self.student_mean, self.student_std):
            pixels = images * jnp.array(self.student_std) + jnp.array(self.student_mean)
            images = (pixels - jnp.array(self.mean)) / jnp.array(self.std)
        size = self.image_size or images.shape[1:3]
        height, width = (size, size) if isinstance(size, int) else size
        if (height, width) != images.shape[1:3]:
            shape = (images.shape[0], height, width, images.shape[3])
            images = jax.image.resize(images, shape, "cubic")
        return apply_with_features(self.model, {"params": params}, images, features)[0]

    def logits(self, params, images: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Return the fused logits of the student's images."""
        return self.outputs(params, images).heads.fused()


def apply_with_features(
    model, variables, images, features: bool = True, mutable: tuple[str, ...] = (), **options
) -> tuple[Outputs, dict[str, Any]]:
    """Return a model's outputs, with the output of its `feature_layer` if asked, and new variables.

    `options` are those of model.apply, train=False unless they say otherwise.
    """
    options = {"train": False, **options}
    if not features:
        found = model.apply(variables, images, mutable=list(mutable) or False, **options)
        heads, changed = found if mutable else (found, {})
        return Outputs(heads), changed
    heads, changed = model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: module.name == model.feature_layer,
        mutable=[*mutable, "intermediates"],
        **options,
    )
    caught = changed["intermediates"][model.feature_layer]["__call__"][0]
    return Outputs(heads, caught), {k: v for k, v in changed.items() if k != "intermediates"}
