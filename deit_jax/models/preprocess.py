"""Images as models take them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalise(
    images: UInt8[Array, "B H W C"] | Float[Array, "B H W C"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "B H W C"]:
    """Return (image / 255 - mean) / std in float32 of pixels from 0 to 255."""
    return (images.astype(jnp.float32) / 255.0 - jnp.array(mean)) / jnp.array(std)
