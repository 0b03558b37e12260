"""`deit report`: the figures of runs as a page to read in a browser."""

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
from deit_jax.storage import to_path

log = logging.getLogger("deit_jax")

REPORT_DOC = """usage: deit report --workdir=DIR[,DIR…] [--images=N] [--checkpoint=best] …

Write DIR/report.html: curves, accuracies, confusion, mistakes, tokens, attention maps and config
of a run; of several runs side by side, comparison.html in the first DIR. --out names another file.
They may be under way. The page needs no other file and no network; docs/report.md explains it.

  deit report --workdir=runs/quickstart"""


def main(argv: list[str]) -> None:
    """Run `deit report`."""
    command = Command("report", REPORT_DOC)
    add_workdir_flags(command, IMAGES)
    add_checkpoint_flags(command)
    command.string("out", "", "where to write it, if not in the (first) run")
    command.boolean("json", False, "print where it is as JSON")
    no_words(command.parse(argv, required=("workdir",)))
    values = command.flags
    from deit_jax.analysis.figures import analyze
    from deit_jax.analysis.report.page import page

    found = analyze(values.workdir, values.images, values.checkpoint, values.ema)
    name = "report.html" if len(values.workdir) == 1 else "comparison.html"
    out = to_path(values.out or to_path(values.workdir[0]) / name)
    write_output(out, page(found))
    for run in found.figures["runs"]:
        for note in run["notes"].values():
            log.warning("%s: %s", run["name"], note)
    if values.json:
        json.dump({"out": str(out), "runs": [r["name"] for r in found.figures["runs"]]}, sys.stdout)
        print()
    else:
        print(f"report: {out}")
