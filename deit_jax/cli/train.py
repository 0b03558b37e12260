"""The command `deit train`: start or continue a run, reproduce one, replay one of its steps."""

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from deit_jax import (
    cli,
    compile_cache,
    distributed,
    evaluate,
    interrupt,
    replay,
    run_tape,
    train,
)
from deit_jax import config as config_lib
from deit_jax import workdir as workdir_lib
from deit_jax.errors import UserError
from deit_jax.teacher import load_teacher, weights_path

TRAIN_DOC = """usage: deit train --config=FILE[:ARGS] --workdir=DIR [--config.KEY=VALUE ...]

Train what the config describes. The same command continues a run that stopped, to the same bits.
It may be killed at any moment; SIGTERM and SIGINT save first and end it with exit code 75.
configs/base.py lists every key. A teacher that has no weights is trained first, in DIR/teacher.

  deit train --config=configs/quickstart.py --workdir=runs/quickstart
  deit train --reproduce=DIR [--workdir=NEW]                 the run in DIR anew, from its records
  deit train --config=… --workdir=DIR --replay-step=N        dump step N into DIR/replay
  deit train --config=… --workdir=DIR --allow-config-change=KEY,…"""


def main(argv: list[str]) -> None:
    """Run `deit train`."""
    command = _command(argv)
    again = any(word.partition("=")[0].lstrip("-") == "reproduce" for word in argv)
    cli.no_words(command.parse(argv, required=() if again else ("config", "workdir")))
    options = command.flags
    with distributed.joined(options):
        compile_cache.enable()
        _train(options, command, again)


def _train(options, command, again: bool) -> None:
    if again:
        if options["config"].value is not None:
            raise cli.UsageError("--reproduce takes the config from the run: leave out --config")
        config = workdir_lib.recorded_config(Path(options.reproduce))
        workdir = Path(options.workdir or f"{options.reproduce.rstrip('/')}-reproduced")
    else:
        config, workdir = command.config, Path(options.workdir)
    if options.replay_step is not None:
        print(f"step {options.replay_step}: {replay_step(config, workdir, options.replay_step)}")
        return
    with interrupt.listening() as stop:
        results = train.train(config, workdir, stop, options.allow_config_change)
    if jax.process_index() != 0:
        return
    if options.json:
        json.dump(results, sys.stdout)
        print()
    else:
        print(f"{evaluate.table(results)}\nresults: {workdir / 'results.json'}")
        if (workdir / "picture.png").exists():
            print(f"picture: {workdir / 'picture.png'}")


def _command(argv: list[str]) -> cli.Command:
    from absl import flags

    command = cli.Command("train", TRAIN_DOC)
    command.add_config(argv)
    own = {"flag_values": command.flags}
    flags.DEFINE_string("workdir", "", "where the run is kept; a run found there goes on", **own)
    flags.DEFINE_boolean("json", False, "print the results as JSON", **own)
    flags.DEFINE_list(
        "allow_config_change", [], "fields that may differ from the run's, as optim.lr,seed", **own
    )
    flags.DEFINE_string("reproduce", "", "train the run in this directory anew, elsewhere", **own)
    flags.DEFINE_integer(
        "replay_step", None, "compute only this step again and dump it", lower_bound=1, **own
    )
    distributed.add_flags(command)
    return command


def replay_step(config: ConfigDict, workdir: str | Path, number: int) -> Path:
    """Compute one step of a run again, from the checkpoint before it; return where it is dumped.

    The run may be under way: nothing of it is touched.
    """
    workdir = Path(workdir)
    config, dataset = train.prepared(config, workdir)
    if jax.process_count() > 1:
        raise UserError("--replay-step: leave out --multihost; one process computes the same step")
    if not (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir}: no run is there to replay a step of")
    config_lib.check_unchanged(config, workdir / "config.json")
    weights, teacher = weights_path(config, workdir), None
    if weights:
        teacher = load_teacher(config, weights, dataset.classes)
    start = workdir_lib.starting_weights(config, workdir, len(dataset.classes))
    tape = None  # nor is a step that is looked at recorded
    if config.teacher.tape == "replay":
        tape = run_tape.open_tape(config, workdir, dataset, teacher)
    return replay.replay(
        train.Trainer(config, workdir, dataset, teacher, start, read_only=True, tape=tape), number
    )
