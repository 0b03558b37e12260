"""A label tape recorded without a student; and what a tape on disk is."""

import contextlib
import logging
import time
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from deit_jax.errors import Interrupted, UserError
from deit_jax.parallel.signals import StopRequest
from deit_jax.storage import backend, to_path
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import train
from deit_jax.train.tape import session
from deit_jax.train.tape.fingerprint import outsider
from deit_jax.train.tape.labeller import Labeller, progress
from deit_jax.train.tape.layout import form_of
from deit_jax.train.tape.tape import Tape, runs_of
from deit_jax.train.teacher_spec import teacher_config
from deit_jax.workdir import directory

log = logging.getLogger("deit_jax")
FLUSH_S = 60

Part = tuple[int, int | None]  # the steps first … stop - 1, to the run's end without a stop


def info(path: str | PurePath) -> dict[str, Any]:
    """Return what is on a tape.

    {"path", "kind", "top_k", "steps", "recorded", "missing": [[first, stop], …], "written_by",
    "bytes", "fingerprint"}; "written_by" is "deit_jax" or "another program".
    """
    tape = Tape.open(to_path(path))
    missing = runs_of(np.flatnonzero(tape.recorded < 0))
    return {
        "path": str(path),
        "kind": tape.layout.kind,
        "top_k": None if form_of(tape.layout).exact else tape.layout.top_k,
        "steps": len(tape),
        "recorded": int(np.sum(tape.recorded >= 0)),
        "missing": [[int(run[0]), int(run[-1]) + 1] for run in missing],
        "written_by": "another program" if outsider(tape.fingerprint) else "deit_jax",
        "bytes": sum(size for _, size in backend(tape.path).files(tape.path)),
        "fingerprint": tape.fingerprint,
    }


def record(
    config,
    workdir: str | PurePath | None,
    stop: StopRequest | None = None,
    part: Part | None = None,
) -> PurePath:
    """Write the teacher's answers to every step of a run, or to a `part`; return where they are.

    Steps that the tape has are left alone. A part is of a teacher that has weights, on a tape that
    the config names, and needs no workdir: any number of them may be recorded at once. Raise
    Interrupted, all so far saved, if `stop` asks for it, UserError if the tape is another run's or
    cannot be written.
    """
    workdir, stop = to_path(workdir) if workdir else None, stop or StopRequest()
    if part is not None:
        _check_part(config.teacher)
    experiment, dataset = prepare(config, workdir)
    spec = experiment.teacher
    assert spec is not None  # validate has refused a tape without a teacher
    first, end = _steps(part, experiment.total_steps)
    place = workdir or Path()  # which a part, whose tape is named, does not look into
    path, weights = session.tape_path(experiment, place), spec.weights_path(place)
    with contextlib.ExitStack() as stack:
        if part is None:
            stack.enter_context(directory.locked(place))
        if not spec.weights:
            train(teacher_config(experiment.config), weights, stop)
        stack.enter_context(session.alone(path))
        teacher = load_teacher(spec, weights, dataset.classes)
        run = Labeller(experiment, dataset, teacher)
        recorder = session.recorder(experiment, place, dataset, teacher)
        _record(run, recorder, stop, first, end)
    if len(holes := Tape.open(path).holes(first, end, 0)):
        raise UserError(
            f"{path}: {len(holes)} of {end - first} steps could not be written; make room, and run "
            "the same command again"
        )
    return path


def _check_part(teacher) -> None:
    """Raise UserError unless a part of a tape can be recorded beside others."""
    if not teacher.tape_path:
        raise UserError(
            "--steps: a part is recorded on a tape of its own; name it with --tape=PATH, and join "
            "the parts with `deit tape join`"
        )
    if not teacher.weights:
        raise UserError(
            "--steps: the parts of a tape are of one teacher, trained before; give "
            "--config.teacher.weights"
        )


def _steps(part: Part | None, total: int) -> tuple[int, int]:
    """Return first and stop of a part; raise UserError for one that is not in the run."""
    if part is None:
        return 0, total
    first, stop = part
    stop = total if stop is None else stop
    if not 0 <= first < min(stop, total):
        raise UserError(
            f"--steps={first}:{stop}: the run has the steps 0 to {total - 1}; give A:B, from A to "
            "B - 1"
        )
    if stop > total:
        log.info("--steps=%d:%d: the run ends after its %d steps", first, stop, total)
    return first, min(stop, total)


def _record(
    run: Labeller, recorder: session.TapeRecorder, stop: StopRequest, first: int, end: int
) -> None:
    recorder.begin(0, run.steps, 0)
    holes = recorder.holes(first, end)
    stop.armed = True
    with progress(end - first, end - first - len(holes)) as bar:
        for part in runs_of(holes):
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
