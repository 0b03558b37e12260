"""Label tapes for other programs: the images of a run's steps, and a tape of any teacher's answers.

A teacher in any framework looks at `views` and hands its logits to a `Writer`. See docs/tape.md.
"""

import contextlib
import dataclasses
import logging
import operator
import time
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, SupportsIndex

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from deit_jax.config import files
from deit_jax.data.classes import align
from deit_jax.data.sources.assemble import NEWEST_RULES
from deit_jax.data.sources.base import Dataset
from deit_jax.data.sources.registry import has_labels
from deit_jax.errors import UserError
from deit_jax.models.heads import Heads
from deit_jax.parallel import sharding
from deit_jax.step.compile import compiler_options
from deit_jax.step.distill.base import Outputs
from deit_jax.step.objective import distillation
from deit_jax.step.train_step import model_inputs
from deit_jax.storage import to_path
from deit_jax.train.experiment import Experiment, prepare
from deit_jax.train.record_tape import FLUSH_S
from deit_jax.train.tape import LEAST
from deit_jax.train.tape.check import check, compare
from deit_jax.train.tape.fingerprint import fingerprint
from deit_jax.train.tape.join import join
from deit_jax.train.tape.layout import pack
from deit_jax.train.tape.session import TapeRecorder, alone, layout_of, writable
from deit_jax.train.tape.tape import runs_of
from deit_jax.train.teacher_spec import ask_no_teacher

__all__ = ["View", "Writer", "check", "join", "views"]

log = logging.getLogger("deit_jax")

NO_TAPE = "-"  # a path where none is


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """One step of a run as its student sees it.

    Images are normalised, (pixel / 255 - mean) / std, then erased and mixed; `targets` are the
    labels, smoothed and mixed likewise. The arrays are the caller's own.
    """

    step: int
    images: Float[np.ndarray, "B H W C"]
    targets: Float[np.ndarray, "B K"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def views(
    config: ConfigDict | str | PurePath, start: int = 0, stop: int | None = None
) -> Iterator[View]:
    """Iterate over the steps start … stop - 1 of a run, to its end without a stop.

    The config is a ConfigDict, or FILE[:ARGS] as --config has it. Views are computed by JAX on the
    devices at hand, one ahead of the caller. Raise UserError for a config that cannot be trained,
    or steps that the run does not have.
    """
    experiment, dataset = prepare(_views_alone(files.config_of(config)))
    stop = _checked_stop(start, stop, experiment.total_steps)
    return _views(experiment, dataset, np.arange(start, stop))


def _checked_stop(start: int, stop: int | None, total: int) -> int:
    """Return where steps end; raise UserError unless the run has them."""
    stop = total if stop is None else stop
    if not 0 <= start <= stop <= total:
        raise UserError(f"start={start}, stop={stop}: the run has the steps 0 to {total - 1}")
    return stop


def _views_alone(given: ConfigDict) -> ConfigDict:
    """Return a config as far as it decides views: without a teacher, and with any start."""
    config = given.copy_and_resolve_references()
    ask_no_teacher(config)
    config.teacher.weights = ""
    if not has_labels(config.data.source):  # of such images only features are learned
        config.distill.kind, config.teacher.tape = "feature", "replay"
        config.teacher.tape_path = NO_TAPE
    return _of_no_training(config)


def _of_no_training(changed: ConfigDict) -> ConfigDict:
    changed.init.required, changed.optim.may_rise = False, True  # which are a training's matter
    if changed.data.rules is None:  # not those of a tape that is there: `views` knows of none
        changed.data.rules = NEWEST_RULES
    return changed


def _views(experiment: Experiment, dataset: Dataset, steps: np.ndarray) -> Iterator[View]:
    if jax.process_count() > 1:
        raise UserError("views are of one process; run several with some steps each, and join")
    mesh, settings = experiment.mesh, experiment.settings
    seen = jax.jit(
        lambda step, batch: model_inputs(step, batch, settings)[:2],
        out_shardings=sharding.batch_sharding(mesh),
        compiler_options=compiler_options(mesh, experiment.train.deterministic),
    )
    batches, ahead = experiment.batches(dataset), None
    for run in runs_of(steps):
        first, stop = int(run[0]), int(run[-1]) + 1
        with contextlib.closing(experiment.loaded(batches, first, stop)) as loader:
            for step in range(first, stop):
                this = step, seen(np.int32(step), experiment.on_devices(next(loader)))
                if ahead is not None:
                    yield _view(*ahead, settings)
                ahead = this
    if ahead is not None:
        yield _view(*ahead, settings)


def _view(step: int, arrays, settings) -> View:
    images, targets = (np.array(array) for array in arrays)  # JAX's own may not be written to
    return View(step, images, targets, settings.mean, settings.std)


class Writer:
    """A label tape of a teacher in another program, for the students that a config describes.

    The config is a ConfigDict, or FILE[:ARGS] as --config has it. `path` is a new tape or one that
    was begun for the same config and teacher. `teacher` is what people call that teacher,
    "resnet50.a1_in1k of timm 1.0": the tape's only knowledge of it. `classes` are the names of its
    classes in its order; without them, it has the data's classes in the data's order. `features` is
    the width of its features, where the students learn them. Use it in a `with`, or call `close`:
    what was written is claimed once a minute and at the end, and what a killed program had claimed
    is right.

    Raise UserError for a config whose distillation no tape can hold or that names a teacher of its
    own, another run's tape, one that another process writes, and classes that do not go together.
    """

    def __init__(
        self,
        config: ConfigDict | str | PurePath,
        path: str | PurePath,
        teacher: str,
        classes: Sequence[str] | None = None,
        features: int = 0,
    ):
        if not isinstance(teacher, str) or not teacher.strip() or not teacher.isprintable():
            raise UserError(f"teacher={teacher!r}: give a name that people know it by, on one line")
        self.path = to_path(path)
        prepared = _taught_outside(files.config_of(config), self.path)
        self._experiment, self._dataset = prepare(prepared)
        self.steps = self._experiment.total_steps
        kind = self._experiment.settings.kind
        self._layout = dataclasses.replace(layout_of(self._experiment), width=features)
        if bool(features) != kind.features:
            raise UserError(
                f"features={features}: {prepared.distill.kind} students learn "
                f"{'features: give their width' if kind.features else 'none; leave it out'}"
            )
        self._asks = kind.classes, kind.features
        names, source = self._dataset.classes, self._experiment.data.source
        self._classes, self._order = len(names if classes is None else classes), None
        if classes is not None:
            aligned = align(list(classes), names, f"teacher {teacher!r}", source)
            self._order = aligned.order
            if aligned.note:
                log.info(aligned.note)
        layout = self._layout
        self._target = jax.jit(lambda logits, seen: kind.target(Outputs(Heads(logits), seen)))
        self._pack = jax.jit(lambda target: pack(target, layout))
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(alone(self.path))
        try:
            ours = fingerprint(self._experiment, self._dataset, teacher)
            self._tape = writable(self.path, layout, ours, self.steps)
            self._recorder = TapeRecorder(self._tape, layout)
            self._recorder.begin(0, self.steps, 0)
        except BaseException:
            self._stack.close()
            raise
        self._pending: set[int] = set()
        self._flushed, self._open = time.monotonic(), True

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        try:  # what was written is right, whatever happened after; the error is the news
            self.close()
        except UserError as second:
            log.warning("%s", second)

    def missing(self) -> list[int]:
        """Return the steps that the tape lacks."""
        holes = self._tape.holes(0, self.steps, 0).tolist()
        return [step for step in holes if step not in self._pending]

    def views(self, start: int = 0, stop: int | None = None) -> Iterator[View]:
        """Iterate over those of the steps start … stop - 1 that the tape lacks; see `views`."""
        stop = _checked_stop(start, stop, self.steps)
        steps = [step for step in self.missing() if start <= step < stop]
        return _views(self._experiment, self._dataset, np.array(steps, np.int64))

    def write(self, step: SupportsIndex, logits: Any = None, features: Any = None) -> None:
        """Keep what the teacher says of one step: logits [B K], features [B D], or both.

        Rows are in the batch's order; arrays of numpy, torch or JAX, on any device. For a step that
        is there already they are compared with what it holds. Raise UserError for another shape,
        what is not finite, a step that the run does not have, and other answers than are there.
        """
        if not self._open:
            raise UserError(f"{self.path}: step {step} is written to a Writer that was closed")
        number = self._checked_step(step)
        target = self._target(*self._checked_answer(number, logits, features))
        if number in self._pending:
            self.flush()
        if self._tape.has(number, 0):
            self._must_agree(number, jax.device_get(target))
            return
        self._recorder.record(number, jax.device_get(self._pack(target)))
        self._pending.add(number)
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Have everything so far on disk, and claimed; raise UserError if it cannot be."""
        lost, reason = self._recorder.settle()
        self._pending, self._flushed = set(), time.monotonic()
        if lost:
            raise UserError(
                f"{self.path}: {lost} steps could not be written ({reason}); make room, and write "
                "those that are missing"
            )

    def close(self) -> None:
        """Flush, and let others write."""
        if self._open:
            self._open = False
            with self._stack:
                self.flush()

    def _checked_step(self, step: SupportsIndex) -> int:
        try:
            number = operator.index(step)
        except TypeError:
            raise UserError(f"{self.path}: step {step!r} is no whole number") from None
        if not 0 <= number < self.steps:
            raise UserError(
                f"{self.path}: step {number}: the run has the steps 0 to {self.steps - 1}"
            )
        return number

    def _checked_answer(self, step: int, logits: Any, features: Any):
        """Return logits and features, None for what the students do not learn."""
        given = {"logits": logits, "features": features}
        for (name, value), asked in zip(given.items(), self._asks, strict=True):
            if (value is not None) != asked:
                verb = "learn" if asked else "do not learn"
                raise UserError(f"{self.path}: step {step}: the students {verb} {name}")
        count = self._experiment.batch_size
        logits = self._checked(step, "logits", logits, (count, self._classes))
        features = self._checked(step, "features", features, (count, self._layout.width))
        if logits is None:  # which nobody reads
            return np.zeros((count, 0), np.float32), features
        return logits if self._order is None else logits[:, self._order], features

    def _checked(self, step: int, name: str, logits: Any, size) -> np.ndarray | None:
        """Return an array as float32 of a size; None for none."""
        if logits is None:
            return None
        if hasattr(logits, "detach"):  # torch's, perhaps of a GPU, of which numpy knows nothing
            logits = logits.detach().cpu()
            logits = logits.float() if logits.is_floating_point() else logits
        array = np.asarray(logits)
        where = f"{self.path}: step {step}"
        if array.shape != size:
            raise UserError(
                f"{where}: got {list(array.shape)}, not {name} of {size[0]} images and {size[1]} "
                f"{'classes' if name == 'logits' else 'numbers each'}; hand over what the teacher "
                "says of the whole view"
            )
        if not jax.numpy.issubdtype(array.dtype, np.floating):
            raise UserError(f"{where}: got {array.dtype}, not {name}, which are floats")
        with np.errstate(over="ignore"):  # to infinity, which is told of
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(
                f"{where}: {name} of {np.sum(~np.isfinite(array).all(-1))} images are not finite; "
                "see what the teacher was given, or compute it in float32"
            )
        return array

    def _must_agree(self, step: int, target: Any) -> None:
        same, of, _ = compare(self._tape.parts(step), target, self._tape)
        if of and 100.0 * same / of < LEAST:
            raise UserError(
                f"{self.path}: step {step} is there with other answers ({same} of {of} are the "
                "same); a tape is of one teacher: take another path, or remove this tape"
            )


def _taught_outside(given: ConfigDict, path: PurePath) -> ConfigDict:
    """Return the config of students that replay the tape; raise UserError if none of it can."""
    config = given.copy_and_resolve_references()
    kind, several = config.distill.kind, config.data.multi_label
    known = distillation(kind, several)
    if known is None or known.tape is None:
        of = " of images with several labels" if several else ""
        raise UserError(
            f"config.distill.kind={kind!r}: a label tape cannot hold what it learns{of} from a "
            "teacher; take hard, feature, or soft of one label an image"
        )
    if config.teacher.weights:
        raise UserError(
            f"config.teacher.weights={config.teacher.weights}: the teacher is in this program, "
            "which hands over its logits; leave it out, or use `deit tape record`"
        )
    config.teacher.tape, config.teacher.tape_path = "replay", str(path)
    return _of_no_training(config)
