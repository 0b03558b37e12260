"""`deit inspect`: draw training images as the model is given them."""

import json
import sys
from pathlib import Path

import jax

from deit_jax.analysis.input_sheet import COLUMNS, ROWS, draw, label_text, model_inputs
from deit_jax.cli.flags import Command, no_words
from deit_jax.data.sources.registry import open_dataset
from deit_jax.train.experiment import resolve
from deit_jax.train.validate import validate

INSPECT_DOC = """usage: deit inspect --config=FILE[:ARGS] --out=SHEET.png [--step=0]

Draw the first 64 images of a training step as the model is given them: cropped, augmented, erased
and mixed, each under its label or mixture of labels.

  deit inspect --config=configs/quickstart.py --out=sheet.png"""


def main(argv: list[str]) -> None:
    """Run `deit inspect`."""
    command = Command("inspect", INSPECT_DOC)
    command.add_config(argv)
    command.string("out", "", "the sheet, a .png, .jpg or .pdf")
    command.integer("step", 0, "a training step, counted from 0", 0)
    command.boolean("json", False, "print the labels as JSON")
    no_words(command.parse(argv, required=("config", "out")))
    config, values = command.required_config(), command.flags
    validate(config, num_devices=1)
    dataset = open_dataset(config.data)
    size = (len(dataset.classes), len(dataset.train))
    experiment = resolve(config, *size, devices=jax.devices()[:1], whole=True)
    images, targets = model_inputs(experiment, dataset, values.step, ROWS * COLUMNS)
    titles = [label_text(target, dataset.classes) for target in targets]
    heading = f"{config.data.source}: the model's input at step {values.step}"
    draw(images, titles, heading, Path(values.out))
    if values.json:
        json.dump({"out": values.out, "step": values.step, "labels": titles}, sys.stdout)
        print()
    else:
        print(f"{len(images)} training images of step {values.step}: {values.out}")
