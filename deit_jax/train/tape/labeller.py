"""A run without a student: its views, and what the teacher says of them."""

import contextlib
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from deit_jax.data.order import offset_seed
from deit_jax.parallel import sharding
from deit_jax.step.compile import compiler_options, placing
from deit_jax.step.distill.base import Layout
from deit_jax.step.train_step import StepConfig, model_inputs, teacher_targets
from deit_jax.train.experiment import Experiment
from deit_jax.train.tape import session
from deit_jax.train.tape.layout import pack


class Labeller:
    """What a teacher says of a run's batches, packed as on a tape or as the student learns it."""

    def __init__(self, experiment: Experiment, dataset, teacher):
        self.experiment, self.steps = experiment, experiment.total_steps
        self.mesh, self._dataset = experiment.mesh, dataset
        self.batches = experiment.batches(dataset)
        network, params = teacher
        self._params = experiment.place_teacher(network, params)
        layout, settings = session.layout_of(experiment), experiment.settings
        self._label = self._jit(
            lambda *args: label(*args, teacher=network, settings=settings, layout=layout)
        )
        self._target = self._jit(lambda *args: target(*args, teacher=network, settings=settings))

    def _jit(self, function: Callable):
        return jax.jit(
            placing(function, self.mesh),
            out_shardings=sharding.replicated(self.mesh),
            compiler_options=compiler_options(self.mesh, self.experiment.train.deterministic),
        )

    def answers(self, first: int, stop: int):
        """Iterate over (step, answer on the devices), computed as they are asked for."""
        with contextlib.closing(self.experiment.loaded(self.batches, first, stop)) as loader:
            for step in range(first, stop):
                batch = self.experiment.on_devices(next(loader))
                yield step, self._label(self._params, np.int32(step), batch)

    def target(self, step: int, rollbacks: int):
        """Return the teacher's target of one step, as it is after so many rollbacks."""
        seed = offset_seed(self.experiment.settings.seed, rollbacks)
        batches = self.experiment.batches(self._dataset, seed=seed)
        with contextlib.closing(self.experiment.loaded(batches, step, step + 1)) as loader:
            batch = self.experiment.on_devices(next(loader))
            return jax.device_get(self._target(self._params, np.int32(step), batch))


def target(teacher_params, step, batch, *, teacher, settings: StepConfig):
    """Return what train_step's teacher says of one step.

    It is asked in the same parts, as a product of other shapes is rounded otherwise.
    """
    images, *_ = model_inputs(step, batch, settings)
    return teacher_targets(teacher, teacher_params, images, settings)


def label(teacher_params, step, batch, *, teacher, settings: StepConfig, layout: Layout):
    """Return the tape's arrays for one step."""
    said = target(teacher_params, step, batch, teacher=teacher, settings=settings)
    return pack(said, layout)


def progress(total: int, done: int = 0, unit: str = "step") -> tqdm:
    """Return a progress bar; only process 0 shows one, and only to people."""
    tqdm.monitor_interval = 0  # or a thread of it would outlive the run
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=True,
        leave=False,
        disable=None if jax.process_index() == 0 else True,
    )
