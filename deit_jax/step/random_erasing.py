"""Random erasing on the device, after normalisation: a rectangle of noise per chosen image."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from deit_jax.step.noise import normal

TRIES = 10
AREA = (0.02, 1 / 3)  # share of the image
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))  # height / width


def random_erase(
    key: Key[Array, ""], images: Float[Array, "B H W C"], prob: float
) -> Float[Array, "B H W C"]:
    """Fill a random rectangle of each image, with probability `prob`, with N(0, 1) per pixel.

    The reference draws up to ten rectangles and takes the first that fits; none fitting leaves the
    image alone (timm's RandomErasing, mode "pixel", count 1).
    """
    if prob == 0.0:
        return images
    batch, height, width, _ = images.shape
    k_on, k_area, k_aspect, k_top, k_left, k_noise = jax.random.split(key, 6)
    area = jax.random.uniform(k_area, (batch, TRIES), minval=AREA[0], maxval=AREA[1])
    aspect = jnp.exp(
        jax.random.uniform(k_aspect, (batch, TRIES), minval=LOG_ASPECT[0], maxval=LOG_ASPECT[1])
    )
    h = jnp.round(jnp.sqrt(area * height * width * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area * height * width / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
    on = jax.random.bernoulli(k_on, prob, (batch,)) & jnp.any(fits, axis=1)

    def inside(key, side, size):
        low = jax.random.randint(key, (batch,), 0, jnp.maximum(size - side, 0) + 1)[:, None]
        pixel = jnp.arange(size)
        return (pixel >= low) & (pixel < low + side[:, None])

    rows, columns = inside(k_top, h, height), inside(k_left, w, width)
    erase = on[:, None, None] & rows[:, :, None] & columns[:, None, :]
    noise = normal(k_noise, images.shape).astype(images.dtype)
    return jnp.where(erase[..., None], noise, images)
