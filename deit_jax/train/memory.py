"""Memory of a step on a GPU: whether it fits, and what to change where it does not.

The figures are estimates from the traced step (liveness.py), a quarter or so above what XLA takes
on TPUs.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from deit_jax.errors import UserError
from deit_jax.models.build import for_counting
from deit_jax.models.liveness import peak_bytes
from deit_jax.parallel import devices, sharding
from deit_jax.shapes import Size, input_shape, sides
from deit_jax.step.committee import Committee, shardings
from deit_jax.step.state import EXTRAS
from deit_jax.step.teacher import Foreign
from deit_jax.step.train_step import StepConfig, training_loss

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


@dataclasses.dataclass(frozen=True)
class Takes:
    """What a program takes at once, by the number of images."""

    always: float
    each: float

    def bytes(self, images: int) -> int:
        """Return it for so many."""
        return int(self.always + self.each * images)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a step has on its devices, in however many parts they take their share of a batch.

    `teacher` is what abstract_teacher returns, None where none is asked; `teacher_size` is the size
    of the images for it, or for the one behind a tape. `target` gives the shape of what
    distillation makes of its answers to so many images, `extras` those of its parameters.
    """

    name: str  # of the model
    mesh: Any
    model: Any
    image_size: Size
    batch_size: int
    num_classes: int
    optimizer: Any
    ema: bool
    settings: StepConfig
    teacher: tuple[Any, Any] | None
    teacher_size: Size | None
    target: Callable[[int], Any]
    extras: dict[str, Any]

    @property
    def share(self) -> int:
        """How many examples of a batch a device has."""
        return self.batch_size // (self.mesh.size // self.mesh.shape["tensor"])

    @functools.cached_property
    def held(self) -> int:
        """The bytes of the state and of the batch, which lie there throughout a step."""
        return self.state_bytes + PIXEL_BYTES * math.prod(
            input_shape(self.model, self.image_size, self.share)
        )

    @functools.cached_property
    def state_bytes(self) -> int:
        """What a device holds from step to step: the state and the teacher's parameters."""
        moving = self.settings.tuning.moving(self._variables["params"])
        trees = [self._variables["params"], jax.eval_shape(self.optimizer.init, moving)]
        trees += [moving] if self.ema else []
        total = _share(trees, sharding.state_shardings(self.mesh, trees, self.model))
        if self.teacher is not None:
            network, params = self.teacher
            total += _share(params, shardings(network, self.mesh, params))
        return total

    @functools.cached_property
    def gradient_bytes(self) -> int:
        """The gradient's sum over micro-batches, which each device has whole."""
        moving = self.settings.tuning.moving(self._variables["params"])
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moving))

    @functools.cached_property
    def gradient(self) -> Takes:
        """What the gradient of some images takes besides; to trace it takes a second."""
        channels = channels_of(self.model)
        return _extrapolated(self._gradient, self._variables, channels, self.image_size)

    def _gradient(self, variables, images):
        batch, key = len(images), jax.random.key(0)
        draw = getattr(self.model, "draw_scales", None)
        scales = None if draw is None else draw(key, batch)
        teacher_target = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.target(batch))
        targets = jnp.zeros((batch, self.num_classes))

        params, tuning = variables["params"], self.settings.tuning

        def loss(moving):
            stats = variables.get("batch_stats", {})
            inputs = (images, targets, teacher_target, scales)
            whole = tuning.whole(moving, params)
            return training_loss(self.model, whole, stats, inputs, key, self.settings)[0]

        return jax.value_and_grad(loss)(tuning.moving(params))

    @functools.cached_property
    def _variables(self):
        variables = abstract_variables(self.model, self.image_size)
        extras = {EXTRAS: self.extras} if self.extras else {}
        return {**variables, "params": {**variables["params"], **extras}}

    def expected_bytes(self, parts: int) -> int:
        """Return about how much of a device's memory a step in so many parts takes."""
        sums = self.gradient_bytes if parts > 1 else 0
        return self.held + sums + self.gradient.bytes(self.share // parts)


def _share(tree, places) -> int:
    shapes = jax.tree.map(lambda x, s: (s.shard_shape(x.shape), x.dtype), tree, places)
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves)


@functools.lru_cache(maxsize=16)  # every evaluation asks
def of_forward(model, size: Size) -> Takes:
    """Return what a model's answers to images of `size` pixels take."""
    function = functools.partial(model.apply, train=False)
    return _extrapolated(function, abstract_variables(model, size), channels_of(model), size)


def of_teacher(teacher, params, size: Size) -> Takes:
    """Return what a teacher's answers to images of `size` pixels take; of several the most."""
    if isinstance(teacher, Committee):
        each = zip(teacher.members, params, strict=True)
        takes = [of_teacher(member, own, size) for member, own in each]
        return Takes(max(t.always for t in takes), max(t.each for t in takes))
    size = teacher.image_size or size
    model = teacher.model
    if not isinstance(model, Foreign):
        return of_forward(model, size)
    if model.image_bytes is not None:
        return Takes(0, model.image_bytes)
    channels = len(teacher.mean)
    return _extrapolated(model.outputs, jax.tree.map(_shape, params), channels, size)


def _shape(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _extrapolated(function, variables, channels: int, size: Size) -> Takes:
    """Return the most that function(variables, images) takes, by what TRACED images do."""
    peaks = []
    for count in TRACED:
        batch = jax.ShapeDtypeStruct((count, *sides(size), channels), jnp.float32)
        peaks.append(peak_bytes(jax.make_jaxpr(function)(variables, batch).jaxpr, "cuda"))
    each = (peaks[1] - peaks[0]) / (TRACED[1] - TRACED[0])
    return Takes(peaks[0] - each * TRACED[0], each)


def channels_of(model) -> int:
    """Return the channels of the images that a model takes."""
    return getattr(model, "in_channels", 3)


def abstract_variables(model, size: Size):
    """Return the shapes of a model's variables, which no GPU is asked for."""
    model, images = for_counting(model), jax.ShapeDtypeStruct(input_shape(model, size), "f4")
    return jax.eval_shape(model.init, jax.random.key(0), images)


def advice(model, accum_steps: int, images: int) -> str:
    """Return the fields that lower the memory of a step, with values to try.

    A device takes so many images at a time.
    """
    flags = [f"--config.optim.accum_steps={2 * accum_steps}"]
    if hasattr(model, "draw_scales") and not model.dropout and accum_steps == 1:
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
