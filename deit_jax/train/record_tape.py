"""The command `deit tape`: record a label tape without a student, and look at one."""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from deit_jax import cli, compile_cache, distributed, interrupt, run_tape, sharding, train
from deit_jax import workdir as workdir_lib
from deit_jax.compiled_step import compiler_options
from deit_jax.data import pipeline
from deit_jax.errors import Interrupted, UserError
from deit_jax.inspect_data import train_batches
from deit_jax.interrupt import StopRequest
from deit_jax.step import Recipe, ask, model_inputs
from deit_jax.tape import Layout, Tape, pack
from deit_jax.teacher import load_teacher, teacher_config, weights_path

TAPE_DOC = """usage: deit tape record --config=FILE[:ARGS] --workdir=DIR [--tape=PATH]
       deit tape info [--json] PATH

record runs only the teacher, over the images that `deit train` with this config shows it, and
writes what it says to PATH (DIR/tape). A student trained with --config.teacher.tape=replay
--config.teacher.tape_path=PATH then needs no teacher. The same command goes on with a tape that
was cut off. A teacher that has no weights is trained first, in DIR/teacher.

  deit tape record --config=configs/quickstart.py --workdir=runs/quickstart
  deit tape info runs/quickstart/tape"""
FLUSH_S = 60


def main(argv: list[str]) -> None:
    """Run `deit tape`."""
    command = _command(argv)
    words = command.parse(argv)
    if not words or words[0] not in ("record", "info"):
        raise cli.UsageError("give `record` or `info`; see `deit tape --help`")
    if words[0] == "info":
        if len(words) != 2:
            raise cli.UsageError("give one PATH: deit tape info PATH")
        _print(info(words[1]), command.flags.json)
        return
    cli.no_words(words[1:])
    options = command.flags
    for name in ("config", "workdir"):
        if options[name].value in (None, ""):
            raise cli.UsageError(f"--{name}=… is missing; see `deit tape --help`")
    config = command.config
    with config.unlocked():
        config.teacher.tape = "record"
        if options.tape:
            config.teacher.tape_path = options.tape
    with distributed.joined(options), interrupt.listening() as stop:
        compile_cache.enable()
        path = record(config, options.workdir, stop)
        if jax.process_index() == 0:
            _print(info(path), options.json)


def _command(argv: list[str]) -> cli.Command:
    from absl import flags

    command = cli.Command("tape", TAPE_DOC)
    command.add_config(argv)
    own = {"flag_values": command.flags}
    flags.DEFINE_string("workdir", "", "the run that the tape is of; it need not have begun", **own)
    flags.DEFINE_string("tape", "", "where the tape is written, instead of WORKDIR/tape", **own)
    flags.DEFINE_boolean("json", False, "print one JSON object", **own)
    distributed.add_flags(command)
    return command


def info(path: str | Path) -> dict[str, Any]:
    """Return {"path", "kind", "steps", "recorded", "bytes", "fingerprint"} of a tape."""
    tape = Tape.open(Path(path))
    return {
        "path": str(path),
        "kind": tape.layout.kind,
        "top_k": tape.layout.top_k if tape.layout.kind == "soft" else None,
        "steps": len(tape),
        "recorded": int(np.sum(tape.recorded >= 0)),
        "bytes": sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file()),
        "fingerprint": tape.fingerprint,
    }


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        json.dump(facts, sys.stdout)
        print()
        return
    top = f", {facts['top_k']} classes of each answer" if facts["top_k"] else ""
    print(f"{facts['path']}: {facts['kind']} labels{top}")
    print(f"{facts['recorded']} of {facts['steps']} steps recorded, {facts['bytes'] / 1e6:.2f} MB")
    for key, value in facts["fingerprint"].items():
        print(f"  {key}: {value}")


def record(config, workdir: str | Path, stop: StopRequest | None = None) -> Path:
    """Write the teacher's answers to every step of a run; return where they are.

    Steps that the tape has are left alone. Raise Interrupted, all so far saved, if `stop` asks for
    it, UserError if the tape is another run's or cannot be written.
    """
    workdir, stop = Path(workdir), stop or StopRequest()
    config, dataset = train.prepared(config, workdir)
    weights = weights_path(config, workdir)
    with workdir_lib.held(workdir):
        if not config.teacher.weights:
            train.train(teacher_config(config), weights, stop)
        teacher = load_teacher(config, weights, dataset.classes)
        run = Labeller(config, dataset, teacher)
        recorder = run_tape.recorder(config, workdir, dataset, teacher)
        _record(run, recorder, stop)
    path = run_tape.tape_path(config, workdir)
    if len(run_holes := Tape.open(path).holes(0, run.steps, 0)):
        raise UserError(
            f"{path}: {len(run_holes)} of {run.steps} steps could not be written; make room, and "
            "run the same command again"
        )
    return path


class Labeller:
    """A run without a student: its views, and what the teacher says of them."""

    def __init__(self, config, dataset, teacher):
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh)
        self.layout = run_tape.layout_of(config, len(dataset.classes))
        self.steps = run_tape.run_steps(config, len(dataset.train))
        self.rows = sharding.local_rows(self.mesh, config.batch_size)
        self.batches = train_batches(config, dataset, self.rows)
        network, params = teacher
        places = sharding.state_shardings(self.mesh, params, network.model)
        self._params = jax.device_put(params, places)
        recipe = Recipe.from_config(config, len(dataset.classes), self.mesh)
        self._label = jax.jit(
            lambda *args: label(*args, teacher=network, recipe=recipe, layout=self.layout),
            out_shardings=sharding.replicated(self.mesh),
            compiler_options=compiler_options(self.mesh, config.train.deterministic),
        )

    def answers(self, first: int, stop: int):
        """Iterate over (step, answer on the devices), computed as they are asked for."""
        data = self.config.data
        loader = pipeline.load(self.batches, first, stop, data.threads, data.prefetch_batches)
        with contextlib.closing(loader):
            for step in range(first, stop):
                batch = sharding.to_devices(next(loader), self.mesh, self.config.batch_size)
                yield step, self._label(self._params, np.int32(step), batch)


def label(teacher_params, step, batch, *, teacher, recipe: Recipe, layout: Layout):
    """Return the tape's arrays for one step: what train_step's teacher says there.

    It is asked in the same parts, as a product of other shapes is rounded otherwise.
    """
    images, *_ = model_inputs(step, batch, recipe)
    return pack(ask(teacher, teacher_params, images, recipe), layout)


def _record(run: Labeller, recorder: run_tape.Recorder, stop: StopRequest) -> None:
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
