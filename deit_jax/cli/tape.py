"""`deit tape`: record a label tape without a student, and look at one."""

import json
import sys
from typing import Any

import jax

from deit_jax.cli import compile_cache
from deit_jax.cli.flags import Command, UsageError, add_process_flags, no_words
from deit_jax.parallel import processes, signals
from deit_jax.train.record_tape import info, record

TAPE_DOC = """usage: deit tape record --config=FILE[:ARGS] --workdir=DIR [--tape=PATH]
       deit tape info [--json] PATH

record runs only the teacher, over the images that `deit train` with this config shows it, and
writes what it says to PATH (DIR/tape). A student trained with --config.teacher.tape=replay
--config.teacher.tape_path=PATH then needs no teacher. The same command goes on with a tape that
was cut off. A teacher that has no weights is trained first, in DIR/teacher.

  deit tape record --config=configs/quickstart.py --workdir=runs/quickstart
  deit tape info runs/quickstart/tape"""


def main(argv: list[str]) -> None:
    """Run `deit tape`."""
    command = _command(argv)
    words = command.parse(argv)
    if not words or words[0] not in ("record", "info"):
        raise UsageError("give `record` or `info`; see `deit tape --help`")
    if words[0] == "info":
        if len(words) != 2:
            raise UsageError("give one PATH: deit tape info PATH")
        _print(info(words[1]), command.flags.json)
        return
    no_words(words[1:])
    options = command.flags
    for name in ("config", "workdir"):
        if options[name].value in (None, ""):
            raise UsageError(f"--{name}=… is missing; see `deit tape --help`")
    config = command.required_config()
    with config.unlocked():
        config.teacher.tape = "record"
        if options.tape:
            config.teacher.tape_path = options.tape
    with processes.joined(options), signals.listening() as stop:
        compile_cache.enable()
        path = record(config, options.workdir, stop)
        if jax.process_index() == 0:
            _print(info(path), options.json)


def _command(argv: list[str]) -> Command:
    command = Command("tape", TAPE_DOC)
    command.add_config(argv)
    command.string("workdir", "", "the run that the tape is of; it need not have begun")
    command.string("tape", "", "where the tape is written, instead of WORKDIR/tape")
    command.boolean("json", False, "print one JSON object")
    add_process_flags(command)
    return command


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
