"""One step of a run, computed again by itself and written down: for steps that went wrong."""

import io
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.config.serialize import to_json
from deit_jax.errors import UserError
from deit_jax.parallel.sharding import path_name
from deit_jax.step.compile import placing
from deit_jax.step.train_step import gradients, model_inputs
from deit_jax.storage import backend, exists, write_json
from deit_jax.train.experiment import Experiment
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.loop import Trainer
from deit_jax.train.run import starting_weights
from deit_jax.train.tape.session import open_tape
from deit_jax.workdir.directory import check_unchanged


def dump_step(experiment: Experiment, dataset, workdir: PurePath, number: int) -> PurePath:
    """Compute one step of a run again, from the checkpoint before it; return where it is dumped.

    The run may be under way: nothing of it is touched.
    """
    if jax.process_count() > 1:
        raise UserError("--replay-step: leave out --multihost; one process computes the same step")
    if not exists(workdir / "config.json"):
        raise UserError(f"--workdir={workdir}: no run is there to replay a step of")
    check_unchanged(to_json(experiment.config), workdir / "config.json")
    spec, teacher, tape = experiment.teacher, None, None
    if spec and (weights := spec.weights_path(workdir)):
        teacher = load_teacher(spec, weights, dataset.classes)
    start = starting_weights(experiment, workdir, dataset.classes)
    if spec and not spec.answers:  # nor is a step that is looked at recorded
        tape = open_tape(experiment, workdir, dataset, teacher)
    trainer = Trainer(experiment, workdir, dataset, teacher, start, read_only=True, tape=tape)
    return dump(trainer, number)


def dump(trainer: Trainer, number: int) -> PurePath:
    """Write step `number` of a Trainer's run to WORKDIR/replay/step_N and return that directory.

    batch.npz holds the images as read (uint8), as the model was given them, the targets and each
    head's logits; norms.json the loss and, layer by layer, the norm, the largest magnitude and the
    count of values that are not finite of parameters, gradients and activations. A step that a
    rollback undid is the one replayed as long as the checkpoint before it is kept.
    """
    if number > trainer.total_steps:
        raise UserError(f"--replay-step={number}: the run has {trainer.total_steps} steps")
    before = trainer.go_back(number - 1)
    batches = trainer.batches()
    for step in range(before, number - 1):
        placed = trainer.on_devices(batches(step), step)
        trainer.state, _ = trainer.step(trainer.state, trainer.teacher_params, placed)
    batch = batches(number - 1)
    placed = trainer.on_devices(batch, number - 1)
    inputs, norms = jax.device_get(_look(trainer, placed))
    directory = trainer.workdir / "replay" / f"step_{number}"
    try:
        disk, content = backend(directory), io.BytesIO()
        np.savez(content, image=batch["image"], label=batch["label"], **inputs)
        disk.make_folder(directory)
        disk.write(directory / "batch.npz", content.getvalue())
        write_json(directory / "norms.json", jax.tree.map(_number, {"step": number, **norms}))
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    return directory


def _look(trainer, batch):
    settings, model = trainer.experiment.settings, trainer.experiment.model

    def look(state, teacher_params, batch):
        images, targets, key = model_inputs(state.step, batch, settings)
        grads, terms, *_ = gradients(
            state,
            teacher_params,
            (images, targets, batch.get("teacher_target")),
            key,
            model=model,
            teacher=trainer.teacher,
            settings=settings,
        )
        heads, caught = model.apply(
            state.variables,
            images,
            train=True,
            rngs={"dropout": key},
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        logits = {f"logits_{n}": getattr(heads, n) for n in ("cls", "dist")}
        inputs = {"model_input": images, "targets": targets}
        inputs |= {k: v for k, v in logits.items() if v is not None}
        return inputs, {
            "terms": terms,
            "parameters": _norms(state.params),
            "gradients": _norms(grads),
            "activations": _norms(caught["intermediates"]),
        }

    # The layers' outputs where the run has them: its step, then, as nearly as it can be.
    compiled = jax.jit(placing(look, trainer.experiment.mesh))
    return compiled(trainer.state, trainer.teacher_params, batch)


def _norms(tree) -> dict[str, Any]:
    def norm(x):
        x = x.astype(jnp.float32)
        return {
            "norm": jnp.linalg.norm(x.ravel()),
            "largest": jnp.abs(x).max(),
            "not_finite": jnp.sum(~jnp.isfinite(x)),
        }

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path).replace("/__call__/0", ""): norm(x) for path, x in leaves}


def _number(x) -> float | int | str:
    """Return a number that JSON knows; nan and inf as text."""
    x = np.asarray(x).item()
    return x if np.isfinite(x) else str(x)
