"""The training loop: build, restore, step, log, evaluate, save. The command `deit train`."""

import contextlib
import functools
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from deit_jax import cli, distributed, evaluate, metrics, optim, sharding
from deit_jax import config as config_lib
from deit_jax.checkpoint import Checkpointer
from deit_jax.data import pipeline
from deit_jax.data.resize import choose
from deit_jax.data.sources import Dataset, open_dataset
from deit_jax.errors import UserError
from deit_jax.step import Recipe, init_state, train_step
from deit_jax.teacher import load_teacher, weights_path
from deit_jax.weights import load_variables

log = logging.getLogger("deit_jax")

TRAIN_DOC = """usage: deit train --config=FILE[:ARGS] --workdir=DIR [--config.KEY=VALUE ...]

Train what the config describes. The same command continues a run that stopped, to the same bits.
configs/base.py lists every key. A teacher that has no weights is trained first, in DIR/teacher.

  deit train --config=configs/quickstart.py --workdir=runs/quickstart"""


def teacher_config(config: ConfigDict) -> ConfigDict:
    """Return the config that trains `config.teacher.model` on the student's data."""
    c = config.copy_and_resolve_references()
    c.model = c.teacher.model
    c.model.image_size = config_lib.image_size(config.model)
    c.epochs, c.optim.lr = c.teacher.epochs, c.teacher.lr
    c.optim.ema_decay = 0.0
    c.distill.kind = "none"
    c.init.weights, c.init.required = "", False
    return c


def jit_train_step(model, teacher, tx, recipe: Recipe, mesh, state_shardings):
    """Return the step as a run compiles it, which `deit plan` does too, for other devices."""
    step = functools.partial(train_step, model=model, teacher=teacher, tx=tx, recipe=recipe)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(state_shardings, sharding.replicated(mesh))
    )


class Trainer:
    """A run: its data, its compiled step and its state, restored from the workdir if it began.

    `teacher` is what load_teacher returns, None without distillation; `start` the variables that a
    new run begins with, None for random ones.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, dataset: Dataset, teacher=None, start=None
    ):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.mesh = sharding.make_mesh(config.mesh)
        size = config_lib.image_size(config.model)
        self.model = config_lib.build_model(config.model, len(dataset.classes), config.dtype)
        self.teacher, params = teacher or (None, None)
        places = sharding.state_shardings(self.mesh, params, getattr(self.teacher, "model", None))
        self.teacher_params = jax.device_put(params, places)
        self.order = pipeline.EpochOrder(
            len(dataset.train), config.batch_size, config.augment.repeats, config.seed
        )
        self.total_steps = optim.whole_steps(config.epochs, self.order.steps_per_epoch)
        self.schedule = optim.make_schedule(config.optim, config.epochs, self.order.steps_per_epoch)
        self.tx = optim.make_optimizer(config.optim, self.schedule)
        self.evaluator = evaluate.Evaluator(config, dataset.eval, size, self.mesh)
        self.checkpointer = Checkpointer(workdir, config.train.keep_checkpoints)
        self.state = self._restore_or_init(size, start)
        self._step = self._compile_step()

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
        if self.checkpointer.latest_step is None:
            state = jax.jit(init, out_shardings=self.state_shardings)(key)
            return state if start is None else self._begin_with(state, start)
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            self.state_shardings,
        )
        return self.checkpointer.restore(placed)

    def _begin_with(self, state, start):
        params, stats = start["params"], start.get("batch_stats", {})
        ema = {"params": params, "batch_stats": stats} if state.ema is not None else None
        places = self.state_shardings
        return state.replace(
            params=jax.device_put(params, places.params),
            batch_stats=jax.device_put(stats, places.batch_stats),
            ema=jax.device_put(ema, places.ema),
        )

    def _compile_step(self):
        recipe = Recipe.from_config(self.config, len(self.dataset.classes))
        return jit_train_step(
            self.model, self.teacher, self.tx, recipe, self.mesh, self.state_shardings
        )

    def run(self) -> None:
        """Train to the last step, logging, evaluating and saving on the way."""
        start = int(self.state.step)
        if start:
            log.info("continuing at step %d of %d", start, self.total_steps)
        writer = metrics.MetricWriter(
            self.workdir, start, self.total_steps, active=jax.process_index() == 0
        )
        try:
            self._loop(start, writer)
        finally:
            self.checkpointer.close()
            writer.close()

    def _loop(self, start: int, writer: metrics.MetricWriter) -> None:
        data, meter, in_flight = self.config.data, metrics.Meter(), None
        self._batches = batches = self._train_batches()
        loader = pipeline.load(
            batches, start, self.total_steps, data.threads, data.prefetch_batches
        )
        for step in range(start + 1, self.total_steps + 1):
            began = time.perf_counter()
            batch = next(loader)
            meter.waited(time.perf_counter() - began)
            batch = sharding.to_devices(batch, self.mesh, self.config.batch_size)
            self.state, values = self._step(self.state, self.teacher_params, batch)
            # Step n's metrics are fetched while step n + 1 runs, so that the device never waits.
            if in_flight:
                self._finish_step(*in_flight, meter, writer)
            in_flight = (step, values)
            if self._due(step, "eval") or self._due(step, "save"):
                self._finish_step(*in_flight, meter, writer)
                in_flight = None
                self._evaluate_and_save(step, writer)
                meter.read()  # the next reading is of training alone

    def _train_batches(self) -> pipeline.TrainBatches:
        rows = sharding.local_rows(self.mesh, self.config.batch_size)
        size, data = config_lib.image_size(self.config.model), self.config.data
        return pipeline.TrainBatches(
            self.dataset.train,
            self.order,
            self.config.augment,
            size,
            rows,
            data.decoder,
            data.skip_unreadable,
        )

    def _due(self, step: int, what: str) -> bool:
        epochs = self.config.train[f"{what}_every_epochs"]
        interval = optim.whole_steps(epochs, self.order.steps_per_epoch)
        return step % interval == 0 or step == self.total_steps

    def _finish_step(self, step: int, values, meter, writer) -> None:
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"the loss is {values['loss']} at step {step}; lower config.optim.lr or clip with "
                "config.optim.clip_norm. The last checkpoint is kept"
            )
        meter.count(self.config.batch_size)
        text = None
        if step % self.config.train.log_every_steps == 0 or step == self.total_steps:
            rates, lr = meter.read(), float(self.schedule(step - 1))
            if self.config.data.skip_unreadable:  # images met so far that could not be read
                rates["skipped"] = len(self._batches.unreadable)
            writer.write(step, {**values, "lr": lr})
            writer.write(step, rates, kind="timing")
            text = (
                f"loss {values['loss']:.3f}, lr {lr:.2e}, {rates['images_per_second']:.0f} images/s"
                f", waiting for input {rates['input_wait']:.0%}"
            )
        writer.advance(text)

    def _evaluate_and_save(self, step: int, writer) -> None:
        top1 = None
        if self._due(step, "eval"):
            results = self.evaluate()
            top1 = results["fused"]["top1"]
            flat = config_lib.flatten(results)
            writer.write(step, {f"eval/{k}": v for k, v in flat.items() if k != "examples"})
            heads = ", ".join(
                f"{evaluate.NAMES[k]} {v['top1']:.2f}"
                for k, v in results.items()
                if k in evaluate.NAMES
            )
            writer.say(f"step {step}/{self.total_steps}: top-1 {heads}")
        if self._due(step, "save"):
            self.checkpointer.save(step, self.state, top1)

    def evaluate(self) -> dict[str, Any]:
        """Return the accuracy of the weights and, if there is one, of their moving average."""
        results = {"examples": len(self.dataset.eval)}
        results |= self.evaluator.model(self.model, self.state.variables)
        if self.state.ema is not None:
            results["ema"] = self.evaluator.model(self.model, self.state.ema)
        return results


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train what `config` describes, or continue it, in `workdir`; return and save the results.

    Raise UserError before anything is written if the config cannot be trained.
    """
    workdir = Path(workdir)
    config_lib.validate(config, jax.device_count())
    sharding.make_mesh(config.mesh)
    config_lib.build_model(config.model, num_classes=2)  # a mistake in it should stop us here
    config = config.copy_and_resolve_references()
    config.data.decoder = _decoder(config, workdir)
    dataset = open_dataset(config.data)
    if len(dataset.classes) < 2:
        raise UserError(f"config.data.source={config.data.source}: only one class; add a second")
    weights, teacher = weights_path(config, workdir), None
    if config.teacher.weights and weights:
        teacher = load_teacher(config, weights, dataset.classes)
    start = _starting_weights(config, workdir, len(dataset.classes))
    _claim(workdir, config, dataset.classes)
    if weights and not teacher:
        train(teacher_config(config), weights)
        teacher = load_teacher(config, weights, dataset.classes)
    trainer = Trainer(config, workdir, dataset, teacher, start)
    if results := _finished(workdir, trainer.total_steps):
        log.info("%s: already finished", workdir)
    else:
        log.info(_summary(trainer))
        if len(dataset.train) < config.batch_size:
            log.warning(
                "a batch repeats images: there are %d, config.batch_size=%d; a lower one would not",
                len(dataset.train),
                config.batch_size,
            )
        trainer.run()
        results = {"step": trainer.total_steps, **trainer.evaluate()}
        if trainer.teacher:
            results["teacher"] = trainer.evaluator.teacher(trainer.teacher, trainer.teacher_params)
        _draw(trainer, results)
        if jax.process_index() == 0:
            metrics.write_json(workdir / "results.json", results)
    return results


def _starting_weights(config: ConfigDict, workdir: Path, num_classes: int):
    """Load what `config.init` names and say how it was fitted; None for a run that goes on."""
    if not config.init.weights or any((workdir / "checkpoints").glob("[0-9]*")):
        return None
    opened = load_variables(
        config.init.weights,
        config.model,
        num_classes,
        config_lib.image_size(config.model),
        config.init.head,
        seed=config.seed,
    )
    for note in [f"starting from {config.init.weights} ({opened.format})", *opened.notes]:
        log.info(note)
    return opened.variables


def _decoder(config: ConfigDict, workdir: Path) -> str:
    """Return what `data.decoder` means: auto is the run's own if it began, else the fastest."""
    name, began = config.data.decoder, workdir / "config.json"
    if name == "auto" and began.exists():
        with contextlib.suppress(json.JSONDecodeError, KeyError):  # which are told of later
            name = json.loads(began.read_text())["data"]["decoder"]
    return choose(name).name


def _claim(workdir: Path, config: ConfigDict, classes: list[str]) -> None:
    """Make the workdir this config's own, or check that it is."""
    if (workdir / "config.json").exists():
        config_lib.check_unchanged(config, workdir / "config.json")
        return
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            metrics.write_json(workdir / "classes.json", classes)
            metrics.write_json(workdir / "config.json", config_lib.to_json(config))
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


def _finished(workdir: Path, total_steps: int) -> dict[str, Any] | None:
    """Return the results of a run that already took its last step."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"step": None}
    return results if results["step"] == total_steps else None


def _summary(trainer: Trainer) -> str:
    config, dataset = trainer.config, trainer.dataset
    count = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    return (
        f"{config.model.name}: {count / 1e6:.2f} M parameters; {len(dataset.train)} training and "
        f"{len(dataset.eval)} evaluation images in {len(dataset.classes)} classes; "
        f"{trainer.total_steps} steps of {config.batch_size}, {trainer.order.steps_per_epoch} an "
        f"epoch; {trainer.mesh.size} {jax.devices()[0].device_kind} device(s), "
        f"{config_lib.compute_dtype(config.dtype).name} compute; images decoded by "
        f"{choose(config.data.decoder)}"
    )


def _draw(trainer: Trainer, results: dict[str, Any]) -> None:
    try:
        from deit_jax import picture
    except ModuleNotFoundError as error:
        log.warning("no picture: %s is missing; pip install 'deit_jax[viz]'", error.name)
        return
    picture.draw(trainer, results, trainer.workdir / "picture.png")
    log.info("picture of the run: %s", trainer.workdir / "picture.png")


def main(argv: list[str]) -> None:
    """Run `deit train`."""
    from absl import flags

    command = cli.Command("train", TRAIN_DOC)
    command.add_config(argv)
    flags.DEFINE_string(
        "workdir", "", "where the run is kept; a run found there goes on", flag_values=command.flags
    )
    own = {"flag_values": command.flags}
    flags.DEFINE_boolean("json", False, "print the results as JSON", **own)
    distributed.add_flags(command)
    cli.no_words(command.parse(argv, required=("config", "workdir")))
    workdir = Path(command.flags.workdir)
    distributed.join(command.flags)
    results = train(command.config, workdir)
    if jax.process_index() != 0:
        return
    if command.flags.json:
        json.dump(results, sys.stdout)
        print()
    else:
        print(f"{evaluate.table(results)}\nresults: {workdir / 'results.json'}")
        if (workdir / "picture.png").exists():
            print(f"picture: {workdir / 'picture.png'}")
