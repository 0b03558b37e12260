"""Micro-batches: the gradient of a batch in several passes, to save memory or time."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from deit_jax import config as config_lib
from deit_jax.sharding import BATCH_AXES

# Attention weights in bfloat16 of so many bytes a layer still fit in a TPU core's own memory next
# to what else is there: 32 images of DeiT-B at 224 px (v5e, by XLA's estimate).
FAST_BYTES = 40e6
# What the teacher takes at a time: convolutions gain from more images. RegNetY-16GF, 128 images of
# 224 px on a v5e: 78 M cycles and 1.0 GB at once, 92 M and 0.6 GB in parts of 32.
TEACHER_PIXELS = 128 * 224**2


def micro_batches(config, mesh) -> int:
    """Return in how many parts a device takes its share of the batch.

    `optim.accum_steps` and `train.micro_batch` say so; without either, a transformer on TPUs takes
    the fewest parts of which one layer's attention weights fit into FAST_BYTES. With batch norm and
    with dropout, which draws a number per activation, parts would be another computation: only
    accum_steps asks for that.
    """
    most, steps = config.train.micro_batch, config.optim.accum_steps
    if mesh is None or steps > 1:
        return steps
    model = config_lib.build_model(config.model, num_classes=2)
    if most == 0 or not hasattr(model, "draw_scales") or model.dropout:
        return 1
    share = config.batch_size // (mesh.size // mesh.shape["tensor"])
    if most is not None:
        return _parts(share, most)
    if mesh.devices.flat[0].platform != "tpu":
        return 1
    most = fast_images(model, mesh.shape["tensor"])
    parts = _parts(share, most)
    # A share with no fitting divisor (74 = 2 x 37) is faster whole than in crumbs.
    return parts if 2 * (share // parts) >= most else 1


def teacher_parts(config, mesh) -> int:
    """Return in how many parts a device's share of the batch goes through the teacher.

    In as few as TEACHER_PIXELS allows where the student's parts are for speed; in the student's
    own where they were asked for, which saves memory.
    """
    parts = micro_batches(config, mesh)
    if parts == 1 or config.optim.accum_steps > 1 or config.train.micro_batch is not None:
        return parts
    share = config.batch_size // (mesh.size // mesh.shape["tensor"])
    size = config.teacher.image_size or config_lib.image_size(config.model)
    return min(parts, _parts(share, max(1, TEACHER_PIXELS // size**2)))


def _parts(share: int, most: int) -> int:
    """Return the fewest equal parts of at most `most` examples."""
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)


def fast_images(model, tensor: int) -> int:
    """Return of how many images a layer's attention weights fit into FAST_BYTES."""
    tokens = model.grid_size**2 + model.num_prefix_tokens
    padded = -(-tokens // 128) * 128  # a row of a TPU's registers
    return max(1, int(FAST_BYTES / (2 * model.num_heads / tensor * tokens * padded)))


def in_parts(function, batch, parts: int):
    """Return function(batch) for an array, taken in parts one after the other."""
    if parts == 1:
        return function(batch)
    return _merge(jax.lax.map(function, _split(batch, parts)))


def accumulate(loss_and_grads, params, stats, inputs, key, steps: int, mesh=None):
    """Return gradients, metrics and batch statistics averaged over `steps` micro-batches.

    `loss_and_grads(params, stats, inputs, key)` returns them for one. Where the mesh splits nothing
    but the batch, each device sums its own micro-batches and the devices' sums meet once, at the
    end.
    """
    if steps == 1:
        return loss_and_grads(params, stats, inputs, key)

    def over_own(params, stats, inputs, key):
        return _scan(functools.partial(loss_and_grads, params), stats, inputs, key, steps)

    # Batch norm takes its statistics from all devices, and split weights need the compiler.
    if mesh is None or stats or mesh.size != mesh.shape["data"]:
        return over_own(params, stats, inputs, key)

    def over_all(params, inputs, key):
        grads, metrics, _ = over_own(params, {}, inputs, key)
        return jax.lax.pmean((grads, metrics), BATCH_AXES)

    whole, share = PartitionSpec(), PartitionSpec(BATCH_AXES)
    sharded = jax.shard_map(
        over_all,
        mesh=mesh,
        in_specs=(whole, share, whole),
        out_specs=whole,
        check_vma=False,  # it would sum the gradients of every micro-batch over the devices
    )
    return *sharded(params, inputs, key), {}


def _scan(loss_and_grads, stats, inputs, key, steps: int):
    """Take one micro-batch after the other."""
    split = jax.tree.map(functools.partial(_split, parts=steps), inputs)

    def body(carry, micro):
        stats, total = carry
        grads, metrics, stats = loss_and_grads(stats, *micro)
        total = jax.tree.map(lambda t, x: t + x / steps, total, (grads, metrics))
        return (stats, total), None

    first = (jax.tree.map(lambda x: x[0], split), key)
    shapes = jax.eval_shape(lambda *micro: loss_and_grads(stats, *micro)[:2], *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (stats, (grads, metrics)), _ = jax.lax.scan(
        body, (stats, zeros), (split, jax.random.split(key, steps))
    )
    return grads, metrics, stats


def _split(x: Shaped[Array, "B *x"], parts: int) -> Shaped[Array, "parts b *x"]:
    """Part i has the examples i, i + parts, i + 2 parts, …: some of every device's own."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _merge(x: Shaped[Array, "parts b *x"]) -> Shaped[Array, "B *x"]:
    """Undo _split."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
