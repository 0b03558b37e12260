"""Attention weights of a vision transformer, computed again beside it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deit_jax.models.vit import VisionTransformer


def attention_entropy(
    model: VisionTransformer, variables, images: Float[Array, "B H W C"]
) -> Float[Array, "depth heads"]:
    """Return how evenly each head attends: the mean entropy of its softmax rows, in nats.

    From 0, one token gets all, to log N, all get the same. A fall to 0 comes before divergence.
    """
    log_p = log_attention(model, variables, images)
    return jnp.stack([-jnp.sum(jnp.exp(x) * x, axis=-1).mean(axis=(0, 2)) for x in log_p])


def log_attention(
    model: VisionTransformer, variables, images: Float[Array, "B H W C"]
) -> list[Float[Array, "B heads N N"]]:
    """Return for each block the logarithms of its attention weights, [to token, from token]."""
    # From the projections, which the model computes anyway: it need not know of this.
    _, caught = model.apply(
        variables,
        images,
        train=False,
        capture_intermediates=lambda module, _: module.name == "qkv",
        mutable=["intermediates"],
    )
    blocks = []
    for i in range(model.depth):
        ((q, k, _),) = caught["intermediates"][f"blocks_{i}"]["attn"]["qkv"]["__call__"]
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        blocks.append(jax.nn.log_softmax(logits))
    return blocks
