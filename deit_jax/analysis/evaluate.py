"""The accuracy of trained weights on a config's data."""

import logging
from typing import Any

import jax

from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.train import memory
from deit_jax.train.evaluator import Evaluator
from deit_jax.train.load_teacher import load_teacher, teacher_spec
from deit_jax.weights.fit import LoadedWeights, in_order
from deit_jax.weights.load import open_model
from deit_jax.workdir import held_out

log = logging.getLogger("deit_jax")


def evaluate_run(config, source: str, model: str | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint in a workdir, or other weights, on the data of `config`.

    The model, the normalisation of its input and, of a run, the way it reads images and makes them
    square (data.resize, exif, bits) and its channels are the weights' own; batch size, data and
    eval_crop_ratio come from `config`. Heads get the order of the data's classes, by name; raise
    UserError where the names do not go together. What else differs from the run's data is said.
    """
    mesh = sharding.make_mesh(config.mesh)
    opened = open_model(source, model, dtype=config.dtype)
    data, batch_size = config.data.copy_and_resolve_references(), config.train.eval_batch_size
    if opened.run is not None and data.rules is None:
        data.rules = opened.run.config.data.rules
    _take_channels(data, opened, source)
    dataset = open_dataset(data)
    if opened.multi_label not in (None, data.multi_label):
        says = "any number of classes" if opened.multi_label else "one class"
        raise UserError(
            f"{source}: the model answers {says} an image; evaluate it on data of which "
            f"data.multi_label={opened.multi_label}"
        )
    opened, note = in_order(opened, dataset.classes, f"{source}: the model", data.source)
    lines = [note, *(held_out.changes(source, dataset) if opened.run else ())]
    for line in filter(None, lines):
        log.warning(line)
    if opened.run is not None:
        _read_as_trained(data, opened.run.config.data)
    evaluator = Evaluator(
        dataset.eval, data, batch_size, opened.image_size, mesh, classes=dataset.classes
    )

    def place(tree, model):
        return jax.device_put(tree, sharding.state_shardings(mesh, tree, model))

    variables = place(opened.variables, opened.model)
    evaluator.held = memory.tree_bytes(variables)
    heads = evaluator.model(opened.model, variables)
    results: dict[str, Any] = {**evaluator.examples(), **heads}
    if opened.run is None:
        return results
    if opened.run.ema is not None:
        results["ema"] = evaluator.model(opened.model, place(opened.run.ema, opened.model))
    spec = teacher_spec(opened.run.config)
    if spec and (weights := spec.weights_path(source)):
        teacher, params = load_teacher(spec, weights, dataset.classes)
        results["teacher"] = evaluator.teacher(teacher, place(params, teacher.model))
    return results


def _take_channels(data, opened: LoadedWeights, source: str) -> None:
    """Take the channels and the normalisation that the weights are for; raise UserError without."""
    channels = opened.reading.channels
    if data.channels != channels:
        log.warning("data.channels=%d, as the weights take, not %d", channels, data.channels)
    elif not opened.mean:  # only the config knows it
        return
    try:
        opened.check_convention()
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    data.channels, data.mean, data.std = channels, opened.mean, opened.std


def _read_as_trained(data, own) -> None:
    for key in ("resize", "exif", "bits"):
        if data[key] != own[key]:
            log.warning("data.%s=%s, as the run was trained, not %s", key, own[key], data[key])
            data[key] = own[key]
