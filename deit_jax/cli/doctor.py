"""`deit doctor`: what this machine has for training, and what is wrong with it."""

import dataclasses
import glob
import json
import sys

from deit_jax.cli import platforms
from deit_jax.cli.flags import Command, UsageError, no_words
from deit_jax.errors import UserError

DOCTOR_DOC = """usage: deit doctor [--workdir=DIR|gs://…] [--online] [--json]

Look at this machine as a training would find it: versions, devices that JAX sees and those that it
does not, image decoder and its speed, cores, memory, file systems, compiled programs, extras. Each
line that is not in order says what to do. The exit code is 1 if a training would fail. Paste the
output into a bug report.

  deit doctor
  deit doctor --workdir=gs://bucket/runs --online"""

SIGNS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


def main(argv: list[str]) -> None:
    """Run `deit doctor`."""
    command = Command("doctor", DOCTOR_DOC)
    command.string("workdir", "runs", "where runs would be kept")
    command.boolean("online", False, "also ask whether the hub and the workdir's bucket answer")
    command.boolean("json", False, "print one JSON object")
    no_words(command.parse(argv))
    values = command.flags
    if not values.workdir:
        raise UsageError("--workdir: name a folder")
    from deit_jax.doctor.diagnose import diagnose

    where = (values.workdir, values.online)
    found = diagnose(*where, platforms.missed_gpu(), _seen(), _cache)
    wrong = [finding for finding in found if finding.state == "wrong"]
    if values.json:
        said = {"ok": not wrong, "findings": [dataclasses.asdict(finding) for finding in found]}
        json.dump(said, sys.stdout)
        print()
    else:
        print("\n".join(line for finding in found for line in _lines(finding)))
    if wrong:
        topics = ", ".join(finding.topic for finding in wrong)
        raise UserError(f"a training would fail here: see {topics} above")


def _lines(finding) -> list[str]:
    lines = [f"{SIGNS[finding.state]} {finding.topic}: {finding.text}"]
    return lines + ([f"      -> {finding.remedy}"] if finding.remedy else [])


def _seen() -> dict[str, list[str]]:
    """Return the device files of this machine by kind."""
    kinds = (("nvidia", platforms.NVIDIA), ("tpu", platforms.TPUS))
    return {kind: sorted(p for one in each for p in glob.glob(one)) for kind, each in kinds}


def _cache() -> str | None:
    """Return where compiled programs are kept, None if they are not."""
    import jax

    from deit_jax.cli.compile_cache import default_folder

    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    try:
        return jax.config.values["jax_compilation_cache_dir"] or str(default_folder())
    except RuntimeError:  # there is no home
        return None
