"""Noise is jax.random's to the bit; what stands apart is not fused with its readers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.step import noise
from deit_jax.step.fusion import unfused


@pytest.mark.parametrize("shape", [(3, 5), (2, 16, 16, 3), (1,)])
@pytest.mark.parametrize("seed", [0, 12345])
def test_normal_numbers_are_those_of_jax(shape, seed):
    key = jax.random.fold_in(jax.random.key(seed), 7)
    found = jax.jit(noise.normal, static_argnums=1)(key, shape)
    np.testing.assert_array_equal(found, jax.random.normal(key, shape))


def test_bits_are_those_of_the_paper():
    """Random123's known answer for key (0, 0), counter (0, 0) and 20 rounds."""
    found = noise.threefry(jnp.zeros(2, jnp.uint32), jnp.zeros(1, jnp.uint32))
    assert int(found[0]) == 0x6B200159 ^ 0x99BA4EFE


@pytest.mark.parametrize(
    ("option", "value"),
    [("jax_threefry_partitionable", False), ("jax_default_prng_impl", "unsafe_rbg")],
)
def test_who_chose_other_random_numbers_gets_those(option, value):
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        key = jax.random.key(3)
        expected = jax.random.normal(key, (4, 4))
        np.testing.assert_array_equal(noise.normal(key, (4, 4)), expected)
    finally:
        jax.config.update(option, before)


def program(platform, function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.eight_devices
def test_what_stands_apart_is_computed_once_and_kept():
    def function(x):
        y = unfused(jnp.sin, x)
        return y + 1, y.T * 2

    x = jnp.arange(6.0).reshape(2, 3)
    first, second = jax.jit(function)(x)
    np.testing.assert_array_equal(first, np.asarray(jnp.sin(x)) + 1)
    np.testing.assert_array_equal(second, np.asarray(jnp.sin(x)).T * 2)
    # On a CPU a function that stays one; its own sine is the only one that is left.
    compiled = jax.jit(function).lower(x).compile().as_text()
    assert compiled.count(" sine(") == 1
    assert 'inlineable="false"' in compiled
    assert "optimization_barrier" in program("cuda", function, x)
    assert "optimization_barrier" in program("tpu", function, x)
