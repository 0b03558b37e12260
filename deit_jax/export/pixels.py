"""Evaluation's view of an image as a function of its bytes that JAX traces, for any size.

What data/view.py does with Pillow, by the same formulas: output pixel i of an axis reads the input
around (i + 0.5) * scale with the weights of a cubic of a = -0.5, as wide as the scale where pixels
grow fewer. Pillow rounds to bytes after each axis; here nothing is rounded, for a program whose
answers jump is not to be compared between runtimes. A pixel differs by 1.5 of 255 at most, see
tests/test_export.py.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from deit_jax.data.decode import LONGEST
from deit_jax.data.view import EvalView
from deit_jax.shapes import sides

CUBIC = -0.5  # Pillow's, and torchvision's with antialias
# Pillow resizes the width first, or the axis that shrinks where the other grows: it matters to what
# is clipped between.
WIDTH, HEIGHT = "bhwc,jw->bhjc", "bhwc,ih->biwc"


def viewed(images: UInt8[Array, "B h w C"], view: EvalView) -> Float[Array, "B H W C"]:
    """Return what a model is shown of images, from 0 to 255, not rounded.

    Heights and widths may be symbolic sizes of jax.export.
    """
    _, height, width, channels = images.shape
    down, across = _axes(height, width, view)
    x = _resized(images.astype(jnp.float32), (WIDTH, across[0]), (HEIGHT, down[0]))
    if view.reading.resize == "squash":  # the others change both sides alike
        other = _resized(images.astype(jnp.float32), (HEIGHT, down[0]), (WIDTH, across[0]))
        rows, columns = sides(view.size)
        h, w = (jnp.asarray(n, jnp.int32) for n in (height, width))
        x = jnp.where((h > rows) & (w < columns), other, x)
    fill = jnp.array(view.reading.fill if view.reading.resize == "pad" else (0,) * channels)
    inside = (down[1][:, None] & across[1][None, :])[None, :, :, None]
    return jnp.where(inside, x, fill.astype(jnp.float32))


def _resized(x, *axes):
    """Return images resized along axis after axis, each clipped to bytes as Pillow clips."""
    for equation, weights in axes:
        # In full float32 on TPUs and GPUs too: a pixel has 8 bits, as many as bfloat16.
        x = jnp.clip(jnp.einsum(equation, x, weights, precision="highest"), 0.0, 255.0)
    return x


def _axes(height: Any, width: Any, view: EvalView):
    """Return for the height and the width (weights [out in], whether an output is in the image)."""
    rows, columns = sides(view.size)
    h, w = (jnp.asarray(n, jnp.int32) for n in (height, width))
    if view.reading.resize == "squash":
        new, start = (rows, columns), (0, 0)
    elif view.reading.resize == "pad":
        new = _within(h, w, rows, columns)
        start = tuple(-((n - k) // 2) for n, k in zip((rows, columns), new, strict=True))
    else:
        return _cropped(height, width, h, w, view)
    return (
        _weights(height, (jnp.int32(0), h), rows, new[0], start[0]),
        _weights(width, (jnp.int32(0), w), columns, new[1], start[1]),
    )


def _cropped(height, width, h, w, view: EvalView):
    (rows, columns), ratio = sides(view.size), view.crop_ratio
    high, wide = jnp.minimum(h, LONGEST * w), jnp.minimum(w, LONGEST * h)
    new = _covering(high, wide, int(rows / ratio), int(columns / ratio))
    start = [_half_to_even(k - n) for k, n in zip(new, (rows, columns), strict=True)]
    return (
        _weights(height, ((h - high) // 2, high), rows, new[0], start[0]),
        _weights(width, ((w - wide) // 2, wide), columns, new[1], start[1]),
    )


def _covering(h, w, rows: int, columns: int):
    """Return decode._covering's size in whole numbers: height, width."""
    if rows == columns:
        tall = w <= h
        return jnp.where(tall, rows * h // w, rows), jnp.where(tall, columns, columns * w // h)
    low = h * columns <= w * rows  # the height decides
    return jnp.where(low, rows, _round(h * columns, w)), jnp.where(
        low, _round(w * rows, h), columns
    )


def _within(h, w, rows: int, columns: int):
    """Return the largest size in an image's shape that a size holds: height, width."""
    low = h * columns <= w * rows  # the width decides
    new = jnp.where(low, _round(h * columns, w), rows), jnp.where(low, columns, _round(w * rows, h))
    return tuple(jnp.maximum(n, 1) for n in new)


def _round(a, b):
    """Return a / b rounded, halves to even, as Python rounds."""
    floor, rest = a // b, a % b
    up = (2 * rest > b) | ((2 * rest == b) & (floor % 2 == 1))
    return floor + up


def _half_to_even(n):
    return _round(n, 2)


# Not jax.image.scale_and_translate: it takes whole axes, and the ends of very long images are left
# out here.
def _weights(
    size: Any, part: tuple[Any, Any], count: int, new: Any, start: Any
) -> tuple[Float[Array, "out in"], Bool[Array, "out"]]:
    """Return what each of `count` outputs takes of an axis's inputs, and whether it is inside.

    `part` = (first, length) of the axis is resized to `new`, of which `count` from `start` on are
    the outputs.
    """
    first, length = part
    i = jnp.arange(count) + start
    scale = length.astype(jnp.float32) / new
    wide = jnp.maximum(scale, 1.0)
    centre = (i.astype(jnp.float32) + 0.5) * scale
    x = jnp.arange(size) - first
    distance = jnp.abs((x.astype(jnp.float32) + 0.5)[None, :] - centre[:, None]) / wide
    weights = jnp.where(((x >= 0) & (x < length))[None, :], _cubic(distance), 0.0)
    inside = (i >= 0) & (i < new)
    total = jnp.where(inside, weights.sum(axis=1), 1.0)
    return jnp.where(inside[:, None], weights / total[:, None], 0.0), inside


def _cubic(x):
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
