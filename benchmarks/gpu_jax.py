"""JAX's side of benchmarks/gpu.py: our training step and prediction, and a plain Flax ViT's."""

import functools
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from deit_jax.configs import deit
from deit_jax.models import cudnn
from deit_jax.models.build import build_model, image_size
from deit_jax.models.preprocess import normalise
from deit_jax.parallel import devices
from deit_jax.perf.flops import flops_per_image, forward_flops
from deit_jax.train.experiment import Experiment, resolve

STEPS_PER_EPOCH = 1000  # only the learning rate follows from it


def build(row: dict):
    """Return a function that starts a step, one that waits for it, and one that tells the rest."""
    if jax.default_backend() == "cpu" and not row["toy"]:
        raise RuntimeError("JAX sees no GPU")
    config, classes = config_of(row), classes_of(row)
    make = forward if row["part"] == "forward" else flax_train if row["peer"] == "flax" else train
    run, carry = make(config, classes, random_batch(config, classes))
    latest = [carry]

    def step():
        latest[0] = run(latest[0])

    def wait():
        jax.block_until_ready(latest[0])

    return step, wait, lambda: about(row, config, classes)


def about(row: dict, config, classes: int) -> dict:
    """Return what the row's process knows of the device, its memory and the versions.

    Of our step also the memory that it was expected to take, and what computes its attention.
    """
    device, found = jax.devices()[0], {}
    if row["part"] != "forward" and row["peer"] != "flax":
        experiment = resolved(config, classes)
        model, count = experiment.model, experiment.settings.micro_batches
        refused = cudnn.refusal(model.attention_shape(config.batch_size // count), model.dtype)
        found = {"expected_bytes": experiment.load.expected_bytes(count)}
        found |= {"attention": "xla" if refused else "cudnn"}
    return {
        "device": device.device_kind,
        "peak_bytes": devices.peak_bytes([device]),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        **found,
    }


def classes_of(row: dict) -> int:
    """Return the number of classes."""
    return 10 if row["toy"] else 1000


def flops_of(row: dict) -> float:
    """Return the operations that a row takes for one image, whoever computes it."""
    config, classes = config_of(row), classes_of(row)
    if row["part"] == "forward":
        return forward_flops(build_model(config.model, classes), image_size(config.model))
    return flops_per_image(resolved(config, classes))


def config_of(row: dict):
    """Return the paper's config for a row; no moving average, which the peers do not keep."""
    c = deit.get_config(f"variant={row['model']},distilled={row['part'] != 'plain'}")
    c.model.image_size, c.batch_size = row["image_size"], row["batch"]
    c.mixing.group_size = min(c.mixing.group_size, c.batch_size)
    c.optim.ema_decay, c.dtype = 0.0, "bfloat16"
    if row["peer"] == "replay":
        c.teacher.tape, c.teacher.tape_path = "replay", "given"
    if row["toy"]:
        c.model.width, c.model.depth = 24, 1
        c.teacher.model.name, c.teacher.model.stem_width = "regnety_002", 8
        c.teacher.model.widths, c.teacher.model.depths = (8, 16), (1, 1)
    return c


def random_batch(config, classes: int, device=None) -> dict[str, jax.Array]:
    """Return uint8 images and labels, on one device, JAX's first unless another is named."""
    rng, size = np.random.default_rng(0), image_size(config.model)
    batch = {
        "image": rng.integers(0, 256, (config.batch_size, size, size, 3), np.uint8),
        "label": rng.integers(0, classes, config.batch_size, np.int32),
    }
    if config.teacher.tape == "replay":
        batch["teacher_target"] = batch["label"]
    return resolved(config, classes, device).on_devices(batch)


def resolved(config, classes: int, device=None) -> Experiment:
    """Return what a config means on one device, JAX's first unless another is named."""
    images = STEPS_PER_EPOCH * config.batch_size
    return resolve(config, classes, images, devices=[device or jax.devices()[0]])


def jit_step(config, classes: int, device=None):
    """Return the step of `deit train`, compiled as it is there, the state and the teacher."""
    experiment = resolved(config, classes, device)
    teacher, params = experiment.random_teacher() or (None, None)
    params = experiment.place_teacher(teacher, params)
    return experiment.jit_step(teacher), experiment.new_state(), params


def train(config, classes: int, batch):
    """Return a function from state to state, and the first one."""
    step, state, teacher_params = jit_step(config, classes)
    return lambda state: step(state, teacher_params, batch)[0], state


def forward(config, classes: int, batch):
    """Return a function that predicts, whatever it is given."""
    model = build_model(config.model, classes, config.dtype)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *batch["image"].shape[1:])))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    mean, std = config.data.mean, config.data.std

    @jax.jit
    def predict(params, images):
        return model.apply({"params": params}, normalise(images, mean, std), train=False).fused()

    return lambda _: predict(params, batch["image"]), None


class PlainViT(nn.Module):
    """A ViT of Flax's own layers, pre-norm, with one class token, as big_vision writes it."""

    width: int
    depth: int
    heads: int
    classes: int
    patch: int = 16

    @nn.compact
    def __call__(self, images):
        """Return logits [B K] in float32."""
        half = {"dtype": jnp.bfloat16}
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", **half)(images)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(cls.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), shape).astype(x.dtype)
        for _ in range(self.depth):
            y = nn.LayerNorm(**half)(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, **half)(y)
            y = nn.Dense(4 * self.width, **half)(nn.LayerNorm(**half)(x))
            x = x + nn.Dense(self.width, **half)(nn.gelu(y))
        x = nn.LayerNorm(**half)(x)[:, 0]
        return nn.Dense(self.classes)(x.astype(jnp.float32))


def flax_train(config, classes: int, batch):
    """Return what `train` does, for the plain ViT with smoothed labels and AdamW."""
    spec = build_model(config.model, classes)
    model = PlainViT(spec.width, spec.depth, spec.num_heads, classes)
    tx = optax.adamw(5e-4, weight_decay=config.optim.weight_decay)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *batch["image"].shape[1:])))
    smooth = 0.1

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, batch):
        params, moments = carry
        images = normalise(batch["image"], config.data.mean, config.data.std)
        targets = (1 - smooth) * jax.nn.one_hot(batch["label"], classes) + smooth / classes

        def loss(params):
            return optax.softmax_cross_entropy(model.apply(params, images), targets).mean()

        updates, moments = tx.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    return lambda carry: step(carry, batch), (params, tx.init(params))
