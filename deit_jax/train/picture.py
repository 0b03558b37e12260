"""The picture that a run ends with: its curves, and test images with the answers to them."""

import functools
import io
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from deit_jax.data.channels import as_colours
from deit_jax.parallel.sharding import replicated
from deit_jax.step.eval_step import all_logits
from deit_jax.storage import backend, read_lines
from deit_jax.train.evaluator import NAMES
from deit_jax.train.lettering import spelled, style

matplotlib.use("Agg")

COLOURS = {"teacher": "#7f7f7f", "cls": "#1f77b4", "dist": "#d62728", "fused": "#2ca02c"}
ROWS, COLUMNS = 4, 8


def draw(trainer, results: dict[str, Any], path: PurePath) -> None:
    """Write the picture of a finished Trainer's run as a PNG.

    Every process of the run must call this, since all of them compute the answers; one writes.
    """
    figure = plt.figure(figsize=(16, 7.5), layout="constrained")
    curves, grid = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.6))[0]
    _draw_curves(curves.subplots(2, 1, sharex=True), trainer, results)
    _draw_grid(grid, trainer)
    heading = spelled(f"{trainer.experiment.name} on {trainer.experiment.data.source}")
    figure.suptitle(heading, **style(heading))
    if jax.process_index() == 0:
        content = io.BytesIO()
        figure.savefig(content, dpi=100)
        backend(path).write(path, content.getvalue())
    plt.close(figure)


def _draw_curves(axes, trainer, results: dict[str, Any]) -> None:
    records = read_lines(trainer.workdir / "metrics.jsonl")
    (accuracy, loss), (figure, name) = axes, trainer.figure
    for head in ("cls", "dist", "fused"):
        points = [(r["step"], r[k]) for r in records if (k := f"eval/{head}.{figure}") in r]
        if points:
            accuracy.plot(*zip(*points, strict=True), color=COLOURS[head], label=NAMES[head])
    if "teacher" in results:
        score = results["teacher"][figure]
        accuracy.axhline(score, color=COLOURS["teacher"], linestyle="--", label="teacher")
    accuracy.set(ylabel=f"{name} on held-out images, %", ylim=(None, 101))
    for key in ("loss", "loss_label", "loss_teacher", "loss_feature"):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            loss.plot(*zip(*points, strict=True), label=key.replace("_", ", "))
    loss.set(xlabel="step", ylabel="training loss, nats")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def _draw_grid(figure, trainer) -> None:
    """Show evenly spaced test images under what the teacher and the student say of them."""
    source, classes = trainer.dataset.eval, trainer.dataset.classes
    chosen = np.unique(np.linspace(0, len(source) - 1, ROWS * COLUMNS).astype(int))
    read = [found for i in chosen if (found := trainer.evaluator.read(int(i)))]
    if not read:  # none of these few can be read, and the run leaves such images out
        return
    images = np.stack([image for image, _ in read])
    answers = answer(trainer, images)
    names = {"teacher": "teacher", "student": "student" if trainer.teacher else "model"}
    panels = figure.subplots(ROWS, COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for i, (panel, (_, own)) in enumerate(zip(panels, read, strict=False)):
        panel.imshow(as_colours(images[i]))
        said = {who: labels[i] for who, labels in answers.items()}
        right = all(np.array_equal(label, own) for label in said.values())
        lines = [f"{names[who]}: {_named(label, classes)}" for who, label in said.items()]
        text, color = "\n".join(lines), "black" if right else "#d62728"
        panel.set_title(text, fontsize=7, color=color, **style(text))
    figure.suptitle("held-out images; red: an answer is wrong", fontsize=9)


def _named(label: np.ndarray | np.generic, classes: Sequence[str]) -> str:
    """Return the name of a label, or those of several, shortened."""
    if label.ndim == 0:
        return spelled(classes[int(label)], 14)
    names = ", ".join(classes[i] for i in np.flatnonzero(label).tolist())
    return spelled(names or "none", 22)


def answer(trainer, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the labels that teacher (if there is one) and student give to uint8 images.

    Where images have several, those whose sigmoid is above a half, [n K].
    """
    experiment, everywhere = trainer.experiment, replicated(trainer.experiment.mesh)
    several = experiment.settings.several

    # Labels that every process has whole: logits would be split as the heads' weights are.
    @functools.partial(jax.jit, out_shardings=everywhere)
    def labels(variables, teacher_params, images):
        logits = all_logits(
            variables,
            teacher_params,
            images,
            model=experiment.model,
            teacher=trainer.teacher,
            mean=experiment.settings.mean,
            std=experiment.settings.std,
        )
        return {name: x > 0 if several else x.argmax(-1) for name, x in logits.items()}

    placed = jax.device_put(images, everywhere)
    found = jax.device_get(labels(trainer.state.variables, trainer.teacher_params, placed))
    teacher = {"teacher": found["teacher"]} if "teacher" in found else {}
    return {**teacher, "student": found["fused"]}
