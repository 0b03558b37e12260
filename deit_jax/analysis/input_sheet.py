"""A sheet of training images as the model is given them, for people to look at."""

import dataclasses
import io
from pathlib import PurePath

import jax
import numpy as np

from deit_jax.data.channels import as_colours
from deit_jax.data.sources.base import Dataset
from deit_jax.errors import UserError
from deit_jax.step import train_step
from deit_jax.storage import backend
from deit_jax.train.experiment import Experiment

ROWS = COLUMNS = 8


def model_inputs(
    experiment: Experiment, dataset: Dataset, number: int, count: int
) -> tuple[np.ndarray, ...]:
    """Return the first `count` examples of a step: uint8 images [n H W C] and targets [n K].

    They are what train_step hands to the model there, back in pixels. The targets are not smoothed,
    so that they tell the shares in a mixture.
    """
    settings = dataclasses.replace(experiment.settings, smoothing=0.0)
    group = settings.mixing.group_size
    needed = min(-(-count // group) * group, experiment.batch_size)  # partners are of one group
    batch = experiment.batches(dataset, range(needed))(number)
    # Random numbers are drawn for the whole batch at once: the other examples' images are black.
    rest = experiment.batch_size - needed
    batch["image"] = np.pad(batch["image"], ((0, rest), (0, 0), (0, 0), (0, 0)))
    labels = batch["label"]
    batch["label"] = np.pad(labels, [(0, rest), *[(0, 0)] * (labels.ndim - 1)])

    @jax.jit
    def inputs(batch, number):
        images, targets, _ = train_step.model_inputs(number, batch, settings)
        return images[:count], targets[:count]

    images, targets = jax.device_get(inputs(batch, number))
    pixels = 255 * (images * np.array(settings.std) + np.array(settings.mean))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), targets


def label_text(target: np.ndarray, classes: list[str]) -> str:
    """Return `cat`, or `cat 0.70 + dog 0.30` for a mixture, without shares below 0.005.

    Of several labels an image all are told, `cat + dog`; `none` without any.
    """
    shares = [(float(target[i]), classes[i]) for i in np.argsort(-target) if target[i] >= 0.005]
    if not shares:
        return "none"
    if all(share > 0.995 for share, _ in shares):
        return " + ".join(name for _, name in shares)
    if len(shares) == 1 and target.sum() > 0.995:
        return shares[0][1]
    return " + ".join(f"{name} {share:.2f}" for share, name in shares)


def draw(images: np.ndarray, titles: list[str], heading: str, path: PurePath) -> None:
    """Write a sheet of images under their titles as a PNG; raise UserError if it cannot be."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is missing; pip install 'deit_jax[viz]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from deit_jax.train.lettering import spelled, style

    figure, panels = plt.subplots(ROWS, COLUMNS, figsize=(16, 17.5), layout="constrained")
    for panel in panels.ravel():
        panel.axis("off")
    for panel, image, title in zip(panels.ravel(), images, titles, strict=False):
        panel.imshow(as_colours(image))
        names = title.split(" + ")
        text = " +\n".join(s if len(s := spelled(n)) < 26 else f"{spelled(n, 24)}…" for n in names)
        panel.set_title(text, fontsize=8, **style(text))
    heading = spelled(heading)
    figure.suptitle(heading, **style(heading))
    try:
        content = io.BytesIO()
        figure.savefig(content, dpi=100, format=path.suffix[1:] or "png")
        backend(path).write(path, content.getvalue())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out={path}: cannot be written ({reason})") from error
    finally:
        plt.close(figure)
