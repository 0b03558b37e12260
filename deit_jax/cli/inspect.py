"""`deit inspect`: what a config's data is, and how the model is given it."""

import json
import sys
from pathlib import PurePath

from deit_jax.cli.flags import Command, UsageError, no_words
from deit_jax.config.serialize import from_json
from deit_jax.errors import UserError
from deit_jax.storage import to_path, write_json
from deit_jax.workdir import records

INSPECT_DOC = """usage: deit inspect --config=FILE[:ARGS] [--check] [--out=SHEET.png [--step=0]]
       deit inspect --workdir=DIR [--check] [--out=SHEET.png [--step=0]]

Say what is understood of a data set: images by class and part, sizes, formats, what is left out,
and which images are there twice, above all those that are both trained and evaluated on. --check
reads every image of a large data set too. --card writes it all as JSON; with --workdir it goes into
the run's report. --out draws the first 64 images of a training step as the model is given them:
cropped, augmented, erased and mixed, each under its label or mixture of labels.

  deit inspect --config=configs/quickstart.py --out=sheet.png
  deit inspect --config=configs/quickstart.py --config.data.source=folder:images --check"""


def main(argv: list[str]) -> None:
    """Run `deit inspect`."""
    command = Command("inspect", INSPECT_DOC)
    command.add_config(argv)
    command.string("workdir", "", "inspect the data of the run in it")
    command.boolean("check", False, "read every image, however many there are")
    command.string("card", "", "write what was found into this file, as JSON")
    command.string("out", "", "the sheet, a .png, .jpg or .pdf")
    command.integer("step", 0, "a training step, counted from 0", 0)
    command.boolean("json", False, "print one JSON object")
    no_words(command.parse(argv))
    values, config = command.flags, command.config
    if (config is None) == (not values.workdir):
        raise UsageError("give either --config=FILE or --workdir=DIR")
    import jax

    from deit_jax.data import card
    from deit_jax.data.sources.registry import open_dataset
    from deit_jax.data.view import reading_of
    from deit_jax.train.experiment import resolve
    from deit_jax.train.validate import validate

    if config is None:
        config = from_json(records.config_of(to_path(values.workdir)))
    validate(config, num_devices=1)
    dataset = open_dataset(config.data)
    found = card.make(dataset, config.data.source, values.check, reading_of(config.data))
    path = values.card or (values.workdir and to_path(values.workdir) / records.DATA_CARD)
    if path:
        _write(found, to_path(path))
    if values.out:
        size = (len(dataset.classes), len(dataset.train))
        experiment = resolve(config, *size, devices=jax.devices()[:1], whole=True)
        found |= {"out": values.out, "step": values.step}
        found["labels"] = _draw(experiment, dataset, values.step, values.out)
    if values.json:
        json.dump(found, sys.stdout)
        print()
        return
    for line in card.lines(found):
        print(line)
    if values.out:
        print(f"{len(found['labels'])} training images of step {values.step}: {values.out}")


def _write(found, path: PurePath) -> None:
    try:
        write_json(path, found)
    except OSError as error:
        raise UserError(f"--card={path}: cannot be written ({error.strerror})") from error


def _draw(experiment, dataset, step: int, out: str) -> list[str]:
    """Draw a sheet of a step's images; return their titles."""
    import numpy as np

    from deit_jax.analysis.input_sheet import COLUMNS, ROWS, draw, label_text, model_inputs

    images, targets = model_inputs(experiment, dataset, step, ROWS * COLUMNS)
    if experiment.settings.several:  # the labels of both images of a mixture, all of them wholly
        targets = np.sign(targets)
    titles = [label_text(target, dataset.classes) for target in targets]
    draw(
        images, titles, f"{experiment.data.source}: the model's input at step {step}", to_path(out)
    )
    return titles
