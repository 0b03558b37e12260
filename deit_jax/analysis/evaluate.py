"""The accuracy of trained weights on a config's data."""

import dataclasses
import logging
from collections.abc import Callable, Collection
from typing import Any

import jax

from deit_jax.data.sources.base import Dataset
from deit_jax.data.sources.registry import has_labels, open_dataset
from deit_jax.data.view import reading_of
from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.shapes import per_channel, simplest
from deit_jax.step.committee import shardings
from deit_jax.train import memory
from deit_jax.train.evaluator import Evaluator
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.teacher_spec import teacher_spec
from deit_jax.weights.fit import LoadedWeights, in_order
from deit_jax.weights.load import load_variables
from deit_jax.workdir import held_out
from deit_jax.workdir.which import LATEST

log = logging.getLogger("deit_jax")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Weights and the data that they are evaluated on.

    The heads of `opened` have the order of the data's classes, and its mean, std, crop and way of
    reading are those of this evaluation, as are the fields of `data`, a config's.
    """

    source: str
    opened: LoadedWeights
    data: Any
    dataset: Dataset
    mesh: Any
    batch_size: int
    ema: bool = False  # whether the weights are a run's moving average

    def input(self) -> dict[str, Any]:
        """Return what the model is given of an image."""
        reading, size = self.opened.reading, self.opened.image_size
        return {
            "image_size": list(size) if isinstance(size, tuple) else size,
            "resize": reading.resize,
            "crop_ratio": self.opened.crop_ratio if reading.resize == "crop" else None,
            "mean": list(self.data.mean),
            "std": list(self.data.std),
        }

    def results(self, watch: Callable | None = None) -> dict[str, Any]:
        """Return the figures of each head, of a run's moving average and of its teacher.

        `watch` is called with the model's answers to each batch; see Evaluator.model.
        """
        opened = self.opened
        evaluator = Evaluator(
            self.dataset.eval,
            self.data,
            self.batch_size,
            opened.image_size,
            self.mesh,
            classes=self.dataset.classes,
        )
        variables = self._place(opened.variables, opened.model)
        evaluator.held = memory.tree_bytes(variables)
        heads = evaluator.model(opened.model, variables, watch)
        results: dict[str, Any] = {**evaluator.examples(), **heads}
        if opened.run is None:
            return results
        results["step"] = opened.run.step
        if opened.run.ema is not None and not self.ema:
            average = self._place(opened.run.ema, opened.model)
            results["ema"] = evaluator.model(opened.model, average)
        spec = teacher_spec(opened.run.config)
        if spec and (weights := spec.weights_path(self.source)):
            teacher, params = load_teacher(spec, weights, self.dataset.classes)
            if teacher.answers:  # or its classes are others
                placed = jax.device_put(params, shardings(teacher, self.mesh, params))
                results["teacher"] = evaluator.teacher(teacher, placed)
        return results

    def _place(self, tree, model):
        return jax.device_put(tree, sharding.state_shardings(self.mesh, tree, model))


def open_evaluation(
    config,
    source: str,
    model: str | None = None,
    given: Collection[str] = (),
    checkpoint: str | int = LATEST,
    ema: bool = False,
    heads: bool = True,
) -> Evaluation:
    """Return weights and the data of `config`, ready to be evaluated.

    The model, the size, crop and normalisation of its input and, of a run, the way it reads images
    (data.resize, exif, bits, channels) are the weights' own, unless `given` names the field of the
    config that says otherwise: "data.eval_crop_ratio", "model.image_size", … Batch size and data
    come from `config`. Heads get the order of the data's classes, by name; raise UserError where
    the names do not go together. What else differs from the run's data is said. `checkpoint` and
    `ema` are as in load_variables. Without `heads`, for who asks none, the model gives its
    features, and its classes may be any.
    """
    if not has_labels(config.data.source):
        raise UserError(
            f"config.data.source={config.data.source}: its images have no labels to compare "
            "answers with; take a source that has"
        )
    mesh = sharding.make_mesh(config.mesh)
    size = config.model.image_size if "model.image_size" in given else None
    size = None if size is None else simplest(size)
    which: dict[str, Any] = {"checkpoint": checkpoint, "ema": ema}
    classes = None if heads else 0
    opened = load_variables(source, model, classes, size, dtype=config.dtype, **which)
    opened.tell()
    data = config.data.copy_and_resolve_references()
    if opened.run is not None and data.rules is None:
        data.rules = opened.run.config.data.rules
    _take_channels(data, opened)
    opened = _with_input(opened, data, given)
    dataset = open_dataset(data)
    if heads and opened.multi_label not in (None, data.multi_label):
        says = "any number of classes" if opened.multi_label else "one class"
        raise UserError(
            f"{source}: the model answers {says} an image; evaluate it on data of which "
            f"data.multi_label={opened.multi_label}"
        )
    note = ""
    if heads:
        opened, note = in_order(opened, dataset.classes, f"{source}: the model", data.source)
    lines = [note, *(held_out.changes(source, dataset) if opened.run else ())]
    for line in filter(None, lines):
        log.warning(line)
    return Evaluation(source, opened, data, dataset, mesh, config.train.eval_batch_size, ema)


def _take_channels(data, opened: LoadedWeights) -> None:
    """Take the channels that the weights are for; raise UserError without their normalisation."""
    channels = opened.reading.channels
    if data.channels == channels:
        return
    log.warning("data.channels=%d, as the weights take, not %d", channels, data.channels)
    opened.check_convention()
    data.channels = channels


def _with_input(opened: LoadedWeights, data, given: Collection[str]) -> LoadedWeights:
    """Return weights, and change `data`, so that both have the input of this evaluation."""
    if "data.eval_crop_ratio" not in given:
        data.eval_crop_ratio = opened.crop_ratio
    for key, own in (("mean", opened.mean), ("std", opened.std)):
        if own and f"data.{key}" not in given:  # () where only the config knows it
            data[key] = own
    if opened.run is not None:  # other weights do not say how images were read
        for key in ("resize", "exif", "bits"):
            own = opened.run.config.data[key]
            if f"data.{key}" not in given and data[key] != own:
                log.warning("data.%s=%s, as the run was trained, not %s", key, own, data[key])
                data[key] = own
    reading = reading_of(data)
    return dataclasses.replace(
        opened,
        mean=per_channel(data.mean, data.channels),
        std=per_channel(data.std, data.channels),
        crop_ratio=data.eval_crop_ratio,
        reading=reading,
    )
