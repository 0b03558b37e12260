"""What a config says of its teacher, before any of its weights are read."""

import dataclasses
import math
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from deit_jax.errors import UserError
from deit_jax.models.build import build_model, image_size
from deit_jax.shapes import Size, per_channel, simplest
from deit_jax.step.objective import chosen, distillation
from deit_jax.step.teacher import FrozenTeacher
from deit_jax.storage import exists, to_path
from deit_jax.workdir.which import LATEST

# Fields of config.distill that say nothing to some kinds, and what they are where nobody asks.
UNSET = {
    "label_weight": None,
    "teacher_weight": None,
    "feature_weight": 1.0,
    "feature_loss": "cosine",
    "student_features": "token",
    "schedule": "",
}


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """What a config says of its teacher, or of several.

    `weights` are as configured, "" where the teacher is trained first; `image_size` and `channels`
    are those of the images that it is shown, `given_size` what the config says of the former, None
    for nothing; `student_mean` and `student_std` normalise those it is handed; `several` says that
    images have several labels, `classes` and `features` what distillation asks for. Of several
    teachers each counts as much as its one of `shares`, which sum to one, by logits or `votes`.
    `made` keeps those that were converted to know their shapes, until their numbers are asked for.
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
    given_size: Size | None = None
    classes: bool = True
    features: bool = False
    shares: tuple[float, ...] = (1.0,)
    votes: bool = False
    tape_path: str = ""
    made: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def build(self, num_classes: int):
        """Return the model as the config knows it, with its batch norm folded."""
        model = build_model(self.model_config, num_classes, self.dtype, "teacher.", self.channels)
        return model.clone(folded=True) if hasattr(model, "folded") else model

    def as_student_sees(self, model) -> FrozenTeacher:
        """Return a teacher that is normalised as the student is."""
        convention = (self.student_mean, self.student_std)
        return FrozenTeacher(model, *convention, *convention, self.image_size, answers=self.classes)

    @property
    def answers(self) -> bool:
        """Whether the teacher itself is asked, and not its tape."""
        return self.tape != "replay"

    def weights_path(self, workdir: str | PurePath) -> str:
        """Return where a run's teacher is: as configured, or trained by the run.

        "" for one that a tape answers for: a run that replays trains no teacher.
        """
        if not self.answers:
            return self.weights
        return self.weights or str(to_path(workdir) / "teacher")


def sources_of(weights: str) -> tuple[str, ...]:
    """Return the teachers that `teacher.weights` names; one whose own name has a comma is one."""
    if "," not in weights or exists(to_path(weights)):
        return (weights,)
    return tuple(part.strip() for part in weights.split(","))


def shares_of(teacher: ConfigDict) -> tuple[float, ...]:
    """Return how much each teacher counts, together one; raise UserError for other numbers."""
    sources, text = sources_of(teacher.weights), teacher.shares
    if not text:
        return (1.0 / len(sources),) * len(sources)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    fine = len(numbers) == len(sources) > 1
    if not fine or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise UserError(
            f"config.teacher.shares={text}: give a positive number for each of the "
            f"{len(sources)} teacher(s) in config.teacher.weights, as in 2,1"
        )
    return tuple(n / sum(numbers) for n in numbers)


def teacher_spec(config: ConfigDict) -> TeacherSpec | None:
    """Return what a config, also that of an older run, says of its teacher; None without one."""
    if config.distill.kind == "none":
        return None
    kind, given = chosen(config.distill.kind, config.data.multi_label), config.teacher.image_size
    return TeacherSpec(
        model_config=config.teacher.model,
        weights=config.teacher.weights,
        image_size=simplest(given or image_size(config.model)),
        channels=config.data.channels,
        student_mean=per_channel(config.data.mean, config.data.channels),
        student_std=per_channel(config.data.std, config.data.channels),
        dtype=config.dtype,
        tape=config.teacher.tape,
        source=config.data.source,
        several=config.data.multi_label,
        checkpoint=config.teacher.checkpoint,
        ema=config.teacher.ema,
        given_size=None if given is None else simplest(given),
        classes=kind.classes,
        features=kind.features,
        shares=shares_of(config.teacher),
        votes=config.teacher.combine == "votes",
        tape_path=config.teacher.tape_path,
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
    ask_no_teacher(c)
    c.init.weights, c.init.required = "", False
    c.init.checkpoint, c.init.ema = LATEST, False
    c.train.patience_epochs = 0.0
    return c


def ask_no_teacher(c: ConfigDict) -> None:
    """Leave distillation out of a config, with all that is said of it and of the teacher."""
    c.distill.kind = "none"
    c.distill.update(UNSET)
    c.teacher.tape, c.teacher.shares, c.teacher.combine = "off", "", "logits"
    c.teacher.checkpoint, c.teacher.ema = LATEST, False


def leave_idle_head(model: ConfigDict, name: str, data: ConfigDict) -> None:
    """Give a `config.model` no distillation head where the kind of a name would not train it.

    Features are compared in the token itself; a head of it would stay random, and spoil the fused
    prediction.
    """
    kind = distillation(name, data.multi_label)
    if kind is None or kind.classes or model.dist_head is not None:
        return
    if getattr(build_model(model, 2, channels=data.channels), "distilled", False):
        with model.ignore_type():
            model.dist_head = False
