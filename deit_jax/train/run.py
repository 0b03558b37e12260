"""A run from its config to its results: `deit train`, and the teacher that it trains first."""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from deit_jax.config.serialize import flatten, to_json
from deit_jax.data import card
from deit_jax.data.decode import Reading
from deit_jax.data.decoders import choose
from deit_jax.data.sources.base import Dataset
from deit_jax.data.view import reading_of
from deit_jax.errors import UserError
from deit_jax.parallel.signals import StopRequest
from deit_jax.shapes import per_channel
from deit_jax.step.optimizer import make_schedule
from deit_jax.storage import exists, read_json, steps_in, to_path, write_json
from deit_jax.train import memory
from deit_jax.train.evaluator import told
from deit_jax.train.experiment import Experiment, prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.loop import Trainer
from deit_jax.train.tape.session import open_tape, writing
from deit_jax.train.teacher_spec import teacher_config
from deit_jax.weights.fit import LoadedWeights, in_order
from deit_jax.weights.load import load_variables
from deit_jax.workdir import directory, held_out, records
from deit_jax.workdir.trackers.follow import check_installed, following

log = logging.getLogger("deit_jax")


def train(
    config: ConfigDict,
    workdir: str | PurePath,
    stop: StopRequest | None = None,
    allowed: Sequence[str] = (),
    announce: bool = True,
) -> dict[str, Any]:
    """Train what `config` describes, or continue it, in `workdir`; return and save the results.

    The fields in `allowed` may differ from the config that the run began with. `announce` says what
    was understood of the data, which a teacher has in common with its student. Raise UserError
    before anything is written if the config cannot be trained, Interrupted if `stop` asks for it.
    """
    workdir = to_path(workdir)
    experiment, dataset = prepare(config, workdir)
    check_installed(experiment.train.trackers)
    config, spec, teacher = experiment.config, experiment.teacher, None
    weights = spec.weights_path(workdir) if spec else ""
    if spec and spec.weights:
        teacher = load_teacher(spec, weights, dataset.classes)
    if config.distill.kind == "none" and config.teacher.weights:
        log.warning("config.teacher.weights is not used: config.distill.kind=none asks no teacher")
    start = fitted_weights(experiment, workdir, dataset.classes)
    tape = None
    if spec and not spec.answers:  # that it does not fit is told before anything is written
        tape = open_tape(experiment, workdir, dataset, teacher)
        teacher = None  # the tape keeps it on hand
    with directory.locked(workdir), contextlib.ExitStack() as stack:
        before = _epochs_before(workdir)
        _check_length(experiment, workdir)
        directory.bind_config(workdir, config, dataset.classes, allowed)
        for line in held_out.note(workdir, dataset, experiment.settings.class_weights):
            log.warning(line)
        if announce:
            _announce(dataset, config.data.source, workdir, reading_of(config.data))
        if spec and weights and not spec.weights:
            train(teacher_config(config), weights, stop, allowed, announce=False)
            teacher = load_teacher(spec, weights, dataset.classes)
        stack.enter_context(writing(experiment, workdir))
        tape = tape or open_tape(experiment, workdir, dataset, teacher)
        with experiment.explained():
            begin = start and start.variables
            trainer = Trainer(experiment, workdir, dataset, teacher, begin, stop, tape=tape)
        if start:
            facts = {"weights": start.source, "format": start.format, "notes": list(start.notes)}
            directory.log_event(workdir, "init", **facts)
        patience = experiment.train.patience_epochs
        if results := directory.finished(workdir, trainer.total_steps, patience):
            log.info("%s: already finished", workdir)
            return results
        _tell_length(experiment, int(trainer.state.step), before)
        return _run_to_the_end(trainer)


def _epochs_before(workdir: PurePath) -> float | None:
    """Return the epochs that the run in a workdir was to train so far, None without one."""
    path = workdir / "config.json"
    return float(read_json(path)["epochs"]) if exists(path) else None


def _check_length(experiment: Experiment, workdir: PurePath) -> None:
    """Raise UserError for a number of epochs that the run in a workdir has passed."""
    config, total = experiment.config, experiment.total_steps
    if (step := max(steps_in(workdir / "checkpoints"), default=0)) > total:
        raise UserError(
            f"config.epochs={config.epochs:g}: these are {total} steps, and the run has taken "
            f"{step}; give more epochs, or choose a new --workdir"
        )


def _tell_length(experiment: Experiment, step: int, before: float | None) -> None:
    """Say what another number of epochs does to the learning rate."""
    config = experiment.config
    if before is None or before == config.epochs or not step:
        return
    old = make_schedule(config.optim, before, experiment.order.steps_per_epoch)
    log.info(
        "config.epochs: %g -> %g: the schedule is that of the new length, so that the learning "
        "rate goes on at %.3g, where it would have been %.3g",
        before,
        config.epochs,
        *(float(schedule(jnp.int32(step))) for schedule in (experiment.schedule, old)),
    )


def _announce(dataset: Dataset, source: str, workdir: PurePath, reading: Reading) -> None:
    """Say what was understood of the data; keep it, for the report, where nothing better is."""
    if jax.process_index() != 0:
        return
    known = records.data_card(workdir)
    made = known or card.quick(dataset, source, reading)
    for line in card.lines(made):
        log.info(line)
    if known is None:
        write_json(workdir / records.DATA_CARD, made)


def starting_weights(experiment: Experiment, workdir: PurePath, classes: list[str]):
    """Return the variables of fitted_weights, None for a run that goes on."""
    start = fitted_weights(experiment, workdir, classes)
    return start and start.variables


def fitted_weights(
    experiment: Experiment, workdir: PurePath, classes: list[str]
) -> LoadedWeights | None:
    """Load what `config.init` names and say how it was fitted; None for a run that goes on.

    Heads that are kept get the order of `classes`. The notes tell of all that was changed.
    """
    init = experiment.config.init
    if steps_in(workdir / "checkpoints"):
        return None
    if not init.weights:
        if experiment.settings.tuning.partial:
            log.warning("what is frozen stays as drawn: config.init.weights names no weights")
        return None
    try:
        opened = load_variables(
            init.weights,
            experiment.config.model,
            experiment.num_classes,
            experiment.image_size,
            init.head,
            seed=experiment.settings.seed,
            in_channels=experiment.data.channels,
            checkpoint=init.checkpoint,
            ema=init.ema,
        )
    except UserError as error:
        reason = str(error).removeprefix(f"{init.weights}: ")
        raise UserError(f"config.init.weights={init.weights}: {reason}") from error
    whose = f"config.init.weights={init.weights}: the model"
    opened, note = in_order(opened, classes, whose, experiment.data.source)
    other = _other_convention(opened, experiment.data)
    notes = tuple(filter(None, (*opened.notes, note, other)))
    for line in (f"starting from {init.weights} ({opened.format})", *notes):
        log.info(line)
    return dataclasses.replace(opened, notes=notes)


def _other_convention(opened: LoadedWeights, data: ConfigDict) -> str:
    """Return a note where a run normalises its images otherwise than the weights had it."""
    ours = [per_channel(getattr(data, key), data.channels) for key in ("mean", "std")]
    if not opened.mean or [opened.mean, opened.std] == ours:
        return ""
    return (
        f"its images had mean {opened.mean} and std {opened.std}; config.data.mean={ours[0]} and "
        f"config.data.std={ours[1]} are this run's"
    )


def summary(trainer: Trainer) -> str:
    """Return a line on model, data, length, devices and decoder."""
    experiment, dataset, params = trainer.experiment, trainer.dataset, trainer.state.params
    count, moving = map(_count, (params, experiment.settings.tuning.moving(params)))
    trained = "" if moving == count else f", {moving / 1e6:.2f} M of them trained"
    return (
        f"{experiment.name}: {count / 1e6:.2f} M parameters{trained}; "
        f"{len(dataset.train)} training and {len(dataset.eval)} evaluation images in "
        f"{len(dataset.classes)} classes; {trainer.total_steps} steps of {experiment.batch_size}, "
        f"{experiment.order.steps_per_epoch} an epoch; "
        f"{experiment.mesh.size} {jax.devices()[0].device_kind} device(s), "
        f"{experiment.dtype.name} compute; images decoded by "
        f"{choose(experiment.data.decoder)}{_in_parts(experiment)}"
    )


def _count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def uneven(experiment: Experiment, dataset: Dataset) -> list[str]:
    """Return lines on classes that are met or weighed otherwise than they have images."""
    classes, order, lines = dataset.classes, experiment.order, []
    if order.balance != "none":
        share = order.images(dataset.train).share(epoch=0)
        fewest, most = int(np.argmin(share)), int(np.argmax(share))
        lines.append(
            f"data.balance={order.balance}: the first epoch meets {share[fewest]} "
            f"({classes[fewest]}) to {share[most]} ({classes[most]}) images of a class"
        )
    if weights := experiment.settings.class_weights:
        low, high = int(np.argmin(weights)), int(np.argmax(weights))
        lines.append(
            f"loss.class_weights: {weights[low]:.3g} ({classes[low]}) to {weights[high]:.3g} "
            f"({classes[high]})"
        )
    return lines


def _in_parts(experiment: Experiment) -> str:
    """Return how a device takes its share of a batch, and what memory that is expected to need."""
    share, count = experiment.load.share, experiment.settings.micro_batches
    text = "" if count == 1 else f"; a device takes its {share} images {share // count} at a time"
    if (limit := memory.limit(experiment.mesh)) is None:
        return text
    expected = experiment.load.expected_bytes(count)
    return f"{text}; about {expected / 1e9:.1f} of {limit / 1e9:.1f} GB a device expected"


def _run_to_the_end(trainer: Trainer) -> dict[str, Any]:
    experiment, dataset, workdir = trainer.experiment, trainer.dataset, trainer.workdir
    log.info(summary(trainer))
    for line in uneven(experiment, dataset):
        log.info(line)
    if len(dataset.train) < experiment.batch_size:
        log.warning(
            "a batch repeats images: there are %d, config.batch_size=%d; a lower multiple of "
            "config.mixing.group_size=%d would not",
            len(dataset.train),
            experiment.batch_size,
            experiment.settings.mixing.group_size,
        )
    provenance = directory.provenance()
    directory.log_event(workdir, "start", step=int(trainer.state.step), **provenance)
    field, fields = experiment.train.trackers, flatten(to_json(experiment.config))
    with following(workdir, field, fields, active=jax.process_index() == 0) as trainer.trackers:
        trainer.run()
        early = {"stopped_early": trainer.stopped_early} if trainer.stopped_early else {}
        figures, step = trainer.evaluate(), int(trainer.state.step)
        if trainer.teacher and trainer.teacher.answers:
            answers = trainer.evaluator.teacher(trainer.teacher, trainer.teacher_params)
            figures["teacher"] = answers
        trainer.trackers.results(step, told(figures) if "fused" in figures else {})
    results = {"step": step, **early, **figures}
    _draw(trainer, results)
    if jax.process_index() == 0:
        write_json(workdir / "results.json", results)
    return results


def _draw(trainer: Trainer, results: dict[str, Any]) -> None:
    try:
        from deit_jax.train import picture
    except ModuleNotFoundError as error:
        log.warning("no picture: %s is missing; pip install 'deit_jax[viz]'", error.name)
        return
    if not trainer.dataset.classes:  # nothing was evaluated
        return
    picture.draw(trainer, results, trainer.workdir / "picture.png")
    log.info("picture of the run: %s", trainer.workdir / "picture.png")
