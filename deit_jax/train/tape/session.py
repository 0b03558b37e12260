"""What a training run has to do with a label tape: write one, read one, or neither."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from deit_jax import optim
from deit_jax.data.pipeline import EpochOrder
from deit_jax.errors import UserError
from deit_jax.tape import (
    CHUNK_STEPS,
    NAME,
    Layout,
    Tape,
    check_fingerprint,
    checksum,
    fingerprint,
    packing,
)

log = logging.getLogger("deit_jax")


class NoTape:
    """A run without a tape: its teacher answers in every step."""

    def begin(self, start: int, stop: int, rollbacks: int) -> None:
        """Prepare for the steps start … stop - 1 under so many rollbacks."""

    def teacher(self, teacher):
        """Return what is needed of the run's teacher: all of it."""
        return teacher

    def compiled_with(self, step, recipe):
        """Return the train step, a function of a recipe, with what the tape wants of it."""
        return functools.partial(step, recipe=recipe)

    def signal(self, number: int, rows: Sequence[int]) -> np.ndarray | None:
        """Return what the tape knows of some rows of a batch; None where the teacher has to say."""
        return None

    def record(self, number: int, signal) -> None:
        """Take the signal that a step used."""

    def flush(self) -> None:
        """Have everything so far on disk, and claimed."""


class Recorder(NoTape):
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
            return self._tape.holes(start, stop, self._rollbacks)
        missing = np.zeros(stop - start, bool)
        if self._tape is not None:
            missing[self._tape.holes(start, stop, self._rollbacks) - start] = True
        missing = multihost_utils.broadcast_one_to_all(missing)
        return start + np.flatnonzero(missing)

    def compiled_with(self, step, recipe):
        """Return a train step whose metrics hold the signal as the tape does."""
        recording = dataclasses.replace(recipe, record=True)
        return packing(functools.partial(step, recipe=recording), self._layout)

    def record(self, number: int, signal: dict[str, np.ndarray]) -> None:
        """Keep a step's signal; at the end of a chunk, start writing it."""
        if self._tape is None or self._tape.has(number, self._rollbacks):
            return  # views and answers are a function of the step: it holds the same already
        self._buffer[number] = {name: np.asarray(part) for name, part in signal.items()}
        if (number + 1) % CHUNK_STEPS == 0:
            self._write()

    def _write(self) -> None:
        steps = sorted(self._buffer)
        if not steps:
            return
        for run in np.split(steps, np.flatnonzero(np.diff(steps) != 1) + 1):
            rows = [self._buffer[int(step)] for step in run]
            parts = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            futures = self._tape.write(int(run[0]), parts)
            self._writing.append((run, [checksum(row) for row in rows], futures))
        self._buffer = {}

    def flush(self) -> None:
        """Wait until all is written, then claim it; warn of what could not be."""
        if self._tape is None:
            return
        self._write()
        lost, reason = 0, ""
        for steps, sums, futures in self._writing:
            try:
                for future in futures:
                    future.result()
                self._tape.claim(steps, self._rollbacks, sums)
            except (ValueError, OSError) as error:  # as TensorStore reports a full disk
                lost += len(steps)
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        self._writing = []
        if lost:
            log.warning(
                "%s: %d steps could not be written (%s); training goes on, they are not on the "
                "label tape. Make room; `deit tape record` adds them",
                self._tape.path,
                lost,
                reason,
            )


class Player(NoTape):
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
        if self._standby is None:
            raise UserError(
                f"{told}; give config.teacher.weights for the others, train fewer epochs, or "
                "add them to it with `deit tape record`"
            )
        log.info("%s; the teacher answers in the other %d", told, self._holes)

    def teacher(self, teacher):
        """Return the teacher only if the tape lacks a step."""
        return self._standby if self._holes else None

    def signal(self, number: int, rows: Sequence[int]) -> np.ndarray | None:
        """Return labels int32 [b] or logits float32 [b K], None at a hole."""
        if not self._tape.has(number, self._rollbacks):
            return None
        return self._tape.signal(number, rows)


def tape_path(config, workdir: Path) -> Path:
    """Return where a run's tape is, by default in its workdir."""
    return Path(config.teacher.tape_path or workdir / "tape").expanduser()


def run_steps(config, num_images: int) -> int:
    """Return how many steps a run takes."""
    order = EpochOrder(num_images, config.batch_size, config.augment.repeats, config.seed)
    return optim.whole_steps(config.epochs, order.steps_per_epoch)


def layout_of(config, num_classes: int) -> Layout:
    """Return the arrays that a config's tape has."""
    top_k = min(config.teacher.tape_top_k, num_classes) if config.distill.kind == "soft" else 1
    return Layout(config.distill.kind, config.batch_size, num_classes, top_k)


def open_tape(config, workdir: Path, dataset, teacher) -> NoTape:
    """Return what the config wants of a tape; raise UserError if it does not fit this run.

    `teacher` is what load_teacher returns, None without one.
    """
    mode = config.teacher.tape
    if mode == "record":
        return recorder(config, workdir, dataset, teacher)
    if mode == "off":
        return NoTape()
    path = tape_path(config, workdir)
    tape = Tape.open(path)
    check_fingerprint(path, tape.fingerprint, fingerprint(config, dataset, teacher))
    if teacher is None:
        log.info("%s: no config.teacher.weights, so which teacher it is of is not checked", path)
    else:  # it was needed for its checksum; the devices' memory is the student's
        teacher = (teacher[0], jax.device_get(teacher[1]))
    log.info("%s: the teacher's answers come from this label tape", path)
    player = Player(tape, teacher)
    if not any((workdir / "checkpoints").glob("[0-9]*")):  # before anything is written
        player.begin(0, run_steps(config, len(dataset.train)), 0)
    return player


def recorder(config, workdir: Path, dataset, teacher) -> Recorder:
    """Return what writes a tape, a new one or one that was begun; process 0 has it on disk."""
    layout = layout_of(config, len(dataset.classes))
    if jax.process_index() != 0:
        return Recorder(None, layout)
    return Recorder(writable(config, workdir, dataset, teacher, layout), layout)


def writable(config, workdir: Path, dataset, teacher, layout: Layout) -> Tape:
    """Open or make the tape that a config records; raise UserError if it is another run's."""
    path, own = tape_path(config, workdir), fingerprint(config, dataset, teacher)
    if not (path / NAME).exists():
        return Tape.create(path, layout, own, run_steps(config, len(dataset.train)))
    tape = Tape.open(path)
    check_fingerprint(path, tape.fingerprint, own)
    tape.must_be_writable()
    if tape.layout != layout:
        raise UserError(
            f"{path}: keeps {tape.layout.top_k} classes, config.teacher.tape_top_k asks for "
            f"{layout.top_k}; set --config.teacher.tape_top_k={tape.layout.top_k}"
        )
    return tape
