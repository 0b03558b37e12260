"""Normal noise for whole images: jax.random's, to the bit, in a third of its time on a CPU."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend import random as extend_random
from jaxtyping import Array, Float, Key, UInt32

from deit_jax.step.fusion import unfused

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def normal(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Return jax.random.normal(key, shape).

    On a CPU JAX keeps Threefry's rounds in a loop, which saves compiling and writes all the words
    to memory in each turn: 1.8 ms for 96 images of 32 pixels. Unrolled, by itself, it is one pass
    over them: 0.6 ms.
    """
    usual = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]  # no stub has it
    if jax.random.key_impl(key) != "threefry2x32" or not usual:
        return jax.random.normal(key, shape)  # whoever chose other numbers gets those

    def draw(data, impl):
        return jax.random.normal(jax.random.wrap_key_data(data, impl=impl), shape)

    return jax.lax.platform_dependent(
        jax.random.key_data(key),
        cpu=functools.partial(draw, impl=_UNROLLED),
        default=functools.partial(draw, impl="threefry2x32"),
    )


def threefry(key: UInt32[Array, "2"], counts: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Return 32 random bits for each count: both words of Threefry-2x32-20, one xor the other.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the counts are below 2^32.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    first, second = jnp.broadcast_to(keys[0], counts.shape), counts + keys[1]
    for turn in range(5):
        for rotation in ROTATIONS[turn % 2]:
            first = first + second
            second = (second << rotation) | (second >> (32 - rotation))
            second = first ^ second
        first = first + keys[(turn + 1) % 3]
        second = second + keys[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return first ^ second


def _bits(key: UInt32[Array, "2"], width: int, shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    size = math.prod(shape)
    if width != 32 or size >= 2**32:
        return jax.random.bits(
            jax.random.wrap_key_data(key, impl="threefry2x32"), shape, f"uint{width}"
        )
    # Apart: fused with what makes normal numbers of bits, XLA would not vectorise it.
    return unfused(lambda k: threefry(k, jax.lax.iota(jnp.uint32, size).reshape(shape)), key)


_THREEFRY = extend_random.threefry_prng_impl
_UNROLLED = extend_random.define_prng_impl(
    key_shape=(2,),
    seed=_THREEFRY.seed,
    split=_THREEFRY.split,
    random_bits=_bits,
    fold_in=_THREEFRY.fold_in,
    name="threefry2x32_unrolled",
)
