"""The state of a training: weights, optimizer, averages, and how the run goes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Key

EXTRAS = "distill"  # where, among the parameters, those of a kind of distillation are


class Everything:
    """What a training moves of the parameters: all, equally fast. tuning.py knows of less."""

    partial = False  # whether anything may be frozen

    def moving(self, params) -> Any:
        """Return the tree without what is frozen."""
        return params

    def whole(self, moving, params) -> Any:
        """Return all of `params`, those that are trained taken from `moving`."""
        return moving

    def scaling(self) -> tuple[Any, ...]:
        """Return the optimizer's links that give each parameter a rate of its own."""
        return ()


EVERYTHING = Everything()


def new_health() -> dict[str, Any]:
    """Return the part of the state that watches over the run."""
    return {
        "skipped": np.int32(0),  # steps whose loss or gradient was not finite
        "skipped_in_row": np.int32(0),  # the latest of them, without a good one since
        "rollbacks": np.int32(0),  # times that the run went back; offsets the data's seed
        "mean_loss": np.float32(0),  # running mean, which spikes are measured by
    }


class TrainState(struct.PyTreeNode):
    """All that a checkpoint holds. Random numbers derive from the config's seed and `step`."""

    step: Any  # int32 scalar: updates taken
    params: Any
    batch_stats: Any  # running statistics of batch norm; {} in a transformer
    opt_state: Any  # of the parameters that are trained
    ema: Any  # {"params", "batch_stats"}, averaged, of those that are; None without averaging
    health: Any = struct.field(default_factory=new_health)

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def averaged(self) -> dict[str, Any]:
        """The same of the moving average, which has no copy of what is frozen."""
        return averaged(self.params, self.ema)


def averaged(params, ema) -> dict[str, Any]:
    """Return the variables of a moving average: what it lacks is frozen, and as in `params`."""

    def filled(average, whole):
        if not isinstance(whole, dict):
            return average
        return {k: filled(average[k], v) if k in average else v for k, v in whole.items()}

    return {**ema, "params": filled(ema["params"], params)}


def init_state(
    key: Key[Array, ""],
    model,
    image_size: int | tuple[int, int],
    tx,
    ema_decay: float,
    init_extras: Callable[[Key[Array, ""]], dict[str, Any]] = lambda key: {},
    tuning: Everything = EVERYTHING,
) -> TrainState:
    """Return the state before the first step, initialised as the reference does.

    `init_extras` makes the trainable parameters of the kind of distillation, {} for none.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    channels = getattr(model, "in_channels", 3)
    variables = model.init(key, jnp.zeros((1, *sides, channels)))
    params, stats = variables["params"], variables.get("batch_stats", {})
    if extras := init_extras(jax.random.fold_in(key, 1)):
        params = {**params, EXTRAS: extras}
    moving = tuning.moving(params)
    ema = {"params": moving, "batch_stats": stats} if ema_decay else None
    return TrainState(jnp.int32(0), params, stats, tx.init(moving), ema)


def update_health(health, loss: Float[Array, ""], good: Bool[Array, ""]):
    """Return the next health of a state, and what it says of this step.

    `loss_spike` is the loss over its running mean, about 1 in a run that goes well.
    """
    bad = (~good).astype(jnp.int32)
    mean = jnp.where(health["mean_loss"] > 0, health["mean_loss"], loss)
    health = {
        "skipped": health["skipped"] + bad,
        "skipped_in_row": (health["skipped_in_row"] + 1) * bad,
        "rollbacks": jnp.asarray(health["rollbacks"]),
        "mean_loss": jnp.where(good, 0.98 * mean + 0.02 * loss, health["mean_loss"]),
    }
    metrics = {"loss_spike": loss / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)}
    return health, metrics | {k: health[k] for k in ("skipped", "skipped_in_row")}
