"""The training loop: restore, step, log, evaluate, save."""

import contextlib
import functools
import logging
import time
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from deit_jax.data.batches import TrainBatches
from deit_jax.data.order import offset_seed
from deit_jax.data.sources.base import Dataset
from deit_jax.errors import Interrupted, UserError
from deit_jax.parallel import processes
from deit_jax.parallel.signals import StopRequest
from deit_jax.step.state import EXTRAS
from deit_jax.train import divergence, memory
from deit_jax.train.evaluator import NAMES, Evaluator, told
from deit_jax.train.experiment import Experiment
from deit_jax.train.patience import Patience
from deit_jax.train.tape.session import NoTape
from deit_jax.workdir.checkpoints import Checkpointer
from deit_jax.workdir.directory import log_event
from deit_jax.workdir.metrics import Meter, MetricWriter
from deit_jax.workdir.trackers.follow import Following

log = logging.getLogger("deit_jax")


class Trainer:
    """A run: its data, its compiled step and its state, restored from the workdir if it began.

    `teacher` is what load_teacher returns, None without distillation; `start` the variables that a
    new run begins with, None for random ones; `tape` what open_tape returns. With `read_only` the
    workdir is left as it is.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: PurePath,
        dataset: Dataset,
        teacher=None,
        start=None,
        stop: StopRequest | None = None,
        read_only: bool = False,
        tape: NoTape | None = None,
    ):
        self.experiment, self.workdir, self.dataset = experiment, workdir, dataset
        self.stop, self.tape, self._start = stop or StopRequest(), tape or NoTape(), start
        self.total_steps, self.trackers = experiment.total_steps, Following()
        stopping = functools.partial(self.stop.agreed, experiment.mesh)
        self.evaluator = Evaluator(
            dataset.eval,
            experiment.data,
            experiment.train.eval_batch_size,
            experiment.image_size,
            experiment.mesh,
            stopping,
            dataset.classes,
        )
        self.figure = ("mAP", "mAP") if experiment.data.multi_label else ("top1", "top-1")
        kept = experiment.train.keep_checkpoints
        self.checkpointer = Checkpointer(workdir, kept, read_only, best=self.figure[0])
        if not read_only:
            self.checkpointer.notify_with(functools.partial(log_event, workdir))
        for line in experiment.unsplit():
            log.info(line)
        if self.checkpointer.latest_step is None:
            self.state = self._begin()
        else:
            self.state = self.checkpointer.restore(experiment.abstract_state)
        self._bring_teacher(teacher)

    def _begin(self):
        state = self.experiment.new_state()
        if self._start is None:
            return state
        params, stats = self._start["params"], self._start.get("batch_stats", {})
        params |= {EXTRAS: state.params[EXTRAS]} if EXTRAS in state.params else {}
        moving = self.experiment.settings.tuning.moving(params)
        ema = {"params": moving, "batch_stats": stats} if state.ema is not None else None
        places = self.experiment.state_shardings
        return state.replace(
            params=jax.device_put(params, places.params),
            batch_stats=jax.device_put(stats, places.batch_stats),
            ema=jax.device_put(ema, places.ema),
        )

    def _bring_teacher(self, teacher) -> None:
        """Compile the step, with the teacher on the devices unless a tape answers for it."""
        rollbacks = int(self.state.health["rollbacks"])
        self.tape.begin(int(self.state.step), self.total_steps, rollbacks)
        needed, compiled = self.tape.teacher(teacher), hasattr(self, "step")
        if compiled and (self.teacher or not needed):
            return
        self._given = teacher
        network, params = needed or (None, None)
        self.teacher: Any = network
        self.teacher_params = self.experiment.place_teacher(network, params)
        self.evaluator.held = memory.tree_bytes((self.state, self.teacher_params))
        self.step = self.experiment.jit_step(self.teacher, self.tape)

    def go_back(self, step: int) -> int:
        """Take the newest state that is not after `step`; return its own step."""
        if int(self.state.step) > step:
            saved, restore = self.checkpointer.has(step), self.checkpointer.restore
            abstract = self.experiment.abstract_state
            self.state = restore(abstract, step) if saved else self._begin()
            self._bring_teacher(self._given)
        return int(self.state.step)

    def run(self) -> None:
        """Train to the last step, logging, evaluating and saving on the way."""
        rolls_back = self.experiment.train.on_divergence == "rollback"
        if rolls_back and self.checkpointer.latest_step is None:
            self.checkpointer.save(0, self.state, None)  # that there is something to go back to
        try:
            with processes.ending_all(), self.experiment.explained():
                while not self._run_once():
                    pass
            self.checkpointer.require_saved(int(self.state.step))
            self.stop.armed = False
        finally:
            self.checkpointer.close()

    def _run_once(self) -> bool:
        """Train from the state at hand; return False if the run went back and has to go on."""
        start, first = int(self.state.step), jax.process_index() == 0
        if start:
            log.info("continuing at step %d of %d", start, self.total_steps)
        writer = MetricWriter(self.workdir, start, self.total_steps, first, self.trackers)
        self.checkpointer.flush_with(writer.flush)
        try:
            self._loop(start, writer)
            return True
        except divergence.Diverged as diverged:
            self._roll_back(diverged)
            return False
        finally:
            writer.close()

    def _loop(self, start: int, writer: MetricWriter) -> None:
        meter, in_flight = Meter(), None
        self._in_row = int(self.state.health["skipped_in_row"])
        self.patience = self._patience(start)
        if start and self.checkpointer.facts(start).get("eval_pending"):
            self._evaluate_and_save(start, writer)  # which being told to stop had put off
        self._batches = batches = self.batches()
        loader = self.experiment.loaded(batches, start, self.total_steps)
        with contextlib.closing(loader):
            for step in range(start + 1, self.total_steps + 1):
                if self.patience.exhausted(step - 1):
                    self._tell_stop(step - 1, writer)
                    break
                began = time.perf_counter()
                read = next(loader)
                meter.waited(time.perf_counter() - began)
                batch = self.on_devices(read, step - 1)
                del read  # or its memory would not be free while the next is loaded
                self.state, values = self.step(self.state, self.teacher_params, batch)
                stopping = self.stop.agreed(self.experiment.mesh)
                # Step n's metrics are fetched while step n + 1 runs: the device never waits.
                if in_flight:
                    self._finish_step(*in_flight, meter, writer)
                in_flight = (step, values)
                if stopping or self._due(step, "eval") or self._due(step, "save"):
                    self._finish_step(*in_flight, meter, writer)
                    in_flight = None
                    self._evaluate_and_save(step, writer, stopping)
                    meter.read()  # the next reading is of training alone

    def _patience(self, step: int) -> Patience:
        """Return what the evaluations up to a step, as saved beside its state, leave of it."""
        epochs = self.experiment.train.patience_epochs
        steps = self.experiment.steps_of(epochs) if epochs else 0
        return Patience(steps, self.checkpointer.facts(step) if step else {})

    def _tell_stop(self, step: int, writer: MetricWriter) -> None:
        writer.say(
            f"stopping after step {step} of {self.total_steps}: {self.figure[1]} was never above "
            f"the {self.patience.best:.2f} of step {self.patience.best_step} for "
            f"config.train.patience_epochs={self.experiment.train.patience_epochs:g} epochs"
        )

    @property
    def stopped_early(self) -> dict[str, Any] | None:
        """What results.json says of a run that ended before its last step, None for others."""
        if int(self.state.step) == self.total_steps:
            return None
        told = {"patience_epochs": self.experiment.train.patience_epochs, **self.patience.facts}
        return {**told, "figure": self.figure[0], "total_steps": self.total_steps}

    def batches(self) -> TrainBatches:
        """Return this process's share of every training batch, by number."""
        seed = offset_seed(self.experiment.settings.seed, int(self.state.health["rollbacks"]))
        return self.experiment.batches(self.dataset, seed=seed)

    def on_devices(self, batch, number: int) -> dict[str, jax.Array]:
        """Make global arrays of this process's share of a batch, with what a tape knows of it."""
        known = self.tape.target(number, self.experiment.rows)
        batch = batch if known is None else {**batch, "teacher_target": known}
        return self.experiment.on_devices(batch)

    def _due(self, step: int, what: str) -> bool:
        if what == "eval" and not self.dataset.classes:  # there are no labels to count
            return False
        interval = self.experiment.steps_of(self.experiment.train[f"{what}_every_epochs"])
        return step % interval == 0 or step == self.total_steps

    def _finish_step(self, step: int, values, meter, writer) -> None:
        values = jax.device_get(values)
        self.tape.record(step - 1, values.pop("teacher_target", None))
        values = {k: v.item() for k, v in values.items()}
        self.stop.armed = True
        self._in_row = values.pop("skipped_in_row")
        if self._in_row:
            most = self.experiment.train.max_bad_steps
            divergence.warn_or_raise(step, self._in_row, values, most)
        meter.count(self.experiment.batch_size)
        text = None
        if step % self.experiment.train.log_every_steps == 0 or step == self.total_steps:
            rates, lr = meter.read(), float(self.experiment.schedule(step - 1))
            if self.experiment.data.skip_unreadable:  # images met so far that could not be read
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
        rollbacks, settings = int(self.state.health["rollbacks"]), self.experiment.train
        if settings.on_divergence == "stop" or rollbacks >= settings.max_rollbacks:
            raise UserError(str(diverged)) from diverged
        self.checkpointer.settle()
        abstract, last_good = self.experiment.abstract_state, diverged.first - 1
        state = self.checkpointer.restore(abstract, last_good, planned=True)
        step = int(state.step)
        self.checkpointer.delete_after(step)
        count = jax.device_put(np.int32(rollbacks + 1), state.health["rollbacks"].sharding)
        self.state = state.replace(health={**state.health, "rollbacks": count})
        self._bring_teacher(self._given)
        log.warning("%s. Going back to step %d, and on with other data", diverged, step)
        facts = {"step": diverged.step, "first": diverged.first, "to": step}
        log_event(self.workdir, "rollback", **facts, number=rollbacks + 1)

    def _evaluate_and_save(self, step: int, writer, stopping: bool = False) -> None:
        """Do what is due after a step; raise Interrupted, the state saved, if asked to stop."""
        self.tape.flush()  # before the state: a run that goes on from it has all before on its tape
        score, eval_due = None, self._due(step, "eval")
        if eval_due and not stopping:
            try:
                score = self._log_evaluation(step, writer)
                self.patience.evaluated(step, score)
            except Interrupted:
                stopping = True
        # A state of bad steps is the one before them: kept out of the plan, that one stays.
        last = step == self.total_steps or self.patience.exhausted(step)
        planned = last or (self._due(step, "save") and self._in_row == 0)
        known = self.patience.facts
        if not stopping:
            if planned:
                self.checkpointer.save(step, self.state, score, known=known)
            return
        pending = eval_due and score is None
        interim = pending or not planned
        marks = {"interim": interim, "eval_pending": pending}
        self.checkpointer.save(step, self.state, score, **marks, known=known)
        self.checkpointer.require_saved(step)
        log_event(self.workdir, "stopped", step=step, signal=self.stop.name)
        raise Interrupted(
            f"stopped by {self.stop.name or 'a signal to another process'} after step {step} of "
            f"{self.total_steps}; saved in {self.workdir / 'checkpoints' / str(step)}; the same "
            "command continues"
        )

    def _log_evaluation(self, step: int, writer) -> float:
        results = self.evaluate()
        values = {f"eval/{k}": v for k, v in told(results).items()}
        attention = self.evaluator.attention(self.experiment.model, self.state.variables)
        values |= {f"attention_entropy/{k}": v for k, v in attention.items()}
        writer.write(step, values)
        key, name = self.figure
        heads = ", ".join(f"{NAMES[k]} {v[key]:.2f}" for k, v in results.items() if k in NAMES)
        writer.say(f"step {step}/{self.total_steps}: {name} {heads}")
        return results["fused"][key]

    def evaluate(self) -> dict[str, Any]:
        """Return the accuracy of the weights and, if there is one, of their moving average.

        {} where images have no labels.
        """
        if not self.dataset.classes:
            return {}
        heads = self.evaluator.model(self.experiment.model, self.state.variables)
        results: dict[str, Any] = {**self.evaluator.examples(), **heads}
        if self.state.ema is not None:
            results["ema"] = self.evaluator.model(self.experiment.model, self.state.averaged)
        return results
