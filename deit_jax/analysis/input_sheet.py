"""A sheet of augmented training images, for people to look at; the command `deit inspect`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from deit_jax import cli, erasing, mixing, step
from deit_jax import config as config_lib
from deit_jax.data import pipeline
from deit_jax.data.sources import Dataset, open_dataset
from deit_jax.errors import UserError

INSPECT_DOC = """usage: deit inspect --config=FILE[:ARGS] --out=SHEET.png [--step=0]

Draw the first 64 images of a training step as the model is given them: cropped, augmented, erased
and mixed, each under its label or mixture of labels.

  deit inspect --config=configs/quickstart.py --out=sheet.png"""
ROWS = COLUMNS = 8


def train_batches(config, dataset: Dataset, rows: Sequence[int]) -> pipeline.TrainBatches:
    """Return the batches that `deit train` would load, or some rows of them."""
    order = pipeline.EpochOrder(
        len(dataset.train), config.batch_size, config.augment.repeats, config.seed
    )
    return pipeline.TrainBatches(
        dataset.train,
        order,
        config.augment,
        config_lib.image_size(config.model),
        rows,
        config.data.decoder,
        config.data.skip_unreadable,
    )


def model_inputs(config, dataset: Dataset, number: int, count: int) -> tuple[np.ndarray, ...]:
    """Return the first `count` examples of a step: uint8 images [n H W 3] and targets [n K].

    They are what train_step hands to the model there, back in pixels. The targets are not smoothed,
    so that they tell the shares in a mixture.
    """
    recipe = step.Recipe.from_config(config, len(dataset.classes))
    group = config.mixing.group_size
    needed = min(-(-count // group) * group, config.batch_size)  # partners are of the same group
    batch = train_batches(config, dataset, range(needed))(number)
    # Random numbers are drawn for the whole batch at once: the other examples' images are black.
    rest = config.batch_size - needed
    images = np.pad(batch["image"], ((0, rest), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(batch["label"], (0, rest))

    @jax.jit
    def inputs(images, labels, number):
        # As in step.train_step.
        key = jax.random.fold_in(jax.random.key(recipe.seed), number)
        key_erase, key_mix, _ = jax.random.split(key, 3)
        images = step.normalise(images, recipe.mean, recipe.std)
        images = erasing.random_erase(key_erase, images, recipe.erase_prob)
        images, targets = mixing.mix(
            key_mix, images, labels, recipe.num_classes, 0.0, recipe.mixing
        )
        return images[:count], targets[:count]

    images, targets = jax.device_get(inputs(images, labels, number))
    pixels = 255 * (images * np.array(recipe.std) + np.array(recipe.mean))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), targets


def label_text(target: np.ndarray, classes: list[str]) -> str:
    """Return `cat`, or `cat 0.70 + dog 0.30` for a mixture, without shares below 0.005."""
    shares = [(float(target[i]), classes[i]) for i in np.argsort(-target) if target[i] >= 0.005]
    if len(shares) == 1:
        return shares[0][1]
    return " + ".join(f"{name} {share:.2f}" for share, name in shares)


def draw(images: np.ndarray, titles: list[str], heading: str, path: Path) -> None:
    """Write a sheet of images under their titles as a PNG; raise UserError if it cannot be."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is missing; pip install 'deit_jax[viz]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(ROWS, COLUMNS, figsize=(16, 17.5), layout="constrained")
    for panel in panels.ravel():
        panel.axis("off")
    for panel, image, title in zip(panels.ravel(), images, titles, strict=False):
        panel.imshow(image)
        parts = [part if len(part) < 26 else f"{part[:24]}…" for part in title.split(" + ")]
        panel.set_title(" +\n".join(parts), fontsize=8)
    figure.suptitle(heading)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out={path}: cannot be written ({reason})") from error
    finally:
        plt.close(figure)


def main(argv: list[str]) -> None:
    """Run `deit inspect`."""
    from absl import flags

    command = cli.Command("inspect", INSPECT_DOC)
    command.add_config(argv)
    own = {"flag_values": command.flags}
    flags.DEFINE_string("out", "", "the sheet, a .png, .jpg or .pdf", **own)
    flags.DEFINE_integer("step", 0, "a training step, counted from 0", 0, **own)
    flags.DEFINE_boolean("json", False, "print the labels as JSON", **own)
    cli.no_words(command.parse(argv, required=("config", "out")))
    config, values = command.config, command.flags
    config_lib.validate(config, num_devices=1)
    dataset = open_dataset(config.data)
    images, targets = model_inputs(config, dataset, values.step, ROWS * COLUMNS)
    titles = [label_text(target, dataset.classes) for target in targets]
    heading = f"{config.data.source}: the model's input at step {values.step}"
    draw(images, titles, heading, Path(values.out))
    if values.json:
        json.dump({"out": values.out, "step": values.step, "labels": titles}, sys.stdout)
        print()
    else:
        print(f"{len(images)} training images of step {values.step}: {values.out}")
