"""The teacher that a config names: what is known of it without its weights, and with them."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from deit_jax.errors import UserError
from deit_jax.models.build import build_model, compute_dtype, for_counting, image_size
from deit_jax.step.teacher import Teacher
from deit_jax.weights.fit import in_order
from deit_jax.weights.load import folded, open_model

log = logging.getLogger("deit_jax")


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """What a config says of its teacher.

    `weights` are as configured, "" where the teacher is trained first; `image_size` is that of the
    images that it is shown; `student_mean` and `student_std` normalise those it is handed;
    `several` says that images have several labels.
    """

    model_config: ConfigDict
    weights: str
    image_size: int
    student_mean: tuple[float, float, float]
    student_std: tuple[float, float, float]
    dtype: str
    tape: str
    source: str
    several: bool = False

    def build(self, num_classes: int):
        """Return the model as the config knows it, with its batch norm folded."""
        model = build_model(self.model_config, num_classes, self.dtype)
        return model.clone(folded=True) if hasattr(model, "folded") else model

    def as_student_sees(self, model) -> Teacher:
        """Return a teacher that is normalised as the student is."""
        convention = (self.student_mean, self.student_std)
        return Teacher(model, *convention, *convention, self.image_size)

    @property
    def answers(self) -> bool:
        """Whether the teacher itself is asked, and not its tape."""
        return self.tape != "replay"

    def weights_path(self, workdir: str | Path) -> str:
        """Return where a run's teacher is: as configured, or trained by the run.

        "" for one that a tape answers for: a run that replays trains no teacher.
        """
        if not self.answers:
            return self.weights
        return self.weights or str(Path(workdir) / "teacher")


def teacher_spec(config: ConfigDict) -> TeacherSpec | None:
    """Return what a config, also that of an older run, says of its teacher; None without one."""
    if config.distill.kind == "none":
        return None
    return TeacherSpec(
        model_config=config.teacher.model,
        weights=config.teacher.weights,
        image_size=config.teacher.image_size or image_size(config.model),
        student_mean=config.data.mean,
        student_std=config.data.std,
        dtype=config.dtype,
        # A run older than the field has no tape.
        tape=config.teacher.tape if "tape" in config.teacher else "off",
        source=config.data.source,
        several=config.data.get("multi_label", False),
    )


def teacher_config(config: ConfigDict) -> ConfigDict:
    """Return the config that trains `config.teacher.model` on the student's data."""
    c = config.copy_and_resolve_references()
    c.model = c.teacher.model
    c.model.image_size = image_size(config.model)
    c.epochs, c.optim.lr = c.teacher.epochs, c.teacher.lr
    c.optim.ema_decay = 0.0
    c.distill.kind, c.teacher.tape = "none", "off"
    c.init.weights, c.init.required = "", False
    return c


def load_teacher(spec: TeacherSpec, weights: str, classes: list[str]) -> tuple[Teacher, Any]:
    """Return the teacher in any kind of weights and its parameters, batch norm folded into them.

    `spec.model_config` is its model if the weights do not say it. Its classes are put in the
    order of `classes` by their names. Raise UserError unless they are the same and it takes the
    student's images.
    """
    try:
        opened = open_model(weights, default=spec.model_config, dtype=spec.dtype)
    except UserError as error:
        if weights != spec.weights:
            raise
        raise UserError(f"config.teacher.weights={weights}: {error}") from error
    whose = f"config.teacher.weights={weights}: the teacher"
    opened, note = in_order(opened, classes, whose, spec.source)
    if note:
        log.info(note)
    if opened.multi_label not in (None, spec.several):
        says = "any number of classes" if opened.multi_label else "one class"
        raise UserError(
            f"config.teacher.weights={weights}: the teacher answers {says} an image; take one that "
            f"was trained with data.multi_label={spec.several}, as the student is"
        )
    if getattr(opened.model, "image_size", spec.image_size) != spec.image_size:
        raise UserError(
            f"config.teacher.weights={weights}: the teacher takes {opened.image_size} px images, "
            f"not {spec.image_size}; resize them for it with "
            f"--config.teacher.image_size={opened.image_size}"
        )
    model, params = folded(opened.model, opened.variables)
    if hasattr(model, "attention") and spec.model_config.attention:
        model = model.clone(attention=spec.model_config.attention)
    inputs = (opened.mean, opened.std, spec.student_mean, spec.student_std, spec.image_size)
    return Teacher(model, *inputs), _cast(params, compute_dtype(spec.dtype))


def random_teacher(spec: TeacherSpec | None, num_classes: int) -> tuple[Teacher, Any] | None:
    """Return what load_teacher would, with random weights; None without a teacher to ask.

    It is as fast as a trained one, and as large.
    """
    if spec is None or not spec.answers:
        return None
    size, model = spec.image_size, build_model(spec.model_config, num_classes, spec.dtype)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    model, params = folded(model, variables)
    return spec.as_student_sees(model), _cast(params, compute_dtype(spec.dtype))


def abstract_teacher(spec: TeacherSpec | None, num_classes: int) -> tuple[Teacher, Any] | None:
    """Return a teacher and the shapes of its parameters, without any; None without one to ask."""
    if spec is None or not spec.answers:
        return None
    model, size = spec.build(num_classes), spec.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    # Shapes are asked for without its own attention, which might try cuDNN.
    variables = jax.eval_shape(for_counting(model).init, jax.random.key(0), images)
    dtype = compute_dtype(spec.dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables["params"])
    return spec.as_student_sees(model), params


def _cast(params, dtype):
    """Return parameters of another dtype, made by one program instead of one for each shape."""
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))(params)
