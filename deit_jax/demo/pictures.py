"""Pictures of the page: what was seen, and attention laid over it."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from deit_jax.analysis.report.html import LARGE, data_uri
from deit_jax.data.decode import decode
from deit_jax.storage import backend

CLASS, DISTILLATION = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and vermilion
SIDE = 96  # pixels of a small image's thumbnail, at least


def photograph(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return an image as the address of itself, at its own size."""
    return data_uri(pixels, "PNG" if max(pixels.shape) <= LARGE else "JPEG")


def shares(grid: Float[np.ndarray, "g h"]) -> Float[np.ndarray, "g h"]:
    """Return attention over patches so that it sums to one."""
    grid = np.nan_to_num(np.asarray(grid, np.float64))
    return grid / max(grid.sum(), 1e-12)


def overlap(first: Float[np.ndarray, "g h"], second: Float[np.ndarray, "g h"]) -> float:
    """Return which part of what two tokens read is the same, from 0 to 1."""
    return float(np.minimum(shares(first), shares(second)).sum())


def cosine(first: Float[np.ndarray, "g h"], second: Float[np.ndarray, "g h"]) -> float:
    """Return the cosine of two maps."""
    a, b = np.ravel(shares(first)), np.ravel(shares(second))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def difference(
    first: Float[np.ndarray, "g h"], second: Float[np.ndarray, "g h"]
) -> UInt8[np.ndarray, "g h 4"]:
    """Return blue where the first token reads more, vermilion where the second does.

    The opacity is the difference of the shares, that of the largest is full.
    """
    more = shares(first) - shares(second)
    strength = np.abs(more) / max(np.abs(more).max(), 1e-12)
    colours = np.where((more > 0)[..., None], CLASS, DISTILLATION)
    return np.dstack([colours, np.rint(235 * strength)]).astype(np.uint8)


def thumbnail(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return a small image enlarged by a whole number, so that a browser does not blur it."""
    times = max(1, -(-SIDE // max(pixels.shape[:2])))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def png_pixels(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Return the colours in a picture of our own."""
    return np.asarray(decode(backend(file).read(file), file.name))


def largest_difference(first: Float[np.ndarray, "g h"], second: Float[np.ndarray, "g h"]) -> float:
    """Return by how much the shares of a patch differ at most."""
    return float(np.abs(shares(first) - shares(second)).max())
