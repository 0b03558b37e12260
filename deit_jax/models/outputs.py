"""What leaves the layers of any model, taken in one place: the models know nothing of it."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from flax import linen as nn
from jaxtyping import Array


@contextlib.contextmanager
def through(function: Callable[[str, Array], Array]) -> Iterator[None]:
    """Let every array that leaves a layer, while a program is traced, go through `function`.

    It is given the layer's path, `blocks_0/attn/qkv`, "" for a whole model, and the array.
    """

    def called(call, arguments, options, context):
        given = call(*arguments, **options)
        if context.method_name != "__call__":
            return given
        path = "/".join(context.module.path)
        return jax.tree.map(lambda x: function(path, x) if isinstance(x, Array) else x, given)

    with nn.intercept_methods(called):
        yield
