"""`deit train`: start or continue a run, reproduce one, replay one of its steps."""

import json
import sys

from deit_jax.cli.flags import Command, UsageError, add_process_flags, no_words
from deit_jax.storage import exists, to_path

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
    no_words(command.parse(argv, required=() if again else ("config", "workdir")))
    options = command.flags
    if again and options["config"].value is not None:
        raise UsageError("--reproduce takes the config from the run: leave out --config")
    from deit_jax.cli import compile_cache
    from deit_jax.parallel import processes

    with processes.joined(options):
        compile_cache.enable()
        _train(options, command, again)


def _train(options, command: Command, again: bool) -> None:
    import jax

    from deit_jax.parallel import signals
    from deit_jax.train import run
    from deit_jax.train.evaluator import table
    from deit_jax.train.experiment import prepare
    from deit_jax.train.step_dump import dump_step
    from deit_jax.workdir import directory

    if again:
        config = directory.recorded_config(to_path(options.reproduce))
        workdir = to_path(options.workdir or f"{options.reproduce.rstrip('/')}-reproduced")
    else:
        config, workdir = command.required_config(), to_path(options.workdir)
    if options.replay_step is not None:
        dumped = dump_step(*prepare(config, workdir), workdir, options.replay_step)
        print(f"step {options.replay_step}: {dumped}")
        return
    with signals.listening() as stop:
        results = run.train(config, workdir, stop, options.allow_config_change)
    if jax.process_index() != 0:
        return
    if options.json:
        json.dump(results, sys.stdout)
        print()
    else:
        lines = filter(None, (table(results), f"results: {workdir / 'results.json'}"))
        print("\n".join(lines))
        if exists(workdir / "picture.png"):
            print(f"picture: {workdir / 'picture.png'}")


def _command(argv: list[str]) -> Command:
    command = Command("train", TRAIN_DOC)
    command.add_config(argv)
    command.string("workdir", "", "where the run is kept; a run found there goes on")
    command.boolean("json", False, "print the results as JSON")
    command.words(
        "allow_config_change", [], "fields that may differ from the run's, as optim.lr,seed"
    )
    command.string("reproduce", "", "train the run in this directory anew, elsewhere")
    command.integer("replay_step", None, "compute only this step again and dump it", lower_bound=1)
    add_process_flags(command)
    return command
