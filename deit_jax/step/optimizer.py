"""Learning-rate schedule, weight-decay mask and the optax chain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from deit_jax.parallel.sharding import path_name
from deit_jax.step.state import EVERYTHING, Everything

Links = tuple[optax.GradientTransformation, ...]
NO_DECAY = ("cls_token", "pos_embed")  # the reference does decay dist_token (deit issue 48)


def make_schedule(optim, epochs: float, steps_per_epoch: int) -> Callable[[jax.Array], jax.Array]:
    """Return step -> learning rate: linear warm-up, then the cosine that began at step 0.

    As in timm 0.3.2 the cosine does not wait for the warm-up. The reference moves once per epoch
    and one epoch late; this one moves every step. `optim` is the config of that name.
    """
    # At least one step, as many as are taken: in float32 a tiny fraction of one would be 0 / 0.
    total = max(1.0, epochs * steps_per_epoch)
    warmup = optim.warmup_epochs * steps_per_epoch

    def schedule(step):
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1.0)))
        lr = optim.min_lr + (optim.lr - optim.min_lr) * cosine
        if warmup == 0:
            return lr
        ramp = optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
        return jnp.where(step < warmup, ramp, lr)

    return schedule


def decay_mask(params):
    """Return True for the parameters that weight decay shrinks, as the reference chooses them.

    Not decayed: vectors (biases, norms, LayerScale), cls_token and pos_embed.
    """

    def decays(path, leaf):
        return leaf.ndim > 1 and path_name(path).rsplit("/", 1)[-1] not in NO_DECAY

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(optim, schedule) -> Links:
    """Return AdamW (arXiv 1711.05101)."""
    return (
        optax.adamw(
            schedule,
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=decay_mask,
        ),
    )


def lamb(optim, schedule) -> Links:
    """Return LAMB (arXiv 1904.00962) as apex's FusedLAMB and timm's Lamb have it.

    optax.lamb would scale the undecayed parameters too.
    """
    return (
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        optax.masked(optax.scale_by_trust_ratio(), decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def sgd(optim, schedule) -> Links:
    """Return torch's SGD with momentum: decay is added to the gradient, before the momentum."""
    return (
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        optax.sgd(schedule, momentum=optim.b1),
    )


# By config.optim.name: functions of config.optim and the schedule. Their links are joined in one
# chain, whose states are so many in a checkpoint.
OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "lamb": lamb}


def make_optimizer(
    optim, schedule, tuning: Everything = EVERYTHING
) -> optax.GradientTransformation:
    """Return clipping, the optimizer of a `config.optim`, then every parameter's own rate.

    In each of OPTIMIZERS an update is the rate times what does not depend on it, decay included:
    to scale it is to scale the rate, as torch's groups do.
    """
    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm > 0 else []
    return optax.chain(*clip, *OPTIMIZERS[optim.name](optim, schedule), *tuning.scaling())
