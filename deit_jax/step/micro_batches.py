"""Micro-batches: a batch taken in several passes, to save memory or time.

Of the mesh's axes (parallel/sharding.py) only "data" is known here.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped


def in_parts(function, batch, parts: int):
    """Return function(batch), arrays for an array, taken in parts one after the other."""
    if parts == 1:
        return function(batch)
    return jax.tree.map(_merge, jax.lax.map(function, _split(batch, parts)))


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
        return jax.lax.pmean((grads, metrics), "data")

    whole, share = PartitionSpec(), PartitionSpec("data")
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
