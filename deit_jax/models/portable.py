"""The operations of kernels.py and attention.py in the words of libraries, for other runtimes.

What reads an exported program knows a layer norm, a GELU and a softmax by the operations that
libraries make of them, and has fast ones of its own; ours are taken apart.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from deit_jax.models.kernels import NORM_EPSILON


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"]
) -> Float[Array, "*B D"]:
    """Return what kernels.layer_norm does."""
    norm = nn.LayerNorm(epsilon=NORM_EPSILON, dtype=x.dtype)
    return jnp.asarray(norm.apply({"params": {"scale": scale, "bias": bias}}, x))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return what kernels.gelu does."""
    return jax.nn.gelu(x, approximate=False)


def softmax_attention(
    q: Float[Array, "B N heads d"], k: Float[Array, "B N heads d"], v: Float[Array, "B N heads d"]
) -> Float[Array, "B N heads d"]:
    """Return what attention.softmax_attention does."""
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    logits = jnp.matmul(q, k.swapaxes(2, 3)).astype(jnp.float32)
    return jnp.matmul(jax.nn.softmax(logits, axis=-1).astype(v.dtype), v).swapaxes(1, 2)


def product(x: Float[Array, "*B K"], kernel: Float[Array, "K N"]) -> Float[Array, "*B N"]:
    """Return what kernels.product does."""
    return jnp.matmul(x, kernel)


OPERATIONS = {f.__name__: f for f in (layer_norm, gelu, softmax_attention, product)}
