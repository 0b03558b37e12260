"""Values in other people's descriptions, checked one by one before anybody believes them."""

import math
from typing import Any


def must(fine: bool, key: str, value: Any, what: str) -> None:
    """Raise ValueError with the key and the value unless it is fine; `what` is what it must be."""
    if not fine:
        raise ValueError(f"{key}={str(value)[:60]} in what it says of itself: must be {what}")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def are_names(values: Any) -> bool:
    """Return whether a value is a list of strings, or an object whose keys are strings."""
    return isinstance(values, list | dict) and all(isinstance(value, str) for value in values)


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple; what is none is for others to refuse."""
    return tuple(value) if isinstance(value, list) else value
