"""Learning-rate schedule, weight-decay mask and the optax chain."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from deit_jax.errors import UserError
from deit_jax.ranges import INT32

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


def path_name(path) -> str:
    """Return a pytree path as `blocks_0/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(params):
    """Return True for the parameters that weight decay shrinks, as the reference chooses them.

    Not decayed: vectors (biases, norms, LayerScale), cls_token and pos_embed.
    """

    def decays(path, leaf):
        return leaf.ndim > 1 and path_name(path).rsplit("/", 1)[-1] not in NO_DECAY

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(optim, schedule) -> optax.GradientTransformation:
    """Return clipping, then AdamW, LAMB or SGD with momentum; `optim` is the config."""
    chain = []
    if optim.clip_norm > 0:
        chain.append(optax.clip_by_global_norm(optim.clip_norm))
    if optim.name == "adamw":
        chain.append(
            optax.adamw(
                schedule,
                b1=optim.b1,
                b2=optim.b2,
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                mask=decay_mask,
            )
        )
    elif optim.name == "lamb":
        # As apex's FusedLAMB and timm's Lamb; optax.lamb would scale the undecayed parameters too.
        chain.append(optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps))
        chain.append(optax.add_decayed_weights(optim.weight_decay, mask=decay_mask))
        chain.append(optax.masked(optax.scale_by_trust_ratio(), decay_mask))
        chain.append(optax.scale_by_learning_rate(schedule))
    else:  # torch's SGD: decay is added to the gradient, before the momentum
        chain.append(optax.add_decayed_weights(optim.weight_decay, mask=decay_mask))
        chain.append(optax.sgd(schedule, momentum=optim.b1))
    return optax.chain(*chain)


def whole_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return epochs in steps, at least one."""
    return max(1, math.floor(epochs * steps_per_epoch + 0.5))


def check_length(config: ConfigDict, num_images: int) -> None:
    """Raise UserError if the student or its teacher would take more steps than can be counted."""
    per_epoch = max(1, num_images // config.batch_size)
    for key, epochs in (("epochs", config.epochs), ("teacher.epochs", config.teacher.epochs)):
        if (steps := whole_steps(epochs, per_epoch)) > INT32:
            raise UserError(
                f"config.{key}={epochs}: these are {steps} steps of {config.batch_size} images; "
                f"lower it, there can be {INT32} at most"
            )
