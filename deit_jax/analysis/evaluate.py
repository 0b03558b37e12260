"""The accuracy of trained weights on a config's data."""

from typing import Any

import jax

from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.train import memory
from deit_jax.train.evaluator import Evaluator
from deit_jax.train.load_teacher import load_teacher, teacher_spec
from deit_jax.weights.load import open_model


def evaluate_run(config, source: str, model: str | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint in a workdir, or other weights, on the data of `config`.

    The model and the normalisation of its input are the weights' own; batch size, data and crop
    come from `config`. Raise UserError if they know another number of classes than the data has.
    """
    mesh = sharding.make_mesh(config.mesh)
    dataset = open_dataset(config.data)
    opened = open_model(source, model, dtype=config.dtype)
    if len(opened.classes) != len(dataset.classes):
        raise UserError(
            f"{source}: the model knows {len(opened.classes)} classes, {config.data.source} has "
            f"{len(dataset.classes)}; give the --config.data options that it was trained with"
        )
    data, batch_size = config.data.copy_and_resolve_references(), config.train.eval_batch_size
    data.mean, data.std = opened.mean, opened.std
    evaluator = Evaluator(dataset.eval, data, batch_size, opened.image_size, mesh)

    def place(tree, model):
        return jax.device_put(tree, sharding.state_shardings(mesh, tree, model))

    results: dict[str, Any] = {"examples": len(dataset.eval)}
    variables = place(opened.variables, opened.model)
    evaluator.held = memory.tree_bytes(variables)
    results |= evaluator.model(opened.model, variables)
    if opened.run is None:
        return results
    if opened.run.ema is not None:
        results["ema"] = evaluator.model(opened.model, place(opened.run.ema, opened.model))
    spec = teacher_spec(opened.run.config)
    if spec and (weights := spec.weights_path(source)):
        teacher, params = load_teacher(spec, weights, dataset.classes)
        results["teacher"] = evaluator.teacher(teacher, place(params, teacher.model))
    return results
