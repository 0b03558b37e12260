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
from deit_jax.shapes import Size, input_shape, per_channel, simplest, text
from deit_jax.step.teacher import Teacher
from deit_jax.weights.fit import in_order
from deit_jax.weights.load import folded, open_model
from deit_jax.workdir.which import LATEST

log = logging.getLogger("deit_jax")


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """What a config says of its teacher.

    `weights` are as configured, "" where the teacher is trained first; `image_size` and `channels`
    are those of the images that it is shown; `student_mean` and `student_std` normalise those it is
    handed; `several` says that images have several labels.
    """

    model_config: ConfigDict
    weights: str
    image_size: Size
    channels: int
    student_mean: tuple[float, ...]
    student_std: tuple[float, ...]
    dtype: str
    tape: str
    source: str
    several: bool = False
    checkpoint: str | int = LATEST  # of a run's weights
    ema: bool = False  # whether it is their moving average

    def build(self, num_classes: int):
        """Return the model as the config knows it, with its batch norm folded."""
        model = build_model(self.model_config, num_classes, self.dtype, "teacher.", self.channels)
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
        image_size=simplest(config.teacher.image_size or image_size(config.model)),
        channels=config.data.channels,
        student_mean=per_channel(config.data.mean, config.data.channels),
        student_std=per_channel(config.data.std, config.data.channels),
        dtype=config.dtype,
        tape=config.teacher.tape,
        source=config.data.source,
        several=config.data.multi_label,
        checkpoint=config.teacher.checkpoint,
        ema=config.teacher.ema,
    )


def teacher_config(config: ConfigDict) -> ConfigDict:
    """Return the config that trains `config.teacher.model` on the student's data."""
    c = config.copy_and_resolve_references()
    c.model = c.teacher.model
    with c.ignore_type():  # of a config read back, None and a number have types of their own
        c.model.image_size = image_size(config.model)
    c.epochs, c.optim.lr = c.teacher.epochs, c.teacher.lr
    c.optim.ema_decay = 0.0
    c.optim.tune, c.optim.freeze = "all", ""  # the student's alone
    c.optim.layer_decay, c.optim.lr_multipliers = 1.0, ""
    c.distill.kind, c.teacher.tape = "none", "off"
    c.init.weights, c.init.required = "", False
    c.init.checkpoint, c.init.ema = LATEST, False
    c.teacher.checkpoint, c.teacher.ema = LATEST, False
    c.train.patience_epochs = 0.0
    return c


def load_teacher(spec: TeacherSpec, weights: str, classes: list[str]) -> tuple[Teacher, Any]:
    """Return the teacher in any kind of weights and its parameters, batch norm folded into them.

    `spec.model_config` is its model if the weights do not say it. Its classes are put in the
    order of `classes` by their names. Raise UserError unless they are the same and it takes the
    student's images.
    """
    try:
        known = {"default": spec.model_config, "dtype": spec.dtype}
        opened = open_model(weights, **known, checkpoint=spec.checkpoint, ema=spec.ema)
    except UserError as error:
        if weights != spec.weights:
            raise
        reason = str(error).removeprefix(f"{weights}: ")
        raise UserError(f"config.teacher.weights={weights}: {reason}") from error
    opened.tell()
    taken = getattr(opened.model, "in_channels", 3)
    if taken != spec.channels:
        raise UserError(
            f"config.teacher.weights={weights}: the teacher takes images of {taken} channels, and "
            f"config.data.channels={spec.channels}; take a teacher of the same images"
        )
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
    try:
        opened.check_convention()
    except ValueError as error:
        reason = str(error).removeprefix(f"{weights}: ")
        raise UserError(f"config.teacher.weights={weights}: {reason}") from error
    if getattr(opened.model, "image_size", spec.image_size) != spec.image_size:
        raise UserError(
            f"config.teacher.weights={weights}: the teacher takes {text(opened.image_size)} px "
            f"images, not {text(spec.image_size)}; resize them for it with "
            f"--config.teacher.image_size={_as_flag(opened.image_size)}"
        )
    model, params = folded(opened.model, opened.variables)
    if hasattr(model, "attention") and spec.model_config.attention:
        model = model.clone(attention=spec.model_config.attention)
    inputs = (opened.mean, opened.std, spec.student_mean, spec.student_std, spec.image_size)
    return Teacher(model, *inputs), _cast(params, compute_dtype(spec.dtype))


def _as_flag(size: Size) -> str:
    return str(size) if isinstance(size, int) else f"'({size[0]},{size[1]})'"


def random_teacher(spec: TeacherSpec | None, num_classes: int) -> tuple[Teacher, Any] | None:
    """Return what load_teacher would, with random weights; None without a teacher to ask.

    It is as fast as a trained one, and as large.
    """
    if spec is None or not spec.answers:
        return None
    model = build_model(spec.model_config, num_classes, spec.dtype, "teacher.", spec.channels)
    images = jnp.zeros(input_shape(model, spec.image_size))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    model, params = folded(model, variables)
    return spec.as_student_sees(model), _cast(params, compute_dtype(spec.dtype))


def abstract_teacher(spec: TeacherSpec | None, num_classes: int) -> tuple[Teacher, Any] | None:
    """Return a teacher and the shapes of its parameters, without any; None without one to ask."""
    if spec is None or not spec.answers:
        return None
    model = spec.build(num_classes)
    images = jax.ShapeDtypeStruct(input_shape(model, spec.image_size), jnp.float32)
    # Shapes are asked for without its own attention, which might try cuDNN.
    variables = jax.eval_shape(for_counting(model).init, jax.random.key(0), images)
    dtype = compute_dtype(spec.dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables["params"])
    return spec.as_student_sees(model), params


def _cast(params, dtype):
    """Return parameters of another dtype, made by one program instead of one for each shape."""
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))(params)
