"""Sizes of images, the side of a square or (height, width), and numbers for their channels."""

from typing import Any

Size = int | tuple[int, int]


def sides(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def simplest(size: Size) -> Size:
    """Return the side alone where both are the same."""
    height, width = sides(size)
    return height if height == width else (height, width)


def text(size: Size) -> str:
    """Return `224`, or `224x320` of an oblong, as people write it."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return a number for each channel; a single one is that of all."""
    return tuple(values) * channels if len(values) == 1 else tuple(values)


def input_shape(model, size: Size, batch: Any = 1) -> tuple[Any, int, int, int]:
    """Return the shape [B H W C] of images for a model; colour, where it does not say otherwise.

    `batch` is a number, or a symbol that stands for any.
    """
    return (batch, *sides(size), getattr(model, "in_channels", 3))
