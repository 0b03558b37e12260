"""Position embeddings at another resolution."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def grid_of(positions: int, prefix_tokens: int) -> int:
    """Return the side of the square grid behind the prefix; raise ValueError if it is none."""
    side = math.isqrt(max(0, positions - prefix_tokens))
    if side == 0 or side * side != positions - prefix_tokens:
        raise ValueError(
            f"a position embedding of {positions} tokens is not {prefix_tokens} and a square grid"
        )
    return side


def resize_pos_embed(
    pos_embed: Float[Array, "1 N D"], prefix_tokens: int, grid: int
) -> Float[Array, "1 M D"]:
    """Return the embedding of a `grid` x `grid` image, resized as facebookresearch/deit does.

    Bicubic with PyTorch's kernel (A = -0.75, align_corners=False) and no antialias: bilinear would
    shrink the vectors (DeiT section 3). The first `prefix_tokens` rows are kept.
    """
    old = grid_of(pos_embed.shape[1], prefix_tokens)
    prefix, patches = jnp.split(jnp.asarray(pos_embed), [prefix_tokens], axis=1)
    width = patches.shape[-1]
    patches = jax.image.resize(
        patches.reshape(1, old, old, width),
        (1, grid, grid, width),
        "cubic-pytorch",  # "bicubic" has A = -0.5 and other edges: a quarter sigma away
        antialias=False,
    )
    return jnp.concatenate([prefix, patches.reshape(1, grid * grid, width)], axis=1)
