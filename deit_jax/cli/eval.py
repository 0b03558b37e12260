"""`deit eval`: top-1 and top-5 of each head on a data set."""

import json
import sys
from pathlib import Path

from deit_jax.analysis.evaluate import evaluate_run
from deit_jax.cli.flags import Command, UsageError, no_words
from deit_jax.config.serialize import from_json
from deit_jax.train.evaluator import table
from deit_jax.workdir import records

EVAL_DOC = """usage: deit eval --workdir=DIR [--config=FILE[:ARGS]]
       deit eval --weights=W --config=FILE[:ARGS] [--model=NAME]

Evaluate a trained model on the config's evaluation data, every example once; without --config, on
those that the run was trained with. W is the workdir of a run, a .pth or .safetensors file, a
Hugging Face or timm folder, or hf-hub:ORG/NAME.

  deit eval --workdir=runs/quickstart
  deit eval --workdir=runs/deit_s --config=configs/deit.py --config.data.dir=/elsewhere"""


def main(argv: list[str]) -> None:
    """Run `deit eval`."""
    command = Command("eval", EVAL_DOC)
    command.add_config(argv)
    command.string("workdir", "", "evaluate the run in it")
    command.string("weights", "", "evaluate these weights")
    command.string("model", None, "name of the weights' model")
    command.boolean("json", False, "print one JSON object")
    no_words(command.parse(argv))
    values = command.flags
    if bool(values.workdir) == bool(values.weights):
        raise UsageError("give either --workdir=DIR or --weights=W")
    config = command.config
    if config is None:
        if values.weights:
            raise UsageError("--weights=W needs the data: --config=FILE")
        config = from_json(records.config_of(Path(values.workdir)))
    results = evaluate_run(config, values.workdir or values.weights, values.model)
    if values.json:
        json.dump(results, sys.stdout)
        print()
    else:
        print(table(results))
