"""One update of a student, its frozen teacher fused into the same program.

A pure function. compile.py compiles it once, over whatever mesh the arrays live on: under `jax.jit`
with a sharded batch, means are over the global batch and no device axis appears here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from deit_jax.models.preprocess import normalise
from deit_jax.step.distill.base import Distillation
from deit_jax.step.fusion import unfused
from deit_jax.step.micro_batches import accumulate, in_parts
from deit_jax.step.mixup import mix
from deit_jax.step.objective import chosen, objective
from deit_jax.step.random_erasing import random_erase
from deit_jax.step.schedules import Change, at_step
from deit_jax.step.state import EVERYTHING, EXTRAS, Everything, TrainState, update_health
from deit_jax.step.teacher import Teaches, apply_with_features


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What train_step reads from the config."""

    seed: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
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
    class_weights: tuple[float, ...] | None = None  # in the labels' loss
    several: bool = False  # labels an image: the batch's are [B K], 1 where it has a class
    record: bool = False  # whether the metrics hold the teacher's target, as "teacher_target"
    tuning: Everything = EVERYTHING  # what is trained
    changes: tuple[Change, ...] = ()  # of distill, over total_steps
    total_steps: int = 0

    @property
    def kind(self) -> Distillation:
        """The kind of distillation, where there is one."""
        return chosen(self.distill.kind, self.several)

    @property
    def features(self) -> str:
        """The student's features that the kind of distillation asks for, "" for none."""
        asked = self.distill.kind != "none" and self.kind.features
        return self.distill.student_features if asked else ""

    def distill_at(self, step) -> Any:
        """Return `distill` as it is at a step."""
        return at_step(self.distill, self.changes, step, self.total_steps)


def train_step(
    state: TrainState,
    teacher_params,
    batch,
    *,
    model,
    teacher: Teaches | None,
    tx,
    settings: StepConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after one update and the metrics of the step.

    `batch` is {"image": uint8 [B H W C], "label": int [B]}, or uint8 [B K] where images have
    several labels; the teacher sees the very tensor that the student sees, erased and mixed.
    Neither gradient nor state exists for the teacher. With "teacher_target" in the batch, what
    distillation makes of the teacher's answer ([B] labels or [B K] logits), the teacher is not
    asked. With `settings.record` the metrics hold the target that was used, in the order of the
    batch.
    """
    images, targets, key = model_inputs(state.step, batch, settings)
    inputs = (images, targets, batch.get("teacher_target"))
    grads, metrics, stats, teacher_target = gradients(
        state, teacher_params, inputs, key, model=model, teacher=teacher, settings=settings
    )
    now = settings.distill_at(state.step)
    metrics |= {change.name: getattr(now, change.name) for change in settings.changes}
    state, metrics = update(state, grads, metrics, stats, tx, settings.ema_decay, settings.tuning)
    return state, {**metrics, "teacher_target": teacher_target} if settings.record else metrics


def model_inputs(step, batch, settings: StepConfig):
    """Return normalised, erased and mixed images, their targets, and the key of dropout."""
    key = jax.random.fold_in(jax.random.key(settings.seed), step)
    key_erase, key_mix, key_model = jax.random.split(key, 3)

    def erased(key, images):
        normalised = normalise(images, settings.mean, settings.std)
        return random_erase(key, normalised, settings.erase_prob)

    def mixed(key, images, labels):
        smoothing, mixing = settings.smoothing, settings.mixing
        return mix(key, images, labels, settings.num_classes, smoothing, mixing)

    # Apart: or XLA would draw the noise twice, for an image and for its partner in mixing, and the
    # first layers would compute it all again as often as they read a pixel.
    images = unfused(erased, key_erase, batch["image"])
    images, targets = unfused(mixed, key_mix, images, batch["label"])
    return images, targets, key_model


def teacher_targets(
    teacher: Teaches, params, images: Float[Array, "B H W C"], settings: StepConfig
):
    """Return what distillation makes of the teacher's answers, in the order of the batch."""
    kind = settings.kind

    def ask(part):
        return kind.target(jax.lax.stop_gradient(teacher.outputs(params, part, kind.features)))

    return in_parts(ask, images, settings.teacher_parts)


def gradients(state, teacher_params, inputs, key, *, model, teacher, settings: StepConfig):
    """Return the gradients, the terms of the loss, new batch statistics and the teacher's target.

    Gradients are those of what is trained. `inputs` are images [B H W C], targets [B K] and the
    teacher's target, None to ask the teacher.
    """
    images, targets, teacher_target = inputs
    if teacher_target is None and teacher is not None:
        teacher_target = teacher_targets(teacher, teacher_params, images, settings)
    key_scales, key = jax.random.split(key)
    # Drawn for the whole batch: the gradient does not depend on how it is cut into micro-batches.
    draw = getattr(model, "draw_scales", None)
    distill = settings.distill_at(state.step)
    inputs = (images, targets, teacher_target, draw and draw(key_scales, len(images)))

    def loss_and_grads(params, stats, inputs, key):
        images, targets, teacher_target, scales = inputs
        # The student's program must not depend on who else reads the images, nor on where the
        # target comes from: the barriers keep XLA from fusing across, which it might do in another
        # way for each, to other last bits. With them a label tape replays the fused step's bits.
        images, targets, teacher_target = jax.lax.optimization_barrier(
            (images, targets, teacher_target)
        )

        def loss(moving):
            inputs = (images, targets, teacher_target, scales)
            whole = settings.tuning.whole(moving, params)
            total, terms, new_stats = training_loss(
                model, whole, stats, inputs, key, settings, distill
            )
            return total, ({"loss": total, **terms}, new_stats)

        # Of what is trained alone: the backward pass ends where nothing before it is.
        moving = settings.tuning.moving(params)
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(moving)
        return grads, *aux

    summed = accumulate(
        loss_and_grads,
        state.params,
        state.batch_stats,
        inputs,
        key,
        settings.micro_batches,
        settings.mesh,
    )
    return *summed, teacher_target


def update(
    state: TrainState, grads, metrics, stats, tx, ema_decay: float, tuning: Everything = EVERYTHING
):
    """Return the next state and all metrics of the step.

    Where the loss or the gradient is not finite, only the step and the schedule's clock move on.
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    before = tuning.moving(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, before)
    params = optax.apply_updates(before, updates)
    ema = state.ema
    if ema is not None:
        averaged = {"params": params, "batch_stats": stats}
        ema = optax.incremental_update(averaged, ema, 1.0 - ema_decay)

    def keep(new, old):
        if isinstance(new, optax.ScaleByScheduleState):  # the learning rate follows the step
            return new
        return jnp.where(good, new, old)

    new, old = (params, stats, opt_state, ema), (before, state.batch_stats)
    params, stats, opt_state, ema = jax.tree.map(
        keep,
        new,
        (*old, state.opt_state, state.ema),
        is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
    )
    params = tuning.whole(params, state.params)
    health, watched = update_health(state.health, metrics["loss"], good)
    metrics = {**metrics, "grad_norm": norm, **watched}
    return TrainState(state.step + 1, params, stats, opt_state, ema, health), metrics


def training_loss(model, params, stats, inputs, key, settings: StepConfig, distill=None):
    """Return the objective on some images, its terms and the new batch statistics.

    `inputs` are images [b H W C], targets [b K], the teacher's target, and the model's scales;
    `distill` is what the settings say of it at this step, None for what they say at the first.
    """
    images, targets, teacher_target, scales = inputs
    outputs, new_stats = apply_train(model, params, stats, images, key, scales, settings.features)
    total, terms = objective(
        outputs.heads,
        targets,
        teacher_target,
        distill or settings.distill,
        settings.label_loss,
        settings.label_heads,
        outputs.features,
        params[EXTRAS] if settings.features else None,
        settings.class_weights,
        settings.several,
    )
    return total, terms, new_stats


def apply_train(
    model, params, stats, images: Float[Array, "B H W C"], key, scales=None, features: str = ""
):
    """Run the model in training mode; return its Outputs and the new batch statistics.

    `scales` is what the model's draw_scales returns, None for a model without it; `features` are as
    in apply_with_features.
    """
    drawn = {} if scales is None else {"scales": scales}
    outputs, updated = apply_with_features(
        model,
        {"params": params, "batch_stats": stats},
        images,
        features,
        ("batch_stats",),
        train=True,
        rngs={"dropout": key},
        **drawn,
    )
    return outputs, updated.get("batch_stats", {})
