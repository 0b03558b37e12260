"""`deit tape`: record label tapes without a student, join, check and look at them."""

import json
import re
import sys
from typing import Any

from deit_jax.cli.flags import Command, UsageError, add_process_flags
from deit_jax.errors import UserError
from deit_jax.train.tape import LEAST, SAMPLES

TAPE_DOC = """usage: deit tape record --config=FILE[:ARGS] --workdir=DIR [--tape=PATH]
       deit tape record --config=FILE[:ARGS] --steps=A:B --tape=PATH
       deit tape join DST SRC…
       deit tape check PATH --config=FILE[:ARGS] [--samples=N] [--least=PERCENT]
       deit tape info PATH

record runs only the teacher, over the images that `deit train` with this config shows it, and
writes what it says to PATH (DIR/tape). A student trained with --config.teacher.tape=replay
--config.teacher.tape_path=PATH then needs no teacher. The same command goes on with a tape that
was cut off. A teacher that has no weights is trained first, in DIR/teacher.

With --steps it records the steps A to B - 1 (A: to the end), of a teacher that has weights. Any
number of machines may record parts at once, each a tape of its own; join makes one tape of them.
info says which steps are missing.

check asks the config's teacher, which has weights, about N steps of a tape, spread evenly, and says
how many of its answers are those on the tape. It fails below --least, and for a tape that says it
is of another teacher.

  deit tape record --config=configs/quickstart.py --workdir=runs/quickstart
  deit tape info runs/quickstart/tape"""

# Which flags each takes besides --debug and --json; fields of a config and processes go together.
FLAGS = {
    "record": {"config", "workdir", "tape", "steps"},
    "join": set(),
    "check": {"config", "samples", "least"},
    "info": set(),
}
MANY = 20  # ranges of steps that a line names


def main(argv: list[str]) -> None:
    """Run `deit tape`."""
    command = _command(argv)
    words = command.parse(argv)
    if not words or words[0] not in FLAGS:
        raise UsageError(f"give {', '.join(FLAGS)}; see `deit tape --help`")
    name, *places = words
    _check_flags(command, name)
    run = {"record": _record, "join": _join, "check": _check, "info": _info}
    run[name](command, places)


# What a kind keeps; of others both answers and features.
WHAT = {"hard": "labels", "soft": "kept log-probabilities", "feature": "features"}


def _command(argv: list[str]) -> Command:
    command = Command("tape", TAPE_DOC)
    command.add_config(argv)
    command.string("workdir", "", "the run that the tape is of; it need not have begun")
    command.string("tape", "", "where the tape is written, instead of WORKDIR/tape")
    command.string("steps", "", "A:B, record only the steps A to B - 1")
    command.integer("samples", SAMPLES, "how many steps are checked, at most", lower_bound=1)
    command.number("least", LEAST, "percent of answers that must be the same", 0, 100)
    command.boolean("json", False, "print one JSON object")
    add_process_flags(command)
    return command


def _check_flags(command: Command, name: str) -> None:
    """Raise UsageError for a flag that one of the others takes."""
    flags = command.flags
    several = ("multihost", "coordinator", "num_processes", "process_id")
    for flag in (*dict.fromkeys(f for known in FLAGS.values() for f in known), *several):
        takes = FLAGS[name] | (set(several) if name == "record" else set())
        if flags[flag].present and flag not in takes:
            raise UsageError(f"--{flag}: `deit tape {name}` does not take it; see --help")


def _record(command: Command, places: list[str]) -> None:
    _count(places, 0, 0, "record")
    options = command.flags
    part = _part(options.steps)
    if part is None and not options.workdir:
        raise UsageError("--workdir=… is missing; see `deit tape --help`")
    config = command.required_config()
    import jax

    from deit_jax.cli import compile_cache
    from deit_jax.parallel import processes, signals
    from deit_jax.train.record_tape import info, record

    with config.unlocked():
        config.teacher.tape = "record"
        if options.tape:
            config.teacher.tape_path = options.tape
    with processes.joined(options), signals.listening() as stop:
        compile_cache.enable()
        path = record(config, options.workdir or None, stop, part)
        if jax.process_index() == 0:
            _print(info(path), options.json)


def _part(text: str) -> tuple[int, int | None] | None:
    """Return what --steps=A:B means, None without it."""
    if not text:
        return None
    if not (match := re.fullmatch(r"(\d*):(\d*)", text)):
        raise UsageError(f"--steps={text}: give A:B, two steps that count from 0, as in 0:1000")
    return int(match[1] or 0), int(match[2]) if match[2] else None


def _join(command: Command, places: list[str]) -> None:
    _count(places, 2, None, "join DST SRC…")
    from deit_jax.train.record_tape import info
    from deit_jax.train.tape.join import join

    _print(info(join(places[0], places[1:])), command.flags.json)


def _check(command: Command, places: list[str]) -> None:
    _count(places, 1, 1, "check PATH --config=FILE[:ARGS]")
    options = command.flags
    config = command.required_config()
    from deit_jax.cli import compile_cache
    from deit_jax.train.tape.check import check

    compile_cache.enable()
    facts = check(places[0], config, options.samples, options.least)
    if options.json:
        _print(facts, as_json=True)
    else:
        what = WHAT.get(facts["kind"], "answers and features")
        most = facts["largest_difference"]
        apart = "" if most is None else f"; the largest difference of one is {most:.3g}"
        print(
            f"{facts['path']}: {facts['agreement']:.2f} % of the {what} of "
            f"{len(facts['compared'])} steps are the teacher's{apart}"
        )
    if not facts["passed"]:
        raise UserError(f"{facts['path']}: {facts['reason']}")


def _info(command: Command, places: list[str]) -> None:
    _count(places, 1, 1, "info PATH")
    from deit_jax.train.record_tape import info

    _print(info(places[0]), command.flags.json)


def _count(words: list[str], least: int, most: int | None, usage: str) -> None:
    if most is not None and len(words) > most:
        raise UsageError(
            f"unexpected argument {words[most]!r}; give deit tape {usage}, flags as --name=value"
        )
    if len(words) < least:
        raise UsageError(f"give deit tape {usage}")


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        json.dump(facts, sys.stdout)
        print()
        return
    top = f", {facts['top_k']} classes of each answer" if facts["top_k"] else ""
    kept = WHAT.get(facts["kind"], "answers and features")
    print(f"{facts['path']}: {kept}{top}, written by {facts['written_by']}")
    print(f"{facts['recorded']} of {facts['steps']} steps recorded, {facts['bytes'] / 1e6:.2f} MB")
    if missing := facts["missing"]:
        more = f" and {len(missing) - MANY} more" if len(missing) > MANY else ""
        ranges = ", ".join(f"{first}:{stop}" for first, stop in missing[:MANY])
        print(f"missing steps: {ranges}{more}")
    for key, value in facts["fingerprint"].items():
        print(f"  {key}: {value}")
