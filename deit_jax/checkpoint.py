"""Runs on disk: Orbax checkpoints of the whole train state, and loading a run's model from them.

WORKDIR/config.json     the resolved config
WORKDIR/classes.json    names of the classes, in label order
WORKDIR/checkpoints/N   the state after N steps
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from deit_jax import config as config_lib
from deit_jax.errors import UserError


class Checkpointer:
    """Save states in the background, keeping the latest few and the best one."""

    def __init__(self, workdir: Path, keep: int):
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["top1"],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, cleanup_tmp_directories=True
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step saved, None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state, top1: float | None) -> None:
        """Start saving; `top1` (percent) ranks the checkpoint if it was just evaluated."""
        metrics = None if top1 is None else {"top1": top1}
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def restore(self, abstract_state):
        """Return the newest state, each array where `abstract_state` says."""
        args = ocp.args.StandardRestore(abstract_state)
        return self._manager.restore(self.latest_step, args=args)

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.close()


@dataclasses.dataclass
class Run:
    """A finished or unfinished run: its config, and its model with weights."""

    config: ConfigDict
    classes: list[str]
    model: Any
    variables: dict[str, Any]
    ema: dict[str, Any] | None
    step: int


def load_run(workdir: str | Path, dtype: str = "float32") -> Run:
    """Load the newest checkpoint of a workdir; raise UserError where there is none."""
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir}: not the workdir of a `deit train` run (no config.json there)")
    config = config_lib.from_json(json.loads((workdir / "config.json").read_text()))
    classes = json.loads((workdir / "classes.json").read_text())
    state = _restore_on_host(workdir / "checkpoints")
    variables = {"params": state["params"], "batch_stats": state["batch_stats"] or {}}
    model = config_lib.build_model(config.model, len(classes), dtype)
    return Run(config, classes, model, variables, state["ema"], int(state["step"]))


def _restore_on_host(directory: Path) -> dict[str, Any]:
    """Read what inference needs as numpy arrays, whatever devices the state was saved from."""
    if not directory.is_dir():
        raise UserError(f"{directory.parent}: no checkpoint yet; let `deit train` save one first")
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    # Naming the handler lets the manager read the tree's metadata before it restores anything.
    with ocp.CheckpointManager(
        directory.absolute(), options=options, item_handlers=ocp.PyTreeCheckpointHandler()
    ) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(
                f"{directory.parent}: no checkpoint yet; let `deit train` save one first"
            )
        saved = manager.item_metadata(step).tree
        wanted = {key: saved[key] for key in ("params", "batch_stats", "ema", "step")}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        return manager.restore(step, args=args)
