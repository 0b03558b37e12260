"""The frozen teacher: loaded once, its answer computed inside the student's step."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from deit_jax import config as config_lib
from deit_jax import parts, sharding
from deit_jax import weights as weights_lib
from deit_jax.errors import UserError
from deit_jax.models import vit


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network, and how the student's normalised images become its own.

    `mean` and `std` are the teacher's normalisation, `student_mean` and `student_std` that of the
    images it is handed; `image_size` its resolution, None for theirs. Its parameters travel apart,
    as an argument of the compiled step.
    """

    model: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    student_mean: tuple[float, float, float]
    student_std: tuple[float, float, float]
    image_size: int | None = None

    def logits(self, params, images: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Return the fused logits of the student's images."""
        if (self.mean, self.std) != (self.student_mean, self.student_std):
            pixels = images * jnp.array(self.student_std) + jnp.array(self.student_mean)
            images = (pixels - jnp.array(self.mean)) / jnp.array(self.std)
        if self.image_size not in (None, images.shape[1]):
            shape = (images.shape[0], self.image_size, self.image_size, images.shape[3])
            images = jax.image.resize(images, shape, "cubic")
        return self.model.apply({"params": params}, images, train=False).fused()

    def signal(
        self, params, images: Float[Array, "B H W C"], kind: str
    ) -> Int[Array, "B"] | Float[Array, "B K"]:
        """Return what distillation needs: labels for "hard" (only they are kept), else logits."""
        logits = jax.lax.stop_gradient(self.logits(params, images))
        return jnp.argmax(logits, axis=-1) if kind == "hard" else logits


def weights_path(config, workdir: str | Path) -> str:
    """Return where a run's teacher is: as configured, or trained by the run; "" without one."""
    if config.distill.kind == "none":
        return ""
    # A run older than the field has no tape. One that replays a tape trains no teacher.
    if "tape" in config.teacher and config.teacher.tape == "replay":
        return config.teacher.weights
    return config.teacher.weights or str(Path(workdir) / "teacher")


def teacher_config(config: ConfigDict) -> ConfigDict:
    """Return the config that trains `config.teacher.model` on the student's data."""
    c = config.copy_and_resolve_references()
    c.model = c.teacher.model
    c.model.image_size = config_lib.image_size(config.model)
    c.epochs, c.optim.lr = c.teacher.epochs, c.teacher.lr
    c.optim.ema_decay = 0.0
    c.distill.kind, c.teacher.tape = "none", "off"
    c.init.weights, c.init.required = "", False
    return c


def check_teacher(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError, before anything is trained, if `config.teacher` cannot be."""
    if config.distill.kind == "none":
        return
    config_lib.build_model(config.teacher.model, 2, of="teacher.")
    if config.teacher.weights or config.teacher.tape == "replay":
        return
    own = teacher_config(config)
    config_lib.validate(own, num_devices)
    parts.micro_batches(own, sharding.make_mesh(own.mesh))  # raises if no image fits
    model = config_lib.build_model(own.model, 2, of="teacher.")
    size, given = own.model.image_size, config.teacher.model.image_size
    for key, value, fixed in (
        ("teacher.model.image_size", given, True),
        ("teacher.image_size", config.teacher.image_size, isinstance(model, vit.VisionTransformer)),
    ):
        if value not in (None, size) and fixed:
            raise UserError(
                f"config.{key}={value}: a teacher that is trained first is trained on the "
                f"student's images, of {size} pixels; leave it out, or give config.teacher.weights"
            )


def random_teacher(config, num_classes: int) -> tuple[Teacher, Any] | None:
    """Return what load_teacher would, with random weights, None if there is nothing to distil.

    It is as fast as a trained one, and as large.
    """
    if config.distill.kind == "none":
        return None
    data, size = config.data, config.teacher.image_size or config_lib.image_size(config.model)
    dtype = config_lib.compute_dtype(config.dtype)
    model = config_lib.build_model(config.teacher.model, num_classes, config.dtype)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    model, params = weights_lib.folded(model, variables)
    return Teacher(model, data.mean, data.std, data.mean, data.std, size), _cast(params, dtype)


def _cast(params, dtype):
    """Return parameters of another dtype, made by one program instead of one for each shape."""
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))(params)


def load_teacher(config, weights: str, classes: list[str]) -> tuple[Teacher, Any]:
    """Return the teacher in any kind of weights and its parameters, batch norm folded into them.

    `config.teacher.model` is its model if the weights do not say it. Raise UserError unless it
    knows the same number of classes and takes the student's images.
    """
    try:
        opened = weights_lib.open_model(weights, default=config.teacher.model, dtype=config.dtype)
    except UserError as error:
        if weights != config.teacher.weights:
            raise
        raise UserError(f"config.teacher.weights={weights}: {error}") from error
    if len(opened.classes) != len(classes):
        raise UserError(
            f"config.teacher.weights={weights}: the teacher knows {len(opened.classes)} classes, "
            f"{config.data.source} has {len(classes)}; train a teacher on this data set"
        )
    size = config.teacher.image_size or config_lib.image_size(config.model)
    if getattr(opened.model, "image_size", size) != size:
        raise UserError(
            f"config.teacher.weights={weights}: the teacher takes {opened.image_size} px images, "
            f"not {size}; resize them for it with --config.teacher.image_size={opened.image_size}"
        )
    model, params = weights_lib.folded(opened.model, opened.variables)
    if hasattr(model, "attention") and config.teacher.model.attention:
        model = model.clone(attention=config.teacher.model.attention)
    params, data = _cast(params, config_lib.compute_dtype(config.dtype)), config.data
    return Teacher(model, opened.mean, opened.std, data.mean, data.std, size), params
