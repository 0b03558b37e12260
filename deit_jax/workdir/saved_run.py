"""A run read back from its workdir: config, classes, model and the newest good weights."""

import dataclasses
import logging
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from deit_jax.config.serialize import from_json
from deit_jax.errors import UserError
from deit_jax.models.build import build_model
from deit_jax.step.state import EXTRAS, averaged
from deit_jax.storage import absolute, exists, read_json, steps_in, to_path
from deit_jax.workdir import checksums
from deit_jax.workdir.checkpoints import best_of
from deit_jax.workdir.which import BEST, LATEST, parse_checkpoint

log = logging.getLogger("deit_jax")

FIGURES = ("top1", "mAP")  # what ranks checkpoints: of one label an image, and of several


@dataclasses.dataclass
class Run:
    """A finished or unfinished run: its config, and its model with weights."""

    config: ConfigDict
    classes: list[str]
    model: Any
    variables: dict[str, Any]
    ema: dict[str, Any] | None
    step: int


def load_run(
    workdir: str | PurePath, dtype: str = "float32", checkpoint: str | int = LATEST
) -> Run:
    """Load a checkpoint of a workdir; raise UserError where it is not there.

    `checkpoint` is latest, the newest good one; best, the one of the best figure among those that
    are kept (checkpoints.best_of); or the number of steps taken.
    """
    workdir, checkpoint = to_path(workdir), parse_checkpoint(checkpoint)
    if not exists(workdir / "config.json"):
        raise UserError(f"{workdir}: not the workdir of a `deit train` run (no config.json there)")
    config = from_json(read_json(workdir / "config.json"))
    classes = read_json(workdir / "classes.json", list)
    if not all(isinstance(name, str) for name in classes):
        raise UserError(f"{workdir / 'classes.json'}: not a list of names; restore it from a copy")
    figure = FIGURES[bool(config.data.multi_label)]
    state = _restore_on_host(workdir / "checkpoints", checkpoint, figure)
    variables = _models_own({k: state[k] or {} for k in ("params", "batch_stats")})
    here = config.model.copy_and_resolve_references()
    if "attention" in here:  # the kernel of the training's devices, which may not be at hand
        del here["attention"]
    model = build_model(here, len(classes), dtype, channels=config.data.channels)
    ema = None
    if state["ema"] is not None:
        ema = _models_own(averaged(state["params"], state["ema"]))
    return Run(config, classes, model, variables, ema, int(state["step"]))


def _models_own(variables: dict[str, Any]) -> dict[str, Any]:
    """Return variables without the parameters of a kind of distillation."""
    return variables | {"params": {k: v for k, v in variables["params"].items() if k != EXTRAS}}


def _restore_on_host(
    directory: PurePath, checkpoint: str | int = LATEST, figure: str = "top1"
) -> dict[str, Any]:
    """Read what inference needs as numpy arrays, whatever devices the state was saved from."""
    if not exists(directory):
        raise UserError(f"{directory.parent}: no checkpoint yet; let `deit train` save one first")
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    # Naming the handler lets the manager read the tree's metadata before it restores anything.
    with ocp.CheckpointManager(
        absolute(directory), options=options, item_handlers=ocp.PyTreeCheckpointHandler()
    ) as manager:
        # In a bucket Orbax also lists, to who only reads, what a killed save has left.
        steps = sorted({*manager.all_steps()} & {*steps_in(directory)})
        if not steps:
            raise UserError(
                f"{directory.parent}: no checkpoint yet; let `deit train` save one first"
            )
        step = _chosen(directory, steps, checkpoint, figure)
        saved = manager.item_metadata(step).tree
        wanted = {key: saved[key] for key in ("params", "batch_stats", "ema", "step")}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        return manager.restore(step, args=args)


def _chosen(directory: PurePath, steps, checkpoint: str | int, figure: str) -> int:
    if checkpoint == LATEST:
        return _newest_good(directory, steps)
    workdir, there = directory.parent, ", ".join(map(str, sorted(steps)))
    step: int | None
    if checkpoint == BEST:
        step = best_of({s: _facts(directory / str(s)) for s in steps}, figure)
        if step is None:
            raise UserError(
                f"{workdir}: checkpoint=best: none of those there ({there}) was evaluated when it "
                "was saved; take latest, or one of these steps"
            )
    elif checkpoint not in steps:
        raise UserError(
            f"{workdir}: checkpoint={checkpoint}: not there (any more); there are {there}. "
            "config.train.keep_checkpoints says how many stay"
        )
    else:
        step = int(checkpoint)
    if problem := checksums.problem(directory / str(step)):
        raise UserError(f"{directory / str(step)}: damaged ({problem}); take another of {there}")
    return step


def _facts(place: PurePath) -> dict[str, Any]:
    """Return what was saved beside a state; {} where nothing was."""
    path = place / "metrics" / "metrics"
    return read_json(path) if exists(path) else {}


def _newest_good(directory: PurePath, steps) -> int:
    for step in sorted(steps, reverse=True):
        problem = checksums.problem(directory / str(step))
        if problem is None:
            return step
        log.warning(
            "checkpoint %s is damaged (%s): using the one before", directory / str(step), problem
        )
    raise UserError(f"{directory}: every checkpoint is damaged; bring one back from a copy")
