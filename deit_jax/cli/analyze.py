"""`deit analyze`: the figures of runs as JSON."""

import json
import logging
import sys

from deit_jax.analysis.choices import IMAGES
from deit_jax.cli.flags import (
    Command,
    add_checkpoint_flags,
    add_workdir_flags,
    no_words,
    write_output,
)

log = logging.getLogger("deit_jax")

ANALYZE_DOC = """usage: deit analyze --workdir=DIR[,DIR…] [--images=N] [--checkpoint=best] …

Print the figures of one or several runs as JSON: curves, accuracies, confusion, mistakes, cosines
of the two tokens, attention maps, disagreement. The runs may be under way. docs/report.md lists the
keys; `deit report` draws them.

  deit analyze --workdir=runs/quickstart --out=figures.json"""


def main(argv: list[str]) -> None:
    """Run `deit analyze`."""
    command = Command("analyze", ANALYZE_DOC)
    add_workdir_flags(command, IMAGES)
    add_checkpoint_flags(command)
    command.string("out", "", "write the JSON to this file")
    command.boolean("json", True, "what it prints in any case")
    no_words(command.parse(argv, required=("workdir",)))
    values = command.flags
    from deit_jax.analysis.figures import analyze

    text = (
        json.dumps(
            analyze(values.workdir, values.images, values.checkpoint, values.ema).figures,
            allow_nan=False,
        )
        + "\n"
    )
    if values.out:
        write_output(values.out, text)
        log.info("figures: %s", values.out)
    else:
        sys.stdout.write(text)
