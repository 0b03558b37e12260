"""Top-1 and top-5 of every head over a data set; the command `deit eval`."""

import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from deit_jax import cli, memory, micro, parts, run_files, sharding, step
from deit_jax import config as config_lib
from deit_jax import teacher as teacher_lib
from deit_jax import weights as weights_lib
from deit_jax.data import pipeline
from deit_jax.data.sources import open_dataset
from deit_jax.errors import Interrupted, UserError
from deit_jax.models import vit

EVAL_DOC = """usage: deit eval --workdir=DIR [--config=FILE[:ARGS]]
       deit eval --weights=W --config=FILE[:ARGS] [--model=NAME]

Evaluate a trained model on the config's evaluation data, every example once; without --config, on
those that the run was trained with. W is the workdir of a run, a .pth or .safetensors file, a
Hugging Face or timm folder, or hf-hub:ORG/NAME.

  deit eval --workdir=runs/quickstart
  deit eval --workdir=runs/deit_s --config=configs/deit.py --config.data.dir=/elsewhere"""
ATTENTION_IMAGES = 32  # that the attention's entropy is measured on
NAMES = {"teacher": "teacher", "cls": "class head", "dist": "distillation head", "fused": "fused"}


class Evaluator:
    """Evaluate variables of one model, or a teacher, on a fixed set of examples.

    `held` is what a device of the mesh holds meanwhile, in bytes.
    """

    def __init__(self, config, source, image_size: int, mesh, stopping=lambda: False):
        self._batch_size = config.train.eval_batch_size
        rows = sharding.local_rows(mesh, self._batch_size)
        self._batches = pipeline.EvalBatches(
            source, self._batch_size, image_size, config.data.eval_crop_ratio, rows
        )
        self.image_size = image_size
        self._data, self._mesh, self._examples = config.data, mesh, len(source)
        self._stopping, self._few, self.held = stopping, None, 0
        self._share = self._batch_size // (mesh.size // mesh.shape["tensor"])

    @functools.cached_property
    def _count(self):
        return jax.jit(
            functools.partial(step.eval_step, mean=self._data.mean, std=self._data.std),
            static_argnames=("model", "parts"),
        )

    def model(self, model, variables) -> dict[str, Any]:
        """Return {"cls" | "dist" | "fused": {"top1", "top5"}} in percent of the examples."""
        count = self._parts(model, self.image_size)
        return self._evaluate(functools.partial(self._count, variables, model=model, parts=count))

    def _parts(self, model, size: int) -> int:
        return parts.forward_parts(model, size, self._share, self._mesh, self.held)

    @functools.cached_property
    def _entropy(self):
        def entropy(variables, images, model):
            return vit.attention_entropy(model, variables, self._normalise(images))

        return jax.jit(entropy, static_argnames="model")

    def _normalise(self, images):
        return step.normalise(images, self._data.mean, self._data.std)

    def attention(self, model, variables) -> dict[str, float]:
        """Return the attention's entropy in nats on the first images: mean, and the lowest head's.

        {} for a model without attention. `model` must have been called before.
        """
        if not isinstance(model, vit.VisionTransformer):
            return {}
        entropy = jax.device_get(self._entropy(variables, self._few, model=model))
        return {"mean": entropy.mean().item(), "lowest_head": entropy.min().item()}

    def teacher(self, teacher, params) -> dict[str, float]:
        """Return the teacher's {"top1", "top5"} on images as a student's step hands them over."""

        count_of_parts = self._parts(teacher.model, teacher.image_size or self.image_size)

        @jax.jit
        def count(params, batch):
            def predict(images):
                return teacher.logits(params, self._normalise(images))

            logits = micro.in_parts(predict, batch["image"], count_of_parts)
            return {"teacher": step.count_correct(logits, batch["label"], batch["valid"])}

        return self._evaluate(functools.partial(count, params))["teacher"]

    def _evaluate(self, count) -> dict[str, Any]:
        smaller = max(1, self._batch_size // 2)
        remedy = f"try --config.train.eval_batch_size={smaller}"
        with memory.explained("evaluation", remedy):
            return self._count_all(count)

    def _count_all(self, count) -> dict[str, Any]:
        totals = None
        loader = pipeline.load(
            self._batches, 0, len(self._batches), self._data.threads, self._data.prefetch_batches
        )
        with contextlib.closing(loader):
            for batch in loader:
                batch = sharding.to_devices(batch, self._mesh, self._batch_size)
                if self._few is None:
                    self._few = self._first_images(batch["image"])
                counts = count(batch=batch)
                totals = counts if totals is None else jax.tree.map(jax.numpy.add, totals, counts)
                if self._stopping():
                    raise Interrupted("stopped while evaluating")
        return jax.tree.map(lambda n: 100.0 * int(n) / self._examples, jax.device_get(totals))

    def _first_images(self, images: jax.Array) -> jax.Array:
        count = min(ATTENTION_IMAGES, self._examples, len(images))
        everywhere = sharding.replicated(self._mesh)
        return jax.jit(lambda x: x[:count], out_shardings=everywhere)(images)


def table(results: dict[str, Any]) -> str:
    """Return the results as lines for people."""
    lines = [f"{'':24}{'top-1 %':>9}{'top-5 %':>9}"]
    for label, group in (("", results), (" (EMA)", results.get("ema", {}))):
        for key, name in NAMES.items():
            if key in group:
                top1, top5 = group[key]["top1"], group[key]["top5"]
                lines.append(f"{name + label:24}{top1:9.2f}{top5:9.2f}")
    return "\n".join(lines)


def evaluate_run(config, source: str, model: str | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint in a workdir, or other weights, on the data of `config`.

    The model and the normalisation of its input are the weights' own; batch size, data and crop
    come from `config`. Raise UserError if they know another number of classes than the data has.
    """
    mesh = sharding.make_mesh(config.mesh)
    dataset = open_dataset(config.data)
    opened = weights_lib.open_model(source, model, dtype=config.dtype)
    if len(opened.classes) != len(dataset.classes):
        raise UserError(
            f"{source}: the model knows {len(opened.classes)} classes, {config.data.source} has "
            f"{len(dataset.classes)}; give the --config.data options that it was trained with"
        )
    config = config.copy_and_resolve_references()
    config.data.mean, config.data.std = opened.mean, opened.std
    evaluator = Evaluator(config, dataset.eval, opened.image_size, mesh)

    def place(tree, model):
        return jax.device_put(tree, sharding.state_shardings(mesh, tree, model))

    results = {"examples": len(dataset.eval)}
    variables = place(opened.variables, opened.model)
    evaluator.held = memory.tree_bytes(variables)
    results |= evaluator.model(opened.model, variables)
    if opened.run is None:
        return results
    if opened.run.ema is not None:
        results["ema"] = evaluator.model(opened.model, place(opened.run.ema, opened.model))
    weights = teacher_lib.weights_path(opened.run.config, source)
    if weights:
        teacher, params = teacher_lib.load_teacher(opened.run.config, weights, dataset.classes)
        results["teacher"] = evaluator.teacher(teacher, place(params, teacher.model))
    return results


def main(argv: list[str]) -> None:
    """Run `deit eval`."""
    from absl import flags

    command = cli.Command("eval", EVAL_DOC)
    command.add_config(argv)
    flags.DEFINE_string("workdir", "", "evaluate the run in it", flag_values=command.flags)
    flags.DEFINE_string("weights", "", "evaluate these weights", flag_values=command.flags)
    flags.DEFINE_string("model", None, "name of the weights' model", flag_values=command.flags)
    flags.DEFINE_boolean("json", False, "print one JSON object", flag_values=command.flags)
    cli.no_words(command.parse(argv))
    values = command.flags
    if bool(values.workdir) == bool(values.weights):
        raise cli.UsageError("give either --workdir=DIR or --weights=W")
    config = command.config
    if config is None:
        if values.weights:
            raise cli.UsageError("--weights=W needs the data: --config=FILE")
        config = config_lib.from_json(run_files.config_of(Path(values.workdir)))
    results = evaluate_run(config, values.workdir or values.weights, values.model)
    if values.json:
        json.dump(results, sys.stdout)
        print()
    else:
        print(f"{results['examples']} examples\n{table(results)}")
