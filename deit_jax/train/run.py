"""The training loop: build, restore, step, log, evaluate, save. `deit train` calls it."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from deit_jax import config as config_lib
from deit_jax import distributed, divergence, evaluate, memory, metrics, optim, parts, sharding
from deit_jax import workdir as workdir_lib
from deit_jax.checkpoint import Checkpointer
from deit_jax.compiled_step import jit_train_step
from deit_jax.data import pipeline
from deit_jax.data.sources import Dataset, open_dataset
from deit_jax.errors import Interrupted, UserError
from deit_jax.interrupt import StopRequest
from deit_jax.run_tape import NoTape, open_tape
from deit_jax.step import Recipe, init_state
from deit_jax.summary import summary
from deit_jax.teacher import check_teacher, load_teacher, teacher_config, weights_path

log = logging.getLogger("deit_jax")


class Trainer:
    """A run: its data, its compiled step and its state, restored from the workdir if it began.

    `teacher` is what load_teacher returns, None without distillation; `start` the variables that a
    new run begins with, None for random ones; `tape` what open_tape returns. With `read_only` the
    workdir is left as it is.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        dataset: Dataset,
        teacher=None,
        start=None,
        stop: StopRequest | None = None,
        read_only: bool = False,
        tape: NoTape | None = None,
    ):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.stop = stop or StopRequest()
        self.mesh = sharding.make_mesh(config.mesh)
        size = config_lib.image_size(config.model)
        self.model = config_lib.build_model(config.model, len(dataset.classes), config.dtype)
        self.tape, self._rows = tape or NoTape(), sharding.local_rows(self.mesh, config.batch_size)
        self.order = pipeline.EpochOrder(
            len(dataset.train), config.batch_size, config.augment.repeats, config.seed
        )
        self.total_steps = optim.whole_steps(config.epochs, self.order.steps_per_epoch)
        self.schedule = optim.make_schedule(config.optim, config.epochs, self.order.steps_per_epoch)
        self.tx = optim.make_optimizer(config.optim, self.schedule)
        stopping = functools.partial(self.stop.agreed, self.mesh)
        self.evaluator = evaluate.Evaluator(config, dataset.eval, size, self.mesh, stopping)
        self.checkpointer = Checkpointer(workdir, config.train.keep_checkpoints, read_only)
        if not read_only:
            self.checkpointer.tell(functools.partial(workdir_lib.record, workdir))
        self.state = self._restore_or_init(size, start)
        self._seed_data()
        self._bring_teacher(teacher)

    def _restore_or_init(self, size: int, start):
        init = functools.partial(
            init_state,
            model=self.model,
            image_size=size,
            tx=self.tx,
            ema_decay=self.config.optim.ema_decay,
        )
        key = jax.random.key(self.config.seed)
        abstract = jax.eval_shape(init, key)
        # Built under jit with these shardings, no device ever holds more than its share.
        self.state_shardings = sharding.state_shardings(self.mesh, abstract, self.model)
        for line in sharding.unsplit(self.mesh, abstract.params, self.model):
            log.info(line)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            self.state_shardings,
        )

        def begin():
            state = jax.jit(init, out_shardings=self.state_shardings)(key)
            return state if start is None else self._begin_with(state, start)

        self._begin = begin
        if self.checkpointer.latest_step is None:
            return begin()
        return self.checkpointer.restore(self.abstract_state)

    def _begin_with(self, state, start):
        params, stats = start["params"], start.get("batch_stats", {})
        ema = {"params": params, "batch_stats": stats} if state.ema is not None else None
        places = self.state_shardings
        return state.replace(
            params=jax.device_put(params, places.params),
            batch_stats=jax.device_put(stats, places.batch_stats),
            ema=jax.device_put(ema, places.ema),
        )

    def _seed_data(self) -> None:
        seed = pipeline.offset_seed(self.config.seed, int(self.state.health["rollbacks"]))
        self.order = dataclasses.replace(self.order, seed=seed)

    def _bring_teacher(self, teacher) -> None:
        """Compile the step, with the teacher on the devices unless a tape answers for it."""
        rollbacks = int(self.state.health["rollbacks"])
        self.tape.begin(int(self.state.step), self.total_steps, rollbacks)
        needed, compiled = self.tape.teacher(teacher), hasattr(self, "_step")
        if compiled and (self.teacher or not needed):
            return
        self._given = teacher
        self.teacher, params = needed or (None, None)
        places = sharding.state_shardings(self.mesh, params, getattr(self.teacher, "model", None))
        self.teacher_params = jax.device_put(params, places)
        self.evaluator.held = memory.tree_bytes((self.state, self.teacher_params))
        recipe = Recipe.from_config(self.config, len(self.dataset.classes), self.mesh)
        made = (self.model, self.teacher, self.tx, recipe, self.mesh, self.state_shardings)
        deterministic = self.config.train.deterministic
        self._step = jit_train_step(*made, tape=self.tape, deterministic=deterministic)

    def go_back(self, step: int) -> int:
        """Take the newest state that is not after `step`; return its own step."""
        if int(self.state.step) > step:
            found = self.checkpointer.has(step)
            restore = self.checkpointer.restore
            self.state = restore(self.abstract_state, step) if found else self._begin()
            self._seed_data()
            self._bring_teacher(self._given)
        return int(self.state.step)

    def run(self) -> None:
        """Train to the last step, logging, evaluating and saving on the way."""
        rolls_back = self.config.train.on_divergence == "rollback"
        if rolls_back and self.checkpointer.latest_step is None:
            self.checkpointer.save(0, self.state, None)  # that there is something to go back to
        try:
            classes = len(self.dataset.classes)
            with distributed.ending_all(), parts.explained(self.config, self.mesh, classes):
                while not self._run_once():
                    pass
            self.checkpointer.must_hold(self.total_steps)
            self.stop.armed = False
        finally:
            self.checkpointer.close()

    def _run_once(self) -> bool:
        """Train from the state at hand; return False if the run went back and has to go on."""
        start, first = int(self.state.step), jax.process_index() == 0
        if start:
            log.info("continuing at step %d of %d", start, self.total_steps)
        writer = metrics.MetricWriter(self.workdir, start, self.total_steps, active=first)
        try:
            self._loop(start, writer)
            return True
        except divergence.Diverged as diverged:
            self._roll_back(diverged)
            return False
        finally:
            writer.close()

    def _loop(self, start: int, writer: metrics.MetricWriter) -> None:
        data, meter, in_flight = self.config.data, metrics.Meter(), None
        self._in_row = int(self.state.health["skipped_in_row"])
        if start and self.checkpointer.facts(start).get("eval_pending"):
            self._evaluate_and_save(start, writer)  # which being told to stop had put off
        self._batches = batches = self.batches()
        loader = pipeline.load(
            batches, start, self.total_steps, data.threads, data.prefetch_batches
        )
        with contextlib.closing(loader):
            for step in range(start + 1, self.total_steps + 1):
                began = time.perf_counter()
                batch = next(loader)
                meter.waited(time.perf_counter() - began)
                batch = self.on_devices(batch, step - 1)
                self.state, values = self._step(self.state, self.teacher_params, batch)
                stopping = self.stop.agreed(self.mesh)
                # Step n's metrics are fetched while step n + 1 runs: the device never waits.
                if in_flight:
                    self._finish_step(*in_flight, meter, writer)
                in_flight = (step, values)
                if stopping or self._due(step, "eval") or self._due(step, "save"):
                    self._finish_step(*in_flight, meter, writer)
                    in_flight = None
                    self._evaluate_and_save(step, writer, stopping)
                    meter.read()  # the next reading is of training alone

    def batches(self) -> pipeline.TrainBatches:
        """Return this process's share of every training batch, by number."""
        size, data = config_lib.image_size(self.config.model), self.config.data
        return pipeline.TrainBatches(
            self.dataset.train,
            self.order,
            self.config.augment,
            size,
            self._rows,
            data.decoder,
            data.skip_unreadable,
        )

    def on_devices(self, batch, number: int) -> dict[str, jax.Array]:
        """Make global arrays of this process's share of a batch, with what a tape knows of it."""
        signal = self.tape.signal(number, self._rows)
        batch = batch if signal is None else {**batch, "signal": signal}
        return sharding.to_devices(batch, self.mesh, self.config.batch_size)

    def _due(self, step: int, what: str) -> bool:
        epochs = self.config.train[f"{what}_every_epochs"]
        interval = optim.whole_steps(epochs, self.order.steps_per_epoch)
        return step % interval == 0 or step == self.total_steps

    def _finish_step(self, step: int, values, meter, writer) -> None:
        values = jax.device_get(values)
        self.tape.record(step - 1, values.pop("signal", None))
        values = {k: v.item() for k, v in values.items()}
        self.stop.armed = True
        self._in_row = values.pop("skipped_in_row")
        if self._in_row:
            divergence.tell(step, self._in_row, values, self.config.train.max_bad_steps)
        meter.count(self.config.batch_size)
        text = None
        if step % self.config.train.log_every_steps == 0 or step == self.total_steps:
            rates, lr = meter.read(), float(self.schedule(step - 1))
            if self.config.data.skip_unreadable:  # images met so far that could not be read
                rates["unreadable_images"] = len(self._batches.unreadable)
            writer.write(step, {**values, "lr": lr})
            writer.write(step, rates, kind="timing")
            self.checkpointer.settle(wait=False)
            text = (
                f"loss {values['loss']:.3f}, lr {lr:.2e}, {rates['images_per_second']:.0f} images/s"
                f", waiting for input {rates['input_wait']:.0%}"
            )
        writer.advance(text)

    def _roll_back(self, diverged: divergence.Diverged) -> None:
        """Take the last planned checkpoint before the bad steps, and other data from there on."""
        rollbacks, settings = int(self.state.health["rollbacks"]), self.config.train
        if settings.on_divergence == "stop" or rollbacks >= settings.max_rollbacks:
            raise UserError(str(diverged)) from diverged
        self.checkpointer.settle()
        state = self.checkpointer.restore(self.abstract_state, diverged.first - 1, planned=True)
        step = int(state.step)
        self.checkpointer.forget_after(step)
        count = jax.device_put(np.int32(rollbacks + 1), state.health["rollbacks"].sharding)
        self.state = state.replace(health={**state.health, "rollbacks": count})
        self._seed_data()
        self._bring_teacher(self._given)
        log.warning("%s. Going back to step %d, and on with other data", diverged, step)
        facts = {"step": diverged.step, "first": diverged.first, "to": step}
        workdir_lib.record(self.workdir, "rollback", **facts, number=rollbacks + 1)

    def _evaluate_and_save(self, step: int, writer, stopping: bool = False) -> None:
        """Do what is due after a step; raise Interrupted, the state saved, if asked to stop."""
        self.tape.flush()  # before the state: a run that goes on from it has all before on its tape
        top1, eval_due = None, self._due(step, "eval")
        if eval_due and not stopping:
            try:
                top1 = self._log_evaluation(step, writer)
            except Interrupted:
                stopping = True
        # A state of bad steps is the one before them: kept out of the plan, that one stays.
        planned = self._due(step, "save") and (self._in_row == 0 or step == self.total_steps)
        if not stopping:
            if planned:
                self.checkpointer.save(step, self.state, top1)
            return
        pending = eval_due and top1 is None
        interim = pending or not planned
        self.checkpointer.save(step, self.state, top1, interim=interim, eval_pending=pending)
        self.checkpointer.must_hold(step)
        workdir_lib.record(self.workdir, "stopped", step=step, signal=self.stop.name)
        raise Interrupted(
            f"stopped by {self.stop.name or 'a signal to another process'} after step {step} of "
            f"{self.total_steps}; saved in {self.workdir / 'checkpoints' / str(step)}; the same "
            "command continues"
        )

    def _log_evaluation(self, step: int, writer) -> float:
        results = self.evaluate()
        flat = config_lib.flatten(results)
        values = {f"eval/{k}": v for k, v in flat.items() if k != "examples"}
        attention = self.evaluator.attention(self.model, self.state.variables)
        values |= {f"attention_entropy/{k}": v for k, v in attention.items()}
        writer.write(step, values)
        heads = ", ".join(
            f"{evaluate.NAMES[k]} {v['top1']:.2f}"
            for k, v in results.items()
            if k in evaluate.NAMES
        )
        writer.say(f"step {step}/{self.total_steps}: top-1 {heads}")
        return results["fused"]["top1"]

    def evaluate(self) -> dict[str, Any]:
        """Return the accuracy of the weights and, if there is one, of their moving average."""
        results = {"examples": len(self.dataset.eval)}
        results |= self.evaluator.model(self.model, self.state.variables)
        if self.state.ema is not None:
            results["ema"] = self.evaluator.model(self.model, self.state.ema)
        return results


def train(
    config: ConfigDict,
    workdir: str | Path,
    stop: StopRequest | None = None,
    allowed: Sequence[str] = (),
) -> dict[str, Any]:
    """Train what `config` describes, or continue it, in `workdir`; return and save the results.

    The fields in `allowed` may differ from the config that the run began with. Raise UserError
    before anything is written if the config cannot be trained, Interrupted if `stop` asks for it.
    """
    workdir = Path(workdir)
    config, dataset = prepared(config, workdir)
    weights, teacher = weights_path(config, workdir), None
    if config.teacher.weights and weights:
        teacher = load_teacher(config, weights, dataset.classes)
    start = workdir_lib.starting_weights(config, workdir, len(dataset.classes))
    tape = None
    if config.teacher.tape == "replay":  # that it does not fit is told before anything is written
        tape, teacher = open_tape(config, workdir, dataset, teacher), None  # which keeps it on hand
    with workdir_lib.held(workdir):
        workdir_lib.claim(workdir, config, dataset.classes, allowed)
        if weights and not config.teacher.weights:
            train(teacher_config(config), weights, stop, allowed)
            teacher = load_teacher(config, weights, dataset.classes)
        tape = tape or open_tape(config, workdir, dataset, teacher)
        mesh = sharding.make_mesh(config.mesh)
        with parts.explained(config, mesh, len(dataset.classes)):
            trainer = Trainer(config, workdir, dataset, teacher, start, stop, tape=tape)
        if results := workdir_lib.finished(workdir, trainer.total_steps):
            log.info("%s: already finished", workdir)
            return results
        return _run_to_the_end(trainer)


def prepared(config: ConfigDict, workdir: Path) -> tuple[ConfigDict, Dataset]:
    """Check a config and open its data."""
    config_lib.validate(config, jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    config_lib.build_model(config.model, num_classes=2)  # a mistake in it should stop us here
    check_teacher(config, jax.device_count())
    config = config.copy_and_resolve_references()
    config.data.decoder = workdir_lib.decoder(config, workdir)
    dataset = open_dataset(config.data)
    if len(dataset.classes) < 2:
        raise UserError(f"config.data.source={config.data.source}: only one class; add a second")
    optim.check_length(config, len(dataset.train))
    parts.micro_batches(config, mesh, len(dataset.classes))  # raises if none fits
    return config, dataset


def _run_to_the_end(trainer: Trainer) -> dict[str, Any]:
    config, dataset, workdir = trainer.config, trainer.dataset, trainer.workdir
    log.info(summary(trainer))
    if len(dataset.train) < config.batch_size:
        log.warning(
            "a batch repeats images: there are %d, config.batch_size=%d; a lower multiple of "
            "config.mixing.group_size=%d would not",
            len(dataset.train),
            config.batch_size,
            config.mixing.group_size,
        )
    workdir_lib.record(workdir, "start", step=int(trainer.state.step), **workdir_lib.provenance())
    trainer.run()
    results = {"step": trainer.total_steps, **trainer.evaluate()}
    if trainer.teacher:
        results["teacher"] = trainer.evaluator.teacher(trainer.teacher, trainer.teacher_params)
    _draw(trainer, results)
    if jax.process_index() == 0:
        metrics.write_json(workdir / "results.json", results)
    return results


def _draw(trainer: Trainer, results: dict[str, Any]) -> None:
    try:
        from deit_jax import picture
    except ModuleNotFoundError as error:
        log.warning("no picture: %s is missing; pip install 'deit_jax[viz]'", error.name)
        return
    picture.draw(trainer, results, trainer.workdir / "picture.png")
    log.info("picture of the run: %s", trainer.workdir / "picture.png")
