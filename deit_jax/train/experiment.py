"""A config, resolved once against its data and its devices: what every command starts from.

Below it nothing reads a whole config: the loop, the plan, the benchmarks and the tapes take an
Experiment, or those of its fields that they need.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from deit_jax.data.batches import Batch, Batches, TrainBatches
from deit_jax.data.class_weights import class_weights
from deit_jax.data.loader import load
from deit_jax.data.order import EpochOrder, whole_steps
from deit_jax.data.sources.base import Dataset
from deit_jax.data.sources.registry import open_dataset
from deit_jax.data.view import reading_of
from deit_jax.errors import UserError
from deit_jax.models.build import build_model, compute_dtype, image_size
from deit_jax.parallel import sharding
from deit_jax.shapes import Size, per_channel
from deit_jax.step.committee import shardings
from deit_jax.step.compile import jit_train_step
from deit_jax.step.optimizer import make_optimizer, make_schedule
from deit_jax.step.schedules import parse_schedule
from deit_jax.step.state import EVERYTHING, Everything, TrainState, init_state
from deit_jax.step.train_step import StepConfig
from deit_jax.train import memory, parts
from deit_jax.train.began import began_rising, resolved_decoder, resolved_rules
from deit_jax.train.finetune import tuning_of
from deit_jax.train.load_teacher import Loaded, abstract_teacher, random_teacher
from deit_jax.train.memory import Load
from deit_jax.train.targets import (
    extras_shapes,
    init_extras,
    shown_size,
    targets_of,
)
from deit_jax.train.teacher_spec import (
    TeacherSpec,
    leave_idle_head,
    teacher_config,
    teacher_spec,
)
from deit_jax.train.validate import check_length, check_teacher, validate


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config means on these devices, for data of so many images and classes.

    `config` itself is only for the workdir to record; `data`, `augment` and `train` are its groups
    of settings of the input and of the loop.
    """

    config: ConfigDict
    data: ConfigDict
    augment: ConfigDict
    train: ConfigDict
    name: str  # of the model
    model: Any
    image_size: Size
    dtype: Any
    num_classes: int
    teacher: TeacherSpec | None
    mesh: Any
    order: EpochOrder
    total_steps: int
    schedule: Callable
    optimizer: Any
    settings: StepConfig
    load: Load

    @property
    def batch_size(self) -> int:
        """Examples per update."""
        return self.order.batch_size

    @functools.cached_property
    def rows(self) -> list[int]:
        """The rows of a batch that this process's devices hold."""
        return sharding.local_rows(self.mesh, self.batch_size)

    def steps_of(self, epochs: float) -> int:
        """Return epochs in steps, at least one."""
        return whole_steps(epochs, self.order.steps_per_epoch)

    def batches(self, dataset: Dataset, rows: Sequence[int] | None = None, seed: int | None = None):
        """Return every training batch by number, or some rows of it; by default this process's.

        `seed` is that of the data after a rollback.
        """
        order = self.order if seed is None else dataclasses.replace(self.order, seed=seed)
        return TrainBatches(
            dataset.train,
            order,
            self.augment,
            self.image_size,
            self.rows if rows is None else rows,
            self.data.decoder,
            self.data.skip_unreadable,
            reading_of(self.data),
        )

    def loaded(self, batches: Batches, start: int, stop: int) -> Generator[Batch, None, None]:
        """Iterate over batches start … stop - 1, loaded ahead as the config says."""
        return load(batches, start, stop, self.data.threads, self.data.prefetch_batches)

    def on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Make global arrays of this process's share of a batch."""
        return sharding.to_devices(batch, self.mesh, self.batch_size)

    def init(self, key) -> TrainState:
        """Return the state before the first step; to be called under jit."""
        return init_state(
            key,
            self.model,
            self.image_size,
            self.optimizer,
            self.settings.ema_decay,
            self._init_extras,
            self.settings.tuning,
        )

    def _init_extras(self, key) -> dict[str, Any]:
        return init_extras(self.model, self.image_size, self.settings, self.load.target, key)

    @functools.cached_property
    def state_shardings(self):
        """Where each array of the state lives."""
        return sharding.state_shardings(self.mesh, self._shapes, self.model)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The state's shapes, with their shardings."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._shapes,
            self.state_shardings,
        )

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self.init, jax.random.key(self.settings.seed))

    def new_state(self) -> TrainState:
        """Return the state before the first step, on the devices."""
        # Built under jit with these shardings, no device ever holds more than its share.
        init = jax.jit(self.init, out_shardings=self.state_shardings)
        return init(jax.random.key(self.settings.seed))

    def unsplit(self) -> list[str]:
        """Return one line for each kind of parameter that an axis of the mesh does not divide."""
        return sharding.unsplit(self.mesh, self._shapes.params, self.model)

    def jit_step(self, teacher, tape=None):
        """Return the training step as a run, a plan and a benchmark compile it."""
        made = (self.model, teacher, self.optimizer, self.settings, self.mesh, self.state_shardings)
        return jit_train_step(*made, tape=tape, deterministic=self.train.deterministic)

    def place_teacher(self, teacher, params):
        """Put a teacher's parameters on the devices, where they are split or copied."""
        return jax.device_put(params, shardings(teacher, self.mesh, params))

    def random_teacher(self) -> Loaded | None:
        """Return a teacher with random weights, None where the step asks none."""
        return random_teacher(self.teacher, self.num_classes)

    def abstract_teacher(self) -> Loaded | None:
        """Return a teacher and the shapes of its parameters, None where the step asks none."""
        return self.load.teacher

    def changed(self, fields: dict[str, Any]) -> "Experiment":
        """Return what the config means with other values of some fields, {"optim.lr": 0.1, …}."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(fields)
        size = (self.num_classes, self.order.num_images)
        return sketch(config, lambda: size, devices=list(self.mesh.devices.flat))

    def explained(self) -> contextlib.AbstractContextManager:
        """Return a context that turns "out of memory" into one line with the fields to change."""
        images = self.load.share // self.settings.micro_batches
        accum_steps = self.config.optim.accum_steps
        return memory.explained("training", memory.advice(self.model, accum_steps, images))


def resolve(
    config: ConfigDict,
    classes: int,
    images: int,
    devices: Sequence | None = None,
    whole: bool = False,
    weights: tuple[float, ...] | None = None,
) -> Experiment:
    """Return what a validated config means for data of so many classes and images.

    `devices` need not be there (`deit plan`); None are those at hand. Raise UserError where nothing
    fits into their memory, unless `whole`, for who compiles no step. `weights`: see settings_of.
    """
    config = config.copy_and_resolve_references()
    leave_idle_head(config.model, config.distill.kind, config.data)
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    order, total_steps = length_of(config, images)
    schedule = make_schedule(config.optim, config.epochs, order.steps_per_epoch)
    model = build_model(config.model, classes, config.dtype, channels=config.data.channels)
    size, spec = image_size(config.model), teacher_spec(config)
    tuning = tuning_of(config.optim, config.init, config.model.name, model, size)
    settings = settings_of(config, classes, mesh, weights, tuning, total_steps)
    teacher = abstract_teacher(spec, classes)
    target = targets_of(teacher, settings, spec, model, size)
    load = Load(
        name=config.model.name,
        mesh=mesh,
        model=model,
        image_size=size,
        batch_size=config.batch_size,
        num_classes=classes,
        optimizer=make_optimizer(config.optim, schedule, tuning),
        ema=bool(config.optim.ema_decay),
        settings=settings,
        teacher=teacher,
        teacher_size=shown_size(spec, teacher),
        target=target,
        extras=extras_shapes(model, size, settings, target),
    )
    if not whole:
        settings = _in_parts(load, config.optim.accum_steps, config.train.micro_batch)
    return Experiment(
        config=config,
        data=config.data,
        augment=config.augment,
        train=config.train,
        name=config.model.name,
        model=model,
        image_size=size,
        dtype=compute_dtype(config.dtype),
        num_classes=classes,
        teacher=spec,
        mesh=mesh,
        order=order,
        total_steps=total_steps,
        schedule=schedule,
        optimizer=load.optimizer,
        settings=settings,
        load=load,
    )


def _in_parts(load: Load, accum_steps: int, micro_batch: int | None) -> StepConfig:
    student, teacher = parts.choose(load, accum_steps, micro_batch)
    return dataclasses.replace(load.settings, micro_batches=student, teacher_parts=teacher)


def prepare(
    config: ConfigDict, workdir: PurePath | None = None, devices: Sequence | None = None
) -> tuple[Experiment, Dataset]:
    """Check a config, open its data and return what it means with them.

    A run that began in `workdir` keeps its decoder. Raise UserError, with nothing written, for what
    cannot be trained, be it the teacher that is to be trained first.
    """
    count = jax.device_count() if devices is None else len(devices)
    config = config.copy_and_resolve_references()
    if config.optim.may_rise is None:
        config.optim.may_rise = began_rising(workdir)
    validate(config, count)
    build_model(config.model, 2, channels=config.data.channels)  # a mistake should stop us here
    check_teacher(config, count)
    config.data.decoder = resolved_decoder(config.data.decoder, workdir)
    config.data.rules = resolved_rules(config.data.rules, workdir, config.teacher)
    dataset = open_dataset(config.data)
    if len(dataset.classes) == 1:
        raise UserError(f"config.data.source={config.data.source}: only one class; add a second")
    epochs = {"epochs": config.epochs, "teacher.epochs": config.teacher.epochs}
    check_length(epochs, config.batch_size, len(dataset.train))
    size = (len(dataset.classes), len(dataset.train))
    spec = teacher_spec(config)
    if spec and spec.answers and not spec.weights:
        resolve(teacher_config(config), *size, devices)  # raises if no image fits
    weights = class_weights(config.loss.class_weights, dataset)
    experiment = resolve(config, *size, devices, weights=weights)
    if experiment.order.balance != "none":
        experiment.order.images(dataset.train)  # raises if the source does not tell its labels
    return experiment, dataset


def sketch(
    config: ConfigDict,
    size: Callable[[], tuple[int, int]],
    devices: Sequence | None = None,
    whole: bool = False,
) -> Experiment:
    """Check a config but for its weights, and return what it means: to plan and to measure it.

    `size` returns the numbers of classes and images; it is asked after the check, as it may open
    data. See resolve for the rest.
    """
    checked = config.copy_and_resolve_references()
    if checked.distill.kind != "none" and not checked.teacher.weights:
        checked.teacher.epochs = 1.0  # stands for the weights that are not needed
    checked.init.required, checked.optim.may_rise = False, True  # which is a training's matter
    validate(checked, jax.device_count() if devices is None else len(devices))
    return resolve(config, *size(), devices, whole)


def length_of(config: ConfigDict, images: int) -> tuple[EpochOrder, int]:
    """Return the order of a run's examples and the number of its steps."""
    sizes = (images, config.batch_size, config.augment.repeats)
    order = EpochOrder(*sizes, config.seed, config.data.balance)
    return order, whole_steps(config.epochs, order.steps_per_epoch)


def settings_of(
    config: ConfigDict,
    num_classes: int,
    mesh=None,
    weights=None,
    tuning: Everything = EVERYTHING,
    total_steps: int = 0,
) -> StepConfig:
    """Gather what train_step reads; a device takes its share in `optim.accum_steps` parts.

    `weights` are what `loss.class_weights` means for the data, ones for who has none; over
    `total_steps` goes what `distill.schedule` changes.
    """
    if config.loss.class_weights and weights is None:
        weights = (1.0,) * num_classes
    return StepConfig(
        seed=config.seed,
        num_classes=num_classes,
        mean=per_channel(config.data.mean, config.data.channels),
        std=per_channel(config.data.std, config.data.channels),
        erase_prob=config.augment.erase_prob,
        label_loss=config.loss.kind,
        label_heads=config.loss.heads,
        smoothing=config.loss.smoothing,
        mixing=config.mixing,
        distill=config.distill,
        micro_batches=config.optim.accum_steps,
        teacher_parts=config.optim.accum_steps,
        mesh=mesh,
        ema_decay=config.optim.ema_decay,
        class_weights=weights,
        several=config.data.multi_label,
        tuning=tuning,
        changes=parse_schedule(config.distill.schedule),
        total_steps=total_steps,
    )
