"""One step of a run, computed again by itself and written down: for steps that went wrong."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.errors import UserError
from deit_jax.optim import path_name
from deit_jax.step import Recipe, gradients, model_inputs


def replay(trainer, number: int) -> Path:
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
        batch = trainer.on_devices(batches(step), step)
        trainer.state, _ = trainer._step(trainer.state, trainer.teacher_params, batch)
    batch = batches(number - 1)
    placed = trainer.on_devices(batch, number - 1)
    inputs, norms = jax.device_get(_look(trainer, placed))
    directory = trainer.workdir / "replay" / f"step_{number}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        np.savez(directory / "batch.npz", image=batch["image"], label=batch["label"], **inputs)
        text = json.dumps(jax.tree.map(_number, {"step": number, **norms}), indent=2)
        (directory / "norms.json").write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    return directory


def _look(trainer, batch):
    recipe = Recipe.from_config(trainer.config, len(trainer.dataset.classes), trainer.mesh)

    @jax.jit
    def look(state, teacher_params, batch):
        images, targets, key = model_inputs(state.step, batch, recipe)
        grads, terms, *_ = gradients(
            state,
            teacher_params,
            (images, targets, batch.get("signal")),
            key,
            model=trainer.model,
            teacher=trainer.teacher,
            recipe=recipe,
        )
        heads, caught = trainer.model.apply(
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

    return look(trainer.state, trainer.teacher_params, batch)


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
