"""A training run's use of a label tape: write one, read one, or neither."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deit_jax.errors import UserError
from deit_jax.step.distill.base import Layout
from deit_jax.storage import exists, steps_in, to_path
from deit_jax.train.experiment import Experiment
from deit_jax.train.tape.fingerprint import check_fingerprint, fingerprint, outsider
from deit_jax.train.tape.layout import checksum, packing
from deit_jax.train.tape.tape import CHUNK_STEPS, ELSEWHERE, NAME, Tape, first_line, runs_of
from deit_jax.workdir.directory import held

log = logging.getLogger("deit_jax")


class NoTape:
    """A run without a tape: its teacher answers in every step."""

    def begin(self, start: int, stop: int, rollbacks: int) -> None:
        """Prepare for the steps start … stop - 1 under so many rollbacks."""

    def teacher(self, teacher):
        """Return what is needed of the run's teacher: all of it."""
        return teacher

    def compiled_with(self, step, settings):
        """Return the train step, a function of its settings, with what the tape wants of it."""
        return functools.partial(step, settings=settings)

    def target(self, number: int, rows: Sequence[int]) -> Any:
        """Return what the tape knows of some rows of a batch; None where the teacher has to say."""
        return None

    def record(self, number: int, target) -> None:
        """Take the teacher's target that a step used."""

    def flush(self) -> None:
        """Have everything so far on disk, and claimed."""


class TapeRecorder(NoTape):
    """Write what the teacher says; `tape` is None in a process that does not write.

    A tape that cannot be written is told of, and the steps in question are not claimed.
    """

    def __init__(self, tape: Tape | None, layout: Layout):
        self._tape, self._layout = tape, layout
        self._rollbacks, self._buffer, self._writing = 0, {}, []

    def begin(self, start: int, stop: int, rollbacks: int) -> None:
        """Make room; let go of what a rollback undid and of what was not flushed."""
        for _, _, futures in self._writing:  # or they would meet what takes their place
            for future in futures:
                future.exception()
        self._rollbacks, self._buffer, self._writing = rollbacks, {}, []
        if self._tape is not None:
            self._tape.make_room(stop)
            self._tape.forget(start, rollbacks)

    def holes(self, start: int, stop: int) -> np.ndarray:
        """Return the steps start … stop - 1 that are not recorded; all processes know of them."""
        if jax.process_count() == 1:
            assert self._tape is not None  # the only process writes
            return self._tape.holes(start, stop, self._rollbacks)
        missing = np.zeros(stop - start, bool)
        if self._tape is not None:
            missing[self._tape.holes(start, stop, self._rollbacks) - start] = True
        missing = multihost_utils.broadcast_one_to_all(missing)
        return start + np.flatnonzero(missing)

    def compiled_with(self, step, settings):
        """Return a train step whose metrics hold the teacher's target as the tape does."""
        recording = dataclasses.replace(settings, record=True)
        return packing(functools.partial(step, settings=recording), self._layout)

    def record(self, number: int, target: dict[str, np.ndarray]) -> None:
        """Keep a step's target; at the end of a chunk, start writing it."""
        if self._tape is None or self._tape.has(number, self._rollbacks):
            return  # views and answers are a function of the step: it holds the same already
        self._buffer[number] = {name: np.asarray(part) for name, part in target.items()}
        if (number + 1) % CHUNK_STEPS == 0:
            self._write()

    def _write(self) -> None:
        for run in runs_of(sorted(self._buffer)):
            assert self._tape is not None  # or `record` would have kept nothing
            rows = [self._buffer[int(step)] for step in run]
            parts = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            futures = self._tape.write(int(run[0]), parts)
            self._writing.append((run, [checksum(row) for row in rows], futures))
        self._buffer = {}

    def flush(self) -> None:
        """Wait until all is written, then claim it; warn of what could not be."""
        lost, reason = self.settle()
        if self._tape is not None and lost:
            log.warning(
                "%s: %d steps could not be written (%s); training goes on, they are not on the "
                "label tape. Make room; `deit tape record` adds them",
                self._tape.path,
                lost,
                reason,
            )

    def settle(self) -> tuple[int, str]:
        """Flush without a word; return how many steps could not be written, and why."""
        if self._tape is None:
            return 0, ""
        self._write()
        lost, reason = 0, ""
        for steps, sums, futures in self._writing:
            try:
                for future in futures:
                    future.result()
                self._tape.claim(steps, self._rollbacks, sums)
            except (ValueError, OSError) as error:  # as TensorStore reports a full disk
                lost += len(steps)
                reason = first_line(error) or type(error).__name__
        self._writing = []
        return lost, reason


class TapeReader(NoTape):
    """Read what the teacher said; `standby` is the live teacher, None without weights."""

    def __init__(self, tape: Tape, standby):
        self._tape, self._standby, self._rollbacks, self._holes = tape, standby, 0, 0

    def begin(self, start: int, stop: int, rollbacks: int) -> None:
        """Look for steps that the tape lacks; raise UserError if there is no teacher for them."""
        self._rollbacks = rollbacks
        self._holes = len(self._tape.holes(start, stop, rollbacks))
        if not self._holes:
            return
        there = stop - start - self._holes
        told = f"{self._tape.path}: the label tape has {there} of the {stop - start} steps to train"
        told += f" (after {rollbacks} rollbacks)" if rollbacks else ""
        if outsider(self._tape.fingerprint):
            raise UserError(
                f"{told}; train fewer epochs, or add the others to it as it was written, with "
                "deit_jax.tape.Writer"
            )
        if self._standby is None:
            raise UserError(
                f"{told}; give config.teacher.weights for the others, train fewer epochs, or "
                "add them to it with `deit tape record`"
            )
        log.info("%s; the teacher answers in the other %d", told, self._holes)

    def teacher(self, teacher):
        """Return the teacher only if the tape lacks a step."""
        return self._standby if self._holes else None

    def target(self, number: int, rows: Sequence[int]) -> Any:
        """Return what the kind learns of some rows, None at a hole."""
        if not self._tape.has(number, self._rollbacks):
            return None
        return self._tape.target(number, rows)


def tape_path(experiment: Experiment, workdir: PurePath) -> PurePath:
    """Return where a run's tape is, by default in its workdir."""
    return to_path(experiment.config.teacher.tape_path or workdir / "tape")


def layout_of(experiment: Experiment) -> Layout:
    """Return the size of a tape's steps."""
    kind, classes = experiment.settings.distill.kind, experiment.num_classes
    form = experiment.settings.kind.tape
    assert form is not None  # validate has refused the others
    top_k = form.keeps(experiment.config.teacher.tape_top_k, classes)
    width = 0
    if experiment.settings.kind.features:
        target = experiment.load.target(1)
        width = (target["feature"] if isinstance(target, dict) else target).shape[-1]
    return Layout(kind, experiment.batch_size, classes, top_k, experiment.settings.several, width)


def stand_in(experiment: Experiment, labels: np.ndarray) -> dict[str, Any]:
    """Return {"teacher_target": what a tape might say}, {} where none answers for the teacher."""
    if experiment.teacher is None or experiment.teacher.answers:
        return {}
    shapes = experiment.load.target(len(labels))
    if not isinstance(shapes, dict):
        features = not experiment.settings.kind.classes
        return {"teacher_target": _likely(shapes, labels, experiment.num_classes, features)}
    likely = {
        k: _likely(x, labels, experiment.num_classes, k == "feature") for k, x in shapes.items()
    }
    return {"teacher_target": likely}


def _likely(shape, labels: np.ndarray, classes: int, features: bool) -> np.ndarray:
    """Return what a teacher might have said of images of these labels."""
    if features:
        return np.random.default_rng(0).normal(size=shape.shape).astype(shape.dtype)
    if np.issubdtype(shape.dtype, np.integer) or labels.ndim == 2:
        return labels.astype(shape.dtype)
    return np.eye(classes, dtype=shape.dtype)[labels]


def open_tape(experiment: Experiment, workdir: PurePath, dataset, teacher) -> NoTape:
    """Return what a config wants of a tape; raise UserError if it does not fit this run.

    `teacher` is what load_teacher returns, None without one.
    """
    mode = experiment.teacher.tape if experiment.teacher else "off"
    if mode == "record":
        return recorder(experiment, workdir, dataset, teacher)
    if mode == "off":
        return NoTape()
    path = tape_path(experiment, workdir)
    tape = Tape.open(path)
    check_fingerprint(path, tape.fingerprint, fingerprint(experiment, dataset, teacher))
    if teacher is None and (name := outsider(tape.fingerprint)):
        log.info("%s: written by another program, of its teacher %r", path, name)
    elif teacher is None:
        log.info("%s: no config.teacher.weights, so which teacher it is of is not checked", path)
    else:  # it was needed for its checksum; the devices' memory is the student's
        teacher = (teacher[0], jax.device_get(teacher[1]))
    log.info("%s: the teacher's answers come from this label tape", path)
    reader = TapeReader(tape, teacher)
    if not steps_in(workdir / "checkpoints"):  # before anything is written
        reader.begin(0, experiment.total_steps, 0)
    return reader


def recorder(experiment: Experiment, workdir: PurePath, dataset, teacher) -> TapeRecorder:
    """Return what writes a tape, a new one or one that was begun; process 0 has it on disk."""
    layout = layout_of(experiment)
    if jax.process_index() != 0:
        return TapeRecorder(None, layout)
    path, ours = tape_path(experiment, workdir), fingerprint(experiment, dataset, teacher)
    return TapeRecorder(writable(path, layout, ours, experiment.total_steps), layout)


def alone(path: PurePath) -> contextlib.AbstractContextManager:
    """Keep other writers out of a tape, also one to come; raise UserError if one is in it."""
    return held(
        path,
        lambda who: (
            f"{path}: another process writes this label tape ({who}); wait for it, or give "
            "each a tape of its own, and join them with `deit tape join`"
        ),
        lambda reason: f"{path}: the label tape cannot be written ({reason}); {ELSEWHERE}",
    )


def writing(experiment: Experiment, workdir: PurePath) -> contextlib.AbstractContextManager:
    """Return what a run holds while it trains: its label tape, if it records one."""
    if experiment.teacher is None or experiment.teacher.tape != "record":
        return contextlib.nullcontext()
    return alone(tape_path(experiment, workdir))


def writable(path: PurePath, layout: Layout, ours: dict[str, Any], steps: int) -> Tape:
    """Open a tape, or make one of so many steps; raise UserError if it has another fingerprint."""
    if not exists(path / NAME):
        return Tape.create(path, layout, ours, steps)
    tape = Tape.open(path)
    check_fingerprint(path, tape.fingerprint, ours)
    tape.must_be_writable()
    if tape.layout != layout:
        raise UserError(
            f"{path}: keeps {tape.layout.top_k} classes, config.teacher.tape_top_k asks for "
            f"{layout.top_k}; set --config.teacher.tape_top_k={tape.layout.top_k}"
        )
    return tape
