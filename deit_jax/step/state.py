"""What a train state knows of how the run goes: steps that went wrong, and the usual loss."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def new_health() -> dict[str, Any]:
    """Return the part of the state that watches over the run."""
    return {
        "skipped": np.int32(0),  # steps whose loss or gradient was not finite
        "skipped_in_row": np.int32(0),  # the latest of them, without a good one since
        "rollbacks": np.int32(0),  # times that the run went back; offsets the data's seed
        "mean_loss": np.float32(0),  # running mean, which spikes are measured by
    }


def watch(health, loss: Float[Array, ""], good: Bool[Array, ""]):
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
    said = {"loss_spike": loss / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)}
    return health, said | {k: health[k] for k in ("skipped", "skipped_in_row")}
