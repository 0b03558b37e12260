"""Limits of a model's own fields, wherever they come from: a config, a file that lies."""

from typing import Any

COUNT = 1000  # blocks: each costs seconds of compilation
SIDE = 2**14  # pixels
WIDTH = 2**16
CHANNELS = 512
CLASSES = 2**24


def check_whole(key: str, value: Any, most: int, least: int = 1) -> None:
    """Raise ValueError unless a field is a whole number in a range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        raise ValueError(
            f"model.{key}={value!r:.60}: must be a whole number between {least} and {most}"
        )


def check_sides(value: Any) -> None:
    """Raise ValueError unless an image's size is a whole number, or two, in the range of SIDE."""
    if isinstance(value, tuple) and len(value) == 2:
        for side in value:
            check_whole("image_size", side, SIDE)
    else:
        check_whole("image_size", value, SIDE)


def check_number(key: str, value: Any, low: int | float, high: int | float) -> None:
    """Raise ValueError unless a field is a number that is at least `low` and below `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value < high:
        raise ValueError(
            f"model.{key}={value!r:.60}: must be a number, at least {low:g} and below {high:g}"
        )
