"""Does a step fit into a GPU's memory, in how many parts, and what to change where it does not.

The figures are estimates from the traced step (liveness.py), a quarter or so above what XLA takes
on TPUs.
"""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from deit_jax import config as config_lib
from deit_jax import devices, optim, sharding
from deit_jax.errors import UserError
from deit_jax.liveness import peak_bytes
from deit_jax.losses import distillation

USABLE = 0.9  # of what JAX may use: blocks of many sizes leave gaps
PIXEL_BYTES = 1 + 3 * 4  # of a colour: as loaded; erased, mixed, and the noise or the teacher's
TRACED = (4, 8)  # images; from the two follows what one more takes
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def limit(mesh) -> int | None:
    """Return the bytes that each device of a mesh of GPUs may use; None where none tells.

    It is the same for all processes, which must compile the same program.
    """
    return _limit(mesh) if sharding.platform(mesh) == "gpu" else None


@functools.cache
def _limit(mesh) -> int | None:
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    known = devices.bytes_limit(own) or 0
    if jax.process_count() > 1:
        megabytes = multihost_utils.process_allgather(np.int32(known >> 20))
        known = int(megabytes.min()) << 20
    return known or None


def tree_bytes(tree) -> int:
    """Return what a device holds of a tree of arrays, by their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def state_bytes(config, mesh, num_classes: int) -> int:
    """Return what a device holds from step to step: the state and the teacher's parameters."""
    model = config_lib.build_model(config.model, num_classes, config.dtype)
    params = _variables(model, config_lib.image_size(config.model))["params"]
    optimizer = optim.make_optimizer(config.optim, lambda step: step)
    held = [params, jax.eval_shape(optimizer.init, params)]
    held += [params] if config.optim.ema_decay else []
    total = _share(held, mesh, model)
    if has_teacher(config):
        teacher, size = teacher_of(config, num_classes)
        shrunk = config_lib.compute_dtype(config.dtype).itemsize / 4
        total += int(shrunk * _share(_variables(teacher, size)["params"], mesh, teacher))
    return total


def gradient_bytes(config, num_classes: int) -> int:
    """Return the bytes of the gradient's sum over micro-batches, which each device has whole."""
    model = config_lib.build_model(config.model, num_classes)
    params = _variables(model, config_lib.image_size(config.model))["params"]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def has_teacher(config) -> bool:
    """Return whether a config's step asks a teacher."""
    return config.distill.kind != "none" and config.teacher.tape != "replay"


def teacher_of(config, num_classes: int):
    """Return a model like the teacher's, as far as the config knows it, and its image size."""
    model = config_lib.build_model(config.teacher.model, num_classes, config.dtype)
    if hasattr(model, "folded"):
        model = model.clone(folded=True)
    return model, config.teacher.image_size or config_lib.image_size(config.model)


def _share(tree, mesh, model) -> int:
    places = sharding.state_shardings(mesh, tree, model)
    shapes = jax.tree.map(lambda x, s: (s.shard_shape(x.shape), x.dtype), tree, places)
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves)


@dataclasses.dataclass(frozen=True)
class Takes:
    """What a program takes at once, by the number of images."""

    always: float
    each: float

    def bytes(self, images: int) -> int:
        """Return it for so many."""
        return int(self.always + self.each * images)


def of_gradient(config, num_classes: int) -> Takes:
    """Return what the gradient of a batch takes, besides the state."""
    model = config_lib.build_model(config.model, num_classes, config.dtype)
    key, hard = jax.random.key(0), config.distill.kind == "hard"

    def gradient(variables, images):
        batch = len(images)
        signal = jnp.zeros(batch, jnp.int32) if hard else jnp.zeros((batch, num_classes))
        draw = getattr(model, "draw_scales", None)
        scales = {} if draw is None else {"scales": draw(key, batch)}

        def loss(params):
            heads, _ = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
                **scales,
            )
            targets = jnp.zeros((batch, num_classes))
            return distillation(heads, targets, signal, config.distill, config.loss.kind)[0]

        return jax.value_and_grad(loss)(variables["params"])

    return _extrapolated(gradient, model, config_lib.image_size(config.model))


@functools.lru_cache(maxsize=16)  # every evaluation asks
def of_forward(model, size: int) -> Takes:
    """Return what a model's answers to images of `size` pixels take."""
    return _extrapolated(functools.partial(model.apply, train=False), model, size)


def _extrapolated(function, model, size: int) -> Takes:
    """Return the most that function(variables, images) takes, by what TRACED images do."""
    variables, peaks = _variables(model, size), []
    for count in TRACED:
        batch = jax.ShapeDtypeStruct((count, size, size, 3), jnp.float32)
        peaks.append(peak_bytes(jax.make_jaxpr(function)(variables, batch).jaxpr, "cuda"))
    each = (peaks[1] - peaks[0]) / (TRACED[1] - TRACED[0])
    return Takes(peaks[0] - each * TRACED[0], each)


def _variables(model, size: int):
    model, images = config_lib.for_counting(model), jax.ShapeDtypeStruct((1, size, size, 3), "f4")
    return jax.eval_shape(model.init, jax.random.key(0), images)


def advice(config, images: int) -> str:
    """Return the fields that lower the memory of a step, with values to try.

    A device takes so many images at a time.
    """
    model = config_lib.build_model(config.model, num_classes=2)
    flags = [f"--config.optim.accum_steps={2 * config.optim.accum_steps}"]
    if hasattr(model, "draw_scales") and not model.dropout and config.optim.accum_steps == 1:
        flags.insert(0, f"--config.train.micro_batch={max(1, images // 2)}")
    if hasattr(model, "remat") and not model.remat:
        flags.append("--config.model.remat=True")
    return f"try {' or '.join(flags)}, or a smaller --config.batch_size"


@contextlib.contextmanager
def explained(what: str, remedy: str):
    """Turn a device's "out of memory" into one line with the remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        raise UserError(f"{what}: the device is out of memory; {remedy}") from error
