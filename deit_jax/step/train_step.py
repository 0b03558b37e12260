"""One update of a student, its frozen teacher fused into the same program; one evaluation step.

Both are pure functions. train.py compiles them once, over whatever mesh the arrays live on: under
`jax.jit` with a sharded batch, means are over the global batch and no device axis appears here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from deit_jax.apart import apart
from deit_jax.erasing import random_erase
from deit_jax.health import new_health, watch
from deit_jax.losses import distillation
from deit_jax.micro import accumulate, in_parts
from deit_jax.mixing import mix
from deit_jax.models.heads import Heads
from deit_jax.parts import micro_batches, teacher_parts
from deit_jax.teacher import Teacher


class TrainState(struct.PyTreeNode):
    """All that a checkpoint holds. Random numbers derive from the config's seed and `step`."""

    step: Any  # int32 scalar: updates taken
    params: Any
    batch_stats: Any  # running statistics of batch norm; {} in a transformer
    opt_state: Any
    ema: Any  # {"params", "batch_stats"}, averaged; None without averaging
    health: Any = struct.field(default_factory=new_health)

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What train_step reads from the config."""

    seed: int
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    erase_prob: float
    label_loss: str
    label_heads: str
    smoothing: float
    mixing: Any
    distill: Any
    micro_batches: int
    teacher_parts: int
    mesh: Any  # over which micro-batches sum their gradients; None leaves that to the compiler
    ema_decay: float
    record: bool = False  # whether the metrics hold the teacher's signal, as metrics["signal"]

    @classmethod
    def from_config(cls, config, num_classes: int, mesh=None) -> "Recipe":
        """Gather the fields from their places in the config; `mesh` is what the step runs on."""
        return cls(
            seed=config.seed,
            num_classes=num_classes,
            mean=config.data.mean,
            std=config.data.std,
            erase_prob=config.augment.erase_prob,
            label_loss=config.loss.kind,
            label_heads=config.loss.heads,
            smoothing=config.loss.smoothing,
            mixing=config.mixing,
            distill=config.distill,
            micro_batches=micro_batches(config, mesh, num_classes),
            teacher_parts=teacher_parts(config, mesh, num_classes),
            mesh=mesh,
            ema_decay=config.optim.ema_decay,
        )


def init_state(key: Key[Array, ""], model, image_size: int, tx, ema_decay: float) -> TrainState:
    """Return the state before the first step, initialised as the reference does."""
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)))
    params, stats = variables["params"], variables.get("batch_stats", {})
    ema = {"params": params, "batch_stats": stats} if ema_decay else None
    return TrainState(jnp.int32(0), params, stats, tx.init(params), ema)


def normalise(
    images: UInt8[Array, "B H W C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W C"]:
    """Return (image / 255 - mean) / std in float32."""
    return (images.astype(jnp.float32) / 255.0 - jnp.array(mean)) / jnp.array(std)


def train_step(
    state: TrainState, teacher_params, batch, *, model, teacher: Teacher | None, tx, recipe: Recipe
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after one update and the metrics of the step.

    `batch` is {"image": uint8 [B H W C], "label": int [B]}; the teacher sees the very tensor that
    the student sees, erased and mixed. Neither gradient nor state exists for the teacher. With
    "signal" in the batch, what the teacher said of it [B] or [B K], the teacher is not asked. With
    `recipe.record` the metrics hold the signal that was used, in the order of the batch.
    """
    images, targets, key = model_inputs(state.step, batch, recipe)
    inputs = (images, targets, batch.get("signal"))
    grads, metrics, stats, signal = gradients(
        state, teacher_params, inputs, key, model=model, teacher=teacher, recipe=recipe
    )
    state, metrics = update(state, grads, metrics, stats, tx, recipe.ema_decay)
    return state, {**metrics, "signal": signal} if recipe.record else metrics


def model_inputs(step, batch, recipe: Recipe):
    """Return normalised, erased and mixed images, their targets, and the key of dropout."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)
    key_erase, key_mix, key_model = jax.random.split(key, 3)

    def erased(key, images):
        return random_erase(key, normalise(images, recipe.mean, recipe.std), recipe.erase_prob)

    def mixed(key, images, labels):
        return mix(key, images, labels, recipe.num_classes, recipe.smoothing, recipe.mixing)

    # Apart: or XLA would draw the noise twice, for an image and for its partner in mixing, and the
    # first layers would compute it all again as often as they read a pixel.
    images = apart(erased, key_erase, batch["image"])
    images, targets = apart(mixed, key_mix, images, batch["label"])
    return images, targets, key_model


def ask(teacher: Teacher, params, images: Float[Array, "B H W C"], recipe: Recipe):
    """Return the teacher's signal, in the order of the batch."""
    return in_parts(
        lambda part: teacher.signal(params, part, recipe.distill.kind), images, recipe.teacher_parts
    )


def gradients(state, teacher_params, inputs, key, *, model, teacher, recipe: Recipe):
    """Return the gradients, the terms of the loss, the new batch statistics and the signal used.

    `inputs` are images [B H W C], targets [B K] and the teacher's signal, None to ask the teacher.
    """
    images, targets, signal = inputs
    if signal is None and teacher is not None:
        signal = ask(teacher, teacher_params, images, recipe)
    key_scales, key = jax.random.split(key)
    # Drawn for the whole batch: the gradient does not depend on how it is cut into micro-batches.
    draw = getattr(model, "draw_scales", None)
    inputs = (images, targets, signal, draw and draw(key_scales, len(images)))

    def loss_and_grads(params, stats, inputs, key):
        images, targets, signal, scales = inputs
        # The student's program must not depend on who else reads the images, nor on where the
        # signal comes from: the barriers keep XLA from fusing across, which it might do in another
        # way for each, to other last bits. With them a label tape replays the fused step's bits.
        images, targets, signal = jax.lax.optimization_barrier((images, targets, signal))

        def objective(params):
            heads, new_stats = apply_train(model, params, stats, images, key, scales)
            kinds = (recipe.distill, recipe.label_loss, recipe.label_heads)
            loss, terms = distillation(heads, targets, signal, *kinds)
            return loss, ({"loss": loss, **terms}, new_stats)

        (_, aux), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, *aux

    summed = accumulate(
        loss_and_grads,
        state.params,
        state.batch_stats,
        inputs,
        key,
        recipe.micro_batches,
        recipe.mesh,
    )
    return *summed, signal


def update(state: TrainState, grads, metrics, stats, tx, ema_decay: float):
    """Return the next state and all metrics of the step.

    Where the loss or the gradient is not finite, only the step and the schedule's clock move on.
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        new = {"params": params, "batch_stats": stats}
        ema = optax.incremental_update(new, ema, 1.0 - ema_decay)

    def keep(new, old):
        if isinstance(new, optax.ScaleByScheduleState):  # the learning rate follows the step
            return new
        return jnp.where(good, new, old)

    new, old = (params, stats, opt_state, ema), (state.params, state.batch_stats)
    kept = jax.tree.map(
        keep,
        new,
        (*old, state.opt_state, state.ema),
        is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
    )
    health, watched = watch(state.health, metrics["loss"], good)
    metrics = {**metrics, "grad_norm": norm, **watched}
    return TrainState(state.step + 1, *kept, health), metrics


def apply_train(model, params, stats, images: Float[Array, "B H W C"], key, scales=None):
    """Run the model in training mode; return its heads and the new batch statistics.

    `scales` is what the model's draw_scales returns, None for a model without it.
    """
    drawn = {} if scales is None else {"scales": scales}
    heads, updated = model.apply(
        {"params": params, "batch_stats": stats},
        images,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
        **drawn,
    )
    return heads, updated.get("batch_stats", {})


def eval_step(
    variables, batch, *, model, mean, std, parts: int = 1
) -> dict[str, dict[str, Int[Array, ""]]]:
    """Return for each head how many of the valid examples it has right, in its top 1 and top 5.

    The images go through the model in so many `parts`.
    """

    def predict(images):
        return model.apply(variables, normalise(images, mean, std), train=False)

    heads = in_parts(predict, batch["image"], parts)
    return count_heads(heads, batch["label"], batch["valid"])


def count_heads(
    heads: Heads, labels: Int[Array, "B"], valid: Bool[Array, "B"]
) -> dict[str, dict[str, Int[Array, ""]]]:
    """Return {"cls" | "dist" | "fused": {"top1", "top5"}} in numbers of examples."""
    logits = {"cls": heads.cls, "dist": heads.dist, "fused": heads.fused()}
    return {name: count_correct(x, labels, valid) for name, x in logits.items() if x is not None}


def count_correct(
    logits: Float[Array, "B K"], labels: Int[Array, "B"], valid: Bool[Array, "B"]
) -> dict[str, Int[Array, ""]]:
    """Return how many valid examples have their label among the 1 and the 5 largest logits.

    Equal logits rank by class number, as argmax does; a logit that is not finite is never right.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
    rank = jnp.where(valid & jnp.isfinite(own[:, 0]), rank, logits.shape[1] + 5)
    return {f"top{k}": jnp.sum(rank < k) for k in (1, 5)}
