"""A label tape recorded without a student; and what a tape on disk is."""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from deit_jax.errors import Interrupted, UserError
from deit_jax.parallel import sharding
from deit_jax.parallel.signals import StopRequest
from deit_jax.step.compile import compiler_options
from deit_jax.step.distill.base import Layout
from deit_jax.step.train_step import StepConfig, model_inputs, teacher_targets
from deit_jax.storage import backend
from deit_jax.train.experiment import Experiment, prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import train
from deit_jax.train.tape import session
from deit_jax.train.tape.layout import form_of, pack
from deit_jax.train.tape.tape import Tape
from deit_jax.train.teacher_spec import teacher_config
from deit_jax.workdir import directory

FLUSH_S = 60


def info(path: str | Path) -> dict[str, Any]:
    """Return {"path", "kind", "steps", "recorded", "bytes", "fingerprint"} of a tape."""
    tape = Tape.open(Path(path))
    return {
        "path": str(path),
        "kind": tape.layout.kind,
        "top_k": None if form_of(tape.layout).exact else tape.layout.top_k,
        "steps": len(tape),
        "recorded": int(np.sum(tape.recorded >= 0)),
        "bytes": sum(size for _, size in backend(Path(path)).files(Path(path))),
        "fingerprint": tape.fingerprint,
    }


def record(config, workdir: str | Path, stop: StopRequest | None = None) -> Path:
    """Write the teacher's answers to every step of a run; return where they are.

    Steps that the tape has are left alone. Raise Interrupted, all so far saved, if `stop` asks for
    it, UserError if the tape is another run's or cannot be written.
    """
    workdir, stop = Path(workdir), stop or StopRequest()
    experiment, dataset = prepare(config, workdir)
    spec = experiment.teacher
    assert spec is not None  # validate has refused a tape without a teacher
    weights = spec.weights_path(workdir)
    with directory.locked(workdir):
        if not spec.weights:
            train(teacher_config(experiment.config), weights, stop)
        teacher = load_teacher(spec, weights, dataset.classes)
        run = Labeller(experiment, dataset, teacher)
        _record(run, session.recorder(experiment, workdir, dataset, teacher), stop)
    path = session.tape_path(experiment, workdir)
    if len(holes := Tape.open(path).holes(0, run.steps, 0)):
        raise UserError(
            f"{path}: {len(holes)} of {run.steps} steps could not be written; make room, and run "
            "the same command again"
        )
    return path


class Labeller:
    """A run without a student: its views, and what the teacher says of them."""

    def __init__(self, experiment: Experiment, dataset, teacher):
        self.experiment, self.steps = experiment, experiment.total_steps
        self.mesh = experiment.mesh
        self.batches = experiment.batches(dataset)
        network, params = teacher
        self._params = experiment.place_teacher(network, params)
        layout, settings = session.layout_of(experiment), experiment.settings
        self._label = jax.jit(
            lambda *args: label(*args, teacher=network, settings=settings, layout=layout),
            out_shardings=sharding.replicated(self.mesh),
            compiler_options=compiler_options(self.mesh, experiment.train.deterministic),
        )

    def answers(self, first: int, stop: int):
        """Iterate over (step, answer on the devices), computed as they are asked for."""
        with contextlib.closing(self.experiment.loaded(self.batches, first, stop)) as loader:
            for step in range(first, stop):
                batch = self.experiment.on_devices(next(loader))
                yield step, self._label(self._params, np.int32(step), batch)


def label(teacher_params, step, batch, *, teacher, settings: StepConfig, layout: Layout):
    """Return the tape's arrays for one step: what train_step's teacher says there.

    It is asked in the same parts, as a product of other shapes is rounded otherwise.
    """
    images, *_ = model_inputs(step, batch, settings)
    return pack(teacher_targets(teacher, teacher_params, images, settings), layout)


def _record(run: Labeller, recorder: session.TapeRecorder, stop: StopRequest) -> None:
    recorder.begin(0, run.steps, 0)
    holes = recorder.holes(0, run.steps)
    stop.armed = True
    tqdm.monitor_interval = 0  # or a thread of it would outlive the run
    bar = tqdm(
        total=run.steps,
        initial=run.steps - len(holes),
        unit="step",
        dynamic_ncols=True,
        leave=False,
        disable=None if jax.process_index() == 0 else True,
    )
    with bar:
        for part in np.split(holes, np.flatnonzero(np.diff(holes) != 1) + 1):
            if len(part):
                _record_part(run, recorder, stop, int(part[0]), int(part[-1]) + 1, bar)


def _record_part(run, recorder, stop: StopRequest, first: int, end: int, bar) -> None:
    flushed, in_flight = time.monotonic(), None
    for step, answer in run.answers(first, end):
        stopping = stop.agreed(run.mesh)
        if in_flight:  # fetched while the next is computed
            recorder.record(in_flight[0], jax.device_get(in_flight[1]))
        in_flight = (step, answer)
        bar.update()
        if not stopping and step + 1 < end and time.monotonic() - flushed < FLUSH_S:
            continue
        recorder.record(step, jax.device_get(answer))
        recorder.flush()
        flushed, in_flight = time.monotonic(), None
        if stopping:
            raise Interrupted(
                f"stopped by {stop.name or 'a signal to another process'} after step {step + 1} of "
                f"{run.steps}; the same command continues"
            )
