"""A barrier to fusion that holds on every platform."""

from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def unfused(function: Callable, *arguments):
    """Return function(*arguments), in a program where nothing is fused across its results.

    Whoever reads them reads memory: they are computed once however many do, and to the same bits
    whoever does. On a CPU XLA takes optimization barriers away before it fuses, so that there the
    function stays a function, which is not inlined.
    """

    def called(*arguments):
        return set_xla_metadata(jax.jit(function)(*arguments), inlineable="false")

    def behind_a_barrier(*arguments):
        return jax.lax.optimization_barrier(function(*arguments))

    return jax.lax.platform_dependent(*arguments, cpu=called, default=behind_a_barrier)
