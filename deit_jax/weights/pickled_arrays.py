"""NumPy's arrays in pickles, read without NumPy's own unpickling."""

import math
import re
from typing import Any

import numpy as np

from deit_jax.weights.places import Refused


class Latin1:
    """Bytes that Python 2's pickles hold as text; encoded once, when they are asked for."""

    __slots__ = ("content", "text")

    def __init__(self, text: Any):
        self.text = text
        self.content: bytes | None = None

    def encode(self) -> bytes:
        """Return the bytes."""
        if self.content is None:
            self.content = self.text.encode("latin-1")
        return self.content


class Dtype:
    """The type of an array's numbers, as far as a pickle has told it."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any = "", *_unused):
        self.code, self.order = code, "|"

    def build(self, state: Any) -> None:
        """Take the order of the bytes from a state."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            self.order = state[1]

    def plain(self) -> np.dtype | None:
        """Return NumPy's type, None for all but plain numbers."""
        if not isinstance(self.code, str) or not re.fullmatch(r"[fiu][1248]|b1", self.code):
            return None
        return None if self.code == "f1" else np.dtype(self.order + self.code)


class Array:
    """An array, not yet read; it has a shape as soon as it is known to be one of plain numbers."""

    __slots__ = ("dtype", "fortran", "raw", "shape")
    storage = None  # its numbers are in the pickle itself

    def __init__(self, *_unused):
        pass

    def build(self, state: Any) -> None:
        """Take what ndarray.__setstate__ is given; leave the array inert where it does not fit."""
        if not isinstance(state, tuple) or len(state) != 5:
            return
        _, shape, dtype, fortran, raw = state
        numbers = dtype.plain() if isinstance(dtype, Dtype) else None
        sides = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
        if sides and len(shape) < 32 and numbers is not None and isinstance(raw, bytes | Latin1):
            self.shape, self.dtype, self.raw = shape, numbers, raw
            self.fortran = fortran is True

    def view(self, _data: bytes) -> np.ndarray:
        """Return the array as a view of the pickle's bytes."""
        content = self.raw if isinstance(self.raw, bytes) else self.raw.encode()
        if math.prod(self.shape) * self.dtype.itemsize != len(content):
            raise Refused(f"an array of shape {self.shape} in {len(content)} bytes")
        numbers = np.frombuffer(content, self.dtype)
        return numbers.reshape(self.shape[::-1]).T if self.fortran else numbers.reshape(self.shape)


_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
CALLABLE: dict[tuple[str, str], Any] = {(module, "_reconstruct"): Array for module in _MODULES}
CALLABLE |= {("numpy", "dtype"): Dtype, ("_codecs", "encode"): Latin1}
