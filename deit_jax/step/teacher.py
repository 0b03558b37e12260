"""The frozen teacher, whose answer is computed inside the student's step."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deit_jax.models.heads import Heads
from deit_jax.step.distill.base import Outputs

_WEIGHTS: contextvars.ContextVar[Callable] = contextvars.ContextVar("weights", default=lambda x: x)


@contextlib.contextmanager
def foreign_weights(function: Callable[[Any], Any]) -> Iterator[None]:
    """Let the weights of every Foreign, while a program is traced, go through `function` first."""
    token = _WEIGHTS.set(function)
    try:
        yield
    finally:
        _WEIGHTS.reset(token)


@runtime_checkable
class Teaches(Protocol):
    """What a step asks: one teacher, or several together (committee.py)."""

    def outputs(self, params, images, features: bool = False) -> Outputs:
        """Return what is said of the student's images, pooled features if asked."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Foreign:
    """A network that is no Flax model, but a pure function of parameters and images.

    It returns logits [B K], or {"logits", "features"} of which either may be missing. `macs` are
    its multiply-accumulates of one image and `image_bytes` what one image takes of a device's
    memory, where tracing the function cannot tell, else None. `program` tells it from others.
    """

    function: Callable[[Any, Any], Any]
    name: str
    macs: int | None = None
    image_bytes: int | None = None
    program: str = ""

    def outputs(self, params, images: Float[Array, "B H W C"]) -> Outputs:
        """Return what it says of images of its own normalisation and size."""
        said = self.function(_WEIGHTS.get()(params), images)
        said = said if isinstance(said, dict) else {"logits": said}
        logits, features = said.get("logits"), said.get("features")
        logits = jnp.zeros((len(images), 0)) if logits is None else logits
        return Outputs(
            Heads(logits.astype(jnp.float32)),
            None if features is None else features.astype(jnp.float32),
        )


@dataclasses.dataclass(frozen=True)
class FrozenTeacher:
    """A frozen network, and how the student's normalised images become its own.

    `model` is a Flax module or Foreign. `mean` and `std` are the teacher's normalisation,
    `student_mean` and `student_std` that of the images it is handed; `image_size` its resolution, a
    side or (height, width), None for theirs. `columns` are the numbers of its classes that are
    asked for, in the order of the data's, None for all as they are; without `answers` its classes
    are others than the data's, and its features alone are of use.
    Its parameters travel apart, as an argument of the compiled step.
    """

    model: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    student_mean: tuple[float, ...]
    student_std: tuple[float, ...]
    image_size: int | tuple[int, int] | None = None
    columns: tuple[int, ...] | None = None
    answers: bool = True

    def outputs(self, params, images: Float[Array, "B H W C"], features: bool = False) -> Outputs:
        """Return what the teacher says of the student's images, its pooled features if asked."""
        images = self.shown(images)
        if isinstance(self.model, Foreign):
            outputs = self.model.outputs(params, images)
        else:
            outputs = _of_flax(self.model, {"params": params}, images, features)
        if self.columns is None:
            return outputs
        # What is left out here has no part in a softmax: as if it were masked.
        logits = outputs.heads.fused()[:, jnp.array(self.columns)]
        return outputs._replace(heads=Heads(logits))

    def shown(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        """Return the student's images as the teacher takes them."""
        if (self.mean, self.std) != (self.student_mean, self.student_std):
            pixels = images * jnp.array(self.student_std) + jnp.array(self.student_mean)
            images = (pixels - jnp.array(self.mean)) / jnp.array(self.std)
        size = self.image_size or images.shape[1:3]
        height, width = (size, size) if isinstance(size, int) else size
        if (height, width) != images.shape[1:3]:
            shape = (images.shape[0], height, width, images.shape[3])
            images = jax.image.resize(images, shape, "cubic")
        return images

    def logits(self, params, images: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Return the fused logits of the student's images."""
        return self.outputs(params, images).heads.fused()


def _of_flax(model, variables, images, features: bool) -> Outputs:
    heads = model.apply(variables, images, train=False)
    if not features:
        return Outputs(heads)
    # What the heads are given. XLA merges the two passes, which differ in their last layer alone.
    headless = model.clone(num_classes=0)
    return Outputs(heads, headless.apply(variables, images, train=False).fused())


def apply_with_features(
    model, variables, images, features: str = "", mutable: tuple[str, ...] = (), **options
) -> tuple[Outputs, dict[str, Any]]:
    """Return a student's outputs, with its pooled `features` if asked, and new variables.

    `features` is `distill.student_features`, "" for none: of a model with a method `pool` (a
    transformer) that decides; others have the mean of their `feature_layer`. `options` are those of
    model.apply, train=False unless they say otherwise.
    """
    options = {"train": False, **options}
    if not features:
        said = model.apply(variables, images, mutable=list(mutable) or False, **options)
        heads, changed = said if mutable else (said, {})
        return Outputs(heads), changed
    heads, changed = model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: module.name == model.feature_layer,
        mutable=[*mutable, "intermediates"],
        **options,
    )
    caught = changed["intermediates"][model.feature_layer]["__call__"][0]
    pooled = _pooled(model, variables["params"], caught, features)
    return Outputs(heads, pooled), {k: v for k, v in changed.items() if k != "intermediates"}


def _pooled(model, params, caught, which: str) -> Float[Array, "B D"]:
    """Return a vector an image of what left the last layer, by `pool` or as the mean of it."""
    if hasattr(model, "pool"):
        return model.pool(params, caught, which)
    return caught.astype(jnp.float32).mean(tuple(range(1, caught.ndim - 1)))
