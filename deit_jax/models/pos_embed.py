"""Position embeddings at another resolution."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deit_jax.shapes import Size, sides, text


def grid_of(positions: int, prefix_tokens: int) -> int:
    """Return the side of the square grid behind the prefix; raise ValueError if it is none."""
    side = math.isqrt(max(0, positions - prefix_tokens))
    if side == 0 or side * side != positions - prefix_tokens:
        raise ValueError(
            f"a position embedding of {positions} tokens is not {prefix_tokens} and a square grid"
        )
    return side


def resize_pos_embed(
    pos_embed: Float[Array, "1 N D"], prefix_tokens: int, grid: Size, old: Size | None = None
) -> Float[Array, "1 M D"]:
    """Return the embedding of a `grid` of rows x columns, resized as facebookresearch/deit does.

    Bicubic with PyTorch's kernel (A = -0.75, align_corners=False) and no antialias: bilinear would
    shrink the vectors (DeiT section 3). The first `prefix_tokens` rows are kept. `old` is the grid
    that it has now, a square where it is not given.
    """
    count = pos_embed.shape[1]
    rows, columns = sides(grid_of(count, prefix_tokens) if old is None else old)
    if rows * columns != count - prefix_tokens:
        raise ValueError(
            f"a position embedding of {count} tokens is not {prefix_tokens} and a grid of "
            f"{text((rows, columns))}"
        )
    prefix, patches = jnp.split(jnp.asarray(pos_embed), [prefix_tokens], axis=1)
    width, (height_to, width_to) = patches.shape[-1], sides(grid)
    patches = jax.image.resize(
        patches.reshape(1, rows, columns, width),
        (1, height_to, width_to, width),
        "cubic-pytorch",  # "bicubic" has A = -0.5 and other edges: a quarter sigma away
        antialias=False,
    )
    return jnp.concatenate([prefix, patches.reshape(1, height_to * width_to, width)], axis=1)
